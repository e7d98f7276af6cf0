"""Second moments of one linear's input, averaged per token.

With X the input in the original model and X̂ in the partially quantized one: ``H = X̂ X̂ᵀ/n`` and the drift
moment ``D = (X - X̂) X̂ᵀ/n`` (GPTAQ's dXXT, arXiv 2504.02692). Everything the solvers do is invariant to a common
rescale of both, so no factor 2/N appears.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.errors import NumericalError

# An input that loses more than this share of its tokens to NaN or Inf calibrates on something else than the text.
MOST_DROPPED = 0.05


@dataclass
class Moments:
    """Per-token averages over ``tokens`` tokens; ``dropped`` tokens were non-finite and left out."""

    H: Float[Tensor, "in in"]
    D: Float[Tensor, "in in"] | None = None
    tokens: int = 0
    dropped: int = 0

    @classmethod
    def zeros(
        cls, n: int, *, drift: bool = False, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> "Moments":
        """Empty moments of an input with ``n`` features; ``drift`` reserves D."""
        H = torch.zeros(n, n, dtype=dtype, device=device)
        return cls(H, torch.zeros_like(H) if drift else None)

    def add(self, xhat: Float[Tensor, "tokens in"], x: Float[Tensor, "tokens in"] | None = None) -> None:
        """Take in a batch: ``xhat`` of the quantized stream, ``x`` of the reference stream when D is kept.

        A token with a non-finite value in either stream is left out and counted in ``dropped``.
        """
        if (x is None) != (self.D is None):
            raise ValueError("x is needed exactly when the moments keep D.")
        xhat = xhat.to(self.H.dtype)
        shift = None if x is None else x.to(self.H.dtype) - xhat
        finite = xhat.isfinite().all(1) if shift is None else (xhat.isfinite() & shift.isfinite()).all(1)
        kept = int(finite.sum())
        self.dropped += len(xhat) - kept
        if kept == 0:
            return
        if kept < len(xhat):
            xhat, shift = xhat[finite], None if shift is None else shift[finite]
        keep, step = self.tokens / (self.tokens + kept), 1 / (self.tokens + kept)
        torch.addmm(self.H, xhat.T, xhat, beta=keep, alpha=step, out=self.H)
        if self.D is not None and shift is not None:
            torch.addmm(self.D, shift.T, xhat, beta=keep, alpha=step, out=self.D)
        self.tokens += kept

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets of tokens together: the weighted mean, so shards combine exactly."""
        if (self.D is None) != (other.D is None):
            raise ValueError("moments with and without D cannot be merged.")
        tokens = self.tokens + other.tokens
        a, b = (self.tokens / tokens, other.tokens / tokens) if tokens else (0.0, 0.0)
        D = None if self.D is None or other.D is None else a * self.D + b * other.D
        return Moments(a * self.H + b * other.H, D, tokens, self.dropped + other.dropped)

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
        if not bool(self.H.isfinite().all()) or (self.D is not None and not bool(self.D.isfinite().all())):
            raise NumericalError(
                "the Hessian overflowed; likely an activation far outside float32's square root. "
                "Check the model's dtype and the calibration text."
            )
        if not bool((self.H.diagonal() > 0).any()):
            raise NumericalError("the Hessian is zero: every calibration input to this layer is zero.")

    def drift(self) -> Float[Tensor, "in in"]:
        """D, for the methods that need it."""
        if self.D is None:
            raise ValueError("these moments were collected without D; a method asks for it with needs={'H', 'D'}.")
        return self.D
