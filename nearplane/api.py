"""The surface: ``quantize``, ``load``, ``evaluate``. ``quantize`` is the walk from a model to a checkpoint."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

from torch import nn

from nearplane.checkpoint.load import load_model
from nearplane.cli.terminal import announce, stage_line
from nearplane.core.activations import TokenGrid
from nearplane.core.errors import SettingError
from nearplane.core.grid import Grid
from nearplane.data.text import Calibration
from nearplane.evaluation.perplexity import Evaluation
from nearplane.evaluation.perplexity import evaluate as evaluate_model
from nearplane.formats import Format
from nearplane.formats.parts import Writer
from nearplane.machine.devices import give_memory_back, pick_device, pick_dtype
from nearplane.machine.progress import bar, waiting
from nearplane.machine.ranks import Ranks, together
from nearplane.machine.signals import Stop, stoppable
from nearplane.methods import Method
from nearplane.models.locate import locate
from nearplane.models.sketch import Unsketchable
from nearplane.models.source import load_tokenizer
from nearplane.run.budget import decide
from nearplane.run.estimate import refuse
from nearplane.run.mix import WIDTHS, Override
from nearplane.run.plan import Dtype, FormatName, Plan, make_plan
from nearplane.run.report import Report
from nearplane.run.rest import write_the_rest
from nearplane.run.resume import replay, restore, seal
from nearplane.run.stage import is_expert, lines, solve_stage, told
from nearplane.runtime.cpu import Arithmetic


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
    rotate: str | Sequence[str] = (),
    rotate_seed: int = 0,
    activations: TokenGrid | None = None,
    towers: str | Sequence[str] = (),
    format: FormatName | Format = "compressed-tensors",
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
    {"down_proj": {"bits": 8}}; ``ignore``: patterns of linears that stay dense (``mix/overrides.py``).
    ``budget``: stored bits per quantized weight, scales counted, to be met by the best choice of ``widths`` (``mix/budget.py``).
    ``rotate``: "r1,r2" turns the residual stream and every head's values first, fused into the weights; "r4" the down
    projection's input as it runs (docs/rotation.md). ``activations``: how what goes into these linears is rounded when the
    model runs; calibration rounds it alike, except in the reference stream. ``towers``: quantize these only, ("vision",),
    others stay dense (docs/other_models.md). ``dtype``: of stored dense tensors and scales ("auto": as in the source); on CPU the
    computation is float32. ``offload``: keep the hidden states in this folder meanwhile. ``resume``: go on after the last
    finished block that ``out`` holds, with the same settings. Raises NearplaneError for whatever cannot work, a run that does
    not fit into memory or onto the disk included (not with ``force``). However it ends, ``out`` holds the finished checkpoint,
    or the finished blocks for a later ``resume``, or nothing.

    Under torchrun all ranks call this alike (``docs/large_models.md``, "More than one device"): they share the samples and
    the solving, rank 0 writes, each is given the report. With glibc, large freed blocks of memory leave this process from now on.
    """
    scratch = None if offload is None else Path(offload)
    give_memory_back()
    with together(device) as ranks:
        writer = ranks.first(lambda: Writer(Path(out), resume=resume))
        settings = {
            "method": method, "grid": grid, "calibration": calibration, "override": override, "ignore": ignore,
            "budget": budget, "widths": widths, "format": format, "device": ranks.device, "dtype": dtype,
            "trust_remote_code": trust_remote_code, "rotate": rotate, "rotate_seed": rotate_seed,
            "activations": activations, "towers": towers,
        }  # fmt: skip
        with waiting(f"opening {model}: its structure, and what is copied", progress and ranks.rank == 0):
            plan = _plan(model, settings, Path(out), scratch, ranks, force)
        report = Report(str(model), plan.settings, str(out), data=plan.data)
        report.events += plan.warnings()
        _walk(plan, writer, report, ranks, scratch, progress and ranks.rank == 0)
        return ranks.tell(report)


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
    kv_bits: int = 16,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Perplexity of a folder or hub id; with ``reference`` also KL divergence per token and top-1 agreement.

    A quantized checkpoint is measured as it will run: packed (see ``load``). ``kv_bits`` (4, 8) also rounds its keys and values,
    in this evaluation only.
    """
    if seqlen < 2 or (windows is not None and windows < 1):
        raise SettingError(f"seqlen must be at least 2 and windows at least 1; got {seqlen} and {windows}.")
    settings: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    loaded = load(model, packed=packed, arithmetic=arithmetic, head_bits=head_bits, **settings)
    original = None if reference is None else load(reference, **settings)
    tokenizer = load_tokenizer(locate(model), trust_remote_code=trust_remote_code)
    return evaluate_model(
        loaded, tokenizer, dataset=dataset, seqlen=seqlen, windows=windows, reference=original, kv_bits=kv_bits,
        progress=progress,
    )  # fmt: skip


def _plan(
    model: str | Path, settings: dict[str, Any], out: Path, offload: Path | None, ranks: Ranks, force: bool
) -> Plan:
    """What is to be done; where it cannot fit, that is said before a weight is read, or fetched from the hub."""
    if not force:
        try:
            refuse(make_plan(model, **settings, sketch=True), out, offload, ranks)
        except Unsketchable:  # such a model is opened first
            plan = make_plan(model, **settings)
            refuse(plan, out, offload, ranks)
            return plan
    return make_plan(model, **settings)


def _walk(
    plan: Plan, writer: Writer | None, report: Report, ranks: Ranks, offload: Path | None, progress: bool
) -> None:
    """The run: every block in turn, then what is not quantized. Only rank 0 has a writer, and its report is the run's."""
    quiet = ranks.rank > 0
    with writer or nullcontext(), stoppable(ranks.most, quiet=quiet) as stop, bar(progress) as display:
        if plan.undecided:
            plan = _decide(plan, writer, report, ranks, offload, display, stop)
        done = ranks.tell(ranks.first(lambda: restore(plan, writer, report, ranks.world) if writer else []) or [])
        task = display.add_task("quantize", total=sum(len(block.stages) for block in plan.blocks))
        if progress:
            announce(report, plan.blocks, len(done), resume=writer is not None and writer.resume)
        walk = plan.stream(offload, ranks) if len(done) < len(plan.blocks) else iter(())
        for number in count():
            mark = report.mark()
            with report.timed("forward"):  # opening a block, and running the one before it over every sample
                block = next(walk, None)
            stop.check()
            if block is None:
                break
            if number < len(done):
                replay(plan, done[number], block)
                display.advance(task, len(block.stages))
                continue
            for stage in block.stages:
                rows = solve_stage(plan, block, stage, writer, report, ranks)
                display.advance(task)
                if progress and not is_expert(stage):
                    display.console.print(stage_line(block.block, stage, rows, plan.mixed))
                if stage is not block.stages[-1]:
                    stop.check()
            report.events += told(report.linears[mark.linears :])
            for line in lines(report.linears[mark.linears :]) if progress else ():
                display.console.print(line)
            with report.timed("write"):
                if writer:
                    seal(plan, writer, report, block, mark)
            stop.check()
        with report.timed("write"):
            if writer:
                write_the_rest(plan, writer, report)


def _decide(
    plan: Plan, writer: Writer | None, report: Report, ranks: Ranks, offload: Path | None, display: Any, stop: Stop
) -> Plan:
    """The plan with the bits that its budget buys."""
    task = display.add_task("budget", total=sum(len(block.stages) for block in plan.blocks))

    def tick() -> None:
        display.advance(task)
        stop.check()

    with report.timed("budget"):
        plan = decide(plan, writer.records if writer else [], ranks, offload, tick)
    display.remove_task(task)
    report.settings = plan.settings
    return plan
