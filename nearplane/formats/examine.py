"""Whether one quantized layer holds what its format says: codes, zeros, scales, order of groups, unused bits.

Shapes and dtypes were checked when the checkpoint was opened; here the values are read, one layer at a time. A code
of b bits cannot leave 0 to 2^b - 1, so what can be told of packed words is that the bits behind the last code are zero.
"""

import torch
from torch import Tensor

from nearplane.core.errors import NearplaneError
from nearplane.formats.bits import pack
from nearplane.formats.files import Findings
from nearplane.formats.layer import Decoded, StoredLayer
from nearplane.formats.read import Checkpoint
from nearplane.formats.store import REPORT, Store


def examine(checkpoint: Checkpoint, name: str, found: Findings) -> None:
    """Read a layer and list what is wrong with it; a tensor that cannot be read, a code off the grid, a NaN included."""
    try:
        layer, decoded = checkpoint.decode(name)
        _unused_bits(checkpoint.store, layer, decoded, found)
    except NearplaneError as error:
        found.problem(str(error))
        return
    if f"{name}.weight" in checkpoint.dense:
        found.problem(f"{name} is stored twice, quantized and as {name}.weight.")
    _zeros(layer, decoded, found)
    _scales(layer, decoded.scale, (checkpoint.store.folder / REPORT).exists(), found)
    _order(checkpoint, layer, decoded.group, found)


def _unused_bits(store: Store, layer: StoredLayer, decoded: Decoded, found: Findings) -> None:
    """Pack again what was read: only bits that belong to no code can differ."""
    bits, stored = layer.grid.storage_bits, layer.tensors
    if layer.layout == "int":
        return
    if layer.layout == "packed":
        parts = (("weight_packed", decoded.codes, False), ("weight_zero_point", decoded.zero.T, True))
    else:  # version 1 stores zero - 1, wrapped inside its bits
        zero = decoded.zero if layer.layout == "gptq_v2" else (decoded.zero - 1) & ((1 << bits) - 1)
        parts = (("qweight", decoded.codes, True), ("qzeros", zero.T, False))
    for suffix, value, transposed in parts:
        length = value.shape[1]
        if suffix not in stored or length * bits % 32 == 0:  # the last word is full
            continue
        words, wanted = store.get(stored[suffix]), pack(value.contiguous(), bits)
        wanted = wanted.T if transposed else wanted
        # Zeros may be plain int8: then there are no words.
        if words.dtype == wanted.dtype and words.shape == wanted.shape and not torch.equal(words, wanted):
            found.problem(
                f"{stored[suffix]} has bits set behind the last of {length} codes of {bits} bits; it is damaged."
            )


def _zeros(layer: StoredLayer, decoded: Decoded, found: Findings) -> None:
    half = 1 << (layer.grid.storage_bits - 1)
    if layer.grid.sym:
        if "weight_zero_point" in layer.tensors:
            found.problem(f"{layer.name} is symmetric and stores zero points; vLLM refuses such a checkpoint.")
        wrong = int((decoded.zero != half).sum())
        if wrong:
            found.problem(f"{layer.name} is symmetric, and {wrong} of its zero points are not {half}.")
    elif layer.layout == "gptq" and bool((decoded.zero == 0).any()):
        found.problem(
            f"{layer.name} has zero points of 0, which version 1 of GPTQ stores as -1; readers disagree on them."
        )


def _scales(layer: StoredLayer, scale: Tensor, ours: bool, found: Findings) -> None:
    """They are finite, or the layer would not have been read. ``ours``: whether nearplane wrote them."""
    least = torch.finfo(scale.dtype).smallest_normal
    kinds = {"0": scale == 0, "negative": scale < 0, "subnormal": (scale != 0) & (scale.abs() < least)}
    # AutoRound's symmetric scales have the sign of the group's largest weight.
    wrong = {"0": bool((scale == 0).all()), "negative": ours or not layer.grid.sym}
    for kind, where in kinds.items():
        if bool(where.any()):
            row, group = (int(i) for i in where.nonzero()[0])
            count = int(where.sum())
            say = found.problem if wrong.get(kind) else found.note
            say(
                f"{layer.name}: {count} of {scale.numel()} scales {'are' if count > 1 else 'is'} {kind}, the first in "
                f"row {row}, group {group}."
            )
    if layer.layout in ("gptq", "gptq_v2") and scale.dtype != torch.float16:
        found.note(f"{layer.name}: scales are {layer.grid.scale_dtype}; GPTQ's are float16.")


def _order(checkpoint: Checkpoint, layer: StoredLayer, group: Tensor, found: Findings) -> None:
    suffix = "weight_g_idx" if layer.layout in ("packed", "int") else "g_idx"
    if suffix not in layer.tensors:
        return
    dtype = checkpoint.store.dtype(layer.tensors[suffix])
    if dtype.is_floating_point:
        found.problem(f"{layer.tensors[suffix]} is {dtype}; groups are counted in integers.")
    trivial = torch.arange(layer.shape[1]) // layer.grid.group_width(layer.shape[1])
    if not checkpoint.ordered and not torch.equal(group, trivial):
        what = "actorder" if suffix == "weight_g_idx" else "desc_act"
        found.problem(
            f"{layer.name} has groups in an order of its own ({suffix}), and the configuration does not say so ({what}); "
            "engines would read other weights."
        )
