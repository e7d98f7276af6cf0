"""The contract of a method, and the part that all sweeping methods share."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from nearplane.core.certificate import verify
from nearplane.core.errors import SettingError, plain_numbers
from nearplane.core.factor import Factor, Order, factorize
from nearplane.core.grid import Grid, Quantized, fit_groups
from nearplane.core.moments import Moments
from nearplane.core.sweep import Push, sweep

Need = Literal["H", "D", "R", "held_out", "norm", "magnitude", "coarse"]


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass whose fields are its options.

    ``plan``, and ``quantize`` where memory is short, solve small stages of random numbers first (``run/probe.py``).

    Optional members:

    - ``refuses(shape)``: the reason why a weight of that (out, in) cannot be solved, or None.
    - ``rows_independent = True``: a promise that ``solve`` gives a row the same answer alone as among others, from the
      same state. Then each rank may solve some of the rows.
    - ``scale = "awq"``: input channels are scaled first, unless the job says otherwise (``transforms/scaling.py``).
    """

    @property
    def needs(self) -> frozenset[Need]:
        """Moments that calibration must measure: of H, D and R (``core/moments.py``; R takes the place of D), and held_out.

        With norm, tokens and outputs are weighted where a norm follows the linear, which may have an R there, too.
        With magnitude, the mean of |x̂| is measured, too. With coarse, the reference stream's linears and the sums of D may be
        coarse products (``core/dense.py``) where weights get at most 5 bits.
        """
        ...

    def prepare(self, moments: Moments) -> Any:
        """Do the work that depends on the input alone, once for all linears that read it."""
        ...

    def solve(self, weight: Float[Tensor, "out in"], state: Any, grid: Grid) -> Quantized:
        """Solve a weight.

        Args:
            weight: The rows of all linears that read the input, stacked, in the dtype of the moments.
            state: The result of ``prepare``.
            grid: The grid to round to.
        """
        ...


def rows_independent(method: Method) -> bool:
    """Return whether a method promises independent rows; a subclass with a ``solve`` of its own must repeat the promise."""
    for kind in type(method).__mro__:
        if "rows_independent" in vars(kind):
            return bool(getattr(method, "rows_independent", False))
        if "solve" in vars(kind):
            return False
    return False


class Prepared(NamedTuple):
    """The state of a sweeping method, prepared once per input."""

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
        plain_numbers(self)
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
        """Fit the groups, sweep, and check Babai's certificate."""
        scales = fit_groups(weight, grid, state.importance) if self.static_groups else None
        solved = sweep(weight, state.factor, grid, scales, push=state.push, importance=state.importance)
        if solved.certificate is not None:
            verify(solved.certificate)
        return solved


def check_method(method: Any) -> None:
    """SettingError for what is no method, or needs what calibration does not measure."""
    if isinstance(method, type) or not all(hasattr(method, part) for part in ("needs", "prepare", "solve")):
        raise SettingError(f"method must be an object with needs, prepare and solve, such as GPTQ(); got {method!r}.")
    if not set(method.needs) <= set(get_args(Need)):
        known = ", ".join(get_args(Need))
        raise SettingError(f"a method may need {known}; {type(method).__name__} needs {sorted(method.needs)}.")
