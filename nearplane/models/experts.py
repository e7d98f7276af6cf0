"""Mixtures of experts: a fused 3-D parameter taken apart into one linear per expert.

transformers keeps the weights of all experts of a layer in a few 3-D parameters. ``unfuse`` puts in the place of such a
module an ``Experts`` with real linears, ``experts.7.gate_proj``, so that discovery, hooks, pauses, replacing and packing
find what they find elsewhere. Activations, gating and what else the module does stay its own. Every class that dispatches
through transformers' public registry of experts functions describes its layout itself; ``_layout`` has a row for those that
do not. Calibration asks an ``Experts`` to show experts more than they are routed (``Visit``); what the router combines is
unchanged by that.
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

# hit: run the experts that tokens are routed to. each: all, some on no token, so that a hook on any of them fires.
# all: every expert is shown every token. probe: the same, each in a tensor of its own, so that experts share no stage.
Visit = Literal["hit", "each", "all", "probe"]
EXPERT = re.compile(r"((?:.*\.)?experts)\.(\d+)\.(gate_proj|up_proj|down_proj)")
# A child of a mixture by these names routes tokens, whatever its shape.
ROUTES = re.compile(r"(^|_)(gate|router)\d*$")


@dataclass(frozen=True)
class Part:
    """Where a linear of every expert lies in the fused module: all of a slab of ``weight``, or half of it."""

    weight: str
    bias: str | None = None
    half: int | None = None
    """0 or 1, of gate and up in one slab; None: the slab is the linear's alone."""
    interleaved: bool = False
    """Rows of the halves alternate."""
    transposed: bool = False
    """The slab is (in, out)."""

    def cut(self, slab: Tensor) -> Tensor:
        """The (out, in) weight, or the bias, in one expert's slab: a view."""
        slab = slab.T if self.transposed and slab.dim() == 2 else slab
        if self.half is None:
            return slab
        return slab[self.half :: 2] if self.interleaved else slab.chunk(2)[self.half]


@dataclass(frozen=True)
class Layout:
    """How a fused module is taken apart."""

    experts: int
    parts: dict[str, Part]
    """By the linear's name; in the order of their calls."""
    names: dict[str, str]
    """What the linears are called on disk where a checkpoint holds fused tensors: names that engines read."""
    scaled: bool = False
    """The module is given a row for each expert and token, zero where the router has not chosen (Llama 4)."""

    def slab(self, tensor: Tensor, expert: int) -> Tensor:
        """One expert's share of a fused tensor: its first dimension counts experts, or their rows one after another."""
        rows = tensor.shape[0] // self.experts
        return tensor[expert] if rows == 1 else tensor[expert * rows : (expert + 1) * rows]


def _layout(module: nn.Module) -> Layout | None:
    """The layout of a fused module; None for any other."""
    kind, own = type(module).__name__, dict(module.named_parameters())
    names = {linear: linear for linear in ("gate_proj", "up_proj", "down_proj")}
    if kind.startswith("GraniteMoe"):  # stored as input_linear and output_linear, which vLLM splits under these names
        names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    if kind == "DbrxExperts":  # all experts' rows in one matrix, and an activation in a module of its own
        parts = {"gate_proj": Part("mlp.w1"), "up_proj": Part("mlp.v1"), "down_proj": Part("mlp.w2", transposed=True)}
        return Layout(int(module.num_experts), parts, names)  # type: ignore[arg-type]
    described = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated"))
    scaled = (
        kind == "Llama4TextExperts"
    )  # does not dispatch: a product of all experts with inputs the router has scaled
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
    return Layout(len(own[first]), {**(halves if gate else {"up_proj": fused()}), "down_proj": down}, names, scaled)


class Experts(nn.Module):
    """The experts of a layer, one linear each, run one by one."""

    def __init__(self, fused: nn.Module, layout: Layout, visit: Visit) -> None:
        """From the fused module, whose parameters may be on the meta device; the new ones are."""
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
        self.follow: Callable[[Tensor], Tensor] | None = None  # whose routing decides what experts are shown
        for expert in range(layout.experts):
            self._modules[str(expert)] = holder = nn.Module()
            for name, part in layout.parts.items():
                weight = part.cut(torch.empty(self._slab(part.weight), device="meta"))
                bias = part.bias is not None
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias, device="meta", dtype=torch.float32)
                holder.add_module(name, linear.requires_grad_(False))

    def _slab(self, name: str) -> tuple[int, ...]:
        first, *rest = self.shapes[name]
        rows = first // self.layout.experts
        return tuple(rest) if rows == 1 else (rows, *rest)

    def forward(self, hidden_states: Tensor, top_k_index: Any = None, top_k_weights: Any = None) -> Tensor:
        """What the fused module's forward returns."""
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
        """Llama 4: rows are (experts, tokens) one after another, zero where an expert has no part in a token."""
        rows = rows.view(self.layout.experts, -1, rows.shape[-1])
        chosen = (rows != 0).any(-1)
        shown = chosen if self.follow is None else self.follow(chosen)
        # A token as the experts that the router chose were shown it, for those that it did not choose.
        mean = rows.sum(0) / chosen.sum(0).clamp(min=1)[:, None]
        result = torch.zeros_like(rows)
        for expert in range(self.layout.experts) if self.visit != "hit" else chosen.any(1).nonzero().flatten().tolist():
            token, led = torch.where(chosen[expert])[0], torch.where(shown[expert])[0]
            hidden = torch.where(chosen[expert][:, None], rows[expert], mean)
            result[expert, token] = self._run(expert, hidden, token, led)
        return result.view(-1, rows.shape[-1])

    def _visited(self, index: Tensor) -> list[int]:
        if self.visit != "hit":
            return list(range(self.layout.experts))
        return [expert for expert in torch.unique(index).tolist() if expert < self.layout.experts]

    def _run(self, expert: int, hidden: Tensor, token: Tensor, led: Tensor) -> Tensor:
        """Outputs for the rows ``token`` of ``hidden``; what the expert is shown begins with the rows ``led``."""
        if self.visit in ("all", "probe"):
            return self._expert(expert, hidden.clone() if self.visit == "probe" else hidden)[token]
        if led is token:
            return self._expert(expert, hidden[token])
        rows = torch.cat([led, token[~torch.isin(token, led)]])
        place = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
        place[rows] = torch.arange(len(rows), device=hidden.device)
        return self._expert(expert, hidden[rows])[place[token]]

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        linears, own = cast(Any, self._modules[str(expert)]), cast(Any, self)
        if "gate_proj" in self.layout.parts:
            y = self._gated(linears.gate_proj(x), linears.up_proj(x))
        else:
            y = own.act_fn(linears.up_proj(x))
        y = linears.down_proj(y)
        return cast(Tensor, own.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y)

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """The module's own gating, which may expect both in one tensor."""
        if self.gate is None:
            return cast(Tensor, cast(Any, self).act_fn(gate) * up)
        interleaved = self.layout.parts["gate_proj"].interleaved
        return self.gate(self, torch.stack([gate, up], -1).flatten(-2) if interleaved else torch.cat([gate, up], -1))


class LargeOnMeta(TorchFunctionMode):
    """While a skeleton is built: tensors of more than ``most`` bytes are made on the meta device at once.

    They are parameters that would be sent there anyway; memory for all experts of a layer may not even be promised.
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
    """Take every fused module of experts apart, in place; the new parameters are on the meta device."""
    for name, module in list(model.named_modules()):
        layout = _layout(module) if name else None
        if layout is not None:
            model.set_submodule(name, Experts(module, layout, visit))


def experts_of(model: nn.Module) -> dict[str, Experts]:
    """The modules that were taken apart, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def set_visit(model: nn.Module, visit: Visit) -> None:
    """Decide what experts are shown from now on."""
    for module in experts_of(model).values():
        module.visit = visit


def show_all(model: nn.Module, folder: Path) -> None:
    """Let experts see every token. SettingError for a model that has none."""
    if not experts_of(model):
        raise SettingError(f"all_experts: {folder} has no experts that tokens are routed to.")
    set_visit(model, "all")


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Let a few tokens reach every expert, each a stage of its own unless all are to be shown all tokens."""
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
    """The modules that choose or weigh experts, by name: those with a matrix of their own. They stay dense.

    Linears of a module called router; beside the experts of a layer: what is called gate or router, and whatever holds a
    single linear with as many outputs as there are experts, or one (the gate of a shared expert).
    """
    found: dict[str, nn.Module] = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "router" in n.split(".")
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
