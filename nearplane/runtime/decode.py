"""Call the C++ step that takes one token through a whole decoder (decode.cpp).

``Decoder`` holds what C++ needs of a model that ``standard.py`` has described.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nearplane.runtime import cpu
from nearplane.runtime.growing import Run
from nearplane.runtime.linear import QuantizedLinear

TURNS = 512  # positions whose rotations are computed at a time, at least


class _Matrix(ctypes.Structure):
    """The struct NearplaneMatrix."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "dense", "bias")),
        *((name, ctypes.c_int64) for name in ("out", "columns")),
        *((name, ctypes.c_int32) for name in ("dtype", "bias_dtype", "path")),
    )


class _Norm(ctypes.Structure):
    """The struct NearplaneNorm."""

    _fields_ = (("weight", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("eps", ctypes.c_float))


class _Block(ctypes.Structure):
    """The struct NearplaneBlock."""

    _fields_ = (
        *((name, _Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, _Norm) for name in ("before", "after", "query", "key")),
        ("window", ctypes.c_int64),
        ("turns", ctypes.c_int32),
    )


class _Decoder(ctypes.Structure):
    """The struct NearplaneDecoder."""

    _fields_ = (
        ("blocks", ctypes.c_void_p),
        *((name, _Matrix) for name in ("embedding", "head")),
        ("last", _Norm),
        *((name, ctypes.c_int64) for name in ("count", "hidden", "heads", "shared", "width", "turned", "inner")),
        *((name, ctypes.c_float) for name in ("scale", "embedded", "added", "divided")),
        ("dtype", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Block:
    """One decoder block: its modules, and how its attention sees."""

    linears: tuple[nn.Module, ...]
    """q, k, v, o, gate, up, down."""
    norms: tuple[nn.Module | None, ...]
    """Before attention, before the MLP, of each head of q, of each head of k."""
    window: int
    """Positions that a token sees, itself included; 0: all."""
    turns: bool
    """Whether q and k are rotated."""


@dataclass(frozen=True)
class Description:
    """A model whose blocks are of the standard kind."""

    blocks: tuple[Block, ...]
    embedding: nn.Module
    last: nn.Module
    head: nn.Module
    rotation: nn.Module
    heads: int
    shared: int
    """Heads of keys and values."""
    width: int
    """Of a head."""
    scale: float
    """Of scores before softmax."""
    embedded: float
    """Factor of the embedding."""
    added: float
    """Factor of what attention and MLP add."""
    divided: float
    """Divisor of logits."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of hidden states in the plain path, of keys and values, and of logits."""
        weight: Tensor = self.embedding.weight  # type: ignore[assignment]
        return weight.dtype

    def modules(self) -> list[nn.Module]:
        """Every module whose weights are read."""
        inner = [part for block in self.blocks for part in (*block.linears, *block.norms) if part is not None]
        return [*inner, self.embedding, self.last, self.head]


class Decoder:
    """A described model as C++ takes it, valid while its tensors stay where they are."""

    def __init__(self, description: Description, dtype: torch.dtype | None = None) -> None:
        """Prepare a model.

        Args:
            description: the model.
            dtype: of keys, values and logits; None: that of the model.
        """
        isa = cpu.best()
        assert isa is not None
        self.description, self.isa, self.dtype = description, isa, dtype or description.dtype
        kernel = cpu.library(isa)
        assert kernel is not None
        self.kernel = kernel
        self.owners: list[Any] = []
        d = description
        blocks = (_Block * len(d.blocks))(*(self._block(block) for block in d.blocks))
        self.vocabulary = int(getattr(d.head, "out_features", 0))
        self.hidden = int(getattr(d.embedding, "embedding_dim", 0))
        inner = int(getattr(d.blocks[0].linears[4], "out_features", 0))
        self.cosine = self.sine = torch.empty(0, 0)
        self._turn(TURNS)
        sizes = (len(d.blocks), self.hidden, d.heads, d.shared, d.width, self.cosine.shape[1], inner)
        factors = (d.scale, d.embedded, d.added, d.divided)
        parts = (self._matrix(d.embedding), self._matrix(d.head), _norm(d.last))
        self.struct = _Decoder(ctypes.addressof(blocks), *parts, *sizes, *factors, cpu.DTYPES[self.dtype])
        self.owners.append(blocks)
        self.address = ctypes.addressof(self.struct)

    def step(self, token: int, run: Run, threads: int | None = None) -> Tensor:
        """Compute the logits of a token, and add its keys and values to a run.

        Args:
            token: below the number of embeddings.
            run: the sequence so far, which is not full.
            threads: number of threads; None: torch's.

        Returns:
            (vocabulary,) in the model's dtype.

        Raises:
            MemoryError: no memory for the activations.
        """
        logits = torch.empty(self.vocabulary, dtype=self.dtype)
        self._call(token, run, logits.data_ptr(), None, threads)
        return logits

    def last(self, token: int, run: Run) -> Tensor:
        """Do what ``step`` does, but for the head: return (hidden,), float32, which the head would read."""
        hidden = torch.empty(self.hidden)
        self._call(token, run, None, hidden.data_ptr(), None)
        return hidden

    def _call(self, token: int, run: Run, logits: int | None, last: int | None, threads: int | None) -> None:
        if run.position >= len(self.cosine):
            self._turn(2 * run.position)
        cosine, sine = self.cosine, self.sine
        offset = 4 * run.position * cosine.shape[1]
        if self.kernel.nearplane_decode(
            self.address, run.memories, run.capacity, token, cosine.data_ptr() + offset, sine.data_ptr() + offset,
            logits, last, threads or torch.get_num_threads(),
        ):  # fmt: skip
            raise MemoryError(f"no memory for the activations of {run.position + 1} positions")
        run.advance()

    def head(self, hidden: Tensor, threads: int | None = None) -> Tensor:
        """Multiply the head with a last hidden state (hidden,) in float32; ``step`` does so at its end."""
        logits = torch.empty(self.vocabulary)
        if self.kernel.nearplane_head(
            self.address, hidden.data_ptr(), logits.data_ptr(), threads or torch.get_num_threads()
        ):
            raise MemoryError("no memory for the activations of a token")
        return logits

    def _turn(self, positions: int) -> None:
        """Compute the rotations of so many positions by the model's own module."""
        with torch.inference_mode(False), torch.no_grad():
            like = torch.empty(1, dtype=torch.float32)
            cosine, sine = self.description.rotation(like, torch.arange(positions)[None])
        self.cosine, self.sine = (part[0].float().contiguous() for part in (cosine, sine))

    def _block(self, block: Block) -> _Block:
        linears, norms = (self._matrix(part) for part in block.linears), (_norm(part) for part in block.norms)
        return _Block(*linears, *norms, block.window, int(block.turns))

    def _matrix(self, module: Any) -> _Matrix:
        bias = getattr(module, "bias", None)
        adds = (None, 0) if bias is None else (bias.data_ptr(), cpu.DTYPES[bias.dtype])
        if isinstance(module, QuantizedLinear):
            handle = cpu.prepare(module.tiles)
            self.owners.append(handle)
            path = cpu.PATHS[cpu.resolve(module.arithmetic, self.isa)]
            packed = ctypes.addressof(handle.weight.contents)
            return _Matrix(packed, None, adds[0], module.out_features, module.in_features, 0, adds[1], path)
        weight = module.weight
        return _Matrix(None, weight.data_ptr(), adds[0], *weight.shape, cpu.DTYPES[weight.dtype], adds[1], 0)


def _norm(module: Any) -> _Norm:
    if module is None:
        return _Norm(None, 0, 0.0)
    return _Norm(module.weight.data_ptr(), cpu.DTYPES[module.weight.dtype], eps_of(module))


def eps_of(norm: Any) -> float:
    """Give what a norm adds to a mean of squares."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
