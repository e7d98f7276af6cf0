"""``nearplane generate``: text from a checkpoint, streamed, with what it cost."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TextStreamer

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.machine.memory import peak_resident
from nearplane.models.inputs import refuse_unless_causal
from nearplane.models.locate import first_line
from nearplane.runtime import fused
from nearplane.runtime.linear import quantized_linears

MOST_THREADS = 1024


@dataclass(frozen=True)
class Generation:
    """A generated text, and how fast it came. Printed, it is the text and the figures."""

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    """Until the first new token."""
    decode_seconds: float
    """For the others."""
    peak_bytes: int
    """Peak resident memory of the process."""
    threads: int = 0
    """CPU threads that worked."""
    kernel: str = ""
    """How the quantized linears were multiplied, and the tokens decoded."""

    def __str__(self) -> str:
        return f"{self.text}\n{self.summary()}"

    __repr__ = __str__

    def summary(self) -> str:
        """Return one line with the figures."""
        rate = (
            f"{(self.new_tokens - 1) / self.decode_seconds:.1f} tokens/s" if self.new_tokens > 1 else "no second token"
        )
        start = f"{self.kernel}; " if self.kernel else ""
        return (
            f"{start}{self.prompt_tokens} prompt tokens in {self.prefill_seconds:.2f} s; {self.new_tokens} new tokens, {rate} "
            f"({self.threads} threads); peak memory {self.peak_bytes / 1e6:.0f} MB"
        )


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Hands text out in whole words, and notes when tokens arrive."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.text, self.arrivals = write, "", list[float]()

    def put(self, value: torch.Tensor) -> None:
        self.arrivals.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.write(text)


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    chat: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    write: Callable[[str], None] = lambda _: None,
) -> Generation:
    """Continue a prompt, or with ``chat`` answer it through the tokenizer's template.

    The settings of the folder's generation_config.json hold: every end token, repetition_penalty, top_p, suppressed
    tokens. Beams, do_sample, temperature and lengths do not; a prompt is continued greedily unless ``temperature`` is given.

    Args:
        model: a decoder of text.
        tokenizer: the model's own.
        prompt: the text to continue, or the user's message.
        max_new_tokens: stop after so many tokens.
        chat: put the prompt through the tokenizer's template.
        temperature: 0 takes the likeliest token; above, tokens are sampled.
        seed: for sampling.
        write: is given the text as it comes.

    Raises:
        SettingError: settings that cannot work, or a prompt that is too long.
        NearplaneError: no token was generated.
    """
    _refuse(max_new_tokens, temperature, seed)
    refuse_unless_causal(model, "generate")
    ids = _prompt_ids(tokenizer, prompt, chat)
    check_positions(model, ids.shape[1] + max_new_tokens)
    streamer = _Streamer(tokenizer, write)
    if temperature > 0:
        torch.manual_seed(seed)
    packed = list(quantized_linears(model).values())
    kernel = (
        f"{packed[0].why()}, {fused.why(model)}" if packed else "dense weights"
    )  # compares outputs at the first time
    start = time.perf_counter()
    options = {"max_new_tokens": max_new_tokens, "streamer": streamer, **_options(model, tokenizer, temperature)}
    out = _continued(model, ids.to(next(model.parameters()).device), options)
    arrivals = streamer.arrivals[1:]  # the first is the prompt
    if not arrivals:
        raise NearplaneError("the model generated nothing.")
    return Generation(
        streamer.text,
        ids.shape[1],
        out.shape[1] - ids.shape[1],
        arrivals[0] - start,
        arrivals[-1] - arrivals[0],
        peak_resident(),
        torch.get_num_threads(),
        kernel,
    )


def _continued(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Return prompt and new tokens, (1, tokens). NearplaneError for settings that transformers refuses."""
    try:
        with torch.inference_mode():
            out: torch.Tensor = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            return out
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        raise NearplaneError(
            f"transformers cannot generate ({first_line(error)}); look at generation_config.json, whose settings it uses."
        ) from error


def _options(model: nn.Module, tokenizer: Any, temperature: float) -> dict[str, Any]:
    """Return what stands in for the model's own generation settings; all others stay, its end tokens among them.

    One sequence is streamed, greedy or sampled, whatever search the settings ask for.
    """
    own: Any = model.generation_config
    options: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
    options |= dict.fromkeys(("penalty_alpha", "dola_layers", "constraints", "force_words_ids"))
    options |= {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    if own.pad_token_id is None:
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        options["pad_token_id"] = next((token for token in known if token is not None), None)
    if own.stop_strings is not None:
        options["tokenizer"] = tokenizer
    return options


def _refuse(max_new_tokens: int, temperature: float, seed: int) -> None:
    """Raise SettingError for settings that have no meaning."""
    if max_new_tokens < 1 or not (temperature == 0 or 0.01 <= temperature <= 100):
        raise SettingError(
            f"max_new_tokens must be at least 1, temperature 0 or from 0.01 to 100; got {max_new_tokens}, {temperature}."
        )
    if not 0 <= seed < 2**63:
        raise SettingError(f"seed must be from 0 to 2**63 - 1; got {seed}.")


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    """Tokenize a prompt, (1, tokens); with ``chat`` put it through the tokenizer's template."""
    if chat and not getattr(tokenizer, "chat_template", None):
        raise SettingError("this model's tokenizer has no chat template; leave out --chat.")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if not ids.shape[1]:
        raise SettingError("the prompt has no tokens.")
    return ids


@contextmanager
def threads_set(threads: int | None) -> Iterator[None]:
    """Compute with so many CPU threads while the block inside runs; None: as torch decides.

    Raises:
        SettingError: a number of threads that no machine has.
    """
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise SettingError(f"threads must be at least 1 and at most {MOST_THREADS}; got {threads}.")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_positions(model: nn.Module, tokens: int) -> None:
    """Refuse a prompt that is with its new tokens longer than the model's positions, by a SettingError."""
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and tokens > limit:
        raise SettingError(f"prompt and new tokens, {tokens} together, exceed the model's {limit} positions.")
