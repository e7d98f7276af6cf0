"""Perplexity, and with a reference model the divergence from it.

Protocol: the whole text is tokenized once and cut into consecutive windows of ``seqlen`` tokens; each window is read on its
own. Where the tokenizer puts BOS before a text, each window begins with BOS, which counts as one of its tokens and is not
scored; every token of the text is. Otherwise the first token of a window is not scored. Other tools cut and score in other
ways, which have names (``protocols.py``).
perplexity = exp(mean negative log-likelihood of the scored tokens).
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearplane.core.activations import TokenGrid
from nearplane.core.attention import fast_forwards
from nearplane.core.errors import NearplaneError, SettingError, plain
from nearplane.data.rows import Rows
from nearplane.data.samples import check_vocabulary
from nearplane.data.text import read_text
from nearplane.data.windows import digest
from nearplane.evaluation.cache import RoundedCache
from nearplane.evaluation.protocols import Window, cut, together
from nearplane.machine.progress import track
from nearplane.models.inputs import refuse_unless_causal

# Logits that are compared at a time, of whole positions: 16 MB, which the allocator uses again.
CHUNK = 1 << 22


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and how."""

    perplexity: float
    tokens: int  # scored
    windows: int
    seqlen: int
    dataset: str
    sha256: str  # of the windows
    kl: float | None = None  # mean KL(reference || model) per token, in nats
    top1: float | None = None  # share of tokens whose most likely successor agrees
    reference_perplexity: float | None = None
    kv_bits: int = 16
    opening: str = ""
    """The tokens that the tokenizer puts before a text, such as BOS."""
    bos: bool = True
    """Whether each window begins with ``opening``; of a named protocol, which decides by itself, always true."""
    scheme: str | None = None
    """The named protocol; None: our own."""
    cut: str = ""
    """How the text was cut and scored, in words."""

    @property
    def protocol(self) -> str:
        """One line that lets somebody else repeat the measurement."""
        parts = [self.dataset, self.cut]
        if self.kv_bits != 16:
            parts.append(f"keys and values simulated in {self.kv_bits} bits, which no checkpoint carries")
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the protocol, for JSON."""
        return {**asdict(self), "protocol": self.protocol}

    def __str__(self) -> str:
        lines = [f"perplexity {self.perplexity:.4f}"]
        if self.kl is not None and self.top1 is not None and self.reference_perplexity is not None:
            lines.append(f"reference perplexity {self.reference_perplexity:.4f}")
            agreement = f"top-1 agreement {100 * self.top1:.2f}%"
            lines.append(f"mean KL(reference || model) {self.kl:.5f} nats per token, {agreement}")
        return "\n".join([*lines, f"protocol: {self.protocol}"])

    __repr__ = __str__


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    *,
    dataset: str | Path | Rows | None = None,
    dataset_split: str | None = None,
    dataset_column: str | None = None,
    seqlen: int | None = None,
    windows: int | None = None,
    bos: bool = True,
    protocol: str | None = None,
    reference: nn.Module | None = None,
    compared: int | None = None,
    kv_bits: int = 16,
    progress: bool = False,
) -> Evaluation:
    """Perplexity of ``model`` on a text; with ``reference`` also mean KL divergence per token and top-1 agreement.

    ``windows`` limits how many windows are read, ``compared`` how many of them the reference reads, too: it is half the
    cost. ``kv_bits`` below 16 rounds keys and values of ``model`` as they enter its cache (``cache.py``). ``seqlen`` is cut to
    the model's own limit of positions, and 2048 where it is None. ``bos`` begins each window with the tokens that the tokenizer
    puts before a text. ``protocol`` names another way to cut and score (``protocols.py``).
    """
    (seqlen, windows), kv_bits = check_windows(seqlen, windows), plain(kv_bits)
    if kv_bits != 16:
        TokenGrid(kv_bits)
    refuse_unless_causal(model, "perplexity")
    text = read_text(dataset, "evaluation", tokenizer, split=dataset_split, column=dataset_column)
    made = cut(protocol, model, tokenizer, text, seqlen=seqlen, windows=windows, bos=bos)
    ids = together(made.windows)
    check_vocabulary(ids, model, tokenized=bool(text.ids))
    if reference is not None:
        _check_pair(model, reference, ids)
    count = len(made.windows)
    both = made.windows[:compared] if reference is not None else []
    nll, reference_nll, divergence = _read(model, reference, made.windows, len(both), kv_bits, progress)
    if not math.isfinite(nll):
        raise NearplaneError("the model's loss is not finite: its weights or its dtype are broken.")
    return Evaluation(
        perplexity=_exp(nll / sum(window.weight for window in made.windows)),
        tokens=sum(window.scored for window in made.windows),
        windows=count,
        seqlen=made.seqlen,
        dataset=text.origin,
        sha256=digest(ids),
        kl=divergence.kl if reference is not None else None,
        top1=divergence.top1 if reference is not None else None,
        reference_perplexity=_exp(reference_nll / sum(window.weight for window in both))
        if reference is not None
        else None,
        kv_bits=kv_bits,
        opening=made.opening,
        bos=bos,
        scheme=protocol,
        cut=made.said,
    )


def _read(
    model: nn.Module, reference: nn.Module | None, windows: list[Window], compared: int, kv_bits: int, progress: bool
) -> tuple[float, float, "Divergence"]:
    """Run both models over the windows, the reference over the first ``compared``: their losses, and how far they are apart."""
    nll, reference_nll, divergence = 0.0, 0.0, Divergence()
    with fast_forwards(next(model.parameters()).device), torch.inference_mode():
        for k in track(torch.arange(len(windows)), "eval", enabled=progress):
            window = windows[int(k)]
            logits = _logits(model, window.ids, kv_bits)
            nll += _nll(logits, window)
            if reference is not None and k < compared:
                expected = _logits(reference, window.ids)
                reference_nll += _nll(expected, window)
                for part in _chunks(window.first - 1, len(window.ids) - 1, expected.shape[1]):
                    divergence.add(expected[part], logits[part])
    return nll, reference_nll, divergence


def check_windows(seqlen: Any, windows: Any) -> tuple[int | None, int | None]:
    """Return both as Python's numbers. SettingError unless they are whole and in their range, or None."""
    seqlen, windows = plain(seqlen), plain(windows)
    for name, value, least in (("seqlen", seqlen, 2), ("windows", windows, 1)):
        if not (isinstance(value, int) and value >= least) and value is not None:
            raise SettingError(f"{name} must be a whole number of at least {least}; got {value!r}.")
    return seqlen, windows


def _check_pair(model: nn.Module, reference: nn.Module, ids: Tensor) -> None:
    """SettingError where the two do not predict the same tokens."""
    check_vocabulary(ids, reference)
    sizes = {some.get_output_embeddings().weight.shape[0] for some in (model, reference)}  # type: ignore[operator]
    if len(sizes) > 1:
        raise SettingError("model and reference have vocabularies of different size; they cannot be compared.")


def _logits(model: nn.Module, window: Tensor, kv_bits: int = 16) -> Tensor:
    device = next(model.parameters()).device
    cache = {} if kv_bits == 16 else {"past_key_values": RoundedCache(model.config, kv_bits)}
    logits = model(input_ids=window[None].to(device), use_cache=bool(cache), **cache).logits[0]
    assert isinstance(logits, Tensor)
    return logits


def _nll(logits: Tensor, window: Window) -> float:
    """Sum the negative log-likelihoods of a window's scored tokens, as far as the window weighs."""
    total = 0.0
    target = window.ids[1:].to(logits.device)
    for part in _chunks(window.first - 1, len(target), logits.shape[1]):
        loss = nn.functional.cross_entropy(logits[part].float(), target[part], reduction="sum")
        total += float(loss)
    return total * (window.weight / window.scored)


def _chunks(first: int, last: int, vocabulary: int) -> Iterator[slice]:
    """Yield the positions from ``first`` on and before ``last``, ``CHUNK`` logits at a time."""
    step = max(1, CHUNK // vocabulary)
    for a in range(first, last, step):
        yield slice(a, min(a + step, last))


def _exp(value: float) -> float:
    if value > 700:
        raise NearplaneError(f"the mean loss is {value:.0f} nats per token, perplexity overflows: the model is broken.")
    return math.exp(value)


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
