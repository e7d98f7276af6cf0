"""Run linear layers whose weights stay packed.

``QuantizedLinear`` chooses a kernel for each input: C++ on a CPU, Triton on a GPU, else plain torch; ``why`` gives the reasons.
The operator ``nearplane::linear`` makes the product opaque to compilers and tracers, and differentiable with respect to the
input. ``quantize_head`` quantizes an output head when a model is loaded.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearplane.core.activations import TokenGrid, round_tokens
from nearplane.core.errors import SettingError
from nearplane.core.grid import Grid, by_column, encode, fit_groups
from nearplane.runtime import cpu, reference, triton
from nearplane.runtime.cpu import Arithmetic
from nearplane.runtime.layout import Shape, Tiles, dequantize, tile

TENSORS = ("codes", "scales", "zeros", "order")
SCALES = (torch.float32, torch.float16, torch.bfloat16)  # by their number among the operator's arguments
GROUP = 64  # columns per group of an output head


class QuantizedLinear(nn.Module):
    """A linear layer ``y = x W^T + bias`` with a packed weight, which replaces a ``Linear`` or GPT-2's ``Conv1D``.

    The four integer tensors of the weight (``Tiles``) are buffers, so ``.to(device)``, ``state_dict`` and ``deepcopy`` work.
    ``.to(dtype)`` leaves integers alone. Inputs and outputs are float32, float16, bfloat16 or float64.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    order: Tensor

    def __init__(self, tiles: Tiles, bias: Tensor | None = None, arithmetic: Arithmetic = "auto") -> None:
        """Take over a packed weight.

        Args:
            tiles: the weight.
            bias: (out,).
            arithmetic: how the C++ kernel multiplies (``cpu.linear``).
        """
        super().__init__()
        self.shape = tiles.shape
        self.in_features, self.out_features = tiles.shape.columns, tiles.shape.out
        self.arithmetic = arithmetic
        for name in TENSORS:
            self.register_buffer(name, getattr(tiles, name))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.activations: TokenGrid | None = None  # grid that rounds inputs per token
        self._handle: cpu.Handle | None = None

    @property
    def tiles(self) -> Tiles:
        """The packed weight."""
        return Tiles(self.shape, self.codes, self.scales, self.zeros, self.order)

    @property
    def weight(self) -> Tensor:
        """A tensor without values on the meta device, for code that reads shape and dtype of a weight."""
        dtype = self.shape.scale_dtype if self.bias is None else self.bias.dtype
        return torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")

    def dequantized(self) -> Float[Tensor, "out in"]:
        """Return the weight in float32."""
        return dequantize(self.tiles)

    def why(self, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> str:
        """Name the kernel for an input, or the reasons against every kernel."""
        device = device or self.codes.device
        reasons = {"C++": cpu.supports(device, dtype), "Triton": triton.supports(self.shape, device, dtype)}
        for name, reason in reasons.items():
            if reason is None:
                isa = cpu.best() or "portable"
                return f"{name} ({isa}, {cpu.resolve(self.arithmetic, isa)})" if name == "C++" else name
        return "plain torch: " + "; ".join(reason for reason in reasons.values() if reason)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Compute ``x W^T + bias`` in the dtype of ``x``."""
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point() or x.layout != torch.strided:
            raise ValueError(f"expected (..., {self.in_features}) floats, got {list(x.shape)} of {x.dtype}")
        if self.activations is not None:
            x = round_tokens(x, self.activations)
        if torch.compiler.is_compiling() or type(x) is not Tensor or (x.requires_grad and torch.is_grad_enabled()):
            described = _described(self.shape)
            return cast(Tensor, torch.ops.nearplane.linear(x, *self._parts(), self.bias, *described, self.arithmetic))
        buffers = self._buffers  # a module's attributes are slow to look up, next to a small layer's product
        codes, scales, zeros, order = buffers["codes"], buffers["scales"], buffers["zeros"], buffers["order"]
        if x.device != codes.device:  # type: ignore[union-attr]
            raise ValueError(f"input on {x.device}, weight on {self.codes.device}")
        if cpu.supports(x.device, x.dtype) is not None:
            return run(x, self.tiles, self.bias, self.arithmetic)
        handle = self._handle
        if (
            handle is None
            or handle.addresses != cpu.addresses(codes, scales, zeros, order)  # type: ignore[arg-type]
            or handle.shape is not self.shape
        ):
            handle = self._handle = cpu.prepare(self.tiles)  # new, or its tensors were replaced or moved
        return cpu.linear(x, handle, self.bias, self.arithmetic)

    def _parts(self) -> tuple[Tensor, ...]:
        return self.codes, self.scales, self.zeros, self.order

    def get_extra_state(self) -> Tensor:
        """Return the shape as numbers, which the four tensors do not show."""
        sizes, scale_dtype = _described(self.shape)
        return torch.tensor([*sizes, scale_dtype])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the shape."""
        *sizes, scale_dtype = state.tolist()
        self.shape = _shape(sizes, scale_dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}  # addresses are valid in this process only

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.shape.bits}, groups={self.shape.groups}"
        )


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return every packed linear of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def set_arithmetic(model: nn.Module, arithmetic: Arithmetic) -> None:
    """Set how the C++ kernel multiplies in every packed linear. SettingError for an unknown arithmetic."""
    cpu.check(arithmetic)
    for module in quantized_linears(model).values():
        module.arithmetic = arithmetic


def quantize_head(model: nn.Module, bits: int) -> None:
    """Quantize the output head of a model to nearest, symmetric, in groups of 64, in place.

    Args:
        model: the loaded model.
        bits: bits of a code.

    Raises:
        SettingError: the model has no output head that is a dense ``nn.Linear``.
    """
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    if not isinstance(head, nn.Linear):
        raise SettingError(f"{type(model).__name__} has no dense output head to round to {bits} bits.")
    grid = Grid(bits=bits, group_size=GROUP, sym=True, fit="minmax", scale_dtype="float16")
    codes, scales, zeros = [], [], []
    for rows in torch.split(head.weight.detach(), 4096):  # no float32 copy of the whole head
        weight = rows.float()
        scale, zero = fit_groups(weight, grid)
        s, z = (by_column(part, grid, weight.shape[1]) for part in (scale, zero))
        codes.append(encode(weight, s, z, grid).to(torch.uint8))
        scales.append(scale.half())
        zeros.append(zero.to(torch.uint8))
    width = grid.group_width(head.in_features)
    tiles = tile(torch.cat(codes), torch.cat(scales), torch.cat(zeros), grid.storage_bits, width)
    name = next(name for name, module in model.named_modules() if module is head)
    model.set_submodule(name, QuantizedLinear(tiles, head.bias))


def run(x: Tensor, tiles: Tiles, bias: Tensor | None, arithmetic: Arithmetic) -> Tensor:
    """Multiply with the first kernel that supports the input, else with plain torch."""
    if cpu.supports(x.device, x.dtype) is None:
        return cpu.linear(x, cpu.prepare(tiles), bias, arithmetic)
    if triton.supports(tiles.shape, x.device, x.dtype) is None:
        return triton.linear(x, tiles, bias)
    return reference.linear(x, tiles, bias)


def _described(shape: Shape) -> tuple[list[int], int]:
    """Return a shape as arguments of the operator."""
    sizes = [shape.out, shape.columns, shape.bits, shape.positions, shape.span, shape.groups, shape.zero]
    return sizes, SCALES.index(shape.scale_dtype)


def _shape(sizes: list[int], scale_dtype: int) -> Shape:
    """Return the shape of an operator's arguments."""
    out, columns, bits, positions, span, groups, zero = sizes
    return Shape(out, columns, bits, positions, span, groups, zero, SCALES[scale_dtype])


@torch.library.custom_op("nearplane::linear", mutates_args=())
def _linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor, bias: Tensor | None, sizes: list[int],
    scale_dtype: int, arithmetic: str,
) -> Tensor:  # fmt: skip
    """Multiply, as an operator that is opaque to compilers and tracers."""
    tiles = Tiles(_shape(sizes, scale_dtype), codes, scales, zeros, order)
    tiles.check()
    if x.shape[-1:] != (tiles.shape.columns,) or x.device != codes.device:
        raise ValueError(f"expected (..., {tiles.shape.columns}) on {codes.device}, got {list(x.shape)} on {x.device}")
    return run(x, tiles, bias, cast(Arithmetic, arithmetic))


@_linear.register_fake
def _(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor, bias: Tensor | None, sizes: list[int],
    scale_dtype: int, arithmetic: str,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], sizes[0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5])
    ctx.described, ctx.dtype = inputs[6:8], inputs[0].dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient of the input. Codes have none, and a bias is not trained."""
    tiles = Tiles(_shape(*ctx.described), *ctx.saved_tensors)
    back = gradient.float() @ dequantize(tiles).to(gradient.device)
    return back.to(ctx.dtype), *[None] * 8


_linear.register_autograd(_backward, setup_context=_remember)
