"""What plain transformers loads by its own means. Each type that nearplane knows was run (docs/engines.md)."""

from nearplane.checkpoint.engines.describe import Described, Model
from nearplane.checkpoint.engines.findings import AWQ, COMPRESSED, GPTQS, Findings, clipped, grids_of, online, tail
from nearplane.core.grid import Grid

TRANSFORMERS = "transformers 5.23"
FORMATS = (COMPRESSED, *GPTQS, AWQ)
FAST_BITS = (4, 8)


def judge(_: str, checkpoint: Described, found: Findings) -> None:
    """Add what is known of transformers without ``nearplane.enable()``."""
    format, model, grids = checkpoint.format, checkpoint.model, list(grids_of(checkpoint))
    found.refuse(online(checkpoint))
    found.refuse(clipped(TRANSFORMERS, checkpoint))
    for grid, shapes in grids:
        if not found.refuse(tail(grid, shapes)):
            found.note(_needs(format, grid))
    for weight in checkpoint.weights:
        if weight.activations is not None and weight.activations.sym:
            last = (1 << (weight.activations.bits - 1)) - 1
            told = f"{TRANSFORMERS} simulates symmetric activations with a scale of max/{last + 0.5:g}, not max/{last}"
            if weight.activations.bits < 8:  # another model: a step is a fifteenth of the range
                found.refuse(f"{told} as it was calibrated")
            else:
                found.note(f"{told} as vLLM and nearplane")
    if len(grids) > 1 and format in GPTQS:
        found.note(
            "optimum, by which transformers loads GPTQ, knows one grid for all linears; "
            "load this one, whose dynamic rules name several, with the package gptqmodel itself"
        )
    if model is None:
        return
    found.refuse(_refusal(format, model))
    if model.initialises and format == COMPRESSED:
        found.note(
            f"{TRANSFORMERS} loads {model.name} with quantization_config=CompressedTensorsConfig(dequantize=True) only"
        )
    if model.head and format != COMPRESSED:
        found.note(f"whether {TRANSFORMERS} loads a quantized output head was not tried")


def _needs(format: str, grid: Grid) -> str:
    """Tell what transformers needs."""
    if format == AWQ:
        return f"{TRANSFORMERS} needs the package gptqmodel for AWQ; it was not run here"
    if format in GPTQS:
        kernel = "" if grid.storage_bits in FAST_BITS and grid.sym else ", and runs its plain torch kernel"
        return f"{TRANSFORMERS} needs the packages optimum and gptqmodel for it{kernel}"
    if not grid.sym:
        return f"{TRANSFORMERS} loads it with quantization_config=CompressedTensorsConfig(dequantize=True) only"
    return f"{TRANSFORMERS} needs the package compressed-tensors, and makes the weights dense at the first forward"


def _refusal(format: str, model: Model) -> str | None:
    """Tell why transformers does not load this model with these linears quantized; None if nothing is known.

    transformers makes experts dense while it merges them: no condition was found for those.
    """
    if format == COMPRESSED and model.converts:
        return f"{TRANSFORMERS} merges or splits weights of {model.name} while loading, not packed ones"
    if format == COMPRESSED and model.merges and model.dense_experts:
        return (
            f"{TRANSFORMERS} looks for packed experts in all layers of {model.name}, and some stay dense: quantize all"
        )
    if not model.experts or model.scaled:
        return None
    if not model.merges:
        return f"{TRANSFORMERS} does not find experts one by one in {model.name}, and fills them at random"
    if model.zeros:
        return f"{TRANSFORMERS} merges experts without their zero points"
    return None
