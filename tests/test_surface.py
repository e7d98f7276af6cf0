"""The public surface, small and known."""

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nearplane
from nearplane.cli.main import VERBS
from nearplane.methods import METHODS

ROOT = Path(nearplane.__file__).parents[1]
# Modules whose public functions are documented by sections; the others of the surface follow.
OURS = ("nearplane.api", "nearplane.evaluation.speed", "nearplane.evaluation.compare")


def test_public_names_are_exactly_those_of_all() -> None:
    assert dir(nearplane) == sorted(nearplane.__all__)
    assert len(nearplane.__all__) == len(set(nearplane.__all__))
    assert all(getattr(nearplane, name) is not None for name in nearplane.__all__) and nearplane.__version__
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        nearplane.quantise  # noqa: B018


def test_methods_are_frozen_dataclasses_with_documented_fields() -> None:
    for name, kind in METHODS.items():
        assert dataclasses.is_dataclass(kind), name
        assert kind.__dataclass_params__.frozen, name  # type: ignore[attr-defined]
        assert isinstance(kind(), nearplane.Method), name


# Files shorter than 60 lines, and what speaks for each of them.
SHORT = (
    {
        "__main__.py": "python -m nearplane",
        "cli/summary.py": "what is printed at the end; its words are the page's, too",
        "page/read.py": "from a folder to a report; the rest of the page knows no file",
        "core/certificate.py": "one formula, which sweep, beam and report check",
        "core/cuda_graph.py": "all that knows of CUDA graphs",
        "core/errors.py": "imported by everything",
        "core/line.py": "one quadratic, which fits and refinement share",
        "evaluation/cache.py": "a simulated cache, of which perplexity knows nothing",
        "run/walk.py": "the walk is read by itself",
        "runtime/reference.py": "the kernel in plain torch, which others are tested against",
        "checkpoint/engines/others.py": "three engines of which little is known",
        "formats/fused.py": "engines' names, which no format owns",
        "models/values.py": "plain questions about tensors, apart from how they are read",
        "transforms/hooks.py": "rotations that run, needed where a checkpoint is loaded",
    }
    | {f"cli/{verb}.py": "one file a verb" for verb in (*VERBS, "serve")}
    | {f"methods/{name}.py": "one file a method" for name in METHODS}
)
# Folders with more than 12 files beside __init__.py.
WIDE_FOLDERS = {"cli": 16, "core": 21, "formats": 14, "models": 14, "run": 22}
# Their parameters are the operands of a kernel: Triton and torch.library take them one by one.
OPERANDS = {
    "_round_leaf",
    "sweep_columns",
    "_columns",
    "_linear",
    "_",
    "pick",
    "decoded",
    "input_of",
    "finish",
    "few",
    "plane",
    "weight_of",
    "many",
    "unpack",
}


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef, settings: set[str]) -> list[str]:
    """Those that are no fields of a settings object, which a public function takes as keywords."""
    given = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return [a.arg for a in given if a.arg not in {"self", "cls"} | settings]


def test_files_and_functions_stay_readable() -> None:
    """At most 450 lines a file, 60 a function, 7 parameters, 12 files a folder; a short file has a reason; no broad except."""
    options = [importlib.import_module(f"nearplane.cli.{verb}").Options for verb in VERBS]
    kinds = [nearplane.Job, nearplane.LoadSettings, nearplane.Calibration, nearplane.Grid, *options]
    settings = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    folders: dict[str, int] = {}
    for path in sorted((ROOT / "nearplane").rglob("*.py")):
        name, source = str(path.relative_to(ROOT / "nearplane")), path.read_text()
        lines = source.count("\n")
        assert lines <= 450, path
        assert lines >= 60 or name in SHORT or path.name == "__init__.py", path
        assert not re.search(r"except( BaseException| Exception)?:", source), path
        if path.name != "__init__.py":
            folders[str(path.parent.relative_to(ROOT / "nearplane"))] = folders.get(name.rpartition("/")[0], 0) + 1
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, (path, node.name)
                assert len(parameters(node, settings)) <= 7 or node.name in OPERANDS, (path, node.name)
    assert {folder: count for folder, count in folders.items() if count > 12} == WIDE_FOLDERS


SNIPPET = """
import nearplane
from nearplane import Grid, Job, LoadSettings

report = nearplane.quantize("demo", "out", bits=3)
reveal_type(report.linears)
reveal_type(nearplane.plan("demo"))
reveal_type(nearplane.generate("demo", "x").text)
reveal_type(nearplane.inspect("demo"))
reveal_type(nearplane.bench("out"))
reveal_type(Job().grid)
reveal_type(nearplane.__version__)
nearplane.quantise
Grid(bits="three")
LoadSettings(dtype="float64")
"""


def test_a_type_checker_sees_the_names(tmp_path: Path) -> None:
    """The lazy module and ``py.typed``: types where names are known, errors where they are not."""
    assert (ROOT / "nearplane" / "py.typed").is_file()
    (tmp_path / "snippet.py").write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--follow-imports=silent"]
    done = subprocess.run(
        [*command, str(tmp_path / "snippet.py")], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240
    )
    for part in (
        'LinearRow]"', 'type is "nearplane.run.forecast.Forecast"', 'type is "str"',
        'type is "nearplane.checkpoint.inspect.Anatomy"', 'type is "nearplane.evaluation.speed.Speed"',
        'type is "nearplane.core.grid.Grid"', '"quantise"', 'Argument "bits" to "Grid"', 'Argument "dtype" to "LoadSettings"',
    ):  # fmt: skip
        assert part in done.stdout.replace("Revealed type", "type"), (part, done.stdout)


def test_public_functions_have_sections() -> None:
    """Args and Raises of every public function, Returns of those whose answer is not named by its type."""
    for name in nearplane.__all__:
        value = getattr(nearplane, name)
        if inspect.isfunction(value) and value.__module__ in OURS:
            assert value.__doc__ and "Args:" in value.__doc__ and "Raises:" in value.__doc__, name


def test_what_functions_return_is_readable() -> None:
    """No dump of a dataclass: the text for people."""
    for kind in (
        nearplane.Anatomy, nearplane.Conversion, nearplane.Evaluation, nearplane.Features, nearplane.Forecast,
        nearplane.Generation, nearplane.Pushed, nearplane.Speed, nearplane.Verification,
    ):  # fmt: skip
        assert kind.__repr__ is kind.__str__, kind
