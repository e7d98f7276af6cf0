"""A key-value cache whose contents are rounded, for evaluation: what a cache of few bits would cost a model.

Keys (after their rotary embedding) and values get a scale and a zero point for every token and head, as dynamic
per-token rounding does; they are rounded once, when they enter. Of a checkpoint with the rotation r3, keys are rounded rotated
and turned back: what queries rotated alike would make of them is the same. No engine reads this from a checkpoint.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache

from nearplane.core.activations import TokenGrid, round_tokens
from nearplane.transforms.hooks import KEY, turned


class RoundedCache(DynamicCache):  # type: ignore[misc]
    """Of one sequence, from its first token on."""

    def __init__(self, config: Any, bits: int) -> None:
        super().__init__(config=config)
        self.grid = TokenGrid(bits, sym=False)
        told = getattr(config, KEY, None) or {}
        self.seed = told["seed"] if "r3" in told.get("kinds", ()) else None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Round what enters, (batch, heads, tokens, head_dim), along its last dimension."""
        keys = key_states if self.seed is None else turned(key_states, self.seed)
        keys = round_tokens(keys, self.grid)
        keys = keys if self.seed is None else turned(keys, self.seed, back=True)
        found: tuple[Tensor, Tensor] = super().update(keys, round_tokens(value_states, self.grid), *args, **kwargs)
        return found
