"""The public surface, small and known."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nearplane
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


def test_files_and_functions_stay_readable() -> None:
    """At most 450 lines a file; no catch-all except."""
    for path in (ROOT / "nearplane").rglob("*.py"):
        source = path.read_text()
        assert source.count("\n") <= 450, path
        assert not re.search(r"except( BaseException| Exception)?:", source), path


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
        nearplane.Generation, nearplane.Speed, nearplane.Verification,
    ):  # fmt: skip
        assert kind.__repr__ is kind.__str__, kind
