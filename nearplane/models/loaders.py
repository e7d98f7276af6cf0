"""Which engines load a model for what it is, whatever its grids: those are the affair of ``formats/engines.py``."""

from collections.abc import Mapping

from torch import nn

from nearplane.core.grid import Grid
from nearplane.formats.engines import TITLES
from nearplane.models.classes import is_causal
from nearplane.models.experts import EXPERT, experts_of
from nearplane.models.experts_disk import converts, merges_experts

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
