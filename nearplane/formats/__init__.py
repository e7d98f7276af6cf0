"""On-disk formats: reading and writing transformers folders with quantized weights."""

from dataclasses import replace

from nearplane.core.activations import TokenGrid
from nearplane.core.errors import SettingError
from nearplane.formats.base import Format
from nearplane.formats.compressed import CompressedTensors
from nearplane.formats.gptq import GPTQ

FORMATS: dict[str, Format] = {format.name: format for format in (CompressedTensors(), GPTQ("gptq"), GPTQ("gptq_v2"))}
"""Every format that can be written, by the name a user gives."""


def running(format: str | Format, activations: TokenGrid | None, online: bool) -> Format:
    """The format of that name where inputs of linears are rounded, or rotated (``online``), while the model runs; SettingError
    where it has no word for that."""
    chosen = FORMATS[format] if isinstance(format, str) else format
    if activations is None and not online:
        return chosen
    if isinstance(chosen, CompressedTensors):
        return replace(chosen, activations=activations, online=online)
    if online:
        raise SettingError(
            f"r4 rotates inputs while the model runs, and whatever loads {chosen.name} would not; use "
            "--format compressed-tensors, which is marked as nearplane's own then, or rotate by r1,r2."
        )
    raise SettingError(f"{chosen.name} cannot say that activations are rounded; use --format compressed-tensors.")


__all__ = ["FORMATS", "Format", "running"]
