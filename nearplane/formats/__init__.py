"""On-disk formats: reading and writing transformers folders with quantized weights."""

from nearplane.core.errors import SettingError
from nearplane.core.tokens import TokenGrid
from nearplane.formats.base import Format
from nearplane.formats.compressed import CompressedTensors
from nearplane.formats.gptq import GPTQ

FORMATS: dict[str, Format] = {format.name: format for format in (CompressedTensors(), GPTQ("gptq"), GPTQ("gptq_v2"))}
"""Every format that can be written, by the name a user gives."""


def rounding(format: str, activations: TokenGrid) -> Format:
    """The format of that name with activations rounded; SettingError where it has no word for that."""
    chosen = FORMATS[format]
    if not isinstance(chosen, CompressedTensors):
        raise SettingError(f"{format} cannot say that activations are rounded; use --format compressed-tensors.")
    return chosen.rounding(activations)


__all__ = ["FORMATS", "Format", "rounding"]
