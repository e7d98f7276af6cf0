"""NearPlane, our own: everything the family approximates column by column has a closed form; use it, and let tokens that
had no part in it judge every step.

1. Target (``core/target.py``): ``W* = W + α (W D + R X̂ᵀ/n) (H + λI)⁻¹``, the weight that answers the drift of its input
   exactly, where GPTAQ (arXiv 2504.02692) and ResComp (arXiv 2604.07955) push a fixed share along while sweeping. A linear
   whose output is added to the residual stream also repairs the drift R of that stream.
2. Shrinkage: of that step, by direction of the input, only what held-out tokens confirm; they choose the damping, too.
3. Grid and sweep: static groups fitted to W*, errors weighted by what they cost the sweep; GPTQ's sweep (arXiv 2210.17323),
   which is Babai's nearest plane (arXiv 2507.18553), in any order; with ``beam`` > 1 its K cheapest answers side by side.
4. Refinement (``core/refine.py``): closed-form scales for the codes, then every code again, alternating; a round that
   raises the held-out loss is undone and counted.

There is nothing to tune: the switches are there so that each part can be left out and its worth measured.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from nearplane.core.beam import beam_sweep
from nearplane.core.certificate import verify
from nearplane.core.errors import SettingError
from nearplane.core.factor import Factor, Order, column_cost, factorize
from nearplane.core.grid import Course, Grid, Quantized, fit_groups
from nearplane.core.moments import Moments
from nearplane.core.refine import descend, refit
from nearplane.core.sweep import sweep
from nearplane.core.target import full_step, pull, row_shares, shares
from nearplane.core.trial import Trial
from nearplane.methods.base import Need

Shrink = Literal["spectral", "linear", "row", "none"]

# Dampings of the steps that "spectral" mixes, in multiples of damp_percent: directions of the input from all to the strongest.
RIDGES = (1.0, 30.0, 1000.0)
# Dampings of the sweep that held-out tokens choose from, in multiples of damp_percent.
DAMPINGS = (1.0, 3.0, 10.0, 30.0)
# Their multiples start here where damp_percent is less.
LEAST_DAMP = 1e-4
# Rows of a linear that a trial takes.
TRIAL_ROWS = 256


@dataclass
class Aimed:
    """What NearPlane prepares once per input: the moments, and the factors that its linears ask for."""

    moments: Moments
    factor: Factor  # of H + λI, λ from damp_percent
    order: Order
    kept: dict[tuple[float, bool], Factor] = field(default_factory=dict)
    ridge: float | None = None  # the damping, once the first linear has chosen it

    def damped(self, ridge: float, *, trial: bool = False) -> Factor:
        """Factor of H with ``ridge`` times the damping; ``trial``: without the held-out tokens, who shall judge it."""
        if ridge == 1 and not trial:
            return self.factor
        if (ridge, trial) not in self.kept:
            H = self.moments.fit("H") if trial else self.moments.H
            damp_percent = self.factor.damp_percent if ridge == 1 else ridge * max(self.factor.damp_percent, LEAST_DAMP)
            self.kept[ridge, trial] = factorize(H, order=self.order, damp_percent=damp_percent)
        return self.kept[ridge, trial]

    def forget(self) -> None:
        """Drop the factors that only the choice of the damping wanted."""
        self.kept = {key: factor for key, factor in self.kept.items() if key[0] in RIDGES}


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
    """Least damping of the Hessian, as a fraction of its mean diagonal."""
    damping: Literal["held_out", "fixed"] = "held_out"
    """held_out: held-out tokens choose 1, 3, 10 or 30 times damp_percent for each stage; fixed: 1 time."""
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
        if self.damping not in ("held_out", "fixed"):
            raise SettingError(f"damping must be held_out or fixed; got {self.damping!r}.")
        if not 0 <= self.damp_percent <= 1:
            raise SettingError(f"damp_percent is a fraction of the mean diagonal, 0 to 1; got {self.damp_percent}.")
        if self.beam < 1 or self.rounds < 0:
            raise SettingError(f"beam is at least 1 and rounds at least 0; got {self.beam} and {self.rounds}.")

    @property
    def needs(self) -> frozenset[Need]:
        needs: set[Need] = {"H"}
        if self.target:
            needs |= {"D", "R"} if self.residual else {"D"}
        if (self.target and self.shrink != "none") or self.damping == "held_out" or (self.gate and self.rounds):
            needs.add("held_out")
        return frozenset(needs)

    def prepare(self, moments: Moments) -> Aimed:
        """The factor, for all linears that read this input."""
        moments.check()
        factor = factorize(moments.H, order=self.order, damp_percent=self.damp_percent)
        return Aimed(moments, factor, self.order)

    def solve(self, weight: Float[Tensor, "out in"], state: Aimed, grid: Grid) -> Quantized:
        """Aim, choose the damping, fit the groups, sweep, check Babai's certificate, refine."""
        moments, trial = state.moments, self._trial(weight, state)
        taken = self._shares(weight, trial)
        target = weight.clone()
        if taken:
            wanted = pull(weight, moments.D, moments.R)
            for ridge, share in taken.items():
                target.addcmul_(full_step(wanted, state.damped(ridge)), share)
            del wanted
        if state.ridge is None:  # the first linear chooses for the stage
            state.ridge = self._ridge(trial, taken, state, grid)
            state.forget()
        factor = state.damped(state.ridge)
        scales = fit_groups(target, grid, column_cost(moments.H, factor))
        one = self.beam == 1
        solved = sweep(target, factor, grid, scales) if one else beam_sweep(target, factor, grid, scales, self.beam)
        if solved.certificate is not None:
            verify(solved.certificate)
        solved, kept, rejected = self._refine(solved, target, moments.H, factor, grid, trial)
        alpha = sum(float(share.mean()) for share in taken.values())
        return solved._replace(course=Course(alpha, factor.damp_percent, kept, rejected))

    def _trial(self, weight: Tensor, state: Aimed) -> Trial | None:
        """Some rows, and the steps that would be theirs without the held-out tokens."""
        if "held_out" not in self.needs:
            return None
        trial = Trial(weight, state.moments, len(weight) if self.shrink == "row" else TRIAL_ROWS)
        if self.target:
            ridges = RIDGES if self.shrink == "spectral" else RIDGES[:1]
            trial.steps = {r: full_step(trial.fit_pull, state.damped(r, trial=True)) for r in ridges}
        return trial

    def _shares(self, weight: Tensor, trial: Trial | None) -> dict[float, Tensor]:
        """How much of each ridge's step to take: (1, 1), or (out, 1) by row."""
        if not self.target:
            return {}
        if self.shrink == "none" or trial is None:
            return {1.0: weight.new_ones(1, 1)}
        if self.shrink == "row":
            return {1.0: row_shares(trial.steps[1.0], trial.held_pull, trial.held_H)}
        found = shares(list(trial.steps.values()), trial.held_pull, trial.held_H)
        if self.shrink == "linear":
            found = [min(share, 1.0) for share in found]
        return {
            ridge: weight.new_tensor([[share]]) for ridge, share in zip(trial.steps, found, strict=True) if share > 0
        }

    def _ridge(self, trial: Trial | None, taken: dict[float, Tensor], state: Aimed, grid: Grid) -> float:
        """The damping, in multiples of damp_percent, under which a trial serves the held-out tokens best."""
        if self.damping == "fixed" or trial is None:
            return 1.0
        target = trial.weight.clone()
        for ridge, share in taken.items():
            target.addcmul_(trial.steps[ridge], share)
        H, losses = state.moments.fit("H"), []
        for damping in DAMPINGS:
            factor = state.damped(damping, trial=True)
            scales = fit_groups(target, grid, column_cost(H, factor))
            losses.append(trial.loss(sweep(target, factor, grid, scales), grid))
        return DAMPINGS[losses.index(min(losses))]

    def _refine(
        self, solved: Quantized, target: Tensor, H: Tensor, factor: Factor, grid: Grid, trial: Trial | None
    ) -> tuple[Quantized, int, int]:
        """Rounds of scale refit and descent while the held-out loss falls; how many were kept, how many undone."""
        if self.rounds == 0:
            return solved, 0, 0
        metric = H.clone()
        metric.diagonal().add_(factor.damp)
        gate = trial if self.gate else None
        best = gate.loss(solved, grid) if gate else 0.0
        for kept in range(self.rounds):
            candidate = descend(target, metric, refit(target, metric, solved, grid), grid)
            if gate:
                loss = gate.loss(candidate, grid)
                if not loss < best:
                    return solved, kept, 1  # the next round would begin where this one did
                best = loss
            solved = candidate
        return solved, self.rounds, 0
