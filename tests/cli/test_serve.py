"""``nearplane serve``: an OpenAI client talks to transformers' server, whose model is packed."""

import importlib
import inspect
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers.utils.import_utils import is_serve_available

import nearplane
from nearplane import RTN, NearplaneError, SettingError
from nearplane.cli import serve
from nearplane.cli.main import main

needed = pytest.mark.skipif(not is_serve_available(), reason="needs the packages of nearplane[serve]")
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
ROOT = Path(nearplane.__file__).parents[1]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    tiny.save(tiny.build("llama"), folder / "model")
    tiny.marking(folder / "model", template=TEMPLATE)
    nearplane.quantize(folder / "model", folder / "out", method=RTN(), bits=3, group_size=32, progress=False)
    config = json.loads((folder / "out" / "config.json").read_text())
    (folder / "out" / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    return folder / "out"


@pytest.fixture(scope="module")
def address(out: Path) -> Iterator[str]:
    """Of a server that answers."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ["-m", "nearplane", "serve", str(out), "--port", str(port), "--dtype", "float32"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    server = subprocess.Popen([sys.executable, *words], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            assert server.poll() is None, server.stderr.read() if server.stderr else ""
            try:
                with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        yield f"http://localhost:{port}/v1"
    finally:
        server.terminate()
        server.communicate(timeout=60)


@needed
def test_an_openai_client_talks_to_it(address: str, out: Path) -> None:
    """What comes, streamed or whole, is what ``nearplane.generate`` writes."""
    import openai

    client = openai.OpenAI(base_url=address, api_key="-", max_retries=0)
    asked: dict[str, Any] = {"model": str(out), "messages": [{"role": "user", "content": "w5 w9 w33"}], "max_tokens": 6}
    whole = client.chat.completions.create(temperature=0, **asked).choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(temperature=0, stream=True, **asked)
        if chunk.choices
    ]
    wanted = nearplane.generate(out, "w5 w9 w33", chat=True, max_new_tokens=6).text
    assert whole and "".join(pieces).split() == whole.split() == wanted.split()


@needed
def test_wrong_options_are_transformers_own(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--prot", "9"])
    assert ended.value.code == 2 and "--prot" in capfd.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["help", "serve"])
    assert ended.value.code == 0 and "--port" in capfd.readouterr().out
    nearplane.disable()


def test_what_is_wrong_is_one_sentence(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SettingError, match="no such folder"):
        serve._found(str(tmp_path / "nothing"))
    assert (
        serve._found("owner/model") == "owner/model"
        and serve._found("--port") == "--port"
        and serve._found(str(out)) == str(out)
    )
    config = json.loads((out / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "architectures"}))
    with pytest.raises(NearplaneError, match="names no architectures"):
        serve._found(str(tmp_path))
    monkeypatch.setattr(serve, "importable", lambda: False)
    assert main(["serve", str(out)]) == 2
    assert "pip install 'nearplane[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["help serve", "serve --help", "serve -h", "serve OUT --help", "--help serve"])
def test_help_needs_no_package_of_the_server(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "importable", lambda: False)
    assert main(words.split()) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("usage: nearplane serve") and "--port" in printed.out and not printed.err
    assert "pip install 'nearplane[serve]'" in printed.out and max(map(len, printed.out.splitlines())) <= 80


def test_what_is_said_of_the_server_is_so() -> None:
    """Its packages are those that transformers asks for, and help names options that it has."""
    assert serve.importable() == is_serve_available()
    taken = inspect.signature(importlib.import_module("transformers.cli.serve").Serve.__init__).parameters
    flags = {f"--{name.replace('_', '-')}" for name in taken} | {"--help"}
    assert set(serve.COMMON) <= flags and set(re.findall(r"--[\w-]+", serve.HELP)) <= flags
