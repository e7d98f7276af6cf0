"""The surface: ``quantize``, ``load``, ``evaluate``."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from nearplane.checkpoint.load import load_model
from nearplane.cli.terminal import Terminal
from nearplane.core.errors import SettingError
from nearplane.evaluation.perplexity import Evaluation
from nearplane.evaluation.perplexity import evaluate as evaluate_model
from nearplane.formats.parts import Writer
from nearplane.machine.devices import give_memory_back, pick_device, pick_dtype
from nearplane.machine.progress import waiting
from nearplane.machine.ranks import Ranks, together
from nearplane.machine.signals import stoppable
from nearplane.models.locate import locate
from nearplane.models.source import load_tokenizer
from nearplane.run.budget import decide
from nearplane.run.estimate import refuse
from nearplane.run.events import BlockDone, Show, StageDone
from nearplane.run.job import Job
from nearplane.run.plan import Plan, complete, draft
from nearplane.run.report import Report
from nearplane.run.resume import Saver, restore
from nearplane.run.walk import walk
from nearplane.runtime.cpu import Arithmetic


def quantize(
    model: str | Path,
    out: str | Path,
    job: Job | None = None,
    *,
    progress: bool = True,
    show: Show | None = None,
    **settings: Any,
) -> Report:
    """Quantize every linear of the model's blocks and write a checkpoint that engines load.

    Args:
        model: a transformers folder, a hub id, or "demo".
        out: a folder that does not exist or is empty; with ``resume``, what an ended run left.
        job: every setting of the run; none: the defaults.
        progress: tell on standard error what is done, unless ``show`` does.
        show: what is told of every event (``run/events.py``).
        settings: fields of ``Job``, or of its parts, that are others: ``bits=3, group_size=64, method="gptq"``.

    Returns:
        The report, as it is written to ``report.json``.

    Raises:
        SettingError: settings that cannot work, or a run that does not fit into memory or onto the disk.
        NumericalError: numbers that cannot be solved.
        NearplaneError: whatever else cannot work. However a run ends, ``out`` holds the finished checkpoint, or the
            finished blocks for a later ``resume``, or nothing.

    Under torchrun all ranks call this alike (``docs/large_models.md``): they share the samples and the solving, rank 0
    writes, each is given the report. With glibc, large freed blocks of memory leave this process from now on.
    """
    job, out = Job.of(job, settings), Path(out)
    give_memory_back()
    with together(job.device) as ranks:
        job = replace(job, device=ranks.device)
        writer = ranks.first(lambda: Writer(out, resume=job.resume))
        told = show or (Terminal() if progress else None)
        with waiting(f"opening {model}: its structure, and what is copied", told is not None and ranks.rank == 0):
            plan = _plan(model, job, out, ranks)
        report = Report(str(model), plan.settings, str(out), data=plan.data)
        report.events += plan.warnings()
        _run(plan, writer, report, ranks, told if ranks.rank == 0 else None)
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


def _plan(model: str | Path, job: Job, out: Path, ranks: Ranks) -> Plan:
    """Open the model once; where the run cannot fit, that is said before a weight is read, or fetched from the hub."""
    plan = draft(model, job, reads=True)
    if not job.force:
        refuse(plan, out, job.offload, ranks)
    return complete(plan)


def _run(plan: Plan, writer: Writer | None, report: Report, ranks: Ranks, show: Show | None) -> None:
    """Walk, and let the report, the parts and the terminal read what is done. Only rank 0 has a writer."""
    with writer or nullcontext(), stoppable(ranks.most, quiet=ranks.rank > 0) as stop:
        if plan.undecided:
            with report.timed("budget"):
                plan = decide(plan, writer.records if writer else [], ranks, stop.check)
            report.settings = plan.settings
        done = ranks.tell(ranks.first(lambda: restore(plan, writer, report, ranks.world) if writer else []) or [])
        saver = Saver(plan, writer, report, ranks.world) if writer else None
        if show:
            show.begin(report, plan.blocks, len(done), resume=plan.job.resume, mixed=plan.mixed)
        try:
            for event in walk(plan, done, ranks):
                report.take(event)
                if saver:
                    with report.timed("write"):
                        saver.take(event)
                if show:
                    show.take(event)
                if isinstance(event, BlockDone) or (isinstance(event, StageDone) and not event.last):
                    stop.check()
            if saver:
                with report.timed("write"):
                    saver.finish()
        finally:
            if show:
                show.end()
