"""A model whose weights are not read: enough to find blocks and stages, and to say what a run will need.

A source in sketch mode keeps its true widths, and what is large in it never exists: each output of a linear becomes a
seeded sum of two of its inputs, the rows of an embedding are windows on one random vector. Norms, biases and the like are
small and are drawn. Which linears read one tensor, and which outputs join the residual stream, does not depend on what the
weights are: ``discover`` is the same code, and finds the same.
"""

import zlib
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nearplane.core.errors import NearplaneError
from nearplane.formats.store import Store, read_json


class Unsketchable(NearplaneError):
    """A model that reads a weight by itself: it cannot be probed without its weights."""


class Promised(Store):
    """The tensors that a configuration alone promises: every parameter under the model's own name, tied ones once."""

    def __init__(self, folder: Path, model: nn.Module, dtype: torch.dtype) -> None:
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        self.folder = folder
        self._promised = {
            name: (tuple(value.shape), dtype if value.is_floating_point() else value.dtype)
            for name, value in model.state_dict().items()
            if name not in tied
        }
        self.names = frozenset(self._promised)

    def get(self, name: str) -> Tensor:
        """There is none."""
        raise NearplaneError(f"{self.folder} holds a configuration and no weights; a run needs them.")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape that the tensor will have."""
        return self._promised[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """The configuration's dtype."""
        return self._promised[name][1]

    def nbytes(self, name: str) -> int:
        """Bytes that the tensor will have."""
        return prod(self.shape(name)) * self.dtype(name).itemsize


def stand_in(model: nn.Module) -> None:
    """Let every linear of a skeleton compute something cheap that needs no weight."""
    for name, module in model.named_modules():
        if _multiplies(module):
            module.forward = _Draw(name, module)


def stand_down(model: nn.Module) -> None:
    """Give every linear its own forward back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _Draw):
            del module.forward


def drawn(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Draw the parameters and buffers of these names that are small, or a window on something small."""
    found: dict[str, Tensor] = {}
    for name in names:
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if _multiplies(owner) and leaf == "weight":
            continue
        shape = owner.state_dict()[leaf].shape
        if isinstance(owner, nn.Embedding):
            found[name] = torch.randn(sum(shape), generator=_seeded(name)).as_strided(shape, (1, 1))
        else:
            found[name] = 1 + torch.randn(shape, generator=_seeded(name)) / 8
    return found


def promised_dtype(folder: Path) -> torch.dtype:
    """Read the dtype that a config.json names; float32 where it names none. NearplaneError for what is no dtype."""
    raw = read_json(folder / "config.json")
    text = raw.get("text_config")
    given = raw.get("dtype") or raw.get("torch_dtype") or (text.get("dtype") if isinstance(text, dict) else None)
    dtype = getattr(torch, str(given or "float32").removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise NearplaneError(
            f"{folder / 'config.json'} names the dtype {given!r}, which is no floating dtype of torch."
        )
    return dtype


def _multiplies(module: nn.Module) -> bool:
    """Whether a linear does nothing else, as some routers do."""
    return isinstance(module, nn.Linear | Conv1D) and type(module).forward in (nn.Linear.forward, Conv1D.forward)


class _Draw:
    """What stands in for the forward of a linear."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        weight = module.weight
        assert isinstance(weight, Tensor)
        self.out = weight.shape[1 if isinstance(module, Conv1D) else 0]

    def __call__(self, x: Tensor) -> Tensor:
        generator = _seeded(self.name)
        first, second = torch.randint(0, x.shape[-1], (2, self.out), generator=generator)
        sign = torch.randn(2, self.out, generator=generator)
        return x[..., first] * sign[0] + x[..., second] * sign[1]


def _seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))
