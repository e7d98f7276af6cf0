"""``nearplane bench``: how fast a checkpoint is, packed and dense."""

import json
from dataclasses import dataclass
from typing import Any, Literal

SETTINGS = {"nearplane.checkpoint.load:LoadSettings": ("revision", "trust_remote_code")}


@dataclass(frozen=True)
class Options:
    """Tokens per second of a checkpoint packed, against the same weights dense in bf16 and fp32: same process, same threads."""

    model: str
    """A quantized checkpoint."""
    prompt_tokens: int = 128
    """Length of the prompt whose prefill is timed."""
    new_tokens: int = 32
    """Tokens decoded after it."""
    rounds: int = 3
    """Interleaved rounds; the median counts."""
    threads: int | None = None
    """CPU threads; none: as torch decides."""
    against: tuple[Literal["bf16", "fp32"], ...] = ("bf16", "fp32")
    """Dense models to compare with; all are in memory at once."""
    head_bits: int = 8
    """Width of the output head in the row that rounds it."""
    json: bool = False
    """Print one JSON object and nothing else on standard output."""


def run(options: Options, settings: dict[str, Any]) -> int:
    """Time the checkpoint, and print a table."""
    from nearplane.evaluation.speed import bench

    choices = {name: value for name, value in vars(options).items() if name not in ("model", "json")}
    result = bench(options.model, progress=True, **choices, **settings)
    print(json.dumps(result.as_dict()) if options.json else result)
    return 0
