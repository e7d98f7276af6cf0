"""``nearplane bench``: a checkpoint packed against the same model dense, in one process, round by round."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from nearplane.checkpoint.load import load_model
from nearplane.core.errors import SettingError
from nearplane.evaluation.generation import check_positions
from nearplane.machine.progress import bar
from nearplane.models.inputs import refuse_unless_causal
from nearplane.runtime import cpu
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

    def print(self, console: Console) -> None:
        """For people."""
        table = Table(title=f"{self.model}: {self.kernel}, {self.threads} threads")
        columns = ("decode", "x bf16", "prefill", "x bf16", "MB", "floor", "head")
        table.add_column("weights", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right")
        base = next((row for row in self.rows if row.name == "dense bf16"), None)
        for row in self.rows:
            ratios = [f"{row.decode / base.decode:.2f}", f"{row.prefill / base.prefill:.2f}"] if base else ["", ""]
            floor = "" if row.floor is None else f"{row.floor:.0f}"
            table.add_row(
                row.name, f"{row.decode:.1f}", ratios[0], f"{row.prefill:.0f}", ratios[1],
                f"{row.token_bytes / 1e6:.0f}", floor, f"{100 * row.head_share:.0f}%",
            )  # fmt: skip
        console.print(table)
        rate = (
            "not measured, there is no C++ kernel"
            if self.read_gbs is None
            else f"{self.read_gbs:.1f} GB/s by one thread"
        )
        console.print(
            "tokens/s; packed computes in float32; "
            f"batch 1, {self.new_tokens} tokens decoded after a prompt of {self.prompt_tokens}, median of "
            f"{self.rounds} interleaved rounds; floor: a token's bytes of weights at the rate of reading memory ({rate}); "
            "MB: those bytes; head: its part of a decoded token's time",
            soft_wrap=True,
        )


def bench(
    model: str | Path,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    rounds: int = 3,
    threads: int | None = None,
    against: tuple[str, ...] = ("bf16", "fp32"),
    head_bits: int = 8,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Speed:
    """Time decoding and prefill: packed (a16, a8, and a16 with a rounded head), and dense as named in ``against``.

    Packed models compute in float32, on a CPU the fastest dtype for what is not a product. The dense models are the
    checkpoint's own weights, dequantized: as fast as the original's. SettingError for a checkpoint without packed weights.
    """
    if min(prompt_tokens, new_tokens, rounds) < 1:
        raise SettingError("prompt_tokens, new_tokens and rounds must be at least 1.")
    if threads is not None:
        check_threads(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return _bench(model, prompt_tokens, new_tokens, rounds, against, head_bits, trust_remote_code, progress)
    finally:
        torch.set_num_threads(before)


def check_threads(threads: int) -> None:
    """SettingError for a number of threads that no machine has."""
    if not 1 <= threads <= 1024:
        raise SettingError(f"threads must be at least 1 and at most 1024; got {threads}.")


DENSE = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _bench(
    model: str | Path,
    prompt: int,
    new: int,
    rounds: int,
    against: tuple[str, ...],
    head_bits: int,
    trust: bool,
    progress: bool,
) -> Speed:
    def opened(**options: Any) -> nn.Module:
        return load_model(model, device=torch.device("cpu"), trust_remote_code=trust, **options)

    packed = opened()
    if not quantized_linears(packed):
        raise SettingError(f"{model} is not quantized; there is nothing packed to measure.")
    refuse_unless_causal(packed, "bench")
    check_positions(packed, prompt + new)
    kernel = next(iter(quantized_linears(packed).values())).why()
    ways: tuple[Arithmetic, ...] = ("a16", "a8") if cpu.best() is not None else ("auto",)
    models = {f"packed {way if way != 'auto' else 'plain'}": opened(arithmetic=way) for way in ways}
    models[f"{next(iter(models))}, head{head_bits}"] = opened(arithmetic=ways[0], head_bits=head_bits)
    models |= {f"dense {name}": opened(packed=False, dtype=DENSE[name]) for name in against}
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
    run: Callable[[torch.Tensor], Any] = head
    parameter = next(model.parameters())
    x = torch.ones(1, 1, head.in_features, dtype=parameter.dtype)
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
