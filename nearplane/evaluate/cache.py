"""A key-value cache whose contents are rounded, for evaluation: what a cache of few bits would cost a model.

Keys (after their rotary embedding) and values get a scale and a zero point for every token and head, as dynamic
per-token rounding does; they are rounded once, when they enter. No engine reads this from a checkpoint.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache

from nearplane.core.tokens import TokenGrid, round_tokens


class RoundedCache(DynamicCache):  # type: ignore[misc]
    """Of one sequence, from its first token on."""

    def __init__(self, config: Any, bits: int) -> None:
        super().__init__(config=config)
        self.grid = TokenGrid(bits, sym=False)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Round what enters, (batch, heads, tokens, head_dim), along its last dimension."""
        rounded = round_tokens(key_states, self.grid), round_tokens(value_states, self.grid)
        found: tuple[Tensor, Tensor] = super().update(*rounded, *args, **kwargs)
        return found
