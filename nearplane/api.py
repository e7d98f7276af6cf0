"""The surface: ``quantize``, ``load``, ``evaluate``. ``quantize`` is the walk from a model to a checkpoint."""

import time
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from nearplane.calibrate.data import Calibration, Tokens
from nearplane.core.errors import NumericalError, SettingError
from nearplane.core.grid import Grid
from nearplane.core.moments import Moments
from nearplane.evaluate.perplexity import Evaluation, longest_input
from nearplane.evaluate.perplexity import evaluate as evaluate_model
from nearplane.formats import FORMATS
from nearplane.formats.base import Format
from nearplane.formats.write import Writer
from nearplane.methods import GPTAQ, Method
from nearplane.models.discover import Block, Stage, discover, is_linear
from nearplane.models.load import load_model
from nearplane.models.source import Source, load_tokenizer, locate, open_source
from nearplane.progress import CONSOLE, bar
from nearplane.report import LinearRow, Report
from nearplane.stream import OpenBlock, stream

FormatName = Literal["compressed-tensors", "gptq", "gptq_v2"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]

# A stage that loses more than this share of its tokens to NaN or Inf calibrates on something else than the text.
MOST_DROPPED = 0.05
# Files that make a folder a usable model, besides weights and config.json.
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
              "generation_config.json", "*.jinja", "preprocessor_config.json", "LICENSE*")  # fmt: skip


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    method: Method | None = None,
    grid: Grid | None = None,
    calibration: Calibration | None = None,
    format: FormatName = "compressed-tensors",
    device: str = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Report:
    """Quantize every linear of the model's blocks and write a checkpoint that engines load.

    ``model``: a transformers folder, a hub id, or "demo". ``out``: a folder that does not exist or is empty. ``dtype``:
    what dense tensors and scales are stored in ("auto": as in the source); on CPU the computation is float32 whatever is
    stored. Raises NearplaneError, before anything is written, for whatever cannot work; nothing half-written stays.
    """
    method, grid, calibration = method or GPTAQ(), grid or Grid(), calibration or Calibration()
    target = _device(device)
    writer = Writer(Path(out))
    source = open_source(model, trust_remote_code=trust_remote_code)
    if source.quantized:
        raise SettingError(f"{model} is quantized already; give the original model.")
    stored = source.dtype if dtype == "auto" else getattr(torch, dtype)
    compute = torch.float32 if target.type == "cpu" else source.dtype
    fmt = _format(format)
    grid = replace(grid, scale_dtype=fmt.scale_dtype(stored))
    tokens = calibration.load(source.tokenizer, longest_input(source.model)) if method.needs else None
    blocks = discover(source)
    report = Report(str(model), _settings(method, grid, calibration, format, stored, compute, target), str(out))
    _note_data(report, tokens)
    _check_format(fmt, grid, blocks, report)
    with writer, bar(progress) as display:
        task = display.add_task("quantize", total=sum(len(block.stages) for block in blocks))
        _announce(report, source, blocks, progress)
        walk = stream(
            source, blocks, tokens and tokens.ids, device=target, dtype=compute, reference="D" in method.needs
        )
        while True:
            with report.timed("forward"):  # load and advance: what the generator does between two blocks
                block = next(walk, None)
            if block is None:
                break
            for stage in block.stages:
                rows = _solve_stage(block, stage, method, grid, fmt, writer, source, report)
                display.advance(task)
                if progress:
                    display.console.print(_stage_line(block, stage, rows))
        with report.timed("write"):
            _write_the_rest(writer, fmt, source, blocks, grid, method, stored, report)
    return report


def _solve_stage(
    block: OpenBlock,
    stage: Stage,
    method: Method,
    grid: Grid,
    fmt: Format,
    writer: Writer,
    source: Source,
    report: Report,
) -> list[LinearRow]:
    """Observe one stage's input, prepare once, solve each of its weights."""
    moments, state, rows = None, None, []
    try:
        if method.needs:
            with report.timed("observe"):
                moments = block.observe(stage, method.needs)
            _check_tokens(stage, moments, report)
            with report.timed("prepare"):
                state = method.prepare(moments)
        factor = getattr(state, "factor", None)
        if factor is not None and factor.raised:
            report.events.append(f"{stage[0].name}: damping raised {factor.raised} times, to {factor.damp_percent:g}")
        for site in stage:
            start = time.perf_counter()
            weight = block.weight(site)
            with report.timed("solve"):
                quantized = method.solve(weight, state, grid)
            with report.timed("measure"):
                rows.append(
                    report.add(site.name, weight, quantized, grid, moments, factor, time.perf_counter() - start)
                )
            block.replace(site, quantized, grid)
            with report.timed("write"):
                tensors = fmt.tensors(_disk_name(source, site.name), quantized, grid)
                report.bytes["quantized"] = report.bytes.get("quantized", 0) + sum(t.nbytes for t in tensors.values())
                writer.put(tensors)
    except (NumericalError, SettingError) as error:
        raise type(error)(f"{stage[len(rows)].name if len(rows) < len(stage) else stage[-1].name}: {error}") from error
    return rows


def load(
    path: str | Path, *, device: str = "auto", dtype: str = "float32", trust_remote_code: bool = False
) -> nn.Module:
    """The transformers model in a folder, quantized by us or others (compressed-tensors, GPTQ) or not at all."""
    return load_model(path, device=_device(device), dtype=_dtype(dtype), trust_remote_code=trust_remote_code)


def evaluate(
    model: str | Path,
    *,
    dataset: str | None = None,
    seqlen: int = 2048,
    windows: int | None = None,
    reference: str | Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Perplexity of a folder or hub id; with ``reference`` also KL divergence per token and top-1 agreement."""
    settings: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    loaded = load(model, **settings)
    original = None if reference is None else load(reference, **settings)
    return evaluate_model(
        loaded,
        load_tokenizer(locate(model)),
        dataset=dataset,
        seqlen=seqlen,
        windows=windows,
        reference=original,
        progress=progress,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"device {name!r} is not usable here ({str(error).splitlines()[0]}).") from error
    return device


def _dtype(name: str) -> torch.dtype:
    if name not in ("float32", "float16", "bfloat16", "float64"):
        raise SettingError(f"dtype must be float32, float16 or bfloat16; got {name!r}.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise SettingError(f"format must be one of {', '.join(FORMATS)}; got {name!r}.")
    return FORMATS[name]


def _settings(
    method: Method,
    grid: Grid,
    calibration: Calibration,
    format: str,
    stored: torch.dtype,
    compute: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    options = asdict(method) if is_dataclass(method) and not isinstance(method, type) else {"repr": repr(method)}
    return {
        "method": {"name": type(method).__name__, **options},
        "grid": asdict(grid),
        "calibration": asdict(calibration) if method.needs else None,
        "format": format,
        "stored_dtype": str(stored).removeprefix("torch."),
        "compute_dtype": str(compute).removeprefix("torch."),
        "device": str(device),
    }


def _note_data(report: Report, tokens: Tokens | None) -> None:
    if tokens is None:
        report.data = {"origin": "none: this method reads no calibration data"}
        return
    report.data = {
        "origin": tokens.origin,
        "windows": tokens.ids.shape[0],
        "seqlen": tokens.ids.shape[1],
        "tokens": tokens.ids.numel(),
        "text_tokens": tokens.text_tokens,
        "sha256": tokens.sha256,
    }


def _check_format(fmt: Format, grid: Grid, blocks: list[Block], report: Report) -> None:
    """Refuse, before any compute, what the format cannot hold; note what engines would refuse."""
    for block in blocks:
        for site in block.sites:
            reason = fmt.supports(grid, site.shape)
            if reason is not None:
                raise SettingError(f"{site.name}: {reason}")
    for shape in sorted({site.shape for block in blocks for site in block.sites}):
        warning = fmt.warn(grid, shape)
        if warning is not None:
            report.events.append(warning)


def _announce(report: Report, source: Source, blocks: list[Block], progress: bool) -> None:
    """Say what is about to happen, and what "error" means."""
    report.dense += [
        {"name": name, "reason": "the probe forward did not reach it"} for block in blocks for name in block.unreached
    ]
    if not progress:
        return
    settings, data = report.settings, report.data
    CONSOLE.print(f"{source.name}: {sum(len(b.sites) for b in blocks)} linears in {len(blocks)} blocks")
    options = ", ".join(f"{k}={v}" for k, v in settings["method"].items() if k != "name")
    CONSOLE.print(
        f"method {settings['method']['name']} ({options})" if options else f"method {settings['method']['name']}"
    )
    grid = settings["grid"]
    CONSOLE.print(f"grid {grid['bits']} bits, group_size {grid['group_size']}, sym={grid['sym']}, fit={grid['fit']}")
    CONSOLE.print(f"calibration: {data['origin']}" + (f", {data['tokens']} tokens" if "tokens" in data else ""))
    CONSOLE.print("error is ‖(Q-W)X‖²/‖WX‖² per linear; in brackets what rounding to nearest would give")
    for event in report.events:
        CONSOLE.print(f"note: {event}")


def _check_tokens(stage: Stage, moments: Moments, report: Report) -> None:
    if not moments.dropped:
        return
    total = moments.tokens + moments.dropped
    report.events.append(f"{stage[0].name}: {moments.dropped} of {total} tokens dropped, NaN or Inf in the activation")
    if moments.dropped > MOST_DROPPED * total:
        raise NumericalError(
            f"{moments.dropped} of {total} calibration tokens have NaN or Inf in this layer's input. Likely causes: a broken "
            "weight before it, or a dtype too narrow for this model (try --dtype bfloat16 or float32)."
        )


def _stage_line(block: OpenBlock, stage: Stage, rows: list[LinearRow]) -> str:
    """One line a person can judge."""
    names = "+".join(site.name.removeprefix(block.block.name + ".").rpartition(".")[2] for site in stage)
    head = f"{block.block.name} {names}"
    seconds = sum(row.seconds for row in rows)
    if rows[0].error is None:
        return f"{head:<44} weight error {max(r.weight_error for r in rows):.4f}  {seconds:.1f}s"
    worst = max(rows, key=lambda row: row.error or 0.0)
    parts = [f"{head:<44} error {worst.error:.4f} ({worst.rtn_error:.4f})"]
    if worst.clipped is not None:
        weights = sum(row.shape[0] * row.shape[1] for row in rows)
        parts.append(f"clipped {100 * sum(row.clipped or 0 for row in rows) / weights:.1f}%")
    parts.append(f"tokens {worst.tokens}  {seconds:.1f}s")
    return "  ".join(parts)


def _disk_name(source: Source, site: str) -> str:
    return source.names[site + ".weight"].removesuffix(".weight")


def _write_the_rest(
    writer: Writer,
    fmt: Format,
    source: Source,
    blocks: list[Block],
    grid: Grid,
    method: Method,
    stored: torch.dtype,
    report: Report,
) -> None:
    """Everything that was not quantized, the configuration, the tokenizer and the report; the index comes last."""
    sites = {source.names[site.name + ".weight"]: site.name for block in blocks for site in block.sites}
    before = after = 0
    for name in sorted(source.store.names):
        before += source.store.nbytes(name)
        if name in sites:
            continue
        value = source.store.get(name)
        value = value.to(stored) if value.is_floating_point() else value
        after += value.nbytes
        if value.dim() >= 2:
            report.dense.append({"name": name, "bytes": value.nbytes, "reason": "outside the blocks' linears"})
        writer.put({name: value})
    report.bytes |= {"before": before, "dense": after, "after": after + report.bytes.get("quantized", 0)}
    quantized = set(sites.values())
    ignore = [name for name, m in source.model.named_modules() if is_linear(m) and name not in quantized]
    settings = {
        "static_groups": getattr(method, "static_groups", True),
        "true_sequential": True,
        "version": report.versions["nearplane"],
    }
    if hasattr(method, "damp_percent"):
        settings["damp_percent"] = method.damp_percent
    quantization = fmt.config(grid, ignore=ignore, settings=settings)
    config = source.raw_config() | {"quantization_config": quantization}
    config.pop("torch_dtype", None)
    config["dtype"] = str(stored).removeprefix("torch.")
    writer.json("config.json", config)
    for name, content in fmt.extra_files(quantization).items():
        writer.json(name, content)
    for pattern in COMPANIONS:
        for path in sorted(source.folder.glob(pattern)):
            if path.is_file():
                writer.copy(path)
    writer.json("report.json", report.as_dict())
    writer.finish()
