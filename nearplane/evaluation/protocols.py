"""How a text becomes scored windows: our own way, and the ways of others, so that a figure can be compared with theirs.

A protocol decides where windows begin and end, what stands at their beginning, and which of their tokens are scored. Each
was restated from the code that publishes figures by it; tests/evaluation/test_protocols.py has the loops again.

``gptq``: the evaluation of GPTQ's llama.py and opt.py, and of what came after it (2048 tokens, one BOS before the whole text).
``llama.cpp``: llama-perplexity (512 tokens, BOS in place of each window's first token, the second half is scored).
``hf-stride``: the loop of transformers' documentation, "Perplexity of fixed-length models" (overlapping windows, 512 apart).
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.data.samples import longest_input
from nearplane.data.text import consecutive, opening_of, spelled, tokenize
from nearplane.data.windows import Text

Protocol = Literal["gptq", "llama.cpp", "hf-stride"]
OWN_TOKENS, GPTQ_TOKENS, LLAMA_TOKENS, STRIDE = 2048, 2048, 512, 512
# Windows of hf-stride are as long as the model allows; a limit beyond this one is no length that anybody computes at once.
MOST_TOKENS = 4096


class Window(NamedTuple):
    """Tokens that are read at once."""

    ids: Tensor
    """(tokens,), int64."""
    first: int
    """The first token that is scored; all behind it are, too."""
    weight: int
    """Of the mean of its losses among those of all windows: mostly the number of its scored tokens."""

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return len(self.ids) - self.first


class Cut(NamedTuple):
    """A text, cut into windows."""

    windows: list[Window]
    seqlen: int
    """Tokens of the longest one."""
    said: str
    """How it was cut, in words."""
    opening: str
    """The tokens that the tokenizer puts before a text."""


def cut(
    name: str | None,
    model: nn.Module,
    tokenizer: Any,
    text: Text,
    *,
    seqlen: int | None,
    windows: int | None,
    bos: bool,
) -> Cut:
    """Cut a text into windows by a protocol.

    Args:
        name: of the protocol; None: our own.
        model: whose limit of positions windows keep to.
        tokenizer: the model's tokenizer.
        text: the text, or rows of token ids that follow each other.
        seqlen: tokens of a window; None: as the protocol has it.
        windows: the most windows; None: all.
        bos: of our own protocol, begin each window with the tokens that the tokenizer puts before a text.

    Raises:
        SettingError: settings that contradict the protocol.
        NearplaneError: the text is too short.
    """
    longest = longest_input(model)
    if name is None:
        return _own(tokenizer, text, min(seqlen or OWN_TOKENS, longest or seqlen or OWN_TOKENS), windows, bos=bos)
    if name not in get_args(Protocol):
        raise SettingError(f"protocol must be one of {', '.join(get_args(Protocol))}; got {name!r}.")
    if bos is not True:
        raise SettingError(f"protocol {name} decides about BOS; leave --no-bos out, or leave --protocol out.")
    made = {"gptq": _gptq, "llama.cpp": _llama, "hf-stride": _stride}[name](tokenizer, text, seqlen, longest)
    kept = made.windows[:windows]
    fewer = f"the first {len(kept)} of {len(made.windows)}" if len(kept) < len(made.windows) else f"{len(kept)}"
    scored = sum(window.scored for window in kept)
    joined = "rows joined by empty lines, " if text.rows else ""
    said = f"protocol {name}: {joined}tokenized once, {fewer} {made.said}: {scored} tokens scored"
    return made._replace(windows=kept, said=said)


def _own(tokenizer: Any, text: Text, seqlen: int, windows: int | None, *, bos: bool) -> Cut:
    """Cut as the module ``perplexity`` says."""
    batch, opening = consecutive(tokenizer, text, seqlen, windows, bos=bos)
    unscored, word = max(1, len(opening) if bos else 0), spelled(tokenizer, opening)
    first = "first token of each unscored"
    if word:
        first = f"each begins with {word}, unscored" if bos else f"{first}, {word} not put before"
    said = (
        f"tokenized once, {len(batch)} consecutive windows of {seqlen} tokens, {first}: "
        f"{len(batch) * (seqlen - unscored)} tokens scored"
    )
    return Cut([Window(row, unscored, seqlen - unscored) for row in batch], seqlen, said, word)


def _gptq(tokenizer: Any, text: Text, seqlen: int | None, longest: int | None) -> Cut:
    """Consecutive windows of 2048 tokens, or of as many as the model has positions for. BOS stands before the whole text."""
    _only("gptq", seqlen, GPTQ_TOKENS)
    size = min(GPTQ_TOKENS, longest or GPTQ_TOKENS)
    limit = f" (the model's limit; the protocol has {GPTQ_TOKENS})" if size < GPTQ_TOKENS else ""
    ids, word = tokenize(tokenizer, text), spelled(tokenizer, opening_of(tokenizer, text))
    before = f", {word} before the first of them alone" if word and not text.ids else ""
    rows = _rows(ids, size, text)
    said = f"consecutive windows of {size} tokens{limit}, first token of each unscored{before}"
    return Cut([Window(row, 1, size - 1) for row in rows], size, said, word)


def _llama(tokenizer: Any, text: Text, seqlen: int | None, longest: int | None) -> Cut:
    """Consecutive windows of 512 tokens, the first replaced by BOS where the tokenizer marks texts; the second half is scored.

    As llama-perplexity does, the newline at the text's end is dropped, and the token in the middle is not scored.
    """
    _only("llama.cpp", seqlen, LLAMA_TOKENS)
    size, half = LLAMA_TOKENS, LLAMA_TOKENS // 2
    if longest is not None and longest < size:
        raise SettingError(f"protocol llama.cpp has windows of {size} tokens, and the model a limit of {longest}.")
    ids = tokenize(tokenizer, text._replace(content=text.content.removesuffix("\n"), rows=()))
    opening = opening_of(tokenizer, text)
    word, mark = spelled(tokenizer, opening), getattr(tokenizer, "bos_token_id", None) if opening else None
    if len(ids) < 2 * size:
        raise NearplaneError(f"text {text.origin} has {len(ids)} tokens; protocol llama.cpp needs at least {2 * size}.")
    rows = _rows(ids, size, text).clone()
    if mark is not None:
        rows[:, 0] = mark
    bos = f"the first of each replaced by {spelled(tokenizer, [mark])}" if mark is not None else "no BOS"
    said = f"consecutive windows of {size} tokens, {bos}, tokens {half + 2} to {size} of each scored"
    return Cut([Window(row, half + 1, half - 1) for row in rows], size, said, word)


def _stride(tokenizer: Any, text: Text, seqlen: int | None, longest: int | None) -> Cut:
    """Windows of as many tokens as the model has positions for, each 512 further on; what is new in each is scored.

    The loop of the documentation weighs the mean of a window by one token less than it has scored, but for the first.
    """
    size = min(seqlen or longest or 0, longest or seqlen or 0)
    if 0 < size < STRIDE:
        raise SettingError(
            f"protocol hf-stride steps by {STRIDE} tokens, and a window has {size}: tokens would be left out."
        )
    if size == 0 or (seqlen is None and size > MOST_TOKENS):
        limit = "the model has no limit of positions" if longest is None else f"the model's limit is {longest} tokens"
        raise SettingError(f"protocol hf-stride has windows as long as the model allows; {limit}: give --seqlen.")
    ids, word = tokenize(tokenizer, text), spelled(tokenizer, opening_of(tokenizer, text))
    if len(ids) < 2:
        raise NearplaneError(f"text {text.origin} has {len(ids)} tokens; at least 2 are needed.")
    made, done = list[Window](), 0
    for begin in range(0, len(ids), STRIDE):
        end = min(begin + size, len(ids))
        new, done = end - done, end
        made.append(Window(ids[begin:end], max(1, end - begin - new), new - 1))
        if end == len(ids):
            break
    before = f", {word} before the first of them alone" if word and not text.ids else ""
    said = (
        f"windows of up to {size} tokens, each {STRIDE} further on{before}, of each the tokens that none before it held, the "
        "mean weighed by one token less"
    )
    return Cut(made, size, said, word)


def _only(name: str, seqlen: int | None, tokens: int) -> None:
    """Refuse another length than a protocol has."""
    if seqlen not in (None, tokens):
        raise SettingError(
            f"protocol {name} has windows of {tokens} tokens, and seqlen={seqlen} is given; give one of them."
        )


def _rows(ids: Tensor, size: int, text: Text) -> Tensor:
    """Cut token ids into rows; what is left over is dropped."""
    count = len(ids) // size
    if count == 0:
        raise NearplaneError(f"text {text.origin} has {len(ids)} tokens, fewer than one window of {size}.")
    return ids[: count * size].view(count, size)


def together(windows: list[Window]) -> Tensor:
    """Return the tokens of all windows, one behind the other."""
    return torch.cat([window.ids for window in windows])
