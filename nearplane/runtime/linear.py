"""Run linear layers whose weights stay packed.

``QuantizedLinear`` chooses a kernel for each input: C++ on a CPU, Triton on a GPU, else plain torch; ``why`` gives the reasons.
The operator ``nearplane::linear`` makes the product opaque to compilers and tracers, and differentiable with respect to the
input. ``quantize_head`` quantizes an output head when a model is loaded.
"""

from functools import cache
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearplane.core.activations import TokenGrid, round_tokens
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.core.grid import Grid, by_column, encode, fit_groups
from nearplane.runtime import cpu, reference, triton
from nearplane.runtime.cpu import Arithmetic
from nearplane.runtime.layout import Shape, Tiles, dequantize, tile
from nearplane.runtime.words import Words, words

TENSORS = ("codes", "scales", "zeros", "order")
SCALES = (torch.float32, torch.float16, torch.bfloat16)  # by their number among the operator's arguments
GROUP = 64  # columns per group of an output head


class SealedWeight(Tensor):
    """The weight of a packed linear for other code's eyes: its shape, dtype and device, and no values.

    Whatever asks for values is refused: a product, a cast, ``data``, as merging an adapter does.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let questions about the tensor pass, and nothing else. NearplaneError for values."""
        if func not in _questions():
            raise NearplaneError(
                "a packed weight gives no values (QuantizedLinear), and they cannot be changed, merged or copied; load with "
                "packed=False (--no-packed) for dense weights."
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def of(cls, shape: tuple[int, int], like: Tensor) -> "SealedWeight":
        """Make one of a shape, with the dtype and device of a tensor. A stand-in of one number takes no memory."""
        value = torch.full((1,), torch.nan, dtype=like.dtype, device=like.device).expand(shape)
        return value.as_subclass(cls)


@cache
def _questions() -> frozenset[Any]:
    """What may be asked of a sealed weight: functions of a tensor that read no value."""
    getters = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_meta", "is_cuda", "is_cpu", "is_sparse",
               "is_quantized", "is_nested", "is_leaf", "itemsize", "nbytes", "grad", "grad_fn", "is_mps", "is_xpu")  # fmt: skip
    methods = ("size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_complex", "element_size",
               "is_contiguous", "get_device", "__len__", "__hash__", "is_signed", "is_inference", "data_ptr")  # fmt: skip
    plain = (torch.is_floating_point, torch.is_complex, torch.numel)
    found = [getattr(Tensor, name).__get__ for name in getters] + [getattr(Tensor, name) for name in methods]
    return frozenset((*found, *plain))


class QuantizedLinear(nn.Linear):
    """A linear layer ``y = x W^T + bias`` with a packed weight, which replaces a ``Linear`` or GPT-2's ``Conv1D``.

    The four integer tensors of the weight are buffers, so ``.to(device)``, ``state_dict`` and ``deepcopy`` work. They are
    ``Tiles``, and ``Words`` where the Triton kernel runs. A ``state_dict`` has tiles. ``.to(dtype)`` leaves integers alone.
    Inputs and outputs are float32, float16, bfloat16 or float64. Inputs and the bias have gradients, the weight has none:
    adapters (LoRA) can be trained beside it.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    order: Tensor
    like: Tensor

    def __init__(self, tiles: Tiles, bias: Tensor | None = None, arithmetic: Arithmetic = "auto") -> None:
        """Take over a packed weight.

        Args:
            tiles: the weight.
            bias: (out,).
            arithmetic: how the C++ kernel multiplies (``cpu.linear``).
        """
        nn.Module.__init__(self)  # a Linear's would make a weight
        self.shape = tiles.shape
        self.in_features, self.out_features = tiles.shape.columns, tiles.shape.out
        self.arithmetic = arithmetic
        for name in TENSORS:
            self.register_buffer(name, getattr(tiles, name))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)  # type: ignore[assignment]
        # No number, in the dtype of the model, which is no weight's here.
        dtype = tiles.shape.scale_dtype if bias is None else bias.dtype
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=tiles.codes.device), persistent=False)
        self.activations: TokenGrid | None = None  # grid that rounds inputs per token
        self._handle: cpu.Handle | None = None

    @property
    def packed(self) -> "Tiles | Words":
        """The packed weight, as it lies in memory."""
        return _packed(self.shape, *self._parts())

    @property
    def tiles(self) -> Tiles:
        """The packed weight in tiles."""
        return _tiles(self.packed)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._lay_out()
        return self

    def _lay_out(self) -> None:
        """Lay out the weight as its device wants: words where the Triton kernel runs, else tiles."""
        wanted = Words if triton.supports(self.shape, self.codes.device, torch.float16) is None else Tiles
        packed = self.packed
        if not isinstance(packed, wanted):
            self._hold(words(packed) if isinstance(packed, Tiles) else packed.tiles)

    def _hold(self, packed: "Tiles | Words") -> None:
        for name in TENSORS:
            self._buffers[name] = getattr(packed, name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self.packed, Words):
            tiles = self.tiles
            destination.update({prefix + name: getattr(tiles, name) for name in TENSORS})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        before, errors = self.packed, rest[-1]
        found = len(errors)
        self._hold(self.tiles)  # which a state dict has
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if len(errors) > found:
            self.shape = before.shape
            return self._hold(before)
        self._lay_out()
        if isinstance(before, Words):  # graphs that were recorded know the addresses of the tensors
            for name in TENSORS:
                old, new = getattr(before, name), getattr(self, name)
                if old.shape == new.shape and old.dtype == new.dtype and old.device == new.device:
                    self._buffers[name] = old.copy_(new)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A tensor without values, for code that reads shape, dtype and device of a weight."""
        shape = (self.out_features, self.in_features)
        if torch.compiler.is_compiling():  # compilers know no sealed tensors
            return torch.empty(shape, dtype=self.like.dtype, device="meta")
        return SealedWeight.of(shape, self.like)

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
            x = rounded(x, self.activations)
        learning = x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if torch.compiler.is_compiling() or type(x) is not Tensor or (learning and torch.is_grad_enabled()):
            described = _described(self.shape)
            return cast(Tensor, torch.ops.nearplane.linear(x, *self._parts(), self.bias, *described, self.arithmetic))
        buffers = self._buffers  # a module's attributes are slow to look up, next to a small layer's product
        codes, scales, zeros, order = buffers["codes"], buffers["scales"], buffers["zeros"], buffers["order"]
        if x.device != codes.device:  # type: ignore[union-attr]
            raise ValueError(f"input on {x.device}, weight on {self.codes.device}")
        if cpu.supports(x.device, x.dtype) is not None:
            return run(x, self.packed, self.bias, self.arithmetic)
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


def rounded(x: Tensor, grid: TokenGrid) -> Tensor:
    """Round activations per token; gradients pass as if nothing were rounded (straight through)."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return round_tokens(x, grid)
    return x + (round_tokens(x.detach(), grid) - x.detach())


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
    if not isinstance(head, nn.Linear) or isinstance(head, QuantizedLinear):
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


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Make a linear of a weight (out, in)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)  # type: ignore[assignment]
    return linear


def run(x: Tensor, packed: Tiles | Words, bias: Tensor | None, arithmetic: Arithmetic) -> Tensor:
    """Multiply with the first kernel that supports the input, else with plain torch."""
    if cpu.supports(x.device, x.dtype) is None:
        return cpu.linear(x, cpu.prepare(_tiles(packed)), bias, arithmetic)
    if triton.supports(packed.shape, x.device, x.dtype) is None:
        return triton.linear(x, packed if isinstance(packed, Words) else words(packed), bias)
    return reference.linear(x, _tiles(packed), bias)


def _packed(shape: Shape, codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor) -> Tiles | Words:
    """Return the weight of four tensors, whose dtype tells the layout."""
    return (Words if codes.dtype == torch.int32 else Tiles)(shape, codes, scales, zeros, order)


def _tiles(packed: Tiles | Words) -> Tiles:
    return packed.tiles if isinstance(packed, Words) else packed


def _described(shape: Shape) -> tuple[list[int], int]:
    """Return a shape as arguments of the operator."""
    sizes = [
        shape.out,
        shape.columns,
        shape.bits,
        shape.positions,
        shape.span,
        shape.groups,
        shape.zero,
        int(shape.free),
    ]
    return sizes, SCALES.index(shape.scale_dtype)


def _shape(sizes: list[int], scale_dtype: int) -> Shape:
    """Return the shape of an operator's arguments."""
    out, columns, bits, positions, span, groups, zero, free = sizes
    return Shape(out, columns, bits, positions, span, groups, zero, SCALES[scale_dtype], bool(free))


@torch.library.custom_op("nearplane::linear", mutates_args=())
def _linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor, bias: Tensor | None, sizes: list[int],
    scale_dtype: int, arithmetic: str,
) -> Tensor:  # fmt: skip
    """Multiply, as an operator that is opaque to compilers and tracers."""
    packed = _packed(_shape(sizes, scale_dtype), codes, scales, zeros, order)
    packed.check()
    if x.shape[-1:] != (packed.shape.columns,) or x.device != codes.device:
        raise ValueError(f"expected (..., {packed.shape.columns}) on {codes.device}, got {list(x.shape)} on {x.device}")
    return run(x, packed, bias, cast(Arithmetic, arithmetic))


@_linear.register_fake
def _(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor, bias: Tensor | None, sizes: list[int],
    scale_dtype: int, arithmetic: str,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], sizes[0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5])
    ctx.described, ctx.dtype = inputs[6:8], inputs[0].dtype
    ctx.bias = None if inputs[5] is None else inputs[5].dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the input and the bias. Codes and scales have none."""
    back = bias = None
    if ctx.needs_input_grad[0]:
        tiles = _tiles(_packed(_shape(*ctx.described), *ctx.saved_tensors))
        back = (gradient.float() @ dequantize(tiles).to(gradient.device)).to(ctx.dtype)
    if ctx.needs_input_grad[5]:
        bias = gradient.reshape(-1, gradient.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias)
    return back, *[None] * 4, bias, *[None] * 3


_linear.register_autograd(_backward, setup_context=_remember)
