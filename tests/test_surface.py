"""The public surface, small and known."""

import dataclasses
import inspect
import re
from pathlib import Path

import nearplane
from nearplane.methods import METHODS

ROOT = Path(nearplane.__file__).parents[1]


def test_public_names_are_exactly_those_of_all() -> None:
    public = {
        name for name, value in vars(nearplane).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(nearplane.__all__)
    assert len(nearplane.__all__) == len(set(nearplane.__all__))


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
