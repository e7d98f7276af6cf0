"""Keep keys and values of a decoded sequence in memory that grows ahead, inside transformers' own cache.

``hold`` puts layers of our own into a ``DynamicCache``. Their ``keys`` and ``values`` are views of that memory, so that
transformers finds in them what it would have put there. Whatever else writes to a layer (an update by the plain path, crop,
beams) takes plain tensors from then on, and the next ``hold`` copies them into memory again.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

SPARE = 256  # positions ahead of what is stored, at least; and as many as are stored


class Memory(ctypes.Structure):
    """The struct NearplaneMemory of decode.cpp."""

    _fields_ = (("keys", ctypes.c_void_p), ("values", ctypes.c_void_p), ("stored", ctypes.c_int64))


class Run:
    """The memory of all layers of one sequence."""

    def __init__(self, layers: list[Any], position: int) -> None:
        """Copy what the layers hold.

        Args:
            layers: layers of a cache, of one sequence, which hold some positions.
            position: tokens so far, also those that a sliding window has dropped.
        """
        stored = [layer.keys.shape[-2] for layer in layers]
        self.position = position
        self.dropped: list[int] = [position - count for count in stored]
        self.capacity: int = max(stored) + max(SPARE, *stored)
        self.live = True
        """Whether all layers still hold their keys and values here."""
        with torch.inference_mode(False):  # else what is made here could not be changed outside of it
            self.keys, self.values = (
                [self._grown(getattr(layer, name)) for layer in layers] for name in ("keys", "values")
            )
        self.memories = (Memory * len(layers))(
            *(Memory(k.data_ptr(), v.data_ptr(), n) for k, v, n in zip(self.keys, self.values, stored, strict=True))
        )

    def _grown(self, part: Tensor) -> Tensor:
        """Copy keys or values into memory that has room for more."""
        _, heads, stored, width = part.shape
        memory = torch.zeros(1, heads, self.capacity, width, dtype=part.dtype)
        memory[:, :, :stored] = part.detach()
        return memory

    def stored(self, layer: int) -> int:
        """Positions in the memory of a layer."""
        return self.position - self.dropped[layer]

    @property
    def full(self) -> bool:
        """Whether no other token has room."""
        return self.position - min(self.dropped) >= self.capacity

    def advance(self) -> None:
        """Count one token more, which C++ has written."""
        self.position += 1
        for memory in self.memories:
            memory.stored += 1


class _Held:
    """What layers of both kinds share: their tensors are plain ones, or views of a run's memory."""

    _run: Run | None = None
    _index: int = 0
    _plain: dict[str, Any]

    def _read(self, name: str) -> Any:
        run = self._run
        if run is None:
            return self._plain.get(name)
        if name == "cumulative_length":
            return run.position
        stored, window = run.stored(self._index), getattr(self, "sliding_window", None)
        first = 0 if window is None else max(0, stored - window + 1)
        return (run.keys if name == "keys" else run.values)[self._index][:, :, first:stored]

    def _write(self, name: str, value: Any) -> None:
        run = self._run
        if run is not None:
            self._plain = {each: self._read(each) for each in ("keys", "values", "cumulative_length")}
            self._run, run.live = None, False
        self._plain[name] = value

    def __getstate__(self) -> dict[str, Any]:
        """Give a copy plain tensors of its own: addresses are not copied."""
        state = {**self.__dict__, "_run": None}
        values = {name: self._read(name) for name in ("keys", "values", "cumulative_length")}
        if self._run is not None:
            values = {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}
        return {**state, "_plain": values}


def _property(name: str) -> Any:
    return property(lambda self: self._read(name), lambda self, value: self._write(name, value))


class GrowingLayer(_Held, DynamicLayer):  # type: ignore[misc]
    """A layer that sees every position."""

    keys, values = _property("keys"), _property("values")


class GrowingWindowLayer(_Held, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A layer that sees a sliding window."""

    keys, values, cumulative_length = _property("keys"), _property("values"), _property("cumulative_length")


KINDS: dict[type, Any] = {
    DynamicLayer: GrowingLayer,
    DynamicSlidingWindowLayer: GrowingWindowLayer,
    GrowingLayer: GrowingLayer,
    GrowingWindowLayer: GrowingWindowLayer,
}


def hold(cache: Any, shapes: tuple[int, int, int], windows: tuple[int, ...], dtype: torch.dtype) -> Run | None:
    """Have a cache keep its sequence in memory of ours with room for another token.

    Args:
        cache: what a model was given as ``past_key_values``.
        shapes: layers of the model, heads of keys, their width.
        windows: of each layer, the positions that a token sees; 0: all.
        dtype: of keys and values.

    Returns:
        The memory; None for a cache that is of another kind or holds other than one sequence.
    """
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False) or len(cache.layers) != shapes[0]:
        return None
    layers = cache.layers
    run: Run | None = getattr(layers[0], "_run", None)
    if run is not None and run.live and not run.full and getattr(layers[-1], "_run", None) is run:
        return run
    if not all(_fits(layer, shapes[1:], window, dtype) for layer, window in zip(layers, windows, strict=True)):
        return None
    position = layers[0].get_seq_length()
    if {layer.get_seq_length() for layer in layers} != {position} or not position:
        return None
    run = Run(layers, position)
    for i, layer in enumerate(layers):
        cache.layers[i] = _taken(layer, run, i)
    return run


def _fits(layer: Any, shape: tuple[int, ...], window: int, dtype: torch.dtype) -> bool:
    """Tell whether a layer of a cache holds one sequence as the fused step can continue it."""
    if type(layer) not in KINDS or not layer.is_initialized:
        return False
    if getattr(layer, "record_past", False) or getattr(layer, "sliding_window", 0) not in (0, window):
        return False
    keys, values = layer.keys, layer.values
    if (keys.shape[0], keys.shape[1], *keys.shape[3:]) != (1, *shape) or values.shape != keys.shape:
        return False
    return bool(keys.dtype == values.dtype == dtype and keys.device.type == "cpu" and not keys.requires_grad)


def _taken(layer: Any, run: Run, index: int) -> Any:
    """Make the layer of a run that stands for another."""
    kind = KINDS[type(layer)]
    made = kind.__new__(kind)
    names = ("keys", "values", "cumulative_length", "_run", "_index", "_plain")
    made.__dict__.update({name: value for name, value in vars(layer).items() if name not in names})
    made.__dict__.update(_run=run, _index=index, _plain={})
    return made
