"""Opening a checkpoint, quantized or not, whoever wrote it.

Decides what a folder is from its config.json and which reader speaks for it; gives each quantized weight back as codes
(``quantized``) or as numbers (``weight``). What it does not read, it names.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Quantized
from nearplane.formats import compressed, gptq
from nearplane.formats.base import Decoded, StoredLayer
from nearplane.formats.store import Store, read_json

SUPPORTED = "nearplane reads compressed-tensors (pack-quantized, int-quantized) and GPTQ (gptq, gptq_v2)"


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was opened; tensors are read when asked for."""

    store: Store
    config: dict[str, Any]
    """config.json."""
    quantization: dict[str, Any] | None
    """Its quantization_config (or the older files' equivalent); None: a dense checkpoint."""
    format: str | None
    """"compressed-tensors", "gptq" or "gptq_v2"; None: dense."""
    layers: dict[str, StoredLayer]
    """Quantized weights by module prefix."""
    dense: list[str]
    """Names of all other tensors, sorted."""

    @property
    def ordered(self) -> bool:
        """Whether the configuration says that groups may lie in activation order."""
        config = self.quantization or {}
        if self.format != "compressed-tensors":
            return bool(config.get("desc_act"))
        groups = [group.get("weights") for group in config.get("config_groups", {}).values() if isinstance(group, dict)]
        return any(weights.get("actorder") for weights in groups if isinstance(weights, dict))

    def expects(self, names: set[str], kind: str) -> bool:
        """Whether the configuration says that a linear of these names (in model and file) is quantized.

        ``kind``: the class by which a format may address it, "Linear" or another.
        """
        if self.quantization is None:
            return False
        if self.format == "compressed-tensors":
            return compressed.expects(self.quantization, names, kind)
        return gptq.expects(self.quantization, names)

    def quantized(self, prefix: str) -> Quantized:
        """Codes, scales and zeros of one layer. NearplaneError if its groups are not contiguous columns."""
        layer, decoded = self.decode(prefix)
        columns = layer.shape[1]
        if not torch.equal(decoded.group, torch.arange(columns) // layer.grid.group_width(columns)):
            raise NearplaneError(
                f"{prefix} in {self.store.folder} was quantized with activation-ordered groups (desc_act), "
                "which are not contiguous; only its weight can be read."
            )
        return Quantized(decoded.codes, decoded.scale.contiguous(), decoded.zero.contiguous())

    def weight(self, prefix: str, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The weight of one layer, ``(code - zero) * scale``.

        The product is rounded once, to ``dtype``; in float32 it is exact for 16-bit scales. In float32 and in the
        dtype of the scales this is bit for bit what transformers loads, which casts the scales before it multiplies.
        """
        _, decoded = self.decode(prefix)
        work = torch.promote_types(decoded.scale.dtype, dtype)
        scale = decoded.scale.to(work)[:, decoded.group]
        return (decoded.codes.to(work) - decoded.zero.to(work)[:, decoded.group]).mul_(scale).to(dtype)

    def decode(self, prefix: str) -> tuple[StoredLayer, Decoded]:
        """A layer as read, its groups in whatever order. NearplaneError if there is none, or a scale is not finite."""
        if prefix not in self.layers:
            raise NearplaneError(f"{self.store.folder} holds no quantized layer named {prefix}.")
        layer = self.layers[prefix]
        reader = gptq if layer.layout in ("gptq", "gptq_v2") else compressed
        decoded = reader.decode(self.store, layer)
        if not bool(decoded.scale.isfinite().all()):
            raise NearplaneError(f"{prefix} in {self.store.folder} has scales that are not finite; it is damaged.")
        return layer, decoded


def open_checkpoint(folder: Path, broken: dict[str, str] | None = None) -> Checkpoint:
    """Open a transformers folder and check all shapes; reads no weight.

    NearplaneError names the file, tensor or quantization method that is missing, damaged or not supported. With
    ``broken``, a layer whose tensors do not fit goes there, by name with the reason, and the rest is opened, without the
    files that cannot be read.
    """
    store = Store(folder, partial=broken is not None)
    config = read_json(store.folder / "config.json")
    return read_tensors(store, config, _quantization(store, config), broken)


def read_tensors(
    store: Store,
    config: dict[str, Any],
    quantization: dict[str, Any] | None,
    broken: dict[str, str] | None = None,
) -> Checkpoint:
    """The same of tensors whose description is at hand."""
    format, layers = _find(store, quantization, broken)
    if quantization is not None and not layers and not broken and not store.lost:
        raise NearplaneError(f"{store.folder} says that it is quantized ({format}), but holds no quantized tensor.")
    taken = {name for layer in layers.values() for name in layer.tensors.values()}
    return Checkpoint(store, config, quantization, format, layers, sorted(store.names - taken))


def _find(
    store: Store, config: dict[str, Any] | None, broken: dict[str, str] | None
) -> tuple[str | None, dict[str, StoredLayer]]:
    """The format's name and the quantized layers."""
    if config is None:
        return None, {}
    method = config.get("quant_method")
    if method == "compressed-tensors":
        return "compressed-tensors", compressed.find_layers(store, config, broken)
    if method == "gptq":
        return gptq.version(config, str(store.folder)), gptq.find_layers(store, config, broken)
    raise NearplaneError(f"{store.folder} is quantized with {method}; {SUPPORTED}.")


def _quantization(store: Store, config: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization_config, wherever tools have put it; None if there is none.

    Beside the usual place: the text model's part of a multimodal config.json, ``compression_config`` (before 2025), and
    AutoGPTQ's quantize_config.json, which names no method.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            found = part.get(key)
            if isinstance(found, dict) and found:
                method = "compressed-tensors" if "config_groups" in found else None
                return {**found, "quant_method": found.get("quant_method", method)}
            if found:
                raise NearplaneError(f"{key} of {store.folder / 'config.json'} must be an object; it is {found!r}.")
    beside = store.folder / "quantize_config.json"
    if beside.exists():
        legacy = read_json(beside)
        return {**legacy, "quant_method": legacy.get("quant_method", "gptq")}
    return None
