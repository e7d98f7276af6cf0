"""``nearplane bench``: a checkpoint packed against the same model dense, in one process, round by round."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nearplane.checkpoint.load import LoadSettings, load_model
from nearplane.core.errors import SettingError
from nearplane.evaluation.generation import check_positions, threads_set
from nearplane.machine.devices import Dtype
from nearplane.machine.progress import bar, wrapped
from nearplane.models.inputs import refuse_unless_causal
from nearplane.runtime import cpu, fused
from nearplane.runtime.cpu import Arithmetic
from nearplane.runtime.linear import QuantizedLinear, quantized_linears


@dataclass(frozen=True)
class SpeedRow:
    """One way to hold the model."""

    name: str
    decode: float
    """Tokens per second at batch 1, median of the rounds."""
    prefill: float
    token_bytes: int
    """Bytes of weights that one token reads: every weight once, of the embedding nothing unless the head is tied to it."""
    floor: float | None
    """Tokens per second if reading those bytes were all there is; None where the rate of reading could not be measured."""
    head_share: float
    """Part of a decoded token's time that the output head takes."""


@dataclass(frozen=True)
class Speed:
    """A table, and under what conditions it was measured."""

    model: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    kernel: str
    read_gbs: float | None
    """GB/s at which one thread reads memory; the floors assume it for any number of threads."""
    rows: list[SpeedRow]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        base = next((row for row in self.rows if row.name == "dense bf16"), None)
        wide = max(len(row.name) for row in self.rows)
        lines = [f"{self.model}: {self.kernel}, {self.threads} threads"]
        lines.append(f"{'weights':<{wide}}  decode  x bf16  prefill  x bf16    MB  floor  head")
        for row in self.rows:
            ratios = [f"{row.decode / base.decode:.2f}", f"{row.prefill / base.prefill:.2f}"] if base else ["", ""]
            floor = "" if row.floor is None else f"{row.floor:.0f}"
            lines.append(
                f"{row.name:<{wide}}  {row.decode:>6.1f}  {ratios[0]:>6}  {row.prefill:>7.0f}  {ratios[1]:>6}  "
                f"{row.token_bytes / 1e6:>4.0f}  {floor:>5}  {100 * row.head_share:>3.0f}%"
            )
        rate = "not measured, there is no C++ kernel"
        rate = rate if self.read_gbs is None else f"{self.read_gbs:.1f} GB/s by one thread"
        protocol = (
            f"tokens/s; packed computes in float32; batch 1, {self.new_tokens} tokens decoded after a prompt of "
            f"{self.prompt_tokens}, median of {self.rounds} interleaved rounds; floor: a token's bytes of weights at the rate "
            f"of reading memory ({rate}); MB: those bytes; head: its part of a decoded token's time"
        )
        return "\n".join([*lines, wrapped(protocol, 79, "")])

    __repr__ = __str__


def bench(
    model: str | Path,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    rounds: int = 3,
    threads: int | None = None,
    against: tuple[str, ...] = ("bf16", "fp32"),
    head_bits: int = 8,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Speed:
    """Time decoding and prefill of a checkpoint: packed (a16, a8, and a16 with a rounded head), and dense.

    Packed models compute in float32, on a CPU the fastest dtype for all but products. The dense models are the
    checkpoint's own weights, dequantized: as fast as the original's.

    Args:
        model: a folder with a quantized checkpoint.
        prompt_tokens: length of the prompt whose prefill is timed.
        new_tokens: tokens decoded after it.
        rounds: interleaved rounds; the median counts.
        threads: CPU threads; none: as torch decides.
        against: dense models to compare with, "bf16" and "fp32".
        head_bits: width of the output head in the row that rounds it.
        revision: of a hub id, the branch, tag or commit.
        trust_remote_code: run Python code that comes with the model.
        progress: show a bar.

    Returns:
        Tokens per second of each way to hold the weights. Printed, it is a table.

    Raises:
        SettingError: a checkpoint without packed weights, or settings that have no meaning.
    """
    if min(prompt_tokens, new_tokens, rounds) < 1:
        raise SettingError("prompt_tokens, new_tokens and rounds must be at least 1.")
    unknown = [name for name in against if name not in DENSE]
    if unknown:
        raise SettingError(f"against takes {' and '.join(DENSE)}; got {unknown[0]!r}.")
    base = LoadSettings(device="cpu", trust_remote_code=trust_remote_code)
    with threads_set(threads):
        return _bench(model, base, prompt_tokens, new_tokens, rounds, _ways(base, against, head_bits), progress)


DENSE: dict[str, Dtype] = {"bf16": "bfloat16", "fp32": "float32"}


def _ways(base: LoadSettings, against: tuple[str, ...], head_bits: int) -> dict[str, LoadSettings]:
    """Every way to hold the model, by name."""
    arithmetics: tuple[Arithmetic, ...] = ("a16", "a8") if cpu.best() is not None else ("auto",)
    ways = {f"packed {a if a != 'auto' else 'plain'}": replace(base, arithmetic=a) for a in arithmetics}
    first = next(iter(ways))
    ways[f"{first}, head{head_bits}"] = replace(ways[first], head_bits=head_bits)
    return ways | {f"dense {name}": replace(base, packed=False, dtype=DENSE[name]) for name in against}


def _bench(
    model: str | Path,
    base: LoadSettings,
    prompt: int,
    new: int,
    rounds: int,
    ways: dict[str, LoadSettings],
    progress: bool,
) -> Speed:
    packed = load_model(model, base)
    if not quantized_linears(packed):
        raise SettingError(f"{model} is not quantized; there is nothing packed to measure.")
    refuse_unless_causal(packed, "bench")
    check_positions(packed, prompt + new)
    kernel = f"{next(iter(quantized_linears(packed).values())).why()}, {fused.why(packed)}"
    models = {name: load_model(model, way) for name, way in ways.items()}
    del packed
    rate = None if cpu.best() is None else cpu.read_rate()
    ids = torch.randint(0, packed_vocabulary(models), (1, prompt + new), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with torch.inference_mode(), bar(progress) as display:
        task = display.add_task("bench", total=(rounds + 1) * len(models))
        for r in range(rounds + 1):  # the first warms up
            for name, candidate in models.items():
                seconds = _once(candidate, ids, prompt)
                if r:
                    times[name].append(seconds)
                display.advance(task)
    rows = []
    for name, candidate in models.items():
        prefill, decode = (statistics.median(part) for part in zip(*times[name], strict=True))
        size = token_bytes(candidate)
        floor = None if rate is None else rate * 1e9 / size
        head = _head_seconds(candidate)
        rows.append(SpeedRow(name, new / decode, prompt / prefill, size, floor, head * new / decode))
    return Speed(str(model), torch.get_num_threads(), prompt, new, rounds, kernel, rate, rows)


def packed_vocabulary(models: dict[str, nn.Module]) -> int:
    """Tokens that all of them know."""
    return min(int(model.config.get_text_config().vocab_size) for model in models.values())  # type: ignore[union-attr,operator]


def _once(model: nn.Module, ids: torch.Tensor, prompt: int) -> tuple[float, float]:
    """Seconds of prefill, and of decoding the rest."""
    start = time.perf_counter()
    out = model(input_ids=ids[:, :prompt], use_cache=True, logits_to_keep=1)
    middle = time.perf_counter()
    for i in range(prompt, ids.shape[1]):
        out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
    return middle - start, time.perf_counter() - middle


def _head_seconds(model: nn.Module, repeats: int = 10) -> float:
    """Seconds that the output head takes for one token."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    decoder = fused.decoder_of(model)
    run: Callable[[torch.Tensor], Any] = head if decoder is None else decoder.head
    x = torch.ones(head.in_features, dtype=next(model.parameters()).dtype if decoder is None else torch.float32)
    with torch.inference_mode():
        run(x)
        start = time.perf_counter()
        for _ in range(repeats):
            run(x)
    return (time.perf_counter() - start) / repeats


def token_bytes(model: nn.Module) -> int:
    """Bytes of weights that one token reads."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    skipped = {embedding.weight.data_ptr()} - {getattr(head, "weight", embedding.weight).data_ptr()}
    if isinstance(head, QuantizedLinear):
        skipped = {embedding.weight.data_ptr()}
    packed = sum(module.tiles.nbytes for module in quantized_linears(model).values())
    dense = {p.data_ptr(): p.nbytes for p in model.parameters() if p.data_ptr() not in skipped}
    return packed + sum(dense.values())
