"""On-disk formats: reading and writing transformers folders with quantized weights."""

from nearplane.core.errors import SettingError
from nearplane.formats.awq import AWQ
from nearplane.formats.base import Format
from nearplane.formats.compressed import CompressedTensors
from nearplane.formats.gguf.format import GGUF
from nearplane.formats.gptq import GPTQ
from nearplane.formats.mlx import MLX

FORMATS: dict[str, Format] = {
    format.name: format for format in (CompressedTensors(), GPTQ("gptq"), GPTQ("gptq_v2"), AWQ(), MLX(), GGUF())
}
"""Every format that is read and written, by the name that users give."""


def pick_format(format: str | Format) -> Format:
    """Give the format of a name, or a user's own as it is. Raises SettingError for a name that is none."""
    if isinstance(format, Format):
        return format
    if format not in FORMATS:
        raise SettingError(f"format must be one of {', '.join(FORMATS)}; got {format!r}.")
    return FORMATS[format]


__all__ = ["FORMATS", "Format", "pick_format"]
