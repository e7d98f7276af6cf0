"""``nearplane convert``: the same codes and scales in another format."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nearplane.machine.progress import printed

SETTINGS: dict[str, None] = {}


@dataclass(frozen=True)
class Options:
    """Write a quantized checkpoint in another format. Nothing is quantized again: codes, scales and zeros keep their values.

    A NEW that ends in .gguf is one file for llama.cpp, Ollama and LM Studio, made of a GGUF file of the original model.
    """

    out: str
    """The quantized checkpoint."""
    new: Path
    """Folder to write; must not exist, or be empty. Or a new file that ends in .gguf."""
    format: str | None = None
    """The format to write: compressed-tensors, gptq, gptq_v2, awq, mlx or gguf; gguf where NEW ends in .gguf."""
    template: Path | None = None
    """With gguf, a GGUF file of the original model, which gives metadata, tokenizer and names; demo has its own."""
    gguf_type: str | None = None
    """With gguf, the type of all weights; else of each the smallest that keeps its values."""
    gguf_dense: str | None = None
    """With gguf, the type of embedding and output head: Q8_0, Q6_K or F16; else as in the template."""
    revision: str | None = None
    """Of a hub id, the branch, tag or commit; OUT@REVISION says the same."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


def run(options: Options, _: dict[str, Any]) -> int:
    """Write, and print what was written."""
    from nearplane.checkpoint.convert import convert

    asked = {field.name: getattr(options, field.name) for field in fields(options) if field.name not in ("out", "new")}
    printed(convert(options.out, options.new, progress=True, **asked))
    return 0
