"""Let a model write the text that it is calibrated on: ``--dataset self``.

Each window begins as the model's users begin. Where the tokenizer has a chat template, that is the opening of a user's
turn, else what the tokenizer puts before a text. Then comes a first token, another one for each window, evenly from the
``FIRST`` most probable ones. Everything behind it is sampled from the model's distribution. A sample that ends goes on with
what the model writes behind its end token, so that every window is full.

The numbers that choose tokens are drawn before, for each window by itself. The configuration decides the batches. So equal
seeds and threads give equal samples. A run keeps its samples in OUT until it is finished: a resume does not write them again.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.data.samples import longest_input
from nearplane.data.shares import shares_of
from nearplane.data.text import Calibration, opening_of, spelled
from nearplane.data.windows import Text, Tokens, digest
from nearplane.formats.journal import STATE, sync
from nearplane.models.inputs import refuse_unless_causal, text_config, vocabulary
from nearplane.models.locate import first_line
from nearplane.models.source import Source, open_source

# The model's own distribution.
TEMPERATURE = 1.0
# First tokens are taken evenly from so many of the most probable ones, or from one for each window where that is more.
FIRST = 1024
# Windows that are written at once, as far as their cache of keys and values takes no more than so many bytes.
MOST_ROWS, CACHE_BYTES = 64, 1 << 30
# Of the first tokens behind a beginning, so many are compared with what a forward without a cache chooses; the least share
# that must be equal. In 16 bits a few differ.
CHECKED, SAME = 32, 0.5
# Bytes that choosing a token takes for each token of the vocabulary: logits, their float64 shares, and sums of these.
LOGIT_BYTES = 32
# The samples in OUT, while a run is not finished.
KEPT = "self.safetensors"
# Stands in for a user's words in a chat template.
MARK = "XQWORDSXQ"

Counting = Callable[[str, int], AbstractContextManager[Callable[[], None]]]


def wanted(calibration: Calibration) -> tuple[int, int] | None:
    """Return number and seed of the windows that a model has to write itself; None where it has to write none."""
    return next(((count, seed) for share, count, seed in calibration.shares if share.own), None)


def refuse_own(model: nn.Module, calibration: Calibration) -> None:
    """Raise SettingError for a model that cannot write the samples that its calibration asks for."""
    if wanted(calibration) is None:
        return
    refuse_unless_causal(model, "dataset self")
    if not getattr(model, "can_generate", lambda: False)():
        raise SettingError(f"dataset self: transformers cannot generate with {type(model).__name__}; give a text.")


def own_memory(source: Source, calibration: Calibration, itemsize: int, fresh: int = 0) -> tuple[int, int]:
    """Return the bytes that writing takes: of all weights, loaded at once, and of what is kept for each window meanwhile.

    Args:
        source: the model; no weight is read.
        calibration: number and length of the windows.
        itemsize: bytes of a loaded number.
        fresh: windows that are written apart, for a tuning.
    """
    shares, store = shares_of(calibration.dataset), source.store
    own = sum(share.weight for share in shares if share.own) / sum(share.weight for share in shares)
    if not own:
        return 0, 0
    weights = itemsize * sum(prod(store.shape(disk)) for disk in set(source.names.values()))
    cache = _cache(source.model, calibration.seqlen, itemsize)
    rows = min(max(fresh, ceil(own * calibration.nsamples)), _rows(cache))
    return weights, rows * (cache + LOGIT_BYTES * (vocabulary(source.model.config) or 0))


def own_samples(
    source: Source,
    calibration: Calibration,
    device: torch.device,
    dtype: torch.dtype,
    out: Path | None = None,
    counting: Counting | None = None,
) -> Tokens | None:
    """Return the windows that a model has written: those that a run has kept in ``out``, or new ones.

    Args:
        source: the model, which is opened a second time, whole.
        calibration: number, length and seed.
        device: where to compute.
        dtype: of the loaded weights.
        out: folder of a run that may have kept its samples.
        counting: shows the steps that are done, as ``Show.counting`` does.

    Returns:
        The windows, whose record says how they were made; None where the dataset asks for none.

    Raises:
        SettingError: a window has no room for a token behind its opening, or the model cannot write.
    """
    asked = wanted(calibration)
    if asked is None:
        return None
    refuse_own(source.model, calibration)
    source.read_weights()
    (count, seed), tokenizer = asked, source.tokenizer
    seqlen = min(calibration.seqlen, longest_input(source.model) or calibration.seqlen)
    prompt, kind, begun = opened(tokenizer, bos=calibration.bos)
    if len(prompt) + 2 > seqlen:
        raise SettingError(
            f"dataset self: seqlen={seqlen} leaves no room behind the {len(prompt)} tokens of the prompt."
        )
    most = min(max(FIRST, count), vocabulary(source.model.config) or FIRST)
    recipe = {"model": _weights(source), "seed": seed, "temperature": TEMPERATURE, "bos": calibration.bos}
    recipe |= {"prompt": kind, "prompt_tokens": len(prompt), "first_tokens": f"evenly from the {most} most probable"}
    ids = None if out is None else kept(out, recipe, count, seqlen)
    if ids is None:
        # Opened again: generating may leave a state in a model.
        apart = open_source(source.folder, trust_remote_code=source.trust_remote_code)
        apart.load("", device, dtype)
        ids = (
            _Writing(apart.model, tokenizer, seed, count).write(prompt, seqlen, counting).clone()
        )  # no tensor of inference
    origin = f"the model's own samples (seed {seed}, temperature {TEMPERATURE:g})"
    return Tokens(ids, origin, ids.numel(), digest(ids), begun, recipe=recipe)


def opened(tokenizer: Any, *, bos: bool) -> tuple[list[int], str, str]:
    """Return the tokens that every sample begins with, what they are in words, and the tokenizer's opening among them.

    Args:
        tokenizer: the model's tokenizer.
        bos: begin with what the tokenizer puts before a text.
    """
    found = opening_of(tokenizer, Text("", "self"))
    opening = list(found) if bos else []
    begun = spelled(tokenizer, opening)
    plain, why = f"{begun or 'nothing'}, as before a text", ""
    words = ""
    if getattr(tokenizer, "chat_template", None):
        try:
            words = str(tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False))
            why = "; the chat template does not write a user's words"
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            why = f"; the chat template refuses a user's turn ({str(error)[:80]})"
    if MARK not in words:
        return opening, plain + why, begun
    start = words[: words.index(MARK)].rstrip(" ")
    ids = list(tokenizer(start, add_special_tokens=False, verbose=False)["input_ids"]) if start else []
    ids = ids[len(found) :] if found and tuple(ids[: len(found)]) == found else ids
    return [*opening, *ids], "the chat template's opening of a user's turn", begun


def keep(own: Tokens, out: Path) -> None:
    """Write samples into the state of an unfinished run. NearplaneError where the disk refuses."""
    path = out / STATE / KEPT
    temporary = path.with_suffix(".tmp")
    try:
        save_file(
            {"ids": own.ids.contiguous()}, temporary, metadata={"recipe": json.dumps(own.recipe), "sha256": own.sha256}
        )
        sync(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise NearplaneError(f"the model's own samples cannot be kept in {path} ({error}).") from error


def kept(out: Path, recipe: dict[str, Any], count: int, seqlen: int) -> Tensor | None:
    """Return the samples that a run has kept; None if there are none, others, or damaged ones."""
    path = out / STATE / KEPT
    try:
        with safe_open(path, "pt") as file:
            ids: Tensor = file.get_tensor("ids")
            notes = file.metadata() or {}
            same = json.loads(notes["recipe"]) == recipe and tuple(ids.shape) == (count, seqlen)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return ids if same and digest(ids) == notes.get("sha256") else None


class _Chosen(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token to each row, chosen by numbers that were drawn before."""

    def __init__(self, chances: Tensor, tokens: int, tick: Callable[[], None]) -> None:
        self.chances, self.tokens, self.tick, self.step = chances, tokens, tick, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = choose(scores[:, : self.tokens], self.chances[:, self.step])
        self.step += 1
        self.tick()
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def choose(logits: Tensor, chances: Tensor) -> Tensor:
    """Return the token (rows,) of each row of logits (rows, tokens) at which the summed probability passes a chance (rows,)."""
    mass = (logits.double() / TEMPERATURE).softmax(-1).cumsum(-1)
    passed = mass <= chances[:, None].to(mass.device) * mass[:, -1:]
    return passed.sum(-1).clamp(max=mass.shape[1] - 1)


class _Writing:
    """A loaded model that writes samples."""

    def __init__(self, model: Any, tokenizer: Any, seed: int, count: int) -> None:
        self.model, self.tokenizer, self.seed, self.count = model, tokenizer, seed, count
        self.device = next(model.parameters()).device
        words = len(tokenizer) if hasattr(tokenizer, "__len__") else None
        sizes = (words, vocabulary(model.config))
        self.tokens = min(size for size in sizes if size is not None)  # an embedding may have rows of no token

    @torch.inference_mode()
    def write(self, prompt: list[int], seqlen: int, counting: Counting | None) -> Tensor:
        """Return windows (count, seqlen)."""
        size = next(self.model.parameters()).element_size()
        firsts, rows = self._firsts(prompt), _rows(_cache(self.model, seqlen, size))
        starts = range(0, self.count, rows)
        steps = seqlen - len(prompt) - 1
        generator = torch.Generator().manual_seed(self.seed)
        chances = torch.rand(self.count, steps, generator=generator, dtype=torch.float64)
        shown = (
            nullcontext(lambda: None) if counting is None else counting("the model's own samples", len(starts) * steps)
        )
        found = []
        with shown as tick:
            for start in starts:
                part = firsts[start : start + rows]
                given = torch.cat([torch.tensor(prompt, dtype=torch.long).expand(len(part), -1), part[:, None]], 1)
                chosen = _Chosen(chances[start : start + rows], self.tokens, tick)
                found.append(self._continued(given, seqlen, chosen))
        windows = torch.cat(found)
        self._check(windows[:1], chances[:1])
        return windows

    def _check(self, window: Tensor, chances: Tensor) -> None:
        """Raise NearplaneError where the model writes other tokens with a cache than its forward of a whole window says."""
        start, steps = window.shape[1] - chances.shape[1], min(CHECKED, chances.shape[1])
        logits = self.model(input_ids=window[:, : start + steps].to(self.device), use_cache=False).logits[
            0, start - 1 : -1
        ]
        again = choose(logits[:, : self.tokens], chances[0, :steps]).cpu()
        same = float((again == window[0, start : start + steps]).float().mean())
        if same < SAME:
            raise NearplaneError(
                f"dataset self: {type(self.model).__name__} writes token by token what its forward of the whole window does not "
                f"say ({same:.0%} of the tokens are equal); give a text."
            )

    def _continued(self, given: Tensor, seqlen: int, chosen: _Chosen) -> Tensor:
        """Continue beginnings of equal length to ``seqlen`` tokens, whatever end tokens come."""
        config = GenerationConfig(max_length=seqlen, do_sample=False, use_cache=True, pad_token_id=0)
        self.model.generation_config = (
            config  # settings that are missing in the one given would be taken from the model's
        )
        given = given.to(self.device)
        processors = LogitsProcessorList([chosen])
        try:
            out: Tensor = self.model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                generation_config=config,
                logits_processor=processors,
            )
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, RuntimeError) as error:
            kind = type(self.model).__name__
            raise NearplaneError(
                f"dataset self: transformers cannot generate with {kind} ({first_line(error)}); give a text."
            ) from error
        return out.cpu()

    def _firsts(self, prompt: list[int]) -> Tensor:
        """Return the first token of each window, evenly from the most probable ones that are no special tokens."""
        special = torch.tensor(sorted(set(getattr(self.tokenizer, "all_special_ids", ()))), dtype=torch.long)
        marks: list[int | None] = [getattr(self.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")]
        context = prompt or [mark for mark in marks if mark is not None][:1]
        if context:
            scores = (
                self.model(input_ids=torch.tensor([context], device=self.device), use_cache=False)
                .logits[0, -1]
                .float()
                .cpu()
            )
        else:  # in the order of their numbers, by which tokenizers tell how usual tokens are
            scores = -torch.arange(self.tokens).float()
        scores = scores[: self.tokens].clone()
        scores[special[special < self.tokens]] = -torch.inf
        order: Tensor = scores.argsort(descending=True, stable=True)[: int(scores.isfinite().sum())]
        most = min(len(order), max(FIRST, self.count))
        generator = torch.Generator().manual_seed(self.seed)
        offset = float(torch.rand((), generator=generator))
        places = ((torch.arange(self.count) + offset) * (most / self.count)).long()
        return order[places.clamp(max=most - 1)]


def _cache(model: nn.Module, seqlen: int, itemsize: int) -> int:
    """Return the most bytes that the keys and values of a window take."""
    config: Any = text_config(model.config)
    layers, width = (int(getattr(config, name, None) or 1) for name in ("num_hidden_layers", "hidden_size"))
    return 2 * layers * width * itemsize * seqlen


def _rows(cache: int) -> int:
    """Return how many windows are written at once."""
    return max(1, min(MOST_ROWS, CACHE_BYTES // cache))


def _weights(source: Source) -> str:
    """Return a hash of all weights, each of which is read."""
    hashed = hashlib.sha256()
    for name in sorted(source.names):
        source.tensor(name)
        hashed.update(f"{name} {source.sums[name]} ".encode())
    return hashed.hexdigest()[:16]
