"""Hold token windows with the record that identifies them, pad rows to windows, and join the windows of a mix's sources."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nearplane.data.shares import Share


class Text(NamedTuple):
    """A text and its origin."""

    content: str
    origin: str
    rows: tuple[str, ...] = ()
    """The rows that were joined to ``content``; none of a raw text."""
    ids: tuple[Tensor, ...] = ()
    """Rows that are token ids already; then there is no ``content``."""
    held: dict[str, Any] | None = None
    """Kind, number of rows and hash of a dataset in memory."""


class Tokens(NamedTuple):
    """Windows of token ids, and the record that identifies them."""

    ids: Tensor  # (windows, seqlen), int64
    origin: str
    text_tokens: int  # tokens in the whole text
    sha256: str  # of the windows
    opening: str = ""
    """The tokens that each window begins with, in words."""
    mask: Tensor | None = None
    """(windows, seqlen), 1 for real tokens and 0 for padding; None where nothing is padded."""
    held: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    sources: tuple[int, ...] = ()
    """Of a mix, the number of each window's source."""
    parts: tuple[dict[str, Any], ...] = ()
    """Of a mix, what the report says of each source."""
    tokenized: bool = False
    """Whether a dataset held token ids, and no tokenizer made them."""
    recipe: dict[str, Any] | None = None
    """How the model has written the text itself."""

    def record(self) -> dict[str, Any]:
        """Return what the report says of the windows."""
        real = self.ids.numel() if self.mask is None else int(self.mask.sum())
        found = {"windows": len(self.ids), "seqlen": self.ids.shape[1], "tokens": real, "origin": self.origin}
        found |= {"text_tokens": self.text_tokens, "sha256": self.sha256, "opening": self.opening}
        more = {"dataset": self.held, "recipe": self.recipe, "sources": list(self.parts) or None}
        return found | {name: value for name, value in more.items() if value is not None}


def padded(text: Text, rows: list[Tensor], tokenizer: Any, opening: str = "") -> Tokens:
    """Pad rows of token ids to the longest; there is a mask where their lengths differ."""
    ids = torch.full((len(rows), max(map(len, rows))), getattr(tokenizer, "pad_token_id", None) or 0)
    mask = torch.zeros_like(ids)
    for row, values in enumerate(rows):
        ids[row, : len(values)], mask[row, : len(values)] = values, 1
    total = int(mask.sum())
    return Tokens(ids, text.origin, total, digest(ids * mask), opening, None if bool(mask.all()) else mask, text.held)


def joined(shares: Sequence[Share], seeds: Sequence[int], parts: Sequence[Tokens], pad: int) -> Tokens:
    """Join the windows of a mix's sources, spread evenly, so that each stretch of the windows holds a share of every source.

    Args:
        shares: the sources.
        seeds: what each source was sampled with.
        parts: the windows of each source, in the same order.
        pad: token id of padding, where lengths differ.
    """
    longest = max(part.ids.shape[1] for part in parts)
    places = [
        ((row + 0.5) / len(part.ids), source, row) for source, part in enumerate(parts) for row in range(len(part.ids))
    ]
    order = [(source, row) for _, source, row in sorted(places)]
    ids = torch.full((len(order), longest), pad)
    mask = torch.zeros_like(ids)
    for place, (source, row) in enumerate(order):
        part = parts[source]
        width = part.ids.shape[1]
        ids[place, :width] = part.ids[row]
        mask[place, :width] = 1 if part.mask is None else part.mask[row]
    records = tuple(
        {"source": share.name, "weight": share.weight, "seed": seed, **part.record()}
        for share, seed, part in zip(shares, seeds, parts, strict=True)
    )
    return Tokens(
        ids,
        " + ".join(f"{len(part.ids)} of {part.origin}" for part in parts),
        sum(part.text_tokens for part in parts),
        digest(ids * mask),
        parts[0].opening if len({part.opening for part in parts}) == 1 else "",
        None if bool(mask.all()) else mask,
        notes=tuple(f"{share.name}: {note}" for share, part in zip(shares, parts, strict=True) for note in part.notes),
        sources=tuple(source for source, _ in order),
        parts=records,
        tokenized=any(part.tokenized for part in parts),
    )


def digest(ids: Tensor) -> str:
    """Return SHA-256 of token windows, equal for equal runs."""
    return hashlib.sha256(ids.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


def overlapping(part: Tokens) -> list[str]:
    """Say that a text has fewer tokens than the windows that are drawn from it."""
    drawn = part.record()["tokens"]
    told = (
        f"its {len(part.ids)} windows overlap: together they have {drawn} tokens, and the text has {part.text_tokens}"
    )
    return [told] if part.text_tokens < drawn else []


def few(samples: int, wanted: int) -> list[str]:
    """Say that a dataset has fewer samples than wanted; nothing where it has enough."""
    return (
        [f"the dataset has {samples} samples, fewer than nsamples={wanted}; all are used"] if samples < wanted else []
    )
