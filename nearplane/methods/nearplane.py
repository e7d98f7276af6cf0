"""NearPlane, our own: the closed form of what the other methods approximate column by column, judged on held-out tokens.

1. Target (``core/target.py``): ``W* = W + α (W D + R X̂ᵀ/n) (H + λI)⁻¹``, which compensates the drift of the input exactly.
   GPTAQ (arXiv 2504.02692) and ResComp (arXiv 2604.07955) push a fixed share of it along while sweeping. A linear whose
   output is added to the residual stream also repairs the drift R of that stream (as LoaQ's does, arXiv 2509.06297). Where
   the output passes a norm before, tokens and outputs count as they do behind that norm.
2. Shrinkage: of that step, by direction of the input, the share that held-out tokens confirm. They choose the damping, too.
3. Grid and sweep: static groups are fitted to W*, with errors weighted by their cost to the sweep. The sweep is GPTQ's
   (arXiv 2210.17323), which is Babai's nearest plane (arXiv 2507.18553); ``beam`` > 1 keeps its K cheapest answers.
4. Refinement (``core/refine.py``): every scale and every code once more, in closed form. A round that raises the held-out
   loss is undone and counted.

Nothing needs tuning: each switch leaves out one part, so that its worth can be measured.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.beam import beam_sweep
from nearplane.core.certificate import verify
from nearplane.core.errors import SettingError, plain_numbers
from nearplane.core.factor import Order, column_cost, factorize
from nearplane.core.grid import Course, Grid, Quantized, fit_groups
from nearplane.core.heldout import Trial
from nearplane.core.moments import Moments
from nearplane.core.refine import Refinement
from nearplane.core.sweep import sweep, sweep_with_slope
from nearplane.core.target import full_step, mixed_step, pull, row_shares, shares
from nearplane.methods.base import Need

Shrink = Literal["spectral", "linear", "row", "none"]

# Damping of the second step that "spectral" mixes, in multiples of damp_percent. That step keeps the strongest
# directions of the input only.
RIDGE = 100.0
# Dampings of the sweep that held-out tokens choose from beside damp_percent, in multiples of it.
DAMPINGS = (10.0, 100.0)
# A damping 100 times as great that loses so many times as much rules out the one between: in 36 linears, at a hundredth to
# once the default damping, the one between won only where the ratio was below 1.2.
FAR_WORSE = 1.25
# The least damping of a step that is judged, and the least number to take multiples of. A smaller one compensates in
# directions that the held-out tokens may not have.
LEAST_DAMP = 1e-3
# Answers per row beyond which a beam is a mistake: memory and time grow with it.
MOST_BEAM = 256
# Rows of a trial.
TRIAL_ROWS = 256


@dataclass(frozen=True)
class NearPlane:
    """Exact target, chosen order, weighted grid, nearest plane, refinement, judged on held-out tokens."""

    target: bool = True
    """Correct the drift of earlier layers exactly; --no-target rounds towards the original weight."""
    residual: bool = True
    """Let linears that write to the residual stream repair its drift too."""
    sandwich: bool = True
    """Where a norm follows a linear (Gemma, OLMo 2, GLM-4), count errors as they are behind the norm, and let the linear
    repair the residual stream through it; --no-sandwich takes such linears as any other."""
    shrink: Shrink = "spectral"
    """How held-out tokens limit the target's step: spectral, by direction of the input; linear, one share for all
    linears that read the input; row, one per output row; none takes all of it."""
    order: Order = "activation"
    """Order in which columns are solved; on disk they stay where they were."""
    damp_percent: float = 0.1
    """Least damping of the Hessian, as a fraction of its mean diagonal. GPTQ's 0.01 serves the calibration text alone:
    on other texts NearPlane leaves less with 0.1."""
    damping: Literal["held_out", "fixed"] = "held_out"
    """held_out: held-out tokens choose 1, 10 or 100 times damp_percent for each stage; fixed: 1 time."""
    beam: int = 1
    """Answers per row that the sweep keeps while it walks the columns; 4 take about 20 times the sweep's time."""
    rounds: int = 2
    """Refinement rounds at most, each over all scales and all codes."""
    gate: bool = True
    """Undo a round that raises the held-out loss of a sample of rows, and stop; --no-gate keeps every round."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.order not in get_args(Order):
            raise SettingError(f"order must be one of {', '.join(get_args(Order))}; got {self.order!r}.")
        if self.shrink not in get_args(Shrink):
            raise SettingError(f"shrink must be one of {', '.join(get_args(Shrink))}; got {self.shrink!r}.")
        if self.damping not in ("held_out", "fixed"):
            raise SettingError(f"damping must be held_out or fixed; got {self.damping!r}.")
        if not 0 <= self.damp_percent <= 1:
            raise SettingError(f"damp_percent is a fraction of the mean diagonal, 0 to 1; got {self.damp_percent}.")
        for switch in ("target", "residual", "sandwich", "gate"):
            if not isinstance(getattr(self, switch), bool):
                raise SettingError(f"{switch} must be True or False; got {getattr(self, switch)!r}.")
        if not (isinstance(self.beam, int) and isinstance(self.rounds, int)):
            raise SettingError(f"beam and rounds are whole numbers; got {self.beam!r} and {self.rounds!r}.")
        if not 1 <= self.beam <= MOST_BEAM or self.rounds < 0:
            raise SettingError(f"beam is 1 to {MOST_BEAM} and rounds at least 0; got {self.beam} and {self.rounds}.")

    @property
    def needs(self) -> frozenset[Need]:
        needs: set[Need] = {"H"}
        if self.target:
            needs |= {"D", "R", "coarse"} if self.residual else {"D", "coarse"}
        if self.sandwich:
            needs.add("norm")
        if (self.target and self.shrink != "none") or self.damping == "held_out" or (self.gate and self.rounds):
            needs.add("held_out")
        return frozenset(needs)

    def prepare(self, moments: Moments) -> Moments:
        """Check the moments; everything else is judged on a weight."""
        moments.check()
        return moments

    def solve(self, weight: Float[Tensor, "out in"], state: Moments, grid: Grid) -> Quantized:
        """Choose the target, fit the groups, sweep, check Babai's certificate, refine."""
        H, trial = state.H, self._trial(weight, state)
        taken, damp_percent = self._judge(trial, state, grid)
        factor = factorize(H, order=self.order, damp_percent=damp_percent)
        target, raised = weight, 0
        if taken:
            step, raised = mixed_step(pull(weight, state.D, state.R), H, taken, factor)
            target = step.add_(weight)
        scales = fit_groups(target, grid, column_cost(H, factor))
        slope: Tensor | None = None
        if self.beam > 1:
            solved = beam_sweep(target, factor, grid, scales, self.beam)
        elif self.rounds:
            solved, slope = sweep_with_slope(target, factor, grid, scales)
        else:
            solved = sweep(target, factor, grid, scales)
        if solved.certificate is not None:
            verify(solved.certificate)
        gate = trial if self.gate else None
        kept = rejected = 0
        if self.rounds and (gate is None or gate.judges):
            solved, kept, rejected = self._refine(Refinement(target, H, solved, grid, slope, factor.damp), gate)
        alpha = sum((float(share.mean()) for share in taken.values()), 0.0)
        return solved._replace(course=Course(alpha, factor.damp_percent, factor.raised + raised, kept, rejected))

    def _trial(self, weight: Tensor, moments: Moments) -> Trial | None:
        """Return the rows on which held-out tokens judge; None where nothing is judged."""
        if "held_out" not in self.needs:
            return None
        return Trial(weight, moments, len(weight) if self.shrink == "row" else TRIAL_ROWS)

    def _judge(self, trial: Trial | None, moments: Moments, grid: Grid) -> tuple[dict[float, Tensor], float]:
        """Return the share of the target's step to take, (1, 1) or (out, 1), by damping; and the damping of the sweep.

        Both are judged with factors of the tokens that are not held out.
        """
        own, least = self.damp_percent, max(self.damp_percent, LEAST_DAMP)
        ridges = {"none": [], "spectral": [least, RIDGE * least]}.get(self.shrink, [least]) if self.target else []
        dampings = [own, *(k * least for k in DAMPINGS)] if self.damping == "held_out" else []
        taken = {own: moments.H.new_ones(1, 1)} if self.target and self.shrink == "none" else {}
        if trial is None or not (ridges or dampings):
            return taken, own
        H = moments.fit("H")
        if not bool(H.diagonal().any()):  # only held-out tokens are not zero: nothing to judge
            return taken, own
        wanted = trial.fit_pull() if ridges else None
        rounding = trial.rounding(grid) if dampings else None
        steps: dict[float, Tensor] = {}
        losses: dict[float, float] = {}
        for damp_percent in [*ridges, *(k for k in dampings if k not in ridges)]:
            if damp_percent not in ridges and _hopeless(damp_percent, losses):
                continue
            factor = factorize(H, order=self.order, damp_percent=damp_percent, rough=True)
            if wanted is not None and damp_percent in ridges:
                steps[damp_percent] = full_step(wanted, factor)
            if rounding is not None and damp_percent in dampings:
                losses[damp_percent] = trial.spread(rounding, factor)
        return taken | self._shares(steps, trial), min(losses, key=losses.__getitem__, default=own)

    def _shares(self, steps: dict[float, Tensor], trial: Trial) -> dict[float, Tensor]:
        """Return the share of each step that the held-out tokens confirm."""
        if not steps:
            return {}
        if self.shrink == "row":
            rows = {k: row_shares(step, trial.pull, trial.H) for k, step in steps.items()}
            return {k: share * trial.confirmed(share * steps[k], by_row=True) for k, share in rows.items()}
        found = shares(list(steps.values()), trial.pull, trial.H)
        most = 1.0 if self.shrink == "linear" else math.inf
        taken = {k: trial.H.new_tensor([[min(c, most)]]) for k, c in zip(steps, found, strict=True) if c > 0}
        if not taken:
            return {}
        share = trial.confirmed(sum(((share * steps[k]) for k, share in taken.items()), torch.zeros_like(trial.pull)))
        return {k: c * share for k, c in taken.items()}

    def _refine(self, refinement: Refinement, gate: Trial | None) -> tuple[Quantized, int, int]:
        """Refine while the held-out loss falls; return the answer, how many rounds were kept and how many undone."""
        solved, grid = refinement.solved, refinement.grid
        best = gate.losses(solved, grid) if gate else []
        for kept in range(self.rounds):
            candidate = refinement.round()
            if gate:
                losses = gate.losses(candidate, grid)
                if not all(loss < least for loss, least in zip(losses, best, strict=True)):
                    return solved, kept, 1  # the next round would begin where this one did
                best = losses
            solved = candidate
        return solved, self.rounds, 0


def _hopeless(damp_percent: float, losses: dict[float, float]) -> bool:
    """Return whether a damping lies between two judged ones of which the greater loses far more: it would not be chosen."""
    below = [loss for k, loss in losses.items() if damp_percent / 20 < k < damp_percent]
    above = [loss for k, loss in losses.items() if damp_percent < k < damp_percent * 20]
    return bool(below and above) and min(above) > FAR_WORSE * min(below)
