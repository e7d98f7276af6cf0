"""Run a model without its weights: enough to find blocks and stages, and to plan a run.

A source in sketch mode keeps its true widths but holds no large tensor. Each output of a linear becomes a seeded sum of two
of its inputs. An embedding becomes windows on one random vector. Norms and biases are small and are drawn. Which linears
read one tensor, and which outputs join the residual stream, does not depend on the weights. So ``discover`` runs
unchanged and finds the same.
"""

import zlib
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nearplane.core.errors import NearplaneError
from nearplane.formats.store import SMALL_FLOATS, Store, read_json
from nearplane.models import absent

# Bytes of memory that a weight stored as a small float takes while it is made dense: code, scale and float32, rounded up.
READ_CODED = 6


class Unsketchable(NearplaneError):
    """The refusal of a model that cannot be probed without weights, because its code reads one by itself."""


class Promised(Store):
    """The tensors that a configuration promises: every parameter under the model's own name, tied ones once."""

    def __init__(self, folder: Path, model: nn.Module, dtype: torch.dtype, *, coded: bool = False) -> None:
        """List the tensors of a skeleton; floats get ``dtype``.

        Args:
            folder: holds the configuration.
            model: the skeleton.
            dtype: of floats.
            coded: matrices will be stored as small floats, and made dense in float32 when they are read.
        """
        tied = absent.tied(model)
        computed = {name for name, value in model.named_parameters() if not value.is_meta}
        self.folder, self.coded = folder, coded
        self._promised = {
            name: (tuple(value.shape), dtype if value.is_floating_point() else value.dtype)
            for name, value in model.state_dict().items()
            if name not in tied and name not in computed
        }
        self.names = frozenset(self._promised)

    def get(self, name: str) -> Tensor:
        """Raise NearplaneError, since there is no data."""
        raise NearplaneError(f"{self.folder} holds a configuration and no weights; a run needs them.")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that a tensor will have."""
        return self._promised[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor will have."""
        return self._promised[name][1]

    def nbytes(self, name: str) -> int:
        """Return the size in bytes that a tensor will have."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def reading(self, name: str) -> int:
        """Count the bytes of memory that reading a tensor will take."""
        dense = self.coded and len(self.shape(name)) > 1
        return READ_CODED * prod(self.shape(name)) if dense else self.nbytes(name)


def stand_in(model: nn.Module) -> None:
    """Replace the forward of every linear by a cheap function that needs no weight, in place."""
    for name, module in model.named_modules():
        if _multiplies(module):
            module.forward = _Draw(name, module)


def stand_down(model: nn.Module) -> None:
    """Give every linear its own forward back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _Draw):
            del module.forward


def drawn(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Draw stand-ins for parameters and buffers, seeded by their names.

    Args:
        model: the skeleton.
        names: names of parameters and buffers; weights of linears are left out.

    Returns:
        Tensors by name, float32. An embedding is a strided view of one vector.
    """
    values: dict[str, Tensor] = {}
    for name in names:
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if _multiplies(owner) and leaf == "weight":
            continue
        shape = owner.state_dict()[leaf].shape
        if isinstance(owner, nn.Embedding) and leaf == "weight":  # T5Gemma 2 keeps another vector beside
            values[name] = torch.randn(sum(shape), generator=_seeded(name)).as_strided(shape, (1, 1))
        else:
            values[name] = 1 + torch.randn(shape, generator=_seeded(name)) / 8
    return values


def promised_dtype(folder: Path) -> torch.dtype:
    """Read the dtype that config.json names, or float32. NearplaneError if the name is no floating dtype."""
    raw = read_json(folder / "config.json")
    text = raw.get("text_config")
    named = raw.get("dtype") or raw.get("torch_dtype") or (text.get("dtype") if isinstance(text, dict) else None)
    dtype = getattr(torch, str(named or "float32").removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise NearplaneError(
            f"{folder / 'config.json'} names the dtype {named!r}, which is no floating dtype of torch."
        )
    return torch.bfloat16 if dtype in SMALL_FLOATS else dtype


class _Draw:
    """The forward that stands in for a linear's."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        weight = module.weight
        assert isinstance(weight, Tensor)
        self.out = weight.shape[1 if isinstance(module, Conv1D) else 0]

    def __call__(self, x: Tensor) -> Tensor:
        """Mix two columns of ``x``, (..., in), into each of the columns of (..., out)."""
        generator = _seeded(self.name)
        first, second = torch.randint(0, x.shape[-1], (2, self.out), generator=generator)
        sign = torch.randn(2, self.out, generator=generator)
        return x[..., first] * sign[0] + x[..., second] * sign[1]


def _multiplies(module: nn.Module) -> bool:
    """Return whether a module is a linear with the plain forward, unlike some routers."""
    return isinstance(module, nn.Linear | Conv1D) and type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _seeded(name: str) -> torch.Generator:
    """Return a generator seeded by a name."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))
