"""Which engines load a choice of format, grid and shapes, and why not.

A table read from the engines' sources and documentation at the versions below, not run here but for what
``docs/formats.md`` marks as tested. ``refusal`` is a reason not to write such a checkpoint for that engine, ``caveat`` a
condition under which it loads, or what it costs there. ``fused`` says which linears engines run as one.
"""

from collections.abc import Iterable, Mapping

from torch import nn

from nearplane.core.activations import TokenGrid
from nearplane.core.errors import SettingError
from nearplane.core.grid import Grid
from nearplane.formats.base import ONLINE_ONLY_HERE, ONLY_HERE, tail_reason
from nearplane.models.experts import EXPERT, experts_of
from nearplane.models.experts_disk import converts, merges_experts
from nearplane.models.inputs import is_causal

ENGINES: tuple[str, ...] = ("vllm", "sglang", "transformers")
VLLM, SGLANG, TRANSFORMERS = "vLLM 0.33", "SGLang 0.5.23", "transformers 5.23"
TITLES = dict(zip(ENGINES, (VLLM, SGLANG, TRANSFORMERS), strict=True))
"""The versions that this was read at."""

FORMATS = ("compressed-tensors", "gptq", "gptq_v2")
# Marlin, the fast kernel of vLLM and SGLang, knows these group sizes, 4 and 8 bits symmetric, and 4 bits asymmetric.
MARLIN_GROUPS = (-1, 32, 64, 128)
FAST_BITS = (4, 8)


def refusal(engine: str, format: str, grid: Grid, shapes: Iterable[tuple[int, int]]) -> str | None:
    """Why the engine does not load weights of these (out, in) shapes on this grid in this format; None if it does.

    SettingError for an engine or a format that does not exist.
    """
    _check(engine, format)
    for shape in sorted(set(shapes)):
        reason = tail_reason(grid, shape[1])
        if reason is not None:
            return f"{reason}; {ONLY_HERE}"
    bits, gptq = grid.storage_bits, format != "compressed-tensors"
    if engine == "vllm" and gptq and bits not in FAST_BITS:
        return f"{VLLM} loads GPTQ of 4 or 8 bits, not {bits}; compressed-tensors of {bits} bits it loads"
    if engine == "vllm" and gptq and not grid.sym:
        return f"{VLLM} loads symmetric GPTQ only; asymmetric weights it loads as compressed-tensors"
    if engine == "sglang" and not gptq and bits not in FAST_BITS:
        return f"{SGLANG} loads compressed-tensors of 4 or 8 bits, not {bits}"
    return None


def order_refusal(engine: str, grid: Grid) -> str | None:
    """Why the engine does not load GPTQ whose groups are in activation order (``desc_act``); None if it does.

    No checkpoint that nearplane writes has them; those of other tools may.
    """
    _check(engine, "gptq")
    if engine != "vllm" or grid.group_size == -1:
        return None
    return f"{VLLM} refuses groups in activation order (desc_act)"


def rounding_refusal(engine: str, grid: Grid, activations: TokenGrid | None) -> str | None:
    """Why the engine does not run such weights with activations rounded like that; None if it does, or none are rounded."""
    _check(engine, "compressed-tensors")
    if activations is None:
        return None
    if activations.clip < 1:
        return f"{TITLES[engine]} knows no clip of activations ({activations.clip:g}); {ONLY_HERE} as it was calibrated"
    plain = (grid.storage_bits, grid.group_size, grid.sym, activations.bits) == (8, -1, True, 8)
    if engine == "transformers" or plain:
        return None
    return (
        f"{TITLES[engine]} rounds activations to 8 bits beside 8-bit symmetric weights of one scale per row (group_size -1) "
        "only; of others it may run the weights and leave activations as they are"
    )


def online_refusal(engine: str, online: bool) -> str | None:
    """Why the engine does not load weights whose inputs are to be rotated while the model runs; None if they are not."""
    _check(engine, "compressed-tensors")
    return f"inputs of linears are rotated while the model runs (r4), which {ONLINE_ONLY_HERE}" if online else None


def caveat(engine: str, format: str, grid: Grid, shapes: Iterable[tuple[int, int]]) -> str | None:
    """On what condition the engine loads such a checkpoint, or what it costs there; None if nothing is known.

    None as well for what it refuses.
    """
    if refusal(engine, format, grid, shapes) is not None:
        return None
    if engine == "transformers":
        return _transformers(format, grid)
    return _marlin(engine, format, grid)


def mixed_caveat(engine: str, format: str) -> str | None:
    """What to know of a checkpoint whose linears have several grids, each of which the engine loads."""
    _check(engine, format)
    if format == "compressed-tensors":
        return None
    if engine == "transformers":
        return (
            "optimum, by which transformers loads GPTQ, knows one grid for all linears; "
            "load this one, whose dynamic rules name several, with the package gptqmodel itself"
        )
    return f"{TITLES[engine]} takes several grids from GPTQ's dynamic rules, which nothing here has tried"


def _marlin(engine: str, format: str, grid: Grid) -> str | None:
    """What vLLM and SGLang run more slowly than by Marlin."""
    bits, name = grid.storage_bits, TITLES[engine]
    if engine == "sglang" and format != "compressed-tensors" and (bits not in FAST_BITS or not grid.sym):
        return f"{SGLANG} runs it without its Marlin kernels, slower"
    if bits not in FAST_BITS:
        return f"{VLLM} runs {bits} bits by a CUDA kernel slower than those of 4 and 8 bits"
    if not grid.sym and bits == 8:
        return f"the Marlin kernels of {name} take 8 bits symmetric only; another kernel must run it, slower"
    if grid.group_size in MARLIN_GROUPS:
        return None
    known = ", ".join(map(str, MARLIN_GROUPS[1:]))
    return f"the Marlin kernels of {name} take group sizes {known} and -1; another must run {grid.group_size}, slower"


def _transformers(format: str, grid: Grid) -> str | None:
    if format != "compressed-tensors":
        kernel = "" if grid.storage_bits in FAST_BITS and grid.sym else ", and runs its plain torch kernel"
        return f"{TRANSFORMERS} needs the packages optimum and gptqmodel for it{kernel}"
    if not grid.sym:
        return f"{TRANSFORMERS} loads it with quantization_config=CompressedTensorsConfig(dequantize=True) only"
    return f"{TRANSFORMERS} needs the package compressed-tensors, and makes the weights dense at the first forward"


def _check(engine: str, format: str) -> None:
    if engine not in ENGINES:
        raise SettingError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}.")
    if format not in FORMATS:
        raise SettingError(f"format must be one of {', '.join(FORMATS)}; got {format!r}.")


# Read by transformers only once their weights are dense: their initialisation looks at weights.
DENSE_ONLY = ("T5", "MT5", "UMT5")
# Classes whose fused experts vLLM's loaders split, or read one by one, under the names that are written here.
SPLIT_BY_VLLM = ("GraniteMoe", "Llama4")


def model_refusal(engine: str, model: nn.Module, layers: Mapping[str, Grid], format: str) -> str | None:
    """Why the engine does not load this model with these linears quantized; None if nothing is known to hinder it.

    ``layers``: grid of each quantized linear by its name in the model, whose experts are taken apart.
    """
    if engine == "transformers" and format == "compressed-tensors" and converts(model):
        return f"{TITLES[engine]} merges or splits weights of {type(model).__name__} while loading, not packed ones"
    found = {name: grid for name, grid in layers.items() if EXPERT.fullmatch(name)}
    experts = {
        path: module for path, module in experts_of(model).items() if any(n.startswith(f"{path}.") for n in found)
    }
    if not experts:
        return None
    scaled = all(module.layout.scaled for module in experts.values())  # which transformers takes apart itself
    if engine == "transformers" and not scaled:
        if not merges_experts(model):
            return (
                f"{TITLES[engine]} does not find experts one by one in {type(model).__name__}, and fills them at random"
            )
        if not all(grid.sym for grid in found.values()):
            return f"{TITLES[engine]} merges experts without their zero points"
    elif engine != "transformers" and not merges_experts(model) and not type(model).__name__.startswith(SPLIT_BY_VLLM):
        return f"no loader of experts one by one was found for {type(model).__name__} in {TITLES[engine]}"
    return None


def model_caveat(engine: str, model: nn.Module, layers: Mapping[str, Grid]) -> str | None:
    """On what condition the engine loads such a model; None if nothing is known."""
    name = type(model).__name__
    if engine != "transformers":
        return None if is_causal(model) else f"whether {TITLES[engine]} has {name} was not looked up"
    experts = any(EXPERT.fullmatch(layer) for layer in layers) and not all(
        module.layout.scaled for module in experts_of(model).values()
    )
    if experts or name.startswith(DENSE_ONLY):
        return f"{TITLES[engine]} loads {name} with quantization_config=CompressedTensorsConfig(dequantize=True) only"
    return None
