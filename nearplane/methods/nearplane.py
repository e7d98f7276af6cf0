"""NearPlane, our own: everything the family approximates column by column has a closed form; use it, and let tokens that
had no part in it judge every step.

1. Target (``core/target.py``): ``W* = W + α (W D + R X̂ᵀ/n) (H + λI)⁻¹``, the weight that answers the drift of its input
   exactly, where GPTAQ (arXiv 2504.02692) and ResComp (arXiv 2604.07955) push a fixed share along while sweeping. A linear
   whose output is added to the residual stream also repairs the drift R of that stream.
2. Shrinkage: α is what held-out tokens want of the step, per linear or per output row.
3. Grid and sweep: static groups fitted to W*, errors weighted by diag(H); GPTQ's sweep (arXiv 2210.17323), which is
   Babai's nearest plane (arXiv 2507.18553), in any order; with ``beam`` > 1 its K cheapest answers side by side.
4. Refinement (``core/refine.py``): closed-form scales for the codes, then every code again, alternating; a round that
   raises the held-out loss is undone and counted.

There is nothing to tune: the switches are there so that each part can be left out and its worth measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.beam import beam_sweep
from nearplane.core.certificate import verify
from nearplane.core.errors import SettingError
from nearplane.core.factor import Factor, Order, column_cost, factorize
from nearplane.core.grid import Course, Grid, Quantized, dequantize, fit_groups
from nearplane.core.moments import Moments
from nearplane.core.refine import descend, refit
from nearplane.core.sweep import sweep
from nearplane.core.target import full_step, pull, row_shares, shares
from nearplane.methods.base import Need

Shrink = Literal["spectral", "linear", "row", "none"]

# Dampings of the steps that "spectral" mixes, in multiples of damp_percent: directions of the input from all to the strongest.
RIDGES = (1.0, 30.0, 1000.0)
# Held-out tokens choose the mix; this many rows of a linear tell it as well as all of them.
TRIAL_ROWS = 1024


class Aimed(NamedTuple):
    """What NearPlane prepares once per input."""

    moments: Moments
    factor: Factor  # of H + λI
    steps: list[Factor]  # of H with each damping that the target mixes
    trials: list[Factor]  # the same without the held-out tokens, which judge them
    importance: Float[Tensor, "in"]  # what an error in each column costs
    metric: Float[Tensor, "in in"]  # H + λI


@dataclass(frozen=True)
class NearPlane:
    """Exact target, chosen order, weighted grid, nearest plane, refinement, judged on held-out tokens."""

    target: bool = True
    """Correct the drift of earlier layers exactly; --no-target rounds towards the original weight."""
    residual: bool = True
    """Let linears that write to the residual stream repair its drift too."""
    shrink: Shrink = "spectral"
    """How held-out tokens limit the target's step: spectral, by direction of the input; one share per linear; one per
    output row; none takes all of it."""
    order: Order = "activation"
    """Order in which columns are solved; on disk they stay where they were."""
    damp_percent: float = 0.01
    """Damping of the Hessian, as a fraction of its mean diagonal."""
    beam: int = 1
    """Answers per row that the sweep keeps while it walks the columns; its cost grows in proportion."""
    rounds: int = 2
    """Refinement rounds at most, each a refit of all scales and one descent over all codes."""
    gate: bool = True
    """Undo a round that raises the held-out loss, and stop; --no-gate keeps every round."""

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise SettingError(f"order must be one of {', '.join(get_args(Order))}; got {self.order!r}.")
        if self.shrink not in get_args(Shrink):
            raise SettingError(f"shrink must be one of {', '.join(get_args(Shrink))}; got {self.shrink!r}.")
        if not 0 <= self.damp_percent <= 1:
            raise SettingError(f"damp_percent is a fraction of the mean diagonal, 0 to 1; got {self.damp_percent}.")
        if self.beam < 1 or self.rounds < 0:
            raise SettingError(f"beam is at least 1 and rounds at least 0; got {self.beam} and {self.rounds}.")

    @property
    def needs(self) -> frozenset[Need]:
        needs: set[Need] = {"H", "held_out"}
        if self.target:
            needs |= {"D", "R"} if self.residual else {"D"}
        return frozenset(needs)

    def prepare(self, moments: Moments) -> Aimed:
        """The factors, for all linears that read this input."""
        moments.check()
        factor = factorize(moments.H, order=self.order, damp_percent=self.damp_percent)
        steps, trials = [factor], []
        if self.target and self.shrink != "none":
            fit, ridges = moments.fit("H"), RIDGES if self.shrink == "spectral" else RIDGES[:1]
            dampings = [ridge * factor.damp_percent for ridge in ridges]
            steps += [factorize(moments.H, damp_percent=damping) for damping in dampings[1:]]
            trials = [factorize(fit, damp_percent=damping) for damping in dampings]
        metric = moments.H.clone()
        metric.diagonal().add_(factor.damp)
        return Aimed(moments, factor, steps, trials, column_cost(moments.H, factor), metric)

    def solve(self, weight: Float[Tensor, "out in"], state: Aimed, grid: Grid) -> Quantized:
        """Aim, fit the groups, sweep, check Babai's certificate, refine."""
        target, alpha = self._aim(weight, state) if self.target else (weight, 0.0)
        scales = fit_groups(target, grid, state.importance)
        if self.beam == 1:
            solved = sweep(target, state.factor, grid, scales)
        else:
            solved = beam_sweep(target, state.factor, grid, scales, self.beam)
        if solved.certificate is not None:
            verify(solved.certificate)
        return self._refine(solved, target, alpha, state, grid, held_out_loss(weight, state.moments, grid))

    def _aim(self, weight: Tensor, state: Aimed) -> tuple[Tensor, float]:
        """The target, and the share of the steps that was taken."""
        moments, held = state.moments, state.moments.held
        wanted = pull(weight, moments.D, moments.R)
        if self.shrink == "none" or held is None:
            return full_step(wanted, state.factor).add_(weight), 1.0
        some = slice(None, None, 1 if self.shrink == "row" else -(-len(weight) // TRIAL_ROWS))
        R, held_R = (None if part is None else part[some] for part in (moments.fit("R"), held.R))
        trial_pull = pull(weight[some], moments.fit("D"), R)
        trials = [full_step(trial_pull, factor) for factor in state.trials]
        judge = pull(weight[some], held.D, held_R)
        if self.shrink == "row":
            share = row_shares(trials[0], judge, held.H)
            return full_step(wanted, state.factor).mul_(share).add_(weight), float(share.mean())
        parts = shares(trials, judge, held.H)
        if self.shrink == "linear":
            parts = [min(part, 1.0) for part in parts]
        del trials
        target = weight.clone()
        for part, factor in zip(parts, state.steps, strict=True):
            if part > 0:
                target.add_(full_step(wanted, factor), alpha=part)
        return target, sum(parts)

    def _refine(
        self,
        solved: Quantized,
        target: Tensor,
        alpha: float,
        state: Aimed,
        grid: Grid,
        judge: Callable[[Quantized], float],
    ) -> Quantized:
        """Rounds of scale refit and descent while the held-out loss falls."""
        kept = rejected = 0
        best = judge(solved) if self.rounds else 0.0
        for _ in range(self.rounds):
            candidate = descend(target, state.metric, refit(target, state.metric, solved, grid), grid)
            loss = judge(candidate)
            if self.gate and not loss < best:
                rejected += 1
                break  # the next round would begin where this one did
            solved, best, kept = candidate, loss, kept + 1
        return solved._replace(course=Course(alpha, kept, rejected))


def held_out_loss(weight: Float[Tensor, "out in"], moments: Moments, grid: Grid) -> Callable[[Quantized], float]:
    """``‖Q X̂ - W X - R‖²`` over the held-out tokens, less what no Q changes; lower is better."""
    held = moments.held
    if held is None:
        raise ValueError("these moments keep nothing held out; a method asks for it with needs={'held_out'}.")
    wanted = None if held.D is None and held.R is None else pull(weight, held.D, held.R)

    def judge(quantized: Quantized) -> float:
        delta = dequantize(quantized, grid).to(weight.dtype).sub_(weight)
        gradient = delta @ held.H
        if wanted is not None:
            gradient.sub_(wanted, alpha=2)
        return float(gradient.mul_(delta).sum(dtype=torch.float64))

    return judge
