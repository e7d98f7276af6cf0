"""Perplexity, and with a reference model the divergence from it.

Protocol: the whole text is tokenized once and cut into consecutive windows of ``seqlen`` tokens; each window is read on its
own, its first token is not scored. perplexity = exp(mean negative log-likelihood of the scored tokens).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearplane.core.activations import TokenGrid
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.data.samples import check_vocabulary, longest_input
from nearplane.data.text import digest, read_text, tokenize
from nearplane.evaluation.cache import RoundedCache
from nearplane.machine.progress import track
from nearplane.models.inputs import refuse_unless_causal

# Logits are compared this many positions at a time: vocabularies are large, memory is not.
CHUNK = 256


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

    @property
    def protocol(self) -> str:
        """One line that lets somebody else repeat the measurement."""
        return (
            f"{self.dataset}; tokenized once, {self.windows} consecutive windows of {self.seqlen} tokens, "
            f"first token of each unscored: {self.tokens} tokens scored"
            + (
                ""
                if self.kv_bits == 16
                else f"; keys and values simulated in {self.kv_bits} bits, which no checkpoint carries"
            )
        )

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
    dataset: str | None = None,
    seqlen: int = 2048,
    windows: int | None = None,
    reference: nn.Module | None = None,
    compared: int | None = None,
    kv_bits: int = 16,
    progress: bool = False,
) -> Evaluation:
    """Perplexity of ``model`` on a text; with ``reference`` also mean KL divergence per token and top-1 agreement.

    ``windows`` limits how many windows are read, ``compared`` how many of them the reference reads, too: it is half the
    cost. ``kv_bits`` below 16 rounds keys and values of ``model`` as they enter its cache (``cache.py``). ``seqlen`` is cut to
    the model's own limit of positions.
    """
    if kv_bits != 16:
        TokenGrid(kv_bits)
    if seqlen < 2 or (windows is not None and windows < 1):
        raise SettingError(f"seqlen must be at least 2 and windows at least 1; got {seqlen} and {windows}.")
    refuse_unless_causal(model, "perplexity")
    seqlen = min(seqlen, longest_input(model) or seqlen)
    text = read_text(dataset, "evaluation")
    ids = tokenize(tokenizer, text)
    count = min(len(ids) // seqlen, windows or len(ids))
    if count == 0:
        raise NearplaneError(f"text {text.origin} has {len(ids)} tokens, fewer than one window of seqlen={seqlen}.")
    check_vocabulary(ids, model)
    if reference is not None:
        _check_pair(model, reference, ids)
    batch = ids[: count * seqlen].view(count, seqlen)
    compared = count if compared is None else min(compared, count)
    nll, reference_nll, divergence = 0.0, 0.0, Divergence()
    with torch.inference_mode():
        for k, window in enumerate(track(batch, "eval", enabled=progress)):
            logits = _logits(model, window, kv_bits)
            nll += _nll(logits, window)
            if reference is not None and k < compared:
                expected = _logits(reference, window)
                reference_nll += _nll(expected, window)
                for a in range(0, seqlen - 1, CHUNK):
                    part = slice(a, min(a + CHUNK, seqlen - 1))
                    divergence.add(expected[part], logits[part])
    scored = count * (seqlen - 1)
    if not math.isfinite(nll):
        raise NearplaneError("the model's loss is not finite: its weights or its dtype are broken.")
    return Evaluation(
        perplexity=_exp(nll / scored),
        tokens=scored,
        windows=count,
        seqlen=seqlen,
        dataset=text.origin,
        sha256=digest(batch),
        kl=divergence.kl if reference is not None else None,
        top1=divergence.top1 if reference is not None else None,
        reference_perplexity=_exp(reference_nll / divergence.tokens) if reference is not None else None,
        kv_bits=kv_bits,
    )


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


def _nll(logits: Tensor, window: Tensor) -> float:
    total = 0.0
    target = window[1:].to(logits.device)
    for a in range(0, len(target), CHUNK):
        part = slice(a, min(a + CHUNK, len(target)))
        loss = nn.functional.cross_entropy(logits[part].float(), target[part], reduction="sum")
        total += float(loss)
    return total


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
