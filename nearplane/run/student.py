"""A quantized model whose scales can be moved: codes stay, and every quantized weight is made anew when it is multiplied.

One model in memory is both the original and its student. The original's weights stay in place beside the codes, and a linear
multiplies by either. So memory holds the whole model, one byte more for each code, and the dequantized weight of one linear.
Blocks are checkpointed: between blocks a backward pass keeps hidden states only.

What moves is the scale of every group, its offset where the format stores one as a number, and the affine parameters of
norms and the biases of linears, as far as the checkpoint stores them as they are. What is tried has always been rounded to
what the checkpoint stores.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from nearplane.checkpoint.gguf import takes_template
from nearplane.core.errors import SettingError
from nearplane.core.grid import Grid, Quantized, by_column, dequantize
from nearplane.core.scales import Affine, Signed, Stored
from nearplane.data.fresh import written_windows
from nearplane.data.samples import Batch, masks
from nearplane.formats.parts import Part
from nearplane.models import absent
from nearplane.models.experts import experts_of, set_visit
from nearplane.models.handed import output_hidden
from nearplane.models.inputs import DECODER, TEXT, options, output_head, reads, vocabulary

if TYPE_CHECKING:
    from nearplane.run.plan import Plan

# Tokens of a step, in whole windows; of one forward, where windows are shorter.
STEP_TOKENS, AT_ONCE = 1024, 512
# Bytes of a number that moves: itself four times, its gradient twice, Adam's moments, the best so far. Of a weight while a
# linear is at work: codes, scales and zeros as floats, the weight and its gradient. Of a logit: both models', their
# logarithms, the products and gradients of the loss.
NUMBER, LINEAR, LOGIT = 36, 28, 32
# Adam's steps, as shares: of a group's scale; of a group's scale, for its offset, and of a norm's mean magnitude.
SCALES, OTHERS = 5e-4, 2e-3
# The most that a scale may move, as a share; the magnitude by which parameters move that are all zero.
MOST, UNIT = 0.5, 0.01


def step_windows(seqlen: int) -> int:
    """Return how many windows of ``seqlen`` tokens one step takes."""
    return max(1, STEP_TOKENS // seqlen)


def fresh_windows(steps: int, seqlen: int) -> int:
    """Return the most fresh windows that a tuning reads: each is read about twice."""
    return -(-steps * step_windows(seqlen) // 2)


def written_fresh(plan: "Plan") -> int:
    """Return how many fresh windows the model writes itself: those of the source ``self``."""
    seqlen = plan.windows[1] or plan.calibration.seqlen
    return written_windows(plan.calibration, fresh_windows(plan.job.tune, seqlen)) if plan.job.tune else 0


def refuse_tuning(plan: "Plan") -> None:
    """Raise SettingError where a plan cannot be tuned, with the reason."""
    job, model, reason = plan.job, plan.source.model, None
    others = sorted(set(reads(model)) - {TEXT, DECODER})
    strange = {type(plan.grid_of(s).scales).__name__: s for s in plan.sites if not _moves(plan.grid_of(s))}
    if others:
        reason = f"tune compares a model's words on texts, and {type(model).__name__} reads {', '.join(others)}"
    elif output_head(model) is None:
        reason = f"tune compares the logits of models that predict tokens, and {type(model).__name__} has none"
    elif job.activations is not None:
        reason = "tune follows gradients, and rounded activations (--act-bits) have none"
    elif job.offload is not None:
        reason = "tune holds the whole model in memory, and --offload is for runs that cannot; give one of them"
    elif strange:
        name, site = next(iter(strange.items()))
        kind = getattr(plan.grid_of(site).scales, "kind", name)
        reason = f"tune moves each scale by itself, and {kind} scales, those of {site.name}, cannot be moved so"
    if reason is not None:
        raise SettingError(f"{reason}.")


def _moves(grid: Grid) -> bool:
    return isinstance(grid.scales, Stored | Signed | Affine)


def movable(plan: "Plan") -> dict[str, str]:
    """List the dense parameters that move, by name in the model: norms' weights and biases, and biases of linears.

    A GGUF file takes such tensors from its template, so none of them moves there. Nor does one that is stored merged with
    others, as the biases of fused experts, or that several modules share.
    """
    if takes_template(plan.format):
        return {}
    source, shared = plan.source, absent.tied(plan.source.model)
    stored = source.store.rejoined({source.names[f"{site.name}.weight"] for site in plan.sites})
    found = {}
    for path, module in source.model.named_modules():
        norm = "norm" in type(module).__name__.lower()
        for leaf, value in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}".lstrip(".")
            moves = norm or (leaf == "bias" and isinstance(module, nn.Linear | Conv1D))
            if moves and value.dim() == 1 and source.names.get(name) in stored:
                found[name] = source.names[name]
    return {name: disk for name, disk in found.items() if name not in {*shared, *shared.values()}}


def moving(plan: "Plan") -> int:
    """Count the numbers that a tuning moves."""
    dense = sum(prod(plan.source.store.shape(disk)) for disk in movable(plan).values())
    grids = [(site.shape, plan.grid_of(site)) for site in plan.sites]
    scales = sum(m * grid.group_count(n) * (1 + grid.scales.free) for (m, n), grid in grids)
    return dense + scales


def needed(plan: "Plan") -> dict[str, int]:
    """Return the bytes of each part of a tuning: model, codes, what moves, one linear at work, hidden states and logits."""
    source, size, seqlen = plan.source, plan.compute.itemsize, plan.windows[1] or plan.calibration.seqlen
    tokens = max(AT_ONCE // seqlen, 1) * seqlen
    numbers = [prod(site.shape) for site in plan.sites]
    inside = max(sum(sum(site.shape) for site in block.sites) + 4 * plan.hidden for block in plan.blocks)
    return {
        "model": size * sum(prod(source.store.shape(name)) for name in set(source.names.values())),
        "codes": sum(numbers),
        "scales": NUMBER * moving(plan),
        "solver": LINEAR * max(numbers, default=0),
        "hidden": tokens * size * (plan.hidden * len(plan.blocks) + 2 * inside),
        "logits": tokens * LOGIT * (vocabulary(source.model.config) or 1),
        "pending": 0,
    }


class Move:
    """Numbers that move: ``start + unit * delta``, rounded to what is stored. Adam moves ``delta``."""

    def __init__(self, start: Tensor, unit: Tensor, rate: float) -> None:
        self.start, self.unit, self.rate = start.float(), unit.float(), rate
        self.delta = nn.Parameter(torch.zeros_like(self.start))
        self.leaf = self.start.clone().requires_grad_()
        """What was stored last, whose gradient the backward pass leaves here."""

    @property
    def wanted(self) -> Tensor:
        """The numbers before they are rounded."""
        return self.start + self.unit * self.delta.detach().clamp(-MOST, MOST)

    def collect(self) -> None:
        """Hand the gradient over to ``delta``: rounding is taken for the identity."""
        gradient = torch.zeros_like(self.start) if self.leaf.grad is None else self.leaf.grad.float()
        self.delta.grad, self.leaf.grad = gradient * self.unit, None


class Scaled:
    """A quantized linear: codes that stay, scales that move."""

    def __init__(self, quantized: Quantized, grid: Grid, device: torch.device) -> None:
        self.grid, self.codes = grid, quantized.codes.to(device)
        self.scale, self.zero = quantized.scale.to(device).float(), quantized.zero.to(device)
        self.moves = [Move(self.scale, self.scale, SCALES)]
        if isinstance(grid.scales, Affine):
            self.moves.append(Move(grid.scales.offset(self.scale, self.zero), self.scale, OTHERS))

    def settle(self) -> None:
        """Round what moved to what the format stores."""
        scales, wanted = self.grid.scales, [move.wanted for move in self.moves]
        if isinstance(scales, Affine):
            self.scale, self.zero = scales.round(wanted[0], wanted[1], self.grid.levels)
        else:
            self.scale = scales.nearest(wanted[0])

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weight (out, in), as a reader of the checkpoint makes it."""
        return dequantize(Quantized(self.codes, self.scale, self.zero), self.grid).to(dtype)

    def gradients(self, of_weight: Tensor) -> list[Tensor]:
        """Return the gradients of scales, and of offsets that are numbers, given the weight's (out, in)."""
        level = self.grid.levels.decode(self.codes, torch.float32)
        if len(self.moves) == 1:
            level = level - by_column(self.zero.float(), self.grid, level.shape[1])
        found = [self._by_group(of_weight * level)]
        return found if len(self.moves) == 1 else [*found, -self._by_group(of_weight)]

    def _by_group(self, values: Tensor) -> Tensor:
        """Sum over the columns of each group; the last group may be smaller."""
        rows, columns = values.shape
        width, groups = self.grid.group_width(columns), self.grid.group_count(columns)
        return nn.functional.pad(values, (0, groups * width - columns)).view(rows, groups, width).sum(2)


class _Multiply(torch.autograd.Function):
    """``x @ weight.T`` with a weight that is made from its codes, and again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Scaled, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.linear = linear
        return x @ linear.weight(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        (x,), linear, gradient = ctx.saved_tensors, ctx.linear, given[0]
        of_input = gradient @ linear.weight(gradient.dtype) if ctx.needs_input_grad[0] else None
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_weight = rows.T @ x.reshape(-1, x.shape[-1])
        return of_input, None, *linear.gradients(of_weight.float())


class Tuned(NamedTuple):
    """What a checkpoint stores in place of what was solved, and in place of the original's dense tensors."""

    scales: dict[str, tuple[Tensor, Tensor]]
    """Scales and zeros, by quantized linear on disk."""
    dense: dict[str, Tensor]
    """By name on disk, as they are to be stored."""

    def apply(self, name: str, solved: Quantized) -> Quantized:
        """Return a solved weight with its scales as they were tuned."""
        scale, zero = self.scales.get(name, (solved.scale, solved.zero))
        return solved._replace(scale=scale.to(solved.scale.dtype), zero=zero.to(solved.zero.dtype))


class Student:
    """The whole model in memory, as the original and as its quantized student."""

    def __init__(self, plan: "Plan", parts: Iterable[Part]) -> None:
        """Read the original's weights and the codes of all finished blocks.

        Args:
            plan: of the run.
            parts: its solved weights.
        """
        self.plan, self.model, self.teaching = plan, plan.source.model, False
        plan.source.load("", plan.device, plan.compute)
        solved = {name: part for part in (part.open() for part in parts) if part is not None for name in part.layers}
        self.linears = {
            site.name: Scaled(solved[name].quantized(name), plan.grid_of(site), plan.device)
            for site in plan.sites
            for name in [plan.disk_name(site.name)]
        }
        self.dense: dict[str, Move] = {}
        self.originals: dict[str, Tensor] = {}
        for name in movable(plan):
            value = self._parameter(name).data
            size = value.float().square().mean().sqrt()
            self.originals[name] = value
            self.dense[name] = Move(value, torch.where(size > 0, size, UNIT), OTHERS)
        self.options = options(self.model)

    @property
    def moves(self) -> list[Move]:
        """Everything that moves."""
        return [*(move for linear in self.linears.values() for move in linear.moves), *self.dense.values()]

    def settle(self) -> None:
        """Round what moved to what is stored, and put it in place."""
        for linear in self.linears.values():
            linear.settle()
        for name, value in self._stored().items():
            self._parameter(name).data = value.to(self.originals[name].dtype)

    def collect(self) -> None:
        """Hand the gradients of one backward pass or several over to what Adam moves."""
        for name, move in self.dense.items():
            parameter = self._parameter(name)
            move.leaf.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        for move in self.moves:
            move.collect()

    def tuned(self) -> Tuned:
        """Return what is to be stored, on the CPU."""
        scales = {
            self.plan.disk_name(name): (linear.scale.cpu(), linear.zero.cpu()) for name, linear in self.linears.items()
        }
        return Tuned(scales, {self.plan.source.names[name]: value.cpu() for name, value in self._stored().items()})

    @contextmanager
    def at_work(self) -> Iterator["Student"]:
        """Let linears multiply by what was quantized, and blocks be checkpointed, while inside."""
        visits = {name: module.visit for name, module in experts_of(self.model).items()}
        set_visit(self.model, "hit")
        with ExitStack() as undo:
            undo.callback(self._leave, visits)
            for name, linear in self.linears.items():
                self._replace(name, self._multiply(linear), undo)
            for block in self.plan.blocks:
                if block.name not in self.linears:
                    self._replace(block.name, self._checkpointed, undo)
            for name in self.dense:
                self._parameter(name).requires_grad_(True)
            self.settle()
            yield self

    def divergence(self, batch: Batch) -> Tensor:
        """Return the mean over a batch's tokens of KL(original ‖ student), in nats."""
        with torch.no_grad(), self._original():
            target = self._log_probabilities(batch)
        found = self._log_probabilities(batch)
        loss = (target.exp() * (target - found)).sum(-1)
        real = next((mask for mask in masks(batch) if mask.shape == loss.shape), None)
        return loss.mean() if real is None else loss[real.bool()].mean()

    def both(self, batch: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return log-probabilities, and the hidden state behind the last block, of the original and of the student."""
        last = next(block.name for block in reversed(self.plan.walked) if block.name not in self.linears)
        states: list[Tensor] = []

        def kept(_module: nn.Module, _given: Any, output: Any) -> None:
            state = output_hidden(output)
            assert state is not None
            states.append(state)

        keep = self.model.get_submodule(last).register_forward_hook(kept)
        try:
            with torch.no_grad():
                with self._original():
                    target = self._log_probabilities(batch)
                found = self._log_probabilities(batch)
        finally:
            keep.remove()
        return (target, states[0]), (found, states[-1])

    def _log_probabilities(self, batch: Batch) -> Tensor:
        """Return log-probabilities (samples, positions, vocabulary)."""
        logits = getattr(self.model(**batch, **self.options), "logits", None)
        if logits is None:
            raise RuntimeError(f"the forward of {type(self.model).__name__} returns no logits")
        return torch.log_softmax(logits.float(), -1)

    @contextmanager
    def _original(self) -> Iterator[None]:
        """Let the model be the original while inside."""
        current = {name: self._parameter(name).data for name in self.dense}
        self.teaching = True
        for name, value in self.originals.items():
            self._parameter(name).data = value
        try:
            yield
        finally:
            self.teaching = False
            for name, value in current.items():
                self._parameter(name).data = value

    def _stored(self) -> Mapping[str, Tensor]:
        """Return the dense parameters that move, as they are stored now."""
        plan = self.plan
        return {
            name: move.wanted.to(plan.source.written(plan.source.names[name], plan.dense))
            for name, move in self.dense.items()
        }

    def _parameter(self, name: str) -> nn.Parameter:
        return self.model.get_parameter(name)

    def _multiply(self, linear: Scaled) -> Callable[..., Tensor]:
        """Make the forward of a linear, given the one that it has."""
        leaves = [move.leaf for move in linear.moves]

        def run(module: Any, original: Callable[..., Tensor], x: Tensor) -> Tensor:
            if self.teaching:
                return original(x)
            y: Tensor = _Multiply.apply(x, linear, *leaves)  # type: ignore[no-untyped-call]
            return y if module.bias is None else y + module.bias

        return run

    def _checkpointed(self, _module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block; a backward pass runs it again rather than keep what is inside."""
        if self.teaching or not torch.is_grad_enabled():
            return original(*args, **kwargs)
        return checkpoint(original, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def _replace(self, name: str, run: Callable[..., Any], undo: ExitStack) -> None:
        """Replace the forward of a module; ``run`` is given the module and its own forward."""
        module = self.model.get_submodule(name)
        original = module.forward
        module.forward = MethodType(lambda self, *args, **kwargs: run(self, original, *args, **kwargs), module)
        undo.callback(lambda: delattr(module, "forward"))

    def _leave(self, visits: Mapping[str, Any]) -> None:
        """Leave the skeleton as it was."""
        for name, module in experts_of(self.model).items():
            module.visit = visits[name]
        self.plan.source.unload("")


def counted(moves: Sequence[Move]) -> int:
    """Count the numbers that move."""
    return sum(move.start.numel() for move in moves)
