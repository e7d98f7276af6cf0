"""Split mixtures of experts: a fused 3-D parameter becomes one linear per expert.

transformers keeps the weights of all experts of a layer in a few 3-D parameters. ``unfuse`` replaces such a module by
``Experts``, which holds real linears (``experts.7.gate_proj``). So discovery, hooks, quantizing and packing need no special
case. Activation and gating stay the module's own. A class that dispatches through transformers' registry of experts
functions describes its layout itself; ``_layout`` has a row for each other class. ``Visit`` can show experts more
tokens than the router does; the output stays the same.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nearplane.core.errors import SettingError

# Which experts run, and on which tokens. hit: experts with routed tokens. each: all experts, on no token if need be, so that
# every hook fires. all: every expert on every token. probe: as all, on a copy per expert, so that experts share no stage.
Visit = Literal["hit", "each", "all", "probe"]
EXPERT = re.compile(r"((?:.*\.)?experts)\.(\d+)\.(gate_proj|up_proj|down_proj)")
# A child of a mixture with such a name is a router, whatever its shape.
ROUTER = re.compile(r"(^|[._])router(\.|$)")
ROUTES = re.compile(r"(^|_)(gate|router)\d*$")


@dataclass(frozen=True)
class Part:
    """Where a linear of every expert lies in the fused module: a slab of the tensor ``weight``, or half of it."""

    weight: str
    bias: str | None = None
    half: int | None = None
    """0 for gate and 1 for up, where both are in one slab; None: the slab is one linear."""
    interleaved: bool = False
    """Rows of gate and up alternate."""
    transposed: bool = False
    """The slab is (in, out)."""

    def cut(self, slab: Tensor) -> Tensor:
        """Slice one linear's (out, in) weight, or its bias, out of one expert's slab, as a view."""
        slab = slab.T if self.transposed and slab.dim() == 2 else slab
        if self.half is None:
            return slab
        return slab[self.half :: 2] if self.interleaved else slab.chunk(2)[self.half]


@dataclass(frozen=True)
class Layout:
    """How a fused module splits into the linears of its experts."""

    experts: int
    parts: dict[str, Part]
    """By name of the linear, in call order. A fused checkpoint, quantized, names them so, too: vLLM reads these names."""
    scaled: bool = False
    """The module's input has a row for each expert and token, zero where the token is not routed there (Llama 4)."""

    def slab(self, tensor: Tensor, expert: int) -> Tensor:
        """Slice one expert out of a fused tensor, whose first dimension counts experts or the rows of all experts."""
        rows = tensor.shape[0] // self.experts
        return tensor[expert] if rows == 1 else tensor[expert * rows : (expert + 1) * rows]


class Experts(nn.Module):
    """The experts of a layer, one linear each, run one after another."""

    def __init__(self, fused: nn.Module, layout: Layout, visit: Visit) -> None:
        """Take over everything of a fused module but its experts' parameters.

        Args:
            fused: the module; its parameters may be on the meta device.
            layout: how its parameters split. The linears are made on the meta device.
            visit: which experts run, on which tokens.
        """
        super().__init__()
        inside = {part.weight.partition(".")[0] for part in layout.parts.values()}
        used = {name for part in layout.parts.values() for name in (part.weight, part.bias)}
        self.shapes = {n: tuple(p.shape) for n, p in fused.named_parameters() if n in used}
        self.__dict__.update({k: v for k, v in vars(fused).items() if k not in self.__dict__})
        self._modules.update({n: m for n, m in fused.named_children() if n not in inside})
        self._parameters.update({n: p for n, p in fused.named_parameters(recurse=False) if n not in used})
        self._buffers.update(dict(fused.named_buffers(recurse=False)))
        self.training, self.kind, self.layout, self.visit = False, type(fused), layout, visit
        self.gate: Callable[..., Tensor] | None = getattr(type(fused), "_apply_gate", None)
        if "mlp" in inside:
            self.act_fn = cast(Any, fused).mlp.activation_fn
        self.follow: Callable[[Tensor], Tensor] | None = (
            None  # routing -> routing that decides which tokens experts read
        )
        for expert in range(layout.experts):
            self._modules[str(expert)] = holder = nn.Module()
            for name, part in layout.parts.items():
                weight = part.cut(torch.empty(self._slab(part.weight), device="meta"))
                bias = part.bias is not None
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias, device="meta", dtype=torch.float32)
                holder.add_module(name, linear.requires_grad_(False))

    def _slab(self, name: str) -> tuple[int, ...]:
        """Return the shape of one expert's slab of a fused tensor."""
        first, *rest = self.shapes[name]
        rows = first // self.layout.experts
        return tuple(rest) if rows == 1 else (rows, *rest)

    def forward(self, hidden_states: Tensor, top_k_index: Any = None, top_k_weights: Any = None) -> Tensor:
        """Compute what the fused module computes.

        Args:
            hidden_states: (..., width). Llama 4: (experts * tokens, width).
            top_k_index: (tokens, k), experts of each token; not given by Llama 4.
            top_k_weights: (tokens, k), their weights.

        Returns:
            Weighted sum of the experts' outputs, of the shape of ``hidden_states``; Llama 4 sums the rows itself.
        """
        if self.layout.scaled:
            return self._scaled(hidden_states)
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        shown = top_k_index if self.follow is None else self.follow(top_k_index)
        result = torch.zeros_like(hidden)
        for expert in self._visited(top_k_index):
            token, place = torch.where(top_k_index == expert)
            led = token if shown is top_k_index else torch.where(shown == expert)[0]
            output = self._run(expert, hidden, token, led)
            weighted = output * top_k_weights[token, place, None]
            result.index_add_(0, token, weighted.to(result.dtype))
        return result.view(hidden_states.shape)

    def _scaled(self, rows: Tensor) -> Tensor:
        """Run Llama 4's experts on rows (experts * tokens, width), zero where a token is not routed to an expert."""
        rows = rows.view(self.layout.experts, -1, rows.shape[-1])
        chosen = (rows != 0).any(-1)
        shown = chosen if self.follow is None else self.follow(chosen)
        # The other experts read a token's mean over the experts it is routed to.
        mean = rows.sum(0) / chosen.sum(0).clamp(min=1)[:, None]
        result = torch.zeros_like(rows)
        for expert in range(self.layout.experts) if self.visit != "hit" else chosen.any(1).nonzero().flatten().tolist():
            token, led = torch.where(chosen[expert])[0], torch.where(shown[expert])[0]
            hidden = torch.where(chosen[expert][:, None], rows[expert], mean)
            result[expert, token] = self._run(expert, hidden, token, led)
        return result.view(-1, rows.shape[-1])

    def _visited(self, index: Tensor) -> list[int]:
        """List the experts to run, given the routing (tokens, k)."""
        if self.visit != "hit":
            return list(range(self.layout.experts))
        return [expert for expert in torch.unique(index).tolist() if expert < self.layout.experts]

    def _run(self, expert: int, hidden: Tensor, token: Tensor, led: Tensor) -> Tensor:
        """Return an expert's outputs for the rows ``token`` of ``hidden``. Its input begins with the rows ``led``."""
        if self.visit in ("all", "probe"):
            return self._expert(expert, hidden.clone() if self.visit == "probe" else hidden)[token]
        if led is token:
            return self._expert(expert, hidden[token])
        rows = torch.cat([led, token[~torch.isin(token, led)]])
        place = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
        place[rows] = torch.arange(len(rows), device=hidden.device)
        return self._expert(expert, hidden[rows])[place[token]]

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        """Run one expert on rows (tokens, width)."""
        linears, own = cast(Any, self._modules[str(expert)]), cast(Any, self)
        if "gate_proj" in self.layout.parts:
            y = self._gated(linears.gate_proj(x), linears.up_proj(x))
        else:
            y = own.act_fn(linears.up_proj(x))
        y = linears.down_proj(y)
        return cast(Tensor, own.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y)

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Apply the module's own gating, which may expect gate and up in one tensor."""
        if self.gate is None:
            return cast(Tensor, cast(Any, self).act_fn(gate) * up)
        interleaved = self.layout.parts["gate_proj"].interleaved
        return self.gate(self, torch.stack([gate, up], -1).flatten(-2) if interleaved else torch.cat([gate, up], -1))


class LargeOnMeta(TorchFunctionMode):
    """Create tensors of more than ``most`` bytes on the meta device while a skeleton is built.

    Only parameters are that large, and they go to the meta device anyway. Memory for all experts of a layer may not exist.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones) and kwargs.get("device") is None:
            size = args[0] if args and isinstance(args[0], tuple | list) else kwargs.get("size", args)
            if 4 * prod(size) > self.most:
                return func(*args, **{**kwargs, "device": "meta"})
        return func(*args, **kwargs)


def unfuse(model: nn.Module, visit: Visit = "hit") -> None:
    """Replace every fused module of experts by ``Experts``, in place. The new parameters are on the meta device."""
    for name, module in list(model.named_modules()):
        layout = _layout(module) if name else None
        if layout is not None:
            model.set_submodule(name, Experts(module, layout, visit))


def experts_of(model: nn.Module) -> dict[str, Experts]:
    """Return the ``Experts`` of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def set_visit(model: nn.Module, visit: Visit) -> None:
    """Set which experts of a model run, and on which tokens."""
    for module in experts_of(model).values():
        module.visit = visit


def show_all(model: nn.Module, folder: Path) -> None:
    """Run every expert on every token. Raises SettingError for a model without experts."""
    if not experts_of(model):
        raise SettingError(f"all_experts: {folder} has no experts that tokens are routed to.")
    set_visit(model, "all")


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Run every expert on all tokens while inside, each a stage of its own unless the model's visit is ``all``."""
    modules = [module for module in experts_of(model).values() if module.visit != "all"]
    before = [module.visit for module in modules]
    for module in modules:
        module.visit = "probe"
    try:
        yield
    finally:
        for module, visit in zip(modules, before, strict=True):
            module.visit = visit


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """Find the modules with a matrix that choose or weigh experts; routers stay dense.

    Every linear in a module called router, or modality_router as Gemma 3n's, is one. Beside the experts of a layer, a router is
    called gate or router, or holds a single matrix. That matrix has a row per expert, or one row (the gate of a shared expert).

    Returns:
        Modules by name.
    """
    found: dict[str, nn.Module] = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ROUTER.search(n)
    }
    for name, module in list(model.named_modules()):
        children = dict(module.named_children())
        experts = children.get("experts")
        if not isinstance(experts, Experts | nn.ModuleList):
            continue
        count = experts.layout.experts if isinstance(experts, Experts) else len(experts)
        for leaf, child in children.items():
            inner = {n: m for n, m in child.named_modules() if getattr(m, "weight", None) is not None}
            matrices = {n: m for n, m in inner.items() if isinstance(m.weight, Tensor) and m.weight.dim() == 2}
            single = len(matrices) == 1 and all(len(m.weight) in (1, count) for m in matrices.values())
            if child is not experts and (ROUTES.search(leaf) or single):
                found |= {".".join(filter(None, (name, leaf, n))): m for n, m in matrices.items()}
    return found


def _layout(module: nn.Module) -> Layout | None:
    """Describe the layout of a fused module; None for any other module."""
    kind, own = type(module).__name__, dict(module.named_parameters())
    if kind == "DbrxExperts":  # one matrix holds the rows of all experts
        parts = {"gate_proj": Part("mlp.w1"), "up_proj": Part("mlp.v1"), "down_proj": Part("mlp.w2", transposed=True)}
        return Layout(int(module.num_experts), parts)  # type: ignore[arg-type]
    described = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated"))
    scaled = (
        kind == "Llama4TextExperts"
    )  # outside of the registry: a product of all experts with inputs scaled by the router
    gate: bool = scaled or bool(getattr(module, "has_gate", False))
    first = "gate_up_proj" if gate else "up_proj"
    if not (described or scaled) or any(n not in own or own[n].dim() != 3 for n in (first, "down_proj")):
        return None
    transposed = scaled or bool(module.is_transposed)
    biased = not scaled and bool(module.has_bias)
    fused = partial(Part, first, f"{first}_bias" if biased else None, transposed=transposed)
    down = Part("down_proj", "down_proj_bias" if biased else None, transposed=transposed)
    interleaved = not scaled and not bool(module.is_concatenated)
    halves = {n: fused(half=i, interleaved=interleaved) for i, n in enumerate(("gate_proj", "up_proj"))}
    return Layout(len(own[first]), {**(halves if gate else {"up_proj": fused()}), "down_proj": down}, scaled)
