"""``nearplane inspect``: what is in a folder."""

from dataclasses import dataclass
from typing import Any

from nearplane.machine.progress import printed

SETTINGS = {"nearplane.core.grid:Grid": None}


@dataclass(frozen=True)
class Options:
    """Blocks, stages, shapes and sizes of a model; for a quantized checkpoint, the grids of its layers.

    Quantizes nothing: it reads one block of each kind and runs 8 tokens through it.
    """

    model: str
    """A transformers folder, a hub id, or "demo"."""
    revision: str | None = None
    """Of a hub id, the branch, tag or commit; MODEL@REVISION says the same."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


def run(options: Options, settings: dict[str, Any]) -> int:
    """Print the anatomy."""
    from nearplane.api import inspect

    asked: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    printed(inspect(options.model, **asked, **settings))
    return 0
