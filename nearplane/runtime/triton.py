"""Decide whether the Triton kernels can run, and run them on CUDA devices.

The kernels are in triton_kernel.py, which is imported at the first call because Triton is optional (CUDA builds of torch
bring it). Tests on a CPU use Triton's interpreter, which shows what is computed but not how fast.

A call is one launch, without a question to the device, so that CUDA graphs can record it. Counters of arrived programs are
0 before and after every launch. Outside of graphs each stream has its own. Each recorded launch has counters of its own.
"""

from contextlib import nullcontext
from importlib.util import find_spec
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nearplane.core.errors import NearplaneError
from nearplane.runtime import tuned
from nearplane.runtime.layout import BLOCK, TILE, Shape
from nearplane.runtime.tuned import Choice
from nearplane.runtime.words import Words

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ARENA = 1 << 20  # counters for recorded launches, of one device, int32
UNPACKED = (64, 2)  # channels and blocks of a program of ``unpack``


def supports(shape: Shape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why the kernels cannot take such a weight or input; None if they can."""
    if device.type != "cuda":
        return f"the Triton kernel runs on CUDA, not on {device.type}"
    if dtype not in DTYPES:
        return f"the Triton kernel takes float32, float16 and bfloat16, not {dtype}"
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


def linear(x: Tensor, weight: Words, bias: Tensor | None, choice: Choice | None = None) -> Tensor:
    """Compute ``x @ W.T + bias``; products are summed in float32.

    Args:
        x: (..., in) float32, float16 or bfloat16.
        weight: the weight (out, in).
        bias: (out,).
        choice: the kernel and its sizes; None: as tuned for this device (tuned.py).

    Returns:
        (..., out), of the dtype of ``x``.

    Raises:
        NearplaneError: a CUDA graph is recorded, and no such product has run before.
        ValueError: the tensors do not match the weight's shape.
    """
    weight.check()
    flat = x.reshape(-1, weight.shape.columns).resolve_neg().contiguous()
    rows = flat.shape[0]
    if not rows:
        return x.new_empty(*x.shape[:-1], weight.shape.out)
    recording = x.is_cuda and torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        if choice is None:
            key = tuned.key(weight.shape, rows, x.dtype)
            if recording and not tuned.known(key, x.device):
                raise NearplaneError(
                    f"a CUDA graph is recorded, and no product of {rows} rows with a packed weight of {weight.shape.out} x "
                    f"{weight.shape.columns} has run yet: call the model once with these sizes before."
                )
            choice = tuned.choose(key, x.device, rows, lambda c: _launch(flat, weight, bias, c, False))
        y = _launch(flat, weight, bias, choice, recording)
    return y.view(*x.shape[:-1], weight.shape.out)


def dense(weight: Words, dtype: torch.dtype) -> Tensor:
    """Unpack the weight (out, in), rounded to ``dtype``."""
    from nearplane.runtime import triton_kernel

    shape, (channels, blocks) = weight.shape, UNPACKED
    result = torch.empty(shape.out, shape.columns, dtype=dtype, device=weight.codes.device)
    total = shape.positions // BLOCK
    triton_kernel.unpack[(-(-shape.out // channels), -(-total // blocks))](
        *_tensors(weight), result, shape.out, shape.columns, shape.tiles * TILE, total, shape.span, shape.zero,
        **_kind(weight), CHANNELS=channels, BLOCKS=blocks,
    )  # fmt: skip
    return result


def _launch(x: Tensor, weight: Words, bias: Tensor | None, choice: Choice, recording: bool) -> Tensor:
    """Launch one kernel on a contiguous (rows, in)."""
    if choice.kernel == "dense":
        return functional.linear(x, dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    from nearplane.runtime import triton_kernel

    shape, rows = weight.shape, x.shape[0]
    blocks, channels = shape.positions // BLOCK, shape.tiles * TILE
    tiles = -(-shape.out // choice.channels), -(-rows // choice.rows)
    share, shares = tuned.split(choice, blocks, tiles[0] * tiles[1], x.device)
    y = torch.empty(rows, shape.out, dtype=x.dtype, device=x.device)
    partial = counters = y
    if shares > 1:
        partial = torch.empty(shares, rows, channels, dtype=torch.float32, device=x.device)
        counters = _counters(x.device, tiles[0] * tiles[1], recording)
    kernel: Any = getattr(triton_kernel, choice.kernel)
    special: dict[str, Any]
    if choice.kernel == "few":
        wide = not weight.order.numel() and shape.columns % 4 == 0
        wide &= x.data_ptr() % 8 == 0 and x.storage_offset() * x.element_size() % 8 == 0
        special = {"WIDE": wide, "KIND": DTYPES[x.dtype], "STAGES": choice.stages}
        x = x.view(torch.int64) if wide else x
    else:
        plain = not x.is_cuda and x.dtype == torch.bfloat16
        special = {"PRECISION": "ieee" if x.dtype == torch.float32 else "tf32", "PLAIN": plain}
    kernel[(tiles[0], shares, tiles[1])](
        x, *_tensors(weight), y if bias is None else bias.contiguous(), y, partial, counters,
        rows, shape.out, shape.columns, channels, blocks, shape.span, shape.zero, share, shares,
        **_kind(weight), **special, BIAS=bias is not None, SPLIT=shares > 1,
        ROWS=choice.rows, CHANNELS=choice.channels, BLOCKS=choice.blocks, num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip
    return y


def _tensors(weight: Words) -> tuple[Tensor, ...]:
    return weight.codes, weight.scales.view(weight.shape.scale_dtype), weight.numbers, weight.order


def _kind(weight: Words) -> dict[str, Any]:
    """What kernels are compiled for."""
    zeros = 0 if not weight.zeros.numel() else 2 if weight.shape.free else 1
    return {"BITS": weight.shape.bits, "ZEROS": zeros, "ORDER": weight.order.numel() > 0}


class _Arena:
    """Counters of one device for recorded launches. A graph holds their addresses, so they are never given back."""

    def __init__(self, device: torch.device) -> None:
        self.counters, self.used = [torch.zeros(ARENA, dtype=torch.int32, device=device)], 0

    def refill(self) -> None:
        """Make room for another graph, if little is left."""
        if self.used > ARENA // 2:
            self.counters.append(torch.zeros_like(self.counters[0]))
            self.used = 0

    def take(self, number: int) -> Tensor | None:
        """Return counters that no other launch has; None if too few are left."""
        self.used += number
        return None if self.used > ARENA else self.counters[-1][self.used - number : self.used]


_arenas: dict[torch.device, _Arena] = {}
_streams: dict[tuple[torch.device, int], Tensor] = {}
_lock = Lock()


def _counters(device: torch.device, number: int, recording: bool) -> Tensor:
    """Return counters that are 0, for one launch."""
    if recording:
        with _lock:
            arena = _arenas.get(device)
            found = None if arena is None else arena.take(number)
        # Without an arena the graph sets new counters to 0 itself, by one more launch.
        return torch.zeros(number, dtype=torch.int32, device=device) if found is None else found
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    with _lock:
        if device not in _arenas:
            _arenas[device] = _Arena(device)
        _arenas[device].refill()
        held = _streams.get((device, stream))
        if held is None or held.numel() < number:
            held = _streams[device, stream] = torch.zeros(max(number, 4096), dtype=torch.int32, device=device)
    return held
