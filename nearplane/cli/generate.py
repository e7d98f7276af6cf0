"""``nearplane generate``: text from a checkpoint, streamed."""

import sys
from dataclasses import dataclass
from typing import Any

SETTINGS = {"nearplane.checkpoint.load:LoadSettings": None}


@dataclass(frozen=True)
class Options:
    """Text from a checkpoint, its weights kept packed. Streams; says at the end how fast it was and what it took.

    Tokens go to standard output, the figures to standard error. End tokens, repetition_penalty and the like are those of
    generation_config.json; do_sample, temperature, beams and lengths are not taken from there.
    """

    model: str
    """A transformers folder (original, compressed-tensors or GPTQ), a hub id, or "demo"."""
    prompt: str
    """The text to continue, or with --chat the user's message. One that begins with a dash: --prompt="-..."."""
    max_new_tokens: int = 128
    """Stop after so many tokens."""
    chat: bool = False
    """Put the prompt through the model's chat template."""
    temperature: float = 0.0
    """0: always the likeliest token; above: sample."""
    seed: int = 0
    """For sampling."""
    threads: int | None = None
    """CPU threads; none: as torch decides."""


def run(options: Options, settings: dict[str, Any]) -> int:
    """Print text as it comes, then what it cost."""
    from nearplane.api import generate

    choices = {name: value for name, value in vars(options).items() if name not in ("model", "prompt")}
    result = generate(
        options.model, options.prompt, write=lambda text: print(text, end="", flush=True), **choices, **settings
    )
    print(flush=True)
    print(result.summary(), file=sys.stderr)
    return 0
