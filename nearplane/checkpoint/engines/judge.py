"""Whether an engine loads a checkpoint, on what condition, and why not: one ``verdict`` for every user of it.

``plan``, ``verify``, ``report.json``, the README and ``docs/engines.md`` ask ``verdict``. Facts of one engine are in one
file. ``ran.json`` lists the kinds of checkpoints that were run in an engine, with versions. ``runs/engines.py`` writes
that list from its record, and a test compares every recorded outcome with the verdict. Other facts were read in sources.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nearplane.checkpoint.engines import others, transformers, vllm
from nearplane.checkpoint.engines.describe import Described
from nearplane.checkpoint.engines.findings import AWQ, COMPRESSED, GPTQS, Findings
from nearplane.core.errors import SettingError

RAN = Path(__file__).parent / "ran.json"


@dataclass(frozen=True)
class Engine:
    """One engine, and who judges for it."""

    title: str
    """Name and version whose sources were read."""
    formats: tuple[str, ...]
    """Formats that it knows."""
    judge: Callable[[str, Described, Findings], None]
    """Adds the reasons why the engine does not load a checkpoint, and conditions on which it does."""


_TABLE: dict[str, Engine] = {
    "vllm": Engine(vllm.VLLM, vllm.FORMATS, vllm.judge),
    "sglang": Engine(vllm.SGLANG, vllm.FORMATS, vllm.judge),
    "transformers": Engine(transformers.TRANSFORMERS, transformers.FORMATS, transformers.judge),
    "llama.cpp": Engine(others.LLAMA, ("gguf",), others.llama),
    "mlx": Engine(others.MLX, ("mlx", "awq", "gptq"), others.mlx),
    "onnxruntime-genai": Engine(others.ONNX, ("gptq", "gptq_v2", "awq"), others.onnx),
    "openvino": Engine(others.OPENVINO, (COMPRESSED, *GPTQS, AWQ), others.openvino),
}
ENGINES: tuple[str, ...] = tuple(_TABLE)
TITLES = {name: engine.title for name, engine in _TABLE.items()}
"""The versions whose sources were read."""


@dataclass(frozen=True)
class Verdict:
    """What an engine makes of a checkpoint, in sentences without their full stop."""

    refusals: tuple[str, ...] = ()
    """Why the engine does not load it; empty if nothing is known to hinder it."""
    caveats: tuple[str, ...] = ()
    """On what condition the engine loads it, or what it costs there."""
    basis: str = ""
    """Whether such a checkpoint was run in the engine, and in which version, or its sources were read."""
    foreign: bool = False
    """Whether the engine does not know the format at all."""

    def __str__(self) -> str:
        if self.refusals:
            return f"does not load it: {'; '.join(self.refusals)}"
        loads = f"loads it ({self.basis})" if self.basis else "loads it"
        return f"{loads}: {'; '.join(self.caveats)}" if self.caveats else loads

    def as_dict(self) -> dict[str, Any]:
        """Give all of it for JSON."""
        return {"refusals": list(self.refusals), "caveats": list(self.caveats), "basis": self.basis}


def verdict(engine: str, checkpoint: Described) -> Verdict:
    """Judge whether an engine loads a checkpoint.

    Args:
        engine: one of ``ENGINES``.
        checkpoint: as ``described`` gives it of an opened folder.

    Raises:
        SettingError: for an engine that is not known.
    """
    check_engine(engine)
    known, basis = _TABLE[engine], basis_of(engine, checkpoint)
    if checkpoint.format not in known.formats:
        who = [other for other, row in _TABLE.items() if checkpoint.format in row.formats]
        rest = f"; {', '.join(who)} and nearplane do" if who else "; only nearplane, given that format, loads it"
        return Verdict((f"{known.title} does not know the format {checkpoint.format}{rest}",), (), basis, True)
    found = Findings()
    known.judge(engine, checkpoint, found)
    return Verdict(found.refusals, found.caveats, basis)


def verdicts(checkpoint: Described) -> dict[str, Verdict]:
    """Give the verdict of every engine."""
    return {engine: verdict(engine, checkpoint) for engine in ENGINES}


def basis_of(engine: str, checkpoint: Described) -> str:
    """Tell whether all kinds of weights of a checkpoint were run in an engine."""
    versions = {_ran().get(engine, {}).get(kind) for kind in checkpoint.kinds}
    if versions and None not in versions:
        return f"run here with {', '.join(sorted(map(str, versions)))}"
    return f"read in the sources of {TITLES[engine]}, not run here"


def check_engine(engine: str) -> None:
    """Raise SettingError for an engine that is not known."""
    if engine not in ENGINES:
        raise SettingError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}.")


@cache
def _ran() -> dict[str, dict[str, str]]:
    """Read which kinds of weights were run: by engine and kind, the version."""
    found: dict[str, dict[str, str]] = json.loads(RAN.read_text("utf-8"))
    return found
