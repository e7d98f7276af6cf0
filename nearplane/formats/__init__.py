"""On-disk formats: reading and writing transformers folders with quantized weights."""

from nearplane.formats.base import Format
from nearplane.formats.compressed import CompressedTensors
from nearplane.formats.gptq import GPTQ

FORMATS: dict[str, Format] = {format.name: format for format in (CompressedTensors(), GPTQ("gptq"), GPTQ("gptq_v2"))}
"""Every format that can be written, by the name a user gives."""

__all__ = ["FORMATS", "Format"]
