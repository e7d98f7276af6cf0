"""Find where scales of a linear's input channels can go: which norm or linear makes each channel, and who else reads it.

No model is listed; all is found by intervention. Outputs of a norm or a linear are multiplied by powers of two while a block
runs. The module makes a stage's input if every channel of that input is multiplied by the power of one output. The
number of that output is written in several runs, two bits in each. Then outputs are divided by powers and all linears that
read the input multiply by them: powers of two round nothing, so the block's output must be what it was. Grouped queries,
fused projections and a ReLU between two linears are found like any other. An activation such as GELU lets no scale through.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearplane.models.discover import Block, takes_one
from nearplane.models.experts import EXPERT
from nearplane.models.record import Call, rows_of, same
from nearplane.models.towers import is_linear
from nearplane.transforms.roles import Norm, as_norm

# Exponents of two that a digit of an output's number is written as; none is 0, which no effect would look like.
DIGITS = (-2, -1, 1, 2)
# Relative to a channel: the largest difference from a power of two times itself, in float32 and in fewer digits.
CLOSE, COARSE = 1e-4, 3e-2
EXPERTS = "an expert is shown the tokens that a router picks"
OUTSIDE = "no norm and no linear of its block makes it channel by channel"


@dataclass(frozen=True)
class Fold:
    """An input whose channels can be scaled: what takes the inverse, and all linears that read the input."""

    source: str  # a norm or a linear
    norm: Norm | None  # None: a linear
    rows: Int[Tensor, "in"]  # the output of the source that each channel is made of
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """The folds of a block, and the inputs without one: by the linears that read them, the reason."""

    folds: list[Fold] = field(default_factory=list)
    left: dict[tuple[str, ...], str] = field(default_factory=dict)

    def below(self, old: str, new: str) -> "Found":
        """Rename what was found in the block ``old`` for ``new``, a block of the same structure."""

        def named(name: str) -> str:
            return new + name.removeprefix(old)

        folds = [
            Fold(
                named(fold.source),
                None if fold.norm is None else replace(fold.norm, name=named(fold.norm.name)),
                fold.rows,
                tuple(map(named, fold.readers)),
            )
            for fold in self.folds
        ]
        return Found(
            folds, {tuple(map(named, names)): why.replace(old + ".", new + ".") for names, why in self.left.items()}
        )


class Interventions:
    """Runs one block with some outputs and inputs scaled, and finds its folds."""

    def __init__(self, model: nn.Module, block: Block, forward: Callable[[], Tensor]) -> None:
        """Run the block as it is.

        Args:
            model: the model; parameters of the block are in memory.
            block: its stages.
            forward: runs some tokens through the block, and returns its hidden state.
        """
        self.model, self.block, self.forward = model, block, forward
        inside = model.get_submodule(block.name).named_modules(prefix=block.name)
        modules = {name: module for name, module in inside if name != block.name and not EXPERT.fullmatch(name)}
        self.linears = [name for name, module in modules.items() if is_linear(module) and name not in block.strange]
        self.norms = [name for name, module in modules.items() if _like_norm(module)]
        self.shape = torch.Size()  # of the hidden state
        self.output, self.inputs = self.run(self.linears)
        # The first token of each sequence.
        self.firsts = torch.arange(0, self.shape[:-1].numel(), self.shape[-2])

    def run(
        self,
        keep: Iterable[str],
        outputs: Mapping[str, Tensor] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the block once.

        Args:
            keep: linears whose first inputs are returned, (tokens, in).
            outputs: factors of the outputs of modules, by name.
            inputs: factors of the inputs of linears, by name.

        Returns:
            The hidden state (tokens, width), and the inputs of the linears that ran.
        """
        kept: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name in keep:
                stack.enter_context(_keeping(self.model.get_submodule(name), name, kept))
            for name, factors in (inputs or {}).items():
                stack.enter_context(_scaling(self.model.get_submodule(name), factors, before=True))
            for name, factors in (outputs or {}).items():
                stack.enter_context(_scaling(self.model.get_submodule(name), factors, before=False))
            hidden = self.forward()
            self.shape = hidden.shape
            return rows_of(hidden), kept

    def find(self) -> Found:
        """Find the folds of the block."""
        found = Found()
        groups = self._groups(found)
        sources: dict[int, list[Fold]] = {number: [] for number in range(len(groups))}
        # Values that a block hands to later blocks must stay what they are.
        linears = [] if self.block.handed else list(reversed(self.linears))
        for name in [*self.norms, *linears]:
            for number, rows in self._made_by(name, groups).items():
                norm = self._norm(name) if name in self.norms else None
                if norm is not None or name not in self.norms:
                    sources[number].append(Fold(name, norm, rows.cpu(), groups[number]))
        for number, readers in enumerate(groups):
            exact = [fold for fold in sources[number] if self.exact([fold])]
            if not exact:
                guesses = (Fold(name, None, rows, readers) for name in linears for rows in self._parts(name, readers))
                exact = list(islice((fold for fold in guesses if self.exact([fold])), 1))
            if exact:
                found.folds.append(max(exact, key=lambda fold: len(torch.unique(fold.rows))))
            else:
                also = f"{sources[number][0].source} makes it, which others read, too" if sources[number] else OUTSIDE
                found.left[readers] = also
        return found

    def exact(self, folds: Iterable[Fold]) -> bool:
        """Tell whether the block computes the same with inputs scaled and their sources divided."""
        outputs: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}
        for fold in folds:
            digits = torch.randint(len(DIGITS), (int(fold.rows.max()) + 1,), generator=torch.Generator().manual_seed(0))
            powers = torch.tensor(DIGITS)[digits]
            factors = torch.ones(self._width(fold.source))
            factors[fold.rows] = 2.0 ** -powers[fold.rows]
            outputs[fold.source] = factors
            inputs |= dict.fromkeys(fold.readers, 2.0 ** powers[fold.rows])
        finite = self.output.isfinite().all(1)  # a position of padding may attend to nothing
        return bool(finite.any()) and same(self.run((), outputs, inputs)[0][finite], self.output[finite])

    def _groups(self, found: Found) -> list[tuple[str, ...]]:
        """Group the linears that read equal inputs, one of them at least to be quantized; experts are left out."""
        groups: list[list[str]] = []
        for name in self.inputs:  # in the order of their calls
            x = self.inputs[name]
            known = next((group for group in groups if _equal(self.inputs[group[0]], x)), None)
            groups.append([name]) if known is None else known.append(name)
        sites = {site.name for site in self.block.sites}
        experts = tuple(name for name in sorted(sites) if EXPERT.fullmatch(name))
        beside = tuple(sorted(sites - {*experts, *self.inputs}))  # the output head; what these tokens do not reach
        found.left.update({names: why for names, why in ((experts, EXPERTS), (beside, OUTSIDE)) if names})
        return [tuple(group) for group in groups if sites.intersection(group)]

    def _made_by(self, name: str, groups: list[tuple[str, ...]]) -> dict[int, Tensor]:
        """Find the groups whose inputs a module makes, with the output that makes each channel."""
        width = self._width(name)
        live = {i: torch.zeros(self.inputs[g[0]].shape[1], dtype=torch.long) for i, g in enumerate(groups)}
        live = {i: rows for i, rows in live.items() if name not in groups[i]}
        numbers, base = torch.arange(width), len(DIGITS)
        place = 1
        while live and place < max(2, width):
            powers = torch.tensor(DIGITS)[numbers // place % base]
            _, inputs = self.run([groups[i][0] for i in live], {name: 2.0**powers})
            for i in list(live):
                digits = _digits(self.inputs[groups[i][0]], inputs[groups[i][0]])
                if digits is None:
                    live.pop(i)
                    continue
                silent = digits < 0
                live[i] = torch.where(silent | (live[i] < 0), -1, live[i] + place * digits)
            place *= base
        return {i: rows for i, found in live.items() if (rows := _completed(found, width)) is not None}

    def _parts(self, name: str, readers: tuple[str, ...]) -> Iterator[Tensor]:
        """Guess which outputs of a fused linear make an input: a part of equal width, or values, by the first tokens.

        Attention passes the values of a sequence's first token as they are, head by head, if it is causal.
        """
        x, width = self.inputs[readers[0]], self._width(name)
        own, times = torch.arange(x.shape[1]), width // x.shape[1]
        if width <= x.shape[1] or name in readers or name not in self.inputs:
            return
        if width == times * x.shape[1]:
            for part in reversed(range(times)):
                yield own + part * x.shape[1]
                yield own * times + part
        y: dict[str, Tensor] = {}
        with _keeping(self.model.get_submodule(name), name, y, output=True):
            self.run(())
        if name in y and len(y[name]) == len(x) > int(self.firsts[-1]):
            made, wanted = (each[self.firsts.to(each.device)].float().T for each in (y[name], x))
            yield torch.cdist(wanted, made).argmin(1).cpu()

    def _width(self, name: str) -> int:
        """Return the number of a module's outputs."""
        module = self.model.get_submodule(name)
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.shape[-1] if weight.dim() == 1 or not isinstance(module, nn.Linear) else weight.shape[0]

    def _norm(self, name: str) -> Norm | None:
        """Identify a norm, from a copy in float32; None for a module that is no norm with a weight."""
        module = copy.deepcopy(self.model.get_submodule(name))
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module = module.float().cpu()
        x = torch.randn(2, self._width(name), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            norm = as_norm(Call(name, module, x, module(x)))
        return norm if norm is not None and norm.weight else None


def _like_norm(module: nn.Module) -> bool:
    """Tell whether a module may be a norm: no module inside, a weight and perhaps a bias, of one dimension each."""
    own = dict(module.named_parameters())
    plain = "weight" in own and set(own) <= {"weight", "bias"} and all(p.dim() == 1 for p in own.values())
    return plain and not any(module.children()) and takes_one(module)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all()))


def _digits(before: Float[Tensor, "tokens in"], after: Float[Tensor, "tokens in"]) -> Tensor | None:
    """Read the digit by which each channel was multiplied, -1 where the channel is zero throughout; None: by no digit."""
    finite = before.isfinite().all(1)
    if before.shape != after.shape or not bool(finite.any()) or not bool(after[finite].isfinite().all()):
        return None
    x, y = before[finite].float(), after[finite].float()
    energy = x.square().sum(0)
    silent = (energy == 0) & (y.square().sum(0) == 0)
    ratio = (x * y).sum(0) / energy
    powers = 2.0 ** torch.tensor(DIGITS, device=x.device)
    digits = (ratio[:, None].clamp_min(1e-9).log2() - powers.log2()).abs().argmin(1)
    digits = torch.where(silent, 0, digits)
    missed = (y - x * powers[digits]).square().sum(0).sqrt()
    close = CLOSE if before.dtype in (torch.float32, torch.float64) else COARSE
    if silent.all() or not bool((silent | (missed <= close * y.square().sum(0).sqrt())).all()):
        return None
    return torch.where(silent, -1, digits).cpu()


def _completed(rows: Int[Tensor, "in"], width: int) -> Tensor | None:
    """Fill in the channels that were zero throughout where all others are made of the output of their own number."""
    known, own = rows >= 0, torch.arange(len(rows))
    if bool((rows >= width).any()):
        return None
    if bool(known.all()):
        return rows
    return own if len(rows) == width and torch.equal(rows[known], own[known]) else None


@contextmanager
def _keeping(module: nn.Module, name: str, kept: dict[str, Tensor], *, output: bool = False) -> Iterator[None]:
    """Keep a copy of a linear's first input, or its first output; linears that are given one tensor share the copy."""

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if name not in kept:
            x = rows_of(args[0])
            kept[name] = next((other for other in kept.values() if _equal(other, x)), x)

    def keep_output(_module: nn.Module, _args: Any, y: Tensor) -> None:
        kept.setdefault(name, rows_of(y))

    handle = module.register_forward_hook(keep_output) if output else module.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _scaling(module: nn.Module, factors: Tensor, *, before: bool) -> Iterator[None]:
    """Multiply the input of a module, or its output, by a factor for each channel."""

    def given(_module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (args[0] * factors.to(args[0]), *args[1:])

    def returned(_module: nn.Module, _args: Any, output: Any) -> Any:
        fits = isinstance(output, Tensor) and output.shape[-1] == len(factors)
        return output * factors.to(output) if fits else None

    handle = module.register_forward_pre_hook(given) if before else module.register_forward_hook(returned)
    try:
        yield
    finally:
        handle.remove()
