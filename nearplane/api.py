"""The surface: ``quantize``, ``load``, ``evaluate``. ``quantize`` is the walk from a model to a checkpoint."""

import time
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from nearplane.calibrate.data import Calibration, Tokens
from nearplane.core.errors import NumericalError, SettingError
from nearplane.core.grid import Grid
from nearplane.evaluate.perplexity import Evaluation, longest_input
from nearplane.evaluate.perplexity import evaluate as evaluate_model
from nearplane.formats import FORMATS
from nearplane.formats.base import Format
from nearplane.formats.write import Writer
from nearplane.methods import GPTAQ, Method
from nearplane.models.discover import Block, Stage, discover, is_linear
from nearplane.models.load import load_model
from nearplane.models.source import Source, load_tokenizer, locate, open_source
from nearplane.narration import announce, stage_line
from nearplane.progress import bar
from nearplane.report import LinearRow, Report
from nearplane.stream import OpenBlock, stream

FormatName = Literal["compressed-tensors", "gptq", "gptq_v2"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]

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

    ``model``: a transformers folder, a hub id, or "demo". ``out``: a folder that does not exist or is empty. ``method``:
    GPTAQ() unless given. ``dtype``: what dense tensors and scales are stored in ("auto": as in the source); on CPU the
    computation is float32 whatever is stored. Raises NearplaneError for whatever cannot work; nothing half-written stays.
    """
    writer = Writer(Path(out))
    plan = _plan(
        model, method or GPTAQ(), grid or Grid(), calibration or Calibration(), format, device, dtype, trust_remote_code
    )
    report = Report(str(model), plan.settings, str(out), data=plan.data)
    report.events += plan.warnings()
    with writer, bar(progress) as display:
        task = display.add_task("quantize", total=sum(len(block.stages) for block in plan.blocks))
        if progress:
            announce(report, plan.blocks)
        walk = plan.stream()
        while True:
            with report.timed("forward"):  # opening a block, and running the one before it over every sample
                block = next(walk, None)
            if block is None:
                break
            for stage in block.stages:
                rows = _solve_stage(plan, block, stage, writer, report)
                display.advance(task)
                if progress:
                    display.console.print(stage_line(block.block, stage, rows))
        with report.timed("write"):
            _write_the_rest(plan, writer, report)
    return report


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
    tokenizer = load_tokenizer(locate(model))
    return evaluate_model(
        loaded, tokenizer, dataset=dataset, seqlen=seqlen, windows=windows, reference=original, progress=progress
    )


@dataclass(frozen=True)
class Plan:
    """Everything decided before the first block is opened."""

    source: Source
    blocks: list[Block]
    tokens: Tokens | None
    method: Method
    grid: Grid
    calibration: Calibration
    format: Format
    stored: torch.dtype
    compute: torch.dtype
    device: torch.device

    def stream(self) -> Any:
        """The walk over blocks."""
        ids = None if self.tokens is None else self.tokens.ids
        reference = "D" in self.method.needs
        return stream(self.source, self.blocks, ids, device=self.device, dtype=self.compute, reference=reference)

    def disk_name(self, site: str) -> str:
        """A site's name in the checkpoint."""
        return self.source.names[site + ".weight"].removesuffix(".weight")

    def warnings(self) -> list[str]:
        """What this run can do but a user should know before it starts."""
        shapes = sorted({site.shape for block in self.blocks for site in block.sites})
        notes = [self.format.warn(self.grid, shape) for shape in shapes]
        unreached = [
            f"{name}: the probe forward did not reach it, stays dense" for b in self.blocks for name in b.unreached
        ]
        return list(dict.fromkeys([note for note in notes if note is not None])) + unreached

    @property
    def settings(self) -> dict[str, Any]:
        """For the report."""
        options: dict[str, Any] = (
            asdict(self.method) if is_dataclass(self.method) and not isinstance(self.method, type) else {}
        )
        return {
            "method": {"name": type(self.method).__name__, **options},
            "grid": asdict(self.grid),
            "calibration": asdict(self.calibration) if self.tokens is not None else None,
            "format": self.format.name,
            "stored_dtype": str(self.stored).removeprefix("torch."),
            "compute_dtype": str(self.compute).removeprefix("torch."),
            "device": str(self.device),
        }

    @property
    def data(self) -> dict[str, Any]:
        """For the report."""
        if self.tokens is None:
            return {"origin": "none: this method reads no calibration data"}
        windows, seqlen = self.tokens.ids.shape
        return {"windows": windows, "seqlen": seqlen, "tokens": windows * seqlen} | {
            key: value for key, value in self.tokens._asdict().items() if key != "ids"
        }


def _plan(
    model: str | Path,
    method: Method,
    grid: Grid,
    calibration: Calibration,
    format: str,
    device: str,
    dtype: str,
    trust_remote_code: bool,
) -> Plan:
    """Open the source and settle every choice; refuse, before any compute, what cannot work."""
    where = _device(device)
    if format not in FORMATS:
        raise SettingError(f"format must be one of {', '.join(FORMATS)}; got {format!r}.")
    source = open_source(model, trust_remote_code=trust_remote_code)
    if source.quantized:
        raise SettingError(f"{model} is quantized already; give the original model.")
    stored = source.dtype if dtype == "auto" else _dtype(dtype)
    compute = torch.float32 if where.type == "cpu" else source.dtype
    grid = replace(grid, scale_dtype=FORMATS[format].scale_dtype(stored))
    blocks = discover(source)
    for block in blocks:
        for site in block.sites:
            reason = FORMATS[format].supports(grid, site.shape)
            if site.transposed and not FORMATS[format].holds_conv1d:
                reason = f"{format} knows nn.Linear only, loaders would fill this Conv1D with random weights; use gptq"
            if reason is not None:
                raise SettingError(f"{site.name}: {reason}.")
    tokens = calibration.load(source.tokenizer, longest_input(source.model)) if method.needs else None
    return Plan(source, blocks, tokens, method, grid, calibration, FORMATS[format], stored, compute, where)


def _solve_stage(plan: Plan, block: OpenBlock, stage: Stage, writer: Writer, report: Report) -> list[LinearRow]:
    """Observe one stage's input, prepare once, solve each of its weights."""
    moments, state, rows = None, None, []
    where = stage[0].name
    try:
        if plan.method.needs:
            with report.timed("observe"):
                moments = block.observe(stage, plan.method.needs)
            moments.check()
            if moments.dropped:
                report.events.append(
                    f"{where}: {moments.dropped} calibration tokens left out, NaN or Inf in the activation"
                )
            with report.timed("prepare"):
                state = plan.method.prepare(moments)
        factor = getattr(state, "factor", None)
        if factor is not None and factor.raised:
            report.events.append(f"{where}: damping raised {factor.raised} times, to {factor.damp_percent:g}")
        for site in stage:
            where, start = site.name, time.perf_counter()
            weight = block.weight(site)
            with report.timed("solve"):
                quantized = plan.method.solve(weight, state, plan.grid)
            seconds = time.perf_counter() - start
            with report.timed("measure"):
                rows.append(report.add(site.name, weight, quantized, plan.grid, moments, factor, seconds))
            block.replace(site, quantized, plan.grid)
            with report.timed("write"):
                tensors = plan.format.tensors(plan.disk_name(site.name), quantized, plan.grid)
                report.bytes["quantized"] += sum(tensor.nbytes for tensor in tensors.values())
                writer.put(tensors)
    except (NumericalError, SettingError) as error:
        raise type(error)(f"{where}: {error}") from error
    return rows


def _write_the_rest(plan: Plan, writer: Writer, report: Report) -> None:
    """Everything that was not quantized, the configuration, the tokenizer and the report; the index comes last."""
    source = plan.source
    sites = {source.names[site.name + ".weight"]: site.name for block in plan.blocks for site in block.sites}
    for name in sorted(source.store.names):
        report.bytes["before"] += source.store.nbytes(name)
        if name in sites:
            continue
        value = source.store.get(name)
        value = value.to(plan.stored) if value.is_floating_point() else value
        report.bytes["dense"] += value.nbytes
        if value.dim() >= 2:
            missed = any(name == source.names.get(linear + ".weight") for b in plan.blocks for linear in b.unreached)
            reason = "the probe forward did not reach it" if missed else "not a linear of a block"
            report.dense.append({"name": name, "bytes": value.nbytes, "reason": reason})
        writer.put({name: value})
    report.bytes["after"] = report.bytes["dense"] + report.bytes["quantized"]
    quantized = set(sites.values())
    ignore = [name for name, m in source.model.named_modules() if is_linear(m) and name not in quantized]
    settings = {
        "static_groups": getattr(plan.method, "static_groups", True),
        "true_sequential": True,
        "version": report.versions["nearplane"],
    }
    if hasattr(plan.method, "damp_percent"):
        settings["damp_percent"] = plan.method.damp_percent
    quantization = plan.format.config(plan.grid, ignore=ignore, settings=settings)
    config = {key: value for key, value in source.raw_config().items() if key != "torch_dtype"}
    dtype = {"dtype": str(plan.stored).removeprefix("torch.")}
    writer.json("config.json", config | dtype | {"quantization_config": quantization})
    for name, content in plan.format.extra_files(quantization).items():
        writer.json(name, content)
    for pattern in COMPANIONS:
        for path in sorted(source.folder.glob(pattern)):
            if path.is_file():
                writer.copy(path)
    writer.json("report.json", report.as_dict())
    writer.finish()


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
