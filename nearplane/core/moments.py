"""Second moments of one linear's input, averaged per token.

With X the input in the original model and X̂ in the partially quantized one: ``H = X̂ X̂ᵀ/n`` and the drift
moment ``D = (X - X̂) X̂ᵀ/n`` (GPTAQ's dXXT, arXiv 2504.02692). Where the linear's output is added to a residual stream
r, the linear can repair the drift behind the addition: ``R = (r + W X - r̂ - W X̂) X̂ᵀ/n``. ``W D`` is part of R, so the
walk keeps no D then. The solvers are invariant to a common rescale of all three, so no factor 2/N appears.

Where a norm follows the linear, an error of a token counts by the token's weight, and one of an output by the norm's gain
(``docs/method.md``, section 10). Moments are then weighted averages.
"""

import math
from dataclasses import dataclass
from functools import reduce
from typing import Literal, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearplane.core.dense import coarse_product
from nearplane.core.errors import NumericalError, SettingError

# A stage that loses a larger share of its tokens to NaN or Inf is an error.
MOST_DROPPED = 0.05
# Units in the last place by which a difference of two sums may be wrong.
ROUNDING = 64
# Solvers multiply moments with each other; float32 is safe while the mean diagonal of H is 2^-48 to 2^48.
WIDEST = 48


@dataclass
class Moments:
    """Averages over ``tokens`` tokens, weighted where ``mass`` is given; ``dropped`` more were not finite and left out."""

    H: Float[Tensor, "in in"]
    D: Float[Tensor, "in in"] | None = None
    tokens: int = 0
    dropped: int = 0
    R: Float[Tensor, "out in"] | None = None
    held: "Moments | None" = None  # moments of the held-out tokens, which are among these
    sources: "tuple[Moments, ...]" = ()  # of several texts, the moments of each one's held-out tokens
    mass: float | None = None  # sum of the tokens' weights; None: each weighs 1
    gain: Float[Tensor, "out"] | None = None  # what an error of each output is multiplied by; None: 1
    magnitude: Float[Tensor, "in"] | None = None  # the mean of |x̂|
    coarse: bool = False  # whether D is summed from coarse products (core/dense.py)

    @classmethod
    def zeros(
        cls,
        n: int,
        *,
        drift: bool = False,
        residual: int | None = None,
        weighted: bool = False,
        magnitude: bool = False,
        coarse: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "Moments":
        """Make empty moments.

        Args:
            n: Features of the input.
            drift: Whether to keep D.
            residual: Width of the residual stream, to keep R.
            weighted: Whether tokens come with weights.
            magnitude: Whether to keep the mean of |x̂|.
            coarse: Whether D may be summed from coarse products.
            dtype: Of the moments.
            device: Of the moments.
        """
        H = torch.zeros(n, n, dtype=dtype, device=device)
        R = None if residual is None else H.new_zeros(residual, n)
        size = H.new_zeros(n) if magnitude else None
        D = torch.zeros_like(H) if drift else None
        return cls(H, D, R=R, mass=0.0 if weighted else None, magnitude=size, coarse=coarse)

    def add(
        self,
        xhat: Float[Tensor, "tokens in"],
        x: Float[Tensor, "tokens in"] | None = None,
        drift: Float[Tensor, "tokens out"] | None = None,
        weight: Float[Tensor, "tokens"] | None = None,
    ) -> None:
        """Add a batch of tokens. A token with a value that is not finite is left out and counted in ``dropped``.

        Args:
            xhat: Input in the quantized stream.
            x: Input in the reference stream; where D is kept, and only there.
            drift: Drift of the stream behind the linear; where R is kept, and only there.
            weight: Weights of the tokens, none below 0; where moments are weighted, and only there.
        """
        if (x is None) != (self.D is None) or (drift is None) != (self.R is None):
            raise ValueError("x is needed exactly when the moments keep D, and drift exactly when they keep R.")
        if (weight is None) != (self.mass is None):
            raise ValueError("weight is needed exactly when the moments are weighted.")
        dtype = self.H.dtype
        xhat = xhat.to(dtype)
        finite = _finite(xhat)
        sides: list[tuple[Tensor, Tensor]] = []  # a moment, and the factor left of X̂ᵀ in it
        if self.D is not None and x is not None:
            sides.append((self.D, x.to(dtype) - xhat))
        if self.R is not None and drift is not None:
            sides.append((self.R, drift.to(dtype)))
        for _, left in sides:
            finite &= _finite(left)
        if weight is not None:
            root = weight.to(dtype).sqrt()[:, None]
            finite &= _finite(root)
            xhat, sides = xhat * root, [(moment, left * root) for moment, left in sides]
        kept = int(finite.sum())
        self.dropped += len(xhat) - kept
        if kept == 0:
            return
        if kept < len(xhat):
            xhat, sides = xhat[finite], [(moment, left[finite]) for moment, left in sides]
        before, more = self.weight, float(kept)
        if weight is not None:
            more = float(weight[finite].sum(dtype=torch.float64))
            self.mass = before + more
            if more == 0:
                self.tokens += kept
                return
        keep, step = before / (before + more), 1 / (before + more)
        add_gram(self.H, xhat, keep, step)
        if self.magnitude is not None:
            sizes = xhat.abs() if weight is None else xhat.abs().mul_(root[finite])
            self.magnitude.mul_(keep).add_(sizes.sum(0), alpha=step)
        for moment, left in sides:
            self._add_side(moment, left, xhat, keep, step)
        self.tokens += kept

    def _add_side(self, moment: Tensor, left: Tensor, xhat: Tensor, keep: float, step: float) -> None:
        """Update ``moment ← keep moment + step leftᵀ xhat``, by a coarse product for D where that is allowed.

        A drift is small, and so are the errors of its products. What R sums holds W X, which is not small.
        """
        if self.coarse and moment is self.D:
            moment.mul_(keep).add_(coarse_product(left.T, xhat), alpha=step)
        else:
            torch.addmm(moment, left.T, xhat, beta=keep, alpha=step, out=moment)

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of tokens together: their weighted mean, so shards combine exactly."""
        kinds = [(m.D is None, m.R is None, m.mass is None, m.magnitude is None) for m in (self, other)]
        if kinds[0] != kinds[1]:
            raise ValueError("moments that keep different things cannot be merged.")
        held = self.held.merge(other.held) if self.held is not None and other.held is not None else None
        sources = tuple(mine.merge(its) for mine, its in zip(self.sources, other.sources, strict=True))
        D, R, size = (None if moment is None else moment.clone() for moment in (self.D, self.R, self.magnitude))
        whole = Moments(self.H.clone(), D, self.tokens, self.dropped, R, mass=self.mass, gain=self.gain, magnitude=size)
        whole.coarse = self.coarse
        whole._absorb(other)
        whole.held, whole.sources = held, sources
        return whole

    def join(self, *held: "Moments") -> "Moments":
        """Add the moments of held-out tokens, in place, and keep those moments as ``held``; of several texts, also apart."""
        for part in held:
            self._absorb(part)
        self.held = reduce(Moments.merge, held)
        self.sources = held if len(held) > 1 else ()
        return self

    @property
    def parts(self) -> "list[Moments]":
        """These moments, and those of the held-out tokens that they keep."""
        return [self, *([] if self.held is None else [self.held]), *self.sources]

    @overload
    def fit(self, moment: Literal["H"]) -> Tensor: ...
    @overload
    def fit(self, moment: Literal["D", "R"]) -> Tensor | None: ...
    def fit(self, moment: Literal["H", "D", "R"]) -> Tensor | None:
        """Return one moment over the tokens that are not held out; None where the moment is not kept.

        A feature of the input that is zero on these tokens has zeros in H, not the rounding errors of a difference.
        """
        whole: Tensor | None = getattr(self, moment)
        part: Tensor | None = getattr(self.held, moment, None)
        if whole is None or part is None or self.held is None or not 0 < self.held.weight < self.weight:
            return whole
        share = self.held.weight / self.weight
        rest = torch.sub(whole, part, alpha=share).div_(1 - share)
        if moment == "H":
            dead = rest.diagonal() <= ROUNDING * torch.finfo(rest.dtype).eps * whole.diagonal()
            if bool(dead.any()):
                rest.masked_fill_(dead[:, None], 0.0).masked_fill_(dead, 0.0)
        return rest

    @property
    def weight(self) -> float:
        """Return the sum of the tokens' weights: their number where each weighs 1."""
        return float(self.tokens) if self.mass is None else self.mass

    def _absorb(self, other: "Moments") -> None:
        total = self.weight + other.weight
        a, b = (self.weight / total, other.weight / total) if total else (0.0, 0.0)
        pairs = [(self.H, other.H), (self.D, other.D), (self.R, other.R), (self.magnitude, other.magnitude)]
        for mine, its in pairs:
            if mine is not None and its is not None:
                mine.mul_(a).add_(its, alpha=b)
        self.tokens, self.dropped = self.tokens + other.tokens, self.dropped + other.dropped
        self.mass = None if self.mass is None else total

    def rescale(self) -> int:
        """Multiply moments of very large or small activations by a power of two, to bring them near 1.

        Returns:
            The exponent; 0, and nothing done, for ordinary activations. Solvers are invariant to a common factor.
        """
        mean = self._mean()
        least = torch.finfo(self.H.dtype).tiny / torch.finfo(self.H.dtype).eps  # smaller numbers have lost digits
        if not least <= mean < math.inf or 2.0**-WIDEST <= mean <= 2.0**WIDEST:
            return 0
        power = -2 * (math.frexp(mean)[1] // 2)  # even, so that square roots are scaled exactly, too
        for moment in (moment for part in self.parts for moment in (part.H, part.D, part.R)):
            if moment is not None:
                moment.mul_(2.0 ** (power // 2)).mul_(2.0 ** (power // 2))  # 2 ** power may leave the dtype's range
        for part in self.parts:
            if part.magnitude is not None:  # a first moment
                part.magnitude.mul_(2.0 ** (power // 2))
        return power

    def _mean(self) -> float:
        return float(self.H.diagonal().double().mean())

    def check(self) -> None:
        """Raise NumericalError where no solver can give a meaningful answer."""
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
        """Return the moments of the held-out tokens. ValueError where none are kept."""
        if self.held is None:
            raise ValueError("nothing is held out of these moments; a method asks for it with needs={'held_out'}.")
        return self.held

    def drift(self) -> Float[Tensor, "in in"]:
        """Return D. SettingError where D was not asked for, or R was kept in its place."""
        if self.D is None:
            raise SettingError(
                "these moments hold no D: a method that reads D asks for needs={'H', 'D'}, without 'R', which takes the place "
                "of D where a linear adds to the residual stream."
            )
        return self.D


def _finite(x: Float[Tensor, "tokens width"]) -> Bool[Tensor, "tokens"]:
    """Return which tokens are finite throughout, by their sums: NaN and Inf stay in a sum.

    A sum of finite numbers that overflows counts as not finite; the squares in H would overflow, too.
    """
    return x.sum(1).isfinite()


def all_finite(value: Tensor) -> bool:
    """Return whether all numbers are finite, by their least and greatest; on a CPU much faster than ``isfinite``."""
    return value.numel() == 0 or all(math.isfinite(extreme) for extreme in value.aminmax())


# Columns of a Gram matrix that one GEMM computes whole; a wider matrix is split into quarters.
LEAF, LEAF_GPU = 256, 2048


def add_gram(total: Float[Tensor, "in in"], x: Float[Tensor, "tokens in"], keep: float, step: float) -> None:
    """Update ``total ← keep total + step xᵀx``: both diagonal quarters, the upper right one, and its mirror."""
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
    total.copy_(total.triu() + total.triu(1).T)  # a GEMM may round the two halves differently
