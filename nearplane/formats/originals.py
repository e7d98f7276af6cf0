"""What config.json and the names of tensors say about the weights of a folder that nearplane did not write.

Decides three things. Weights stored as small floats with scales are an original, and are read as dense
(``small_floats.py``). Any other quantization is refused in a sentence that names the method. A tensor that shows that a
weight is quantized is never ignored: where no configuration explains such a tensor, the folder is refused by its name.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nearplane.core.errors import NearplaneError
from nearplane.formats.small_floats import DenseStore, Sizes, dense_name, find_coded
from nearplane.formats.store import DTYPES, SMALL_FLOATS, Store, again

KEYS = ("quantization_config", "compression_config")
# Methods that store weights as small floats with scales.
FLOATS = ("fp8", "mxfp8", "mxfp4", "fbgemm_fp8", "modelopt", "modelopt_fp4")
# Formats of compressed-tensors that do so, where the type of the weights is float.
FLOAT_FORMATS = (
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)
BLOCK = 128  # of quant_method fp8, where the configuration names no size
# Names of tensors that only a quantized weight has: FP8, MXFP4, compressed-tensors, ModelOpt, GPTQ and AWQ, bitsandbytes,
# HQQ, quanto, torchao, Mistral.
SIGNS = re.compile(
    r"(^|[._])(scale_inv|weight_scales?|weight_scale_2|weight_packed|weight_shape|weight_global_scale|weight_zero_point"
    r"|pre_quant_scale|qweight|qzeros|SCB|absmax|quant_map|quant_state\.\w+|W_q|weight\._(data|scale|shift)|weight_qdata"
    r"|qscale_weight)$|:_(data|scale)$"
)
# Tensors that show a quantized weight only together: of one module, or of one weight.
TOGETHER = (
    (".codes", ".codebooks"),
    (".indices", ".centroids.weight"),
    (".dense_weights", ".row_offsets"),
    ("_blocks", "_scales"),
)
# Scales of activations and of the cache, which a dense model does not have.
OF_INPUTS = re.compile(
    r"(^|\.)((gate|up|gate_up|down)_proj_)?((input|output|activation|[kv]|kv|prob)_(global_)?scale|(input|output)_zero_point"
    r"|qscale_act)$"
)
NOT_WEIGHTS = (torch.bool, torch.complex64)
BASE = re.compile(r"^base_model:[ \t]*(?:\n[ \t]*-[ \t]*)?([^\s#]+)", re.MULTILINE)


def parts_of(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a config.json and the configurations inside it."""
    yield config
    for key, value in config.items():
        if key.endswith("_config") and key not in KEYS and isinstance(value, dict):
            yield from parts_of(value)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Take the quantization out of a config.json, wherever a tool put it; MLX's stands under two keys."""
    keys = (*KEYS, *(["quantization"] if isinstance(config.get("quantization"), dict) else []))
    return {
        key: plain_config(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in keys
    }


def method_of(quantization: Mapping[str, Any]) -> str:
    """Name the method of a quantization_config."""
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        return "bitsandbytes"
    named = quantization.get("quant_method") or ("compressed-tensors" if "config_groups" in quantization else None)
    return "an unnamed method" if named is None else str(named)


def is_original(quantization: Mapping[str, Any]) -> bool:
    """Tell whether weights are small floats with scales, which are read as dense."""
    if method_of(quantization) != "compressed-tensors":
        return method_of(quantization) in FLOATS
    groups = _groups(quantization)
    return bool(groups) and all(
        str(group.get("format") or quantization.get("format")) in FLOAT_FORMATS
        and _weights(group).get("type") == "float"
        for group in groups
    )


def dense_view(
    store: Store, quantization: dict[str, Any], config: Mapping[str, Any], broken: dict[str, str] | None = None
) -> Store:
    """View a store whose weights are small floats as a store of dense weights.

    Args:
        store: the tensors on disk.
        quantization: a configuration that ``is_original``.
        config: config.json.
        broken: where weights go whose scales are missing or do not fit, by module with the reason.

    Raises:
        NearplaneError: a scale is missing or does not fit, or no weight is quantized.
    """
    refuse_transforms(quantization, f"quantization_config of {store.folder}")
    coded, left = find_coded(store, _sizes(quantization, store.folder), broken)
    if not coded and not left and not store.lost:
        first = next(iter(strays(store, store.names)), None)
        if first is None:
            raise NearplaneError(empty(store.folder, quantization))
        raise NearplaneError(unexplained(store.folder, first, quantization, store.dtype(first)))
    dropped = {name for name in store.names if OF_INPUTS.search(name)}
    zeros = {f"{name}_zero_point" for name in coded} & store.names
    dropped |= {name for name in zeros if not bool(store.get(name).float().any())}
    bad = tuple(dense_name(name) for name in left)
    dropped |= {name for name in store.names if bad and name.startswith(bad) and not name.endswith("bias")}
    return DenseStore(store, coded, dropped, _dtype(config))


def refuse_transforms(quantization: Mapping[str, Any], where: str) -> None:
    """Raise NearplaneError for weights that are more than codes and scales, by the keys of compressed-tensors."""
    for key, meaning in (("transform_config", "online transforms"), ("sparsity_config", "sparse weights")):
        part = quantization.get(key)
        if part and not (isinstance(part, dict) and part.get("format") == "dense"):
            raise NearplaneError(f"{where} asks for {meaning} ({key}), which nearplane does not read.")


def told(store: Store, quantization: Mapping[str, Any]) -> str | None:
    """Say what becomes of small floats; None for a store without any."""
    if not isinstance(store, DenseStore):
        return None
    groups = [group.get("input_activations") for group in _groups(quantization)]
    rounded = any(groups) or method_of(quantization) in ("fp8", "mxfp8", "fbgemm_fp8", "modelopt", "modelopt_fp4")
    inputs = (
        "; engines that run it so also round the inputs of its linears, which nearplane does not" if rounded else ""
    )
    kinds = " and ".join(store.kinds)
    return f"{len(store.coded)} weights are stored as {kinds} ({method_of(quantization)}) and read as dense{inputs}"


def strays(store: Store, names: Iterable[str]) -> list[str]:
    """List tensors that show that a weight is quantized, among ``names``, which no format has taken."""
    names = sorted(names)
    return sorted({*named_strays(names), *(name for name in names if _shows(name, store.dtype(name)))})


def named_strays(names: Iterable[str]) -> list[str]:
    """List names that only tensors of a quantized weight have."""
    names = sorted(names)
    known = set(names)
    pairs = [(name.removesuffix(ending), other, name) for name in names for ending, other in TOGETHER]
    together = {name for stem, other, name in pairs if stem != name and f"{stem}{other}" in known}
    return [name for name in names if name in together or SIGNS.search(name)]


def refuse_strays(store: Store, names: Iterable[str], quantization: Mapping[str, Any] | None) -> None:
    """Raise NearplaneError for the first tensor that shows that a weight is quantized, and that no format has taken."""
    found = strays(store, names)
    if found:
        raise NearplaneError(unexplained(store.folder, found[0], quantization, store.dtype(found[0])))


def unexplained(
    folder: Path, name: str, quantization: Mapping[str, Any] | None, dtype: torch.dtype | None = None
) -> str:
    """Write the sentence about such a tensor."""
    stored = "" if dtype is None else f" ({str(dtype).removeprefix('torch.')})"
    what = f"{folder}: tensor {name}{stored} is part of a quantized weight"
    if quantization is None:
        return (
            f"{what}, and config.json has no quantization_config that says how to read it; {again(folder)} with its "
            f"config.json, or give {original(folder)}."
        )
    return (
        f"{what} that the quantization_config ({method_of(quantization)}) does not explain; {again(folder)}, or give "
        f"{original(folder)}."
    )


def empty(folder: Path, quantization: Mapping[str, Any]) -> str:
    """Write the sentence about a configuration that promises quantized weights where there are none."""
    return (
        f"{folder} says that it is quantized ({method_of(quantization)}), but holds no quantized tensor; if its weights are "
        "those of the original, delete its quantization_config, in config.json or beside it."
    )


def already(model: str, folder: Path, quantization: Mapping[str, Any]) -> str:
    """Write the sentence about a model that is quantized and is no original."""
    method = method_of(quantization)
    bits = quantization.get("bits") or quantization.get("w_bit") or (4 if quantization.get("load_in_4bit") else None)
    bits = f", {bits} bits" if isinstance(bits, int) else ""
    return f"{model} is quantized already ({method}{bits}); {remedy(folder)}."


def remedy(folder: Path) -> str:
    """Say what to give in place of a quantized model."""
    return f"give {original(folder)}, or make it dense with the tool that wrote it"


def original(folder: Path) -> str:
    """Say where the original model of a folder is to be found: its card (README.md) often names it."""
    card = folder / "README.md"
    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
    except (OSError, UnicodeDecodeError):
        text = ""
    head = text.split("\n---", 1)[0] if text.startswith("---") else ""
    named = BASE.search(head)
    if named is None:
        return "the original model (often the base_model of its card)"
    return f"the original model (the base_model of its card: {named[1].strip(chr(34) + chr(39))})"


def _shows(name: str, dtype: torch.dtype) -> bool:
    """Tell whether the dtype of a tensor shows that a weight is quantized."""
    if dtype.is_floating_point:
        return dtype in SMALL_FLOATS or dtype == DTYPES.get("F8_E8M0")
    return dtype not in NOT_WEIGHTS and name.endswith(("weight", "_proj"))


def _groups(quantization: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """List the config groups of compressed-tensors that quantize weights."""
    groups = quantization.get("config_groups")
    found = groups.values() if isinstance(groups, dict) else ()
    return [group for group in found if isinstance(group, dict) and _weights(group)]


def _weights(group: Mapping[str, Any]) -> Mapping[str, Any]:
    weights = group.get("weights")
    return weights if isinstance(weights, dict) else {}


def _sizes(quantization: Mapping[str, Any], folder: Path) -> Sizes:
    """Read how many rows and columns share a scale."""
    pairs = quantization.get("expert_dtype") == "fp4"
    method = method_of(quantization)
    if method in ("fp8", "mxfp8"):
        return Sizes(_pair(quantization.get("weight_block_size", [BLOCK, BLOCK]), folder), pairs)
    blocks = set[tuple[int | None, int | None]]()
    for weights in map(_weights, _groups(quantization)):
        if weights.get("strategy") == "block":
            blocks.add(_pair(weights.get("block_structure"), folder))
        elif weights.get("group_size"):
            blocks.add(_pair([1, weights["group_size"]], folder))
    return Sizes(blocks.pop(), pairs) if len(blocks) == 1 else Sizes(pairs=pairs)


def _pair(value: Any, folder: Path) -> tuple[int | None, int | None]:
    """Check a block's size. Raises NearplaneError if it is no pair of positive integers."""
    if value is None:
        return None, None
    if isinstance(value, str):  # "128x128"
        value = [int(part) for part in value.split("x") if part.isdigit()]
    if not isinstance(value, list) or len(value) != 2 or any(type(size) is not int or size < 1 for size in value):
        raise NearplaneError(
            f"quantization_config of {folder} names blocks of {value!r}; a block has a number of rows and one of columns."
        )
    return value[0], value[1]


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return what dense weights count as: the dtype that config.json names, else bfloat16."""
    for part in parts_of(config):
        named = part.get("dtype") or part.get("torch_dtype")
        found = getattr(torch, str(named).removeprefix("torch."), None)
        if isinstance(found, torch.dtype) and found.is_floating_point and found not in SMALL_FLOATS:
            return found
    return torch.bfloat16
