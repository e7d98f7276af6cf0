"""Opening a checkpoint, quantized or not, whoever wrote it.

Asks each format whether a folder's configuration is its own, and gives each quantized weight back as codes
(``quantized``) or as numbers (``weight``). What no format reads is named.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Quantized
from nearplane.formats import FORMATS
from nearplane.formats.base import Decoded, Format, StoredLayer
from nearplane.formats.originals import KEYS as QUANTIZATION
from nearplane.formats.originals import dense_view, empty, is_original, method_of, parts_of, refuse_strays, remedy, told
from nearplane.formats.store import Store, read_json

# Where ModelOpt states its quantization, in folders whose config.json does not.
MODELOPT = "hf_quant_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder; tensors are read when asked for."""

    store: Store
    config: dict[str, Any]
    """config.json."""
    quantization: dict[str, Any] | None
    """Its quantization_config (or the older files' equivalent); None: a dense checkpoint."""
    reader: Format | None
    """The format that reads the layers; None: a dense checkpoint."""
    layers: dict[str, StoredLayer]
    """Quantized weights by module prefix."""
    dense: list[str]
    """Names of all other tensors, sorted."""
    original: str | None = None
    """What becomes of weights stored as small floats, which ``store`` shows as dense ones; None: there are none."""

    @property
    def format(self) -> str | None:
        """Name of the format; None: a dense checkpoint."""
        return None if self.reader is None else self.reader.name

    @property
    def ordered(self) -> bool:
        """Whether the configuration says that groups may lie in activation order."""
        return self.reader is not None and self.reader.ordered(self.quantization or {})

    def expects(self, names: set[str], kind: str) -> bool:
        """Tell whether the configuration says that a linear of these names (in model and file) is quantized.

        ``kind``: the class by which a format may address it, "Linear" or another.
        """
        return self.reader is not None and self.reader.expects(self.quantization or {}, names, kind)

    def quantized(self, prefix: str) -> Quantized:
        """Read codes, scales and zeros of a layer. Raises NearplaneError if its groups are not contiguous columns."""
        layer, decoded = self.decode(prefix)
        columns = layer.shape[1]
        if not torch.equal(decoded.group, torch.arange(columns) // layer.grid.group_width(columns)):
            raise NearplaneError(
                f"{prefix} in {self.store.folder} was quantized with activation-ordered groups (desc_act), "
                "which are not contiguous; only its weight can be read."
            )
        return Quantized(decoded.codes, decoded.scale.contiguous(), decoded.zero.contiguous())

    def weight(self, prefix: str, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """Read the weight of a layer, ``(code - zero) * scale``, in float32 at least where the zero is a real number.

        The product is rounded once, to ``dtype``; in float32 it is exact for 16-bit scales. In float32 and in the
        dtype of the scales this is bit for bit what transformers loads, which casts the scales before it multiplies.
        """
        _, decoded = self.decode(prefix)
        work = torch.promote_types(decoded.scale.dtype, dtype)
        if decoded.zero.is_floating_point():
            work = torch.promote_types(work, decoded.zero.dtype)
        scale = decoded.scale.to(work)[:, decoded.group]
        return (decoded.codes.to(work) - decoded.zero.to(work)[:, decoded.group]).mul_(scale).to(dtype)

    def decode(self, prefix: str) -> tuple[StoredLayer, Decoded]:
        """Read a layer, its groups in whatever order. Raises NearplaneError if a scale or an offset is not finite."""
        if prefix not in self.layers or self.reader is None:
            raise NearplaneError(f"{self.store.folder} holds no quantized layer named {prefix}.")
        layer = self.layers[prefix]
        decoded = self.reader.unpack(self.store, layer)
        for part, value in (("scales", decoded.scale), ("offsets", decoded.zero)):
            if not bool(value.isfinite().all()):
                raise NearplaneError(f"{prefix} in {self.store.folder} has {part} that are not finite; it is damaged.")
        return layer, decoded


def open_checkpoint(folder: Path, broken: dict[str, str] | None = None, formats: Sequence[Format] = ()) -> Checkpoint:
    """Open a transformers folder and check all shapes; reads no weight.

    Args:
        folder: the checkpoint.
        broken: where a layer whose tensors do not fit goes, by name with the reason; the rest is opened then, without
            the files that cannot be read, and tensors that no configuration explains are left to the caller.
        formats: formats of the caller's own, asked before those of ``FORMATS``.

    Raises:
        NearplaneError: names the file, tensor or quantization method that is missing, damaged or not supported.
    """
    return _open(Store(folder, partial=broken is not None), broken, formats)


def open_original(store: Store) -> tuple[Store, str | None]:
    """View the tensors of a model that is to be quantized; reads no weight.

    Args:
        store: of a folder whose ``stated`` configuration is none, or that of an original.

    Returns:
        The tensors, weights that are stored as small floats as dense ones; and what to tell of these.

    Raises:
        NearplaneError: names the tensor that shows that a weight is quantized in another way.
    """
    found = _open(store)
    return found.store, found.original


def _open(store: Store, broken: dict[str, str] | None = None, formats: Sequence[Format] = ()) -> Checkpoint:
    """Open a folder's tensors; the arguments are ``open_checkpoint``'s."""
    config, known = read_json(store.folder / "config.json"), (*formats, *FORMATS.values())
    quantization = stated(store.folder, config, known)
    own = quantization is not None and any(format.claims(quantization) for format in formats)
    if quantization is not None and is_original(quantization) and not own:
        store = dense_view(store, quantization, config, broken)
        found = Checkpoint(store, config, None, None, {}, sorted(store.names), told(store, quantization))
    else:
        reader = None if quantization is None else _reader(store, quantization, known)
        store = store if reader is None or quantization is None else reader.store(store, quantization)
        found = read_tensors(store, config, quantization, reader, broken)
    if broken is None:
        refuse_strays(store, found.dense, quantization)
    return found


def read_tensors(
    store: Store,
    config: dict[str, Any],
    quantization: dict[str, Any] | None,
    reader: Format | None,
    broken: dict[str, str] | None = None,
) -> Checkpoint:
    """Open tensors whose description is at hand; the arguments are ``Checkpoint``'s and ``open_checkpoint``'s."""
    layers = {} if reader is None else reader.find(store, quantization or {}, broken)
    if reader is not None and not layers and not broken and not store.lost:
        refuse_strays(store, store.names, quantization)
        raise NearplaneError(empty(store.folder, {"quant_method": reader.name, **(quantization or {})}))
    taken = {name for layer in layers.values() for name in layer.tensors.values()}
    return Checkpoint(store, config, quantization, reader, layers, sorted(store.names - taken))


def _reader(store: Store, quantization: dict[str, Any], formats: Sequence[Format]) -> Format:
    """Pick the format that claims a configuration."""
    for format in formats:
        if format.claims(quantization):
            return format
    known, method = (
        " and ".join(dict.fromkeys(format.reads or format.name for format in formats)),
        method_of(quantization),
    )
    raise NearplaneError(
        f"{store.folder} is quantized with {method}; nearplane reads {known}, and originals in FP8 and MXFP4; "
        f"{remedy(store.folder)}."
    )


def stated(
    folder: Path, config: dict[str, Any], formats: Sequence[Format] = tuple(FORMATS.values())
) -> dict[str, Any] | None:
    """Find the quantization_config, wherever tools have put it; None if there is none.

    Besides the usual place: the text model's part of a multimodal config.json, ``compression_config`` (before 2025),
    ``quantization`` (MLX), and a file of the format's own beside config.json, which names no method.
    """
    for part in parts_of(config):
        for key in QUANTIZATION:
            found = part.get(key)
            if isinstance(found, dict) and found:
                named = "quant_method" in found or "config_groups" in found or "quantization" not in config
                return found if named else {**found, "quant_method": "mlx"}
            if found:
                raise NearplaneError(f"{key} of {folder / 'config.json'} must be an object; it is {found!r}.")
    if isinstance(config.get("quantization"), dict) and "bits" in config["quantization"]:
        return {**config["quantization"], "quant_method": "mlx"}
    for format in formats:
        if format.beside is not None and (folder / format.beside).exists():
            legacy = read_json(folder / format.beside)
            if "bits" not in legacy:  # a file of that name that describes nothing
                continue
            return {**legacy, "quant_method": legacy.get("quant_method", format.name)}
    if (folder / MODELOPT).exists():
        inner = read_json(folder / MODELOPT).get("quantization")
        return {**(inner if isinstance(inner, dict) else {}), "quant_method": "modelopt"}
    return None
