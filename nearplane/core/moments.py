"""Second moments of one linear's input, averaged per token.

With X the input in the original model and X̂ in the partially quantized one: ``H = X̂ X̂ᵀ/n`` and the drift
moment ``D = (X - X̂) X̂ᵀ/n`` (GPTAQ's dXXT, arXiv 2504.02692). Where the linear's output is added to a residual stream
r, its own drift and the stream's are one: ``R = (r + W X - r̂ - W X̂) X̂ᵀ/n`` is what the linear could repair there; the
walk keeps no D then, ``W D`` being part of R. Everything the solvers do is invariant to a common rescale of all three, so
no factor 2/N appears.
"""

import math
from dataclasses import dataclass
from typing import Literal, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearplane.core.errors import NumericalError, SettingError

# An input that loses more than this share of its tokens to NaN or Inf calibrates on something else than the text.
MOST_DROPPED = 0.05
# Solvers multiply moments with each other; in float32 that is safe while the mean diagonal of H is 2^-48 to 2^48.
WIDEST = 48


@dataclass
class Moments:
    """Per-token averages over ``tokens`` tokens; ``dropped`` tokens were non-finite and left out."""

    H: Float[Tensor, "in in"]
    D: Float[Tensor, "in in"] | None = None
    tokens: int = 0
    dropped: int = 0
    R: Float[Tensor, "out in"] | None = None
    held: "Moments | None" = None  # the same of a share of these tokens: what a choice is judged on

    @classmethod
    def zeros(
        cls,
        n: int,
        *,
        drift: bool = False,
        residual: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "Moments":
        """Empty moments of an input with ``n`` features; ``drift`` reserves D, ``residual`` (its width) reserves R."""
        H = torch.zeros(n, n, dtype=dtype, device=device)
        R = None if residual is None else H.new_zeros(residual, n)
        return cls(H, torch.zeros_like(H) if drift else None, R=R)

    def add(
        self,
        xhat: Float[Tensor, "tokens in"],
        x: Float[Tensor, "tokens in"] | None = None,
        drift: Float[Tensor, "tokens out"] | None = None,
    ) -> None:
        """Take in a batch: ``xhat`` of the quantized stream, ``x`` of the reference stream when D is kept, the
        ``drift`` of the stream behind the linear when R is.

        A token with a non-finite value anywhere is left out and counted in ``dropped``.
        """
        if (x is None) != (self.D is None) or (drift is None) != (self.R is None):
            raise ValueError("x is needed exactly when the moments keep D, and drift exactly when they keep R.")
        dtype = self.H.dtype
        xhat = xhat.to(dtype)
        finite = _finite(xhat)
        sides: list[tuple[Tensor, Tensor]] = []  # a moment, and what stands left of X̂ᵀ in it
        if self.D is not None and x is not None:
            sides.append((self.D, x.to(dtype) - xhat))
        if self.R is not None and drift is not None:
            sides.append((self.R, drift.to(dtype)))
        for _, left in sides:
            finite &= _finite(left)
        kept = int(finite.sum())
        self.dropped += len(xhat) - kept
        if kept == 0:
            return
        if kept < len(xhat):
            xhat, sides = xhat[finite], [(moment, left[finite]) for moment, left in sides]
        keep, step = self.tokens / (self.tokens + kept), 1 / (self.tokens + kept)
        add_gram(self.H, xhat, keep, step)
        for moment, left in sides:
            torch.addmm(moment, left.T, xhat, beta=keep, alpha=step, out=moment)
        self.tokens += kept

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets of tokens together: the weighted mean, so shards combine exactly."""
        if (self.D is None) != (other.D is None) or (self.R is None) != (other.R is None):
            raise ValueError("moments that keep different things cannot be merged.")
        held = self.held.merge(other.held) if self.held is not None and other.held is not None else None
        D, R = (None if moment is None else moment.clone() for moment in (self.D, self.R))
        whole = Moments(self.H.clone(), D, self.tokens, self.dropped, R)
        whole._absorb(other)
        whole.held = held
        return whole

    def join(self, held: "Moments") -> "Moments":
        """These moments and those of the ``held`` tokens together, with ``held`` kept beside; takes both over."""
        self._absorb(held)
        self.held = held
        return self

    @overload
    def fit(self, moment: Literal["H"]) -> Tensor: ...
    @overload
    def fit(self, moment: Literal["D", "R"]) -> Tensor | None: ...
    def fit(self, moment: Literal["H", "D", "R"]) -> Tensor | None:
        """One moment over the tokens that are not held out; None where it is not kept."""
        whole: Tensor | None = getattr(self, moment)
        part: Tensor | None = getattr(self.held, moment, None)
        if whole is None or part is None or self.held is None or not 0 < self.held.tokens < self.tokens:
            return whole
        share = self.held.tokens / self.tokens
        return torch.sub(whole, part, alpha=share).div_(1 - share)

    def _absorb(self, other: "Moments") -> None:
        tokens = self.tokens + other.tokens
        a, b = (self.tokens / tokens, other.tokens / tokens) if tokens else (0.0, 0.0)
        for mine, its in ((self.H, other.H), (self.D, other.D), (self.R, other.R)):
            if mine is not None and its is not None:
                mine.mul_(a).add_(its, alpha=b)
        self.tokens, self.dropped = tokens, self.dropped + other.dropped

    def rescale(self) -> int:
        """Bring moments of very large or small activations near 1; returns the power of two they were multiplied by.

        Exact, and 0 for what any ordinary model shows. Nothing a solver does depends on a common factor.
        """
        mean = self._mean()
        least = torch.finfo(self.H.dtype).tiny / torch.finfo(self.H.dtype).eps  # what is less has lost digits already
        if not least <= mean < math.inf or 2.0**-WIDEST <= mean <= 2.0**WIDEST:
            return 0
        power = -2 * (math.frexp(mean)[1] // 2)  # even, so that a factor's square roots are scaled exactly, too
        parts = [self] if self.held is None else [self, self.held]
        for moment in (moment for part in parts for moment in (part.H, part.D, part.R)):
            if moment is not None:
                moment.mul_(2.0 ** (power // 2)).mul_(2.0 ** (power // 2))  # 2 ** power may be no number of the dtype
        return power

    def _mean(self) -> float:
        return float(self.H.diagonal().double().mean())

    def check(self) -> None:
        """Raise NumericalError where no solver could give a meaningful answer."""
        total = self.tokens + self.dropped
        if total == 0:
            raise NumericalError("no calibration token reached this input.")
        if self.dropped > MOST_DROPPED * total:
            raise NumericalError(
                f"{self.dropped} of {total} calibration tokens have NaN or Inf in this layer's input. Likely causes: a "
                "broken weight before it, or a dtype too narrow for this model's activations."
            )
        if not all(all_finite(moment) for moment in (self.H, self.D, self.R) if moment is not None):
            raise NumericalError(
                "the Hessian overflowed; likely an activation far outside float32's square root. "
                "Check the model's dtype and the calibration text."
            )
        if not bool((self.H.diagonal() > 0).any()):
            raise NumericalError("the Hessian is zero: every calibration input to this layer is zero.")
        mean, dtype = self._mean(), str(self.H.dtype).removeprefix("torch.")
        if not 2.0**-WIDEST <= mean <= 2.0**WIDEST:
            raise NumericalError(
                f"the activations are of size {math.sqrt(mean):.0e}, whose squares {dtype} cannot hold or multiply. Check "
                "the model's weights and dtype; moments of one's own are brought near 1 by rescale()."
            )

    def held_out(self) -> "Moments":
        """Those of the held-out tokens, for the methods that judge by them."""
        if self.held is None:
            raise ValueError("nothing is held out of these moments; a method asks for it with needs={'held_out'}.")
        return self.held

    def drift(self) -> Float[Tensor, "in in"]:
        """D, for the methods that need it. SettingError where it was not asked for, or R was and stands in for it."""
        if self.D is None:
            raise SettingError(
                "these moments hold no D: a method that reads D asks for needs={'H', 'D'}, without 'R', which takes the place "
                "of D where a linear adds to the residual stream."
            )
        return self.D


def _finite(x: Float[Tensor, "tokens width"]) -> Bool[Tensor, "tokens"]:
    """Which tokens are finite throughout: NaN and Inf stay in a sum, and one pass over the numbers is all it takes.

    A sum of finite numbers that overflows counts as well; their squares in H would have.
    """
    return x.sum(1).isfinite()


def all_finite(value: Tensor) -> bool:
    """Whether every number is: the least and greatest are NaN where any is. Much faster than ``isfinite`` on a CPU."""
    return value.numel() == 0 or all(math.isfinite(extreme) for extreme in value.aminmax())


# Columns of a Gram matrix that one GEMM computes both halves of; wider ones are halved until they are that narrow.
LEAF, LEAF_GPU = 256, 2048


def add_gram(total: Float[Tensor, "in in"], x: Float[Tensor, "tokens in"], keep: float, step: float) -> None:
    """``total ← keep total + step xᵀx``: both diagonal quarters in turn, the upper right one, and its mirror."""
    n, leaf = len(total), LEAF if total.device.type == "cpu" else LEAF_GPU
    if n > leaf:
        half = leaf * -(-n // leaf) // 2
        for part in (slice(0, half), slice(half, n)):
            add_gram(total[part, part], x[:, part], keep, step)
        corner = total[:half, half:]
        torch.addmm(corner, x[:, :half].T, x[:, half:], beta=keep, alpha=step, out=corner)
        total[half:, :half] = corner.T
        return
    torch.addmm(total, x.T, x, beta=keep, alpha=step, out=total)
    total.copy_(total.triu() + total.triu(1).T)  # a GEMM rounds its two halves differently
