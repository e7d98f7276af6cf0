"""The surface: ``quantize``, ``load``, ``evaluate``. ``quantize`` is the walk from a model to a checkpoint."""

import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.progress import TaskID
from torch import nn

from nearplane.budget import decide
from nearplane.calibrate.data import Calibration
from nearplane.core.errors import NumericalError, SettingError
from nearplane.core.grid import Grid
from nearplane.core.moments import Moments
from nearplane.devices import pick_device, pick_dtype
from nearplane.estimate import refuse
from nearplane.evaluate.perplexity import Evaluation
from nearplane.evaluate.perplexity import evaluate as evaluate_model
from nearplane.formats.write import Writer
from nearplane.interrupts import stoppable
from nearplane.methods import Method, NearPlane
from nearplane.mixed import WIDTHS, Override, make_mix
from nearplane.models.discover import Stage, linears_besides
from nearplane.models.load import load_model
from nearplane.models.source import load_tokenizer, locate
from nearplane.narration import announce, stage_line
from nearplane.plan import Dtype, FormatName, Plan, make_plan
from nearplane.progress import bar
from nearplane.report import LinearRow, Report
from nearplane.resume import replay, restore, seal
from nearplane.runtime.cpu import Arithmetic
from nearplane.stream import OpenBlock


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    method: Method | None = None,
    grid: Grid | None = None,
    calibration: Calibration | None = None,
    override: Mapping[str, Mapping[str, Any]] | Sequence[Override] | None = None,
    ignore: Sequence[str] = (),
    budget: float | None = None,
    widths: Sequence[int] = WIDTHS,
    format: FormatName = "compressed-tensors",
    device: str = "auto",
    dtype: Dtype = "auto",
    offload: str | Path | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
    force: bool = False,
    progress: bool = True,
) -> Report:
    """Quantize every linear of the model's blocks and write a checkpoint that engines load.

    ``model``: a transformers folder, a hub id, or "demo". ``out``: a folder that does not exist or is empty. ``method``:
    NearPlane() unless given. ``override``: fields of the grid that are others where a pattern is found in a linear's name,
    {"down_proj": {"bits": 8}}; ``ignore``: patterns of linears that stay dense (``mixed.py``).
    ``budget``: stored bits per quantized weight, scales counted, to be met by the best choice of ``widths`` (``budget.py``).
    ``dtype``: what dense tensors and scales are stored in ("auto": as in the source); on CPU the
    computation is float32 whatever is stored. ``offload``: a folder in which the hidden states are kept while the run goes
    on, instead of in memory. ``resume``: go on after the last finished block that ``out`` holds, if it holds any; the
    settings must be the same. Raises NearplaneError for whatever cannot work, a run that does not fit into memory or onto
    the disk included (not with ``force``). However it ends, ``out`` holds the finished checkpoint, or the finished blocks
    for a later ``resume``, or nothing.
    """
    mix = make_mix(override, ignore, budget, widths)
    writer = Writer(Path(out), resume=resume)
    plan = make_plan(
        model,
        method or NearPlane(),
        grid or Grid(),
        calibration or Calibration(),
        format,
        device,
        dtype,
        trust_remote_code,
        mix,
    )
    if not force:
        refuse(plan, Path(out), offload is not None)
    report = Report(str(model), plan.settings, str(out), data=plan.data)
    report.events += plan.warnings()
    with writer, stoppable() as stop, bar(progress) as display:
        if plan.undecided:
            task = display.add_task("budget", total=sum(len(block.stages) for block in plan.blocks))

            def tick(task: TaskID = task) -> None:
                display.advance(task)
                stop.check()

            with report.timed("budget"):
                plan = decide(plan, writer.records, None if offload is None else Path(offload), tick)
            display.remove_task(task)
            report.settings = plan.settings
        done = restore(plan, writer, report)
        task = display.add_task("quantize", total=sum(len(block.stages) for block in plan.blocks))
        if progress:
            announce(report, plan.blocks, done)
        walk = plan.stream(None if offload is None else Path(offload)) if done < len(plan.blocks) else iter(())
        for number in count():
            mark = report.mark()
            with report.timed("forward"):  # opening a block, and running the one before it over every sample
                block = next(walk, None)
            stop.check()
            if block is None:
                break
            if number < done:
                replay(plan, writer, number, block)
                display.advance(task, len(block.stages))
                continue
            for stage in block.stages:
                rows = _solve_stage(plan, block, stage, writer, report)
                display.advance(task)
                if progress:
                    display.console.print(stage_line(block.block, stage, rows, plan.mixed))
                if stage is not block.stages[-1]:
                    stop.check()
            with report.timed("write"):
                seal(plan, writer, report, block, mark)
            stop.check()
        with report.timed("write"):
            _write_the_rest(plan, writer, report)
    return report


def load(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "float32",
    packed: bool = True,
    arithmetic: Arithmetic = "auto",
    head_bits: int | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The transformers model in a folder, quantized by us or others (compressed-tensors, GPTQ) or not at all.

    Quantized weights stay packed in memory and are multiplied as they are (``runtime/``); ``packed=False`` makes them
    dense. Everything dense has ``dtype`` ("auto": as stored). ``arithmetic``: how the CPU kernel multiplies, "exact",
    "a16" or "a8"; "auto" is a16 where there are vector instructions for it. ``head_bits``: also round the output head,
    in memory. Raises NearplaneError for whatever cannot be read.
    """
    return load_model(
        path,
        device=pick_device(device),
        dtype=pick_dtype(dtype),
        packed=packed,
        arithmetic=arithmetic,
        head_bits=head_bits,
        trust_remote_code=trust_remote_code,
    )


def evaluate(
    model: str | Path,
    *,
    dataset: str | None = None,
    seqlen: int = 2048,
    windows: int | None = None,
    reference: str | Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    packed: bool = True,
    arithmetic: Arithmetic = "auto",
    head_bits: int | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Perplexity of a folder or hub id; with ``reference`` also KL divergence per token and top-1 agreement.

    A quantized checkpoint is measured as it will run: packed (see ``load``).
    """
    if seqlen < 2 or (windows is not None and windows < 1):
        raise SettingError(f"seqlen must be at least 2 and windows at least 1; got {seqlen} and {windows}.")
    settings: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    loaded = load(model, packed=packed, arithmetic=arithmetic, head_bits=head_bits, **settings)
    original = None if reference is None else load(reference, **settings)
    tokenizer = load_tokenizer(locate(model), trust_remote_code=trust_remote_code)
    return evaluate_model(
        loaded, tokenizer, dataset=dataset, seqlen=seqlen, windows=windows, reference=original, progress=progress
    )


def _solve_stage(plan: Plan, block: OpenBlock, stage: Stage, writer: Writer, report: Report) -> list[LinearRow]:
    """Observe one stage's input, prepare once, solve the rows of all its weights together, or of those on one grid."""
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
            held = moments.held
            if held is not None and not 0 < held.tokens < moments.tokens:
                report.events.append(f"{where}: too few tokens to hold any out, so none could judge")
            with report.timed("prepare"):
                state = plan.method.prepare(moments)
        for grid, part in plan.parts(stage):
            where = part[0].name
            rows += _solve(plan, block, part, grid, moments, state, writer, report)
    except (NumericalError, SettingError) as error:
        raise type(error)(f"{where}: {error}") from error
    if rows[0].damp_raised:
        times, reached = rows[0].damp_raised, rows[0].damp_percent
        report.events.append(f"{stage[0].name}: damping raised {times} times, to {reached:g}")
    return rows


def _solve(
    plan: Plan,
    block: OpenBlock,
    sites: Stage,
    grid: Grid,
    moments: Moments | None,
    state: Any,
    writer: Writer,
    report: Report,
) -> list[LinearRow]:
    """Solve the rows of weights that share an input and a grid as one weight; measure, replace and write each."""
    start = time.perf_counter()
    with report.timed("solve"):
        stacked = torch.cat([block.weight(site) for site in sites])
        solved = plan.method.solve(stacked, state, grid)
    seconds = (time.perf_counter() - start) / len(stacked)
    if solved.codes.shape != stacked.shape:
        given, wanted = list(solved.codes.shape), list(stacked.shape)
        raise SettingError(f"{type(plan.method).__name__} returned codes of shape {given} for a weight of {wanted}")
    factor, done, rows = getattr(state, "factor", None), 0, []
    for site in sites:
        part = slice(done, done := done + site.shape[0])
        weight, quantized = stacked[part], solved.rows(part)
        with report.timed("measure"):
            spent = seconds * len(weight)
            rows.append(report.add(site.name, weight, quantized, grid, moments, factor, spent))
        block.replace(site, quantized, grid)
        with report.timed("write"):
            tensors = plan.format.tensors(plan.disk_name(site.name), quantized, grid)
            report.bytes["quantized"] += sum(tensor.nbytes for tensor in tensors.values())
            writer.put(tensors)
    if solved.course:
        report.rounds["kept"] += solved.course.rounds
        report.rounds["rejected"] += solved.course.rejected
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
            pattern = plan.ignored.get(name.removesuffix(".weight"))
            reason = reason if pattern is None else f"left out by ignore {pattern!r}"
            report.dense.append({"name": name, "bytes": value.nbytes, "reason": reason})
        writer.put({name: value})
    report.bytes["after"] = report.bytes["dense"] + report.bytes["quantized"]
    quantized = set(sites.values())
    ignore = linears_besides(source.model, quantized)
    settings = {
        "static_groups": getattr(plan.method, "static_groups", True),
        "true_sequential": True,
        "version": report.versions["nearplane"],
    }
    if hasattr(plan.method, "damp_percent"):
        settings["damp_percent"] = plan.method.damp_percent
    quantization = plan.quantization(ignore=ignore, settings=settings)
    config = {key: value for key, value in source.raw_config().items() if key != "torch_dtype"}
    dtype = {"dtype": str(plan.stored).removeprefix("torch.")}
    writer.json("config.json", config | dtype | {"quantization_config": quantization})
    for name, content in plan.format.extra_files(quantization).items():
        writer.json(name, content)
    writer.companions(source.folder, code=source.trust_remote_code)
    writer.json("report.json", report.as_dict())
    writer.finish()
