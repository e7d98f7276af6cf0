"""Babai's certificate (arXiv 2507.18553): a row in which no code was clipped obeys

    ||q - w*||² in the metric H + λI  ≤  Σ_j d_j (γ s_j)²

with γ half the largest gap between levels, 1/2 for integers. GPTQ's sweep is Babai's nearest plane on the lattice with
basis (H+λI)^{1/2} diag(s), and the loss is the sum Σ_j d_j (v_j - q_j)². With scales fixed beforehand the bound is known
before the sweep. The bound is tight; the mean loss on integers is about a third of it. A row above its bound without a
clipped code is a bug, and raises an error.
"""

from nearplane.core.errors import NumericalError
from nearplane.core.grid import Certificate

# Rounding of v/s at the last bit may exceed a half by this much in float32.
SLACK = 1e-4


def ratio(certificate: Certificate) -> float:
    """Return the achieved loss over the bound, both summed over rows; 0 where the bound is 0."""
    bound = float(certificate.bound.sum())
    return float(certificate.loss.sum()) / bound if bound > 0 else 0.0


def verify(certificate: Certificate) -> None:
    """Raise NumericalError where a row breaks the bound without a clipped code, or a loss is not finite."""
    if not bool((certificate.loss.isfinite() & certificate.bound.isfinite()).all()):
        raise NumericalError("the loss is not finite: this weight or its Hessian is too large for float32.")
    excess = certificate.loss - certificate.bound * (1 + SLACK)
    excess = excess.masked_fill(certificate.clipped > 0, 0)
    if bool((excess > 0).any()):
        row = int(excess.argmax())
        raise NumericalError(
            f"row {row} has loss {float(certificate.loss[row]):.6g} above Babai's bound {float(certificate.bound[row]):.6g} "
            "with no code clipped: this is a bug in the solver, please report it with the report.json of this run."
        )
