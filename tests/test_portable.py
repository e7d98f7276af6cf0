"""What is not on every system: a whole run on plain torch, with POSIX's modules hidden and without a compiled kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from nearplane.formats import journal

ROOT = Path(__file__).parents[1]
# Of the standard library on POSIX alone. Hidden from nearplane only: on Linux torch and psutil import some of them.
HIDDEN = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
SCRIPT = f"""
import builtins, pathlib, sys

there = builtins.__import__

def hidden(name, globals=None, *more, **named):
    if name in {HIDDEN} and (globals or {{}}).get("__name__", "").startswith("nearplane"):
        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    return there(name, globals, *more, **named)

builtins.__import__ = hidden
from nearplane.cli.main import main
from nearplane.core import compiled

compiled.library_path = lambda isa: None
model, out, text = sys.argv[1:]
words = ["--dataset", text, "--seqlen", "32"]
assert main(["plan", model, "--bits", "3", *words, "--nsamples", "4"]) == 0
assert main(["quantize", model, out, "--bits", "3", "--group-size", "32", "--dtype", "float16", *words, "--nsamples", "4"]) == 0
assert main(["eval", out, *words, "--windows", "2"]) == 0
assert main(["verify", out]) == 0
assert main(["generate", out, "--prompt", "w1 w2", "--max-new-tokens", "2"]) == 0
assert main(["convert", out, out + "-gptq", "--format", "gptq"]) == 0

import pkgutil, importlib, nearplane
for module in pkgutil.walk_packages(nearplane.__path__, "nearplane."):
    if not module.name.rpartition(".")[2].startswith(("_kernel", "__main__", "triton_kernel")):
        importlib.import_module(module.name)
from nearplane.machine.memory import peak_resident
assert peak_resident() > 1e7
"""


def test_a_run_without_the_modules_of_posix(tmp_path: Path) -> None:
    model = tiny.with_text(tmp_path)
    words = [sys.executable, "-c", SCRIPT, str(model), str(tmp_path / "out"), str(tmp_path / "text.txt")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "perplexity" in done.stdout


def test_folders_are_not_opened_where_they_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: a folder cannot be opened, and only a file that is open for writing can be forced to disk."""
    file = tmp_path / "file"
    file.touch()
    opened, real = [], os.open
    monkeypatch.setattr(journal, "WINDOWS", True)
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append((path, flags)) or real(path, flags))
    journal.sync(tmp_path)
    journal.sync(file)
    assert opened == [(file, os.O_RDWR)]
