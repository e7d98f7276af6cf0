"""What a method is: the whole contract, and the part that every sweeping method shares."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from nearplane.core.certificate import verify
from nearplane.core.errors import SettingError
from nearplane.core.factor import Factor, Order, factorize
from nearplane.core.grid import Grid, Quantized, fit_groups
from nearplane.core.moments import Moments
from nearplane.core.sweep import Push, sweep

Need = Literal["H", "D", "R", "held_out"]


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass whose fields are its options.

    Where memory is not plenty, and for ``plan``, small stages of random numbers are solved first (``run/probe.py``).

    Optional members: ``refuses(shape)``, the reason why a weight of that (out, in) cannot be solved, or None;
    ``rows_independent = True``, a promise that ``solve`` of some rows gives what it gives them among all rows, with the same
    state, so that several ranks may take some each.
    """

    @property
    def needs(self) -> frozenset[Need]:
        """What calibration must measure: of H, D and R (``core/moments.py``; where R is kept it stands in for D), and
        whether a share of it is held out."""
        ...

    def prepare(self, moments: Moments) -> Any:
        """Work that depends on the input only, done once for all linears that read it."""
        ...

    def solve(self, weight: Float[Tensor, "out in"], state: Any, grid: Grid) -> Quantized:
        """Solve a weight with what ``prepare`` returned: the rows of all linears that read the input, stacked."""
        ...


def rows_independent(method: Method) -> bool:
    """Whether a method promises that. A promise is about the ``solve`` it stands beside: a subclass with its own repeats it."""
    for kind in type(method).__mro__:
        if "rows_independent" in vars(kind):
            return bool(getattr(method, "rows_independent", False))
        if "solve" in vars(kind):
            return False
    return False


class Prepared(NamedTuple):
    """What a sweeping method prepares once per input."""

    factor: Factor
    importance: Float[Tensor, "in"]  # column_cost (core/factor.py)
    push: Push | None = None


@dataclass(frozen=True)
class Sweeping:
    """Options and steps that GPTQ, GPTAQ and ResComp share."""

    rows_independent: ClassVar[bool] = True

    order: Order = "activation"
    """Order in which columns are solved; on disk they stay where they were."""
    damp_percent: float = 0.01
    """Damping of the Hessian, as a fraction of its mean diagonal."""
    static_groups: bool = True
    """Fit every scale before the sweep; --no-static-groups fits each group when the sweep reaches it (natural order)."""

    def __post_init__(self) -> None:
        if self.order not in ("natural", "activation", "pivot"):
            raise SettingError(f"order must be natural, activation or pivot; got {self.order!r}.")
        if not 0 <= self.damp_percent <= 1:
            raise SettingError(f"damp_percent is a fraction of the mean diagonal, 0 to 1; got {self.damp_percent}.")
        for share in ("alpha", "alpha2"):
            if not 0 <= getattr(self, share, 0) <= 1:
                raise SettingError(f"{share} is a share, 0 to 1; got {getattr(self, share)}.")
        if not self.static_groups and self.order != "natural":
            raise SettingError(
                f"order={self.order} solves columns of all groups mixed, so groups must be static; "
                "use static_groups, or order=natural."
            )

    def _factor(self, moments: Moments) -> Factor:
        moments.check()
        return factorize(moments.H, order=self.order, damp_percent=self.damp_percent)

    def solve(self, weight: Float[Tensor, "out in"], state: Prepared, grid: Grid) -> Quantized:
        """Fit the groups, sweep, and check Babai's certificate. ``weight`` has the dtype of the moments."""
        scales = fit_groups(weight, grid, state.importance) if self.static_groups else None
        solved = sweep(weight, state.factor, grid, scales, push=state.push, importance=state.importance)
        if solved.certificate is not None:
            verify(solved.certificate)
        return solved
