"""How far a model's predictions are from a reference's: KL divergence and top-1 agreement."""

import torch
from jaxtyping import Float
from torch import Tensor


class Divergence:
    """Accumulates over tokens: mean KL(reference || model) in nats, and the share of equal top-1 predictions."""

    def __init__(self) -> None:
        self.tokens, self._kl, self._agree = 0, 0.0, 0

    def add(self, reference: Float[Tensor, "tokens vocab"], model: Float[Tensor, "tokens vocab"]) -> None:
        """Take in the logits of some tokens."""
        p, q = reference.float().log_softmax(1), model.float().log_softmax(1)
        self._kl += float(torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True))
        self._agree += int((p.argmax(1) == q.argmax(1)).sum())
        self.tokens += len(reference)

    @property
    def kl(self) -> float:
        """Mean per token."""
        return self._kl / self.tokens

    @property
    def top1(self) -> float:
        """Between 0 and 1."""
        return self._agree / self.tokens
