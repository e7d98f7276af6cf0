"""What answers at once: help, mistakes, a missing model. No torch, no transformers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import sys
from nearplane.cli.main import main
status = main(sys.argv[1:])
heavy = sorted({"torch", "transformers", "numpy", "rich", "huggingface_hub"} & set(sys.modules))
print(f"\\nstatus {status} heavy {heavy}")
"""


def child(code: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    return done.stdout


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["quantize", "--help"], 0),
        (["help", "eval"], 0),
        (["completion", "bash"], 0),
        (["--install-completion"], 2),
        (["quantise"], 2),
        (["quantize", "demo", "out", "--bit", "3"], 2),
        (["quantize", "demo", "out", "--bits", "three"], 2),
        (["quantize", "./nowhere", "out"], 2),
        (["eval", "./nowhere"], 2),
        (["report", "--help"], 0),
        (["report", "./nowhere", "./nor here"], 2),
    ],
)
def test_neither_torch_nor_transformers(words: list[str], status: int) -> None:
    assert child(CHILD, *words).endswith(f"\nstatus {status} heavy []\n")


def test_import_nearplane_imports_nothing() -> None:
    code = "import sys, nearplane; dir(nearplane); print(sorted({'torch', 'rich', 'numpy'} & set(sys.modules)))"
    assert child(code) == "[]\n"


def test_the_first_line_comes_before_torch(tmp_path: Path) -> None:
    """A run says that it opens the model before the import that takes most of its start."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    (tmp_path / "model").mkdir()
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    words = ["-m", "nearplane", "quantize", str(tmp_path / "model"), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=environment)
    assert done.stderr == f"opening {tmp_path / 'model'}\ntorch is imported\n"


@pytest.mark.parametrize(
    ("own", "wanted"),
    [({}, "2000 None"), ({"GOMP_SPINCOUNT": "7"}, "7 None"), ({"OMP_WAIT_POLICY": "active"}, "None active")],
)
def test_threads_of_torch_rest_soon_where_tokens_are_decoded(tmp_path: Path, own: dict[str, str], wanted: str) -> None:
    """The OpenMP library reads this when torch is imported. A user's own choice stays, and quantize changes nothing."""
    code = "import os; raise SystemExit(f\"{os.environ.get('GOMP_SPINCOUNT')} {os.environ.get('OMP_WAIT_POLICY')}\")"
    (tmp_path / "torch.py").write_text(code)
    (tmp_path / "model").mkdir()
    others = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    kept = " ".join(str(own.get(name)) for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"))
    for words, said in (
        (["generate", model, "--prompt", "x"], wanted),
        (["bench", model], wanted),
        (["quantize", model, out], kept),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "nearplane", *words],
            capture_output=True,
            text=True,
            check=False,
            env=others | own | {"PYTHONPATH": path},
        )
        assert done.stderr.splitlines()[-1] == said, words
