"""A model without its weights: enough to find blocks and stages, and to say what a run will need.

Decides how a probe forward runs where no weight is read, or none is there. The skeleton keeps its true widths, and what is
large in it never exists: each output of a linear becomes a seeded sum of two of its inputs, the rows of an embedding
are windows on one random vector. Norms, biases and the like are small and are drawn. Which linears read one tensor, and
which outputs join the residual stream, does not depend on what the weights are: discovery (``discover.py``) is the same
code, and finds the same. A copy of the model with smaller widths would do as well, had every architecture the same names
for its widths.
"""

import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.formats.store import Store, read_json
from nearplane.models.discover import Block, discover
from nearplane.models.experts import set_visit
from nearplane.models.inputs import ForwardFailed
from nearplane.models.locate import locate, read_config
from nearplane.models.source import Source, build_skeleton, open_source, refuse_unread
from nearplane.models.towers import is_linear


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


@dataclass
class Sketch(Source):
    """A source whose large weights are never made; its linears compute something cheap instead."""

    def load(self, prefix: str, device: torch.device, dtype: torch.dtype, *, skip: Any = (), rows: Any = None) -> None:
        """Draw what is small below ``prefix``."""
        loaded: dict[str, Tensor] = {}
        for name in self._below(prefix):
            owner = self.model.get_submodule(name.rpartition(".")[0])
            leaf = name.rpartition(".")[2]
            if (_multiplies(owner) and leaf == "weight") or any(name.startswith(s + ".") for s in skip):
                continue
            shape = owner.state_dict()[leaf].shape
            if isinstance(owner, nn.Embedding):
                line = torch.randn(sum(shape), generator=_seeded(name))
                loaded[name] = line.as_strided(shape, (1, 1))
            else:
                loaded[name] = 1 + torch.randn(shape, generator=_seeded(name)) / 8
            self._set(name, loaded[name])
        self._tie(loaded, skip)


def open_sketch(model: str | Path, *, trust_remote_code: bool = False) -> Sketch:
    """Open a folder, hub id or ``demo`` for a probe without weights; the folder may hold nothing but config.json.

    Of a hub id, only the small files are fetched. Raises NearplaneError for what ``open_source`` would refuse.
    """
    folder = locate(model, weights=False, trust_remote_code=trust_remote_code)
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        source = open_source(folder, trust_remote_code=trust_remote_code)
    else:
        source = _from_config(folder, trust_remote_code)
    for name, module in source.model.named_modules():
        if _multiplies(module):
            module.forward = _Draw(name, module)
    parts = (source.folder, source.config, source.store, source.model, source.names, trust_remote_code)
    return Sketch(str(model), *parts)


def discover_sketch(source: Sketch) -> list[Block]:
    """Blocks and stages, as ``discover`` finds them. Unsketchable where the model reads a weight by itself."""
    try:
        return discover(source)
    except ForwardFailed as error:
        kind = source.config.model_type
        raise Unsketchable(
            f"{source.folder}: a model of type {kind} cannot be probed without its weights "
            f"({(str(error.__cause__).strip().splitlines() or ['no word'])[0][:100]}); nearplane inspect reads one block of it."
        ) from error


def _from_config(folder: Path, trust_remote_code: bool) -> Source:
    raw = read_json(folder / "config.json")
    config = read_config(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise SettingError(f"{folder} is quantized already; give the original model.")
    text = raw.get("text_config")
    given = raw.get("dtype") or raw.get("torch_dtype") or (text.get("dtype") if isinstance(text, dict) else None)
    dtype = getattr(torch, str(given or "float32").removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise NearplaneError(
            f"{folder / 'config.json'} names the dtype {given!r}, which is no floating dtype of torch."
        )
    skeleton = build_skeleton(config, folder, trust_remote_code=trust_remote_code)
    refuse_unread(skeleton, folder)
    set_visit(skeleton, "each")
    store = Promised(folder, skeleton, dtype)
    return Source(str(folder), folder, config, store, skeleton, {name: name for name in store.names})


def _multiplies(module: nn.Module) -> bool:
    """Whether a linear does nothing else, as some routers do."""
    return is_linear(module) and type(module).forward in (nn.Linear.forward, Conv1D.forward)


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
