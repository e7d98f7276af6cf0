"""Experts of a checkpoint in a model that runs: packed linears one by one, or fused again into transformers' own module.

Of interest only where experts are quantized; else transformers places their tensors like any other.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nearplane.core.errors import NearplaneError, NumericalError
from nearplane.formats.read import Checkpoint
from nearplane.models.experts import EXPERT, experts_of
from nearplane.models.experts_disk import SplitStore, names_in_model, split


class Members:
    """Where the weights and biases of all experts lie in a checkpoint; empty where no expert is quantized."""

    def __init__(self, skeleton: nn.Module, checkpoint: Checkpoint, modules: dict[str, str]) -> None:
        """``modules``: of the model, by name of the quantized layer."""
        self.checkpoint = checkpoint
        quantized = {module: layer for layer, module in modules.items() if EXPERT.fullmatch(module)}
        self.experts = experts_of(skeleton) if quantized else {}
        self.layers: dict[str, str] = quantized if self.experts else {}
        """Quantized layer by linear of the model."""
        self.store = split(skeleton, checkpoint.store) if self.experts else checkpoint.store
        fused = {p.tensor for p in self.store.pieces.values()} if isinstance(self.store, SplitStore) else set()
        stored = (set(checkpoint.dense) - fused) | (self.store.names - checkpoint.store.names)
        found = names_in_model(skeleton, stored) if self.experts else {}
        self.dense = {name: disk for name, disk in found.items() if EXPERT.fullmatch(name.rpartition(".")[0])}
        """Name on disk by parameter of the model."""
        self.taken = fused | set(self.dense.values())
        """Tensors that are not transformers' to place."""
        self.linears = {
            f"{path}.{expert}.{linear}": part
            for path, module in self.experts.items()
            for expert in range(module.layout.experts)
            for linear, part in module.layout.parts.items()
        }

    def fused(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The fused parameters, made dense."""
        state: dict[str, Tensor] = {}
        for path, module in self.experts.items():
            state |= {f"{path}.{name}": torch.empty(shape, dtype=dtype) for name, shape in module.shapes.items()}
            for expert in range(module.layout.experts):
                for linear, part in module.layout.parts.items():
                    name = f"{path}.{expert}.{linear}"
                    for parameter, value in ((part.weight, self._weight(name)), (part.bias, self._bias(name))):
                        if parameter is not None and value is not None:
                            part.cut(module.layout.slab(state[f"{path}.{parameter}"], expert)).copy_(value)
        return state

    def fill(self, model: nn.Module, dtype: torch.dtype, packed: Callable[[str, Tensor | None], nn.Module]) -> None:
        """Put every expert's linear into the model; ``packed`` makes one of a quantized layer and a bias."""
        for name in self.linears:
            bias = self._bias(name)
            bias = None if bias is None else bias.to(dtype)
            if name in self.layers:
                model.set_submodule(name, packed(self.layers[name], bias))
                continue
            weight = self._weight(name).to(dtype)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
            model.set_submodule(name, linear)

    def _weight(self, name: str) -> Tensor:
        return self.checkpoint.weight(self.layers[name]) if name in self.layers else self._get(f"{name}.weight")

    def _bias(self, name: str) -> Tensor | None:
        return None if self.linears[name].bias is None else self._get(f"{name}.bias")

    def _get(self, parameter: str) -> Tensor:
        folder = self.checkpoint.store.folder
        if parameter not in self.dense:
            raise NearplaneError(f"{folder} lacks weights that config.json asks for, the first: {parameter}.")
        value = self.store.get(self.dense[parameter])
        if not bool(value.isfinite().all()):
            raise NumericalError(
                f"{folder}: weight {self.dense[parameter]} holds NaN or Inf; the checkpoint is broken."
            )
        return value
