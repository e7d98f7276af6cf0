"""``nearplane convert``: the same codes and scales in another format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearplane.machine.progress import printed

SETTINGS: dict[str, None] = {}


@dataclass(frozen=True)
class Options:
    """Write a quantized checkpoint in another format. Nothing is quantized again: codes, scales and zeros keep their values."""

    out: str
    """The quantized checkpoint."""
    new: Path
    """Folder to write; must not exist, or be empty."""
    format: str
    """The format to write: compressed-tensors, gptq, gptq_v2, awq or mlx."""
    revision: str | None = None
    """Of a hub id, the branch, tag or commit; OUT@REVISION says the same."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


def run(options: Options, _: dict[str, Any]) -> int:
    """Write, and print what was written."""
    from nearplane.checkpoint.convert import convert

    asked: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    printed(convert(options.out, options.new, options.format, progress=True, **asked))
    return 0
