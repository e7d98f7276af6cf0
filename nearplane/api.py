"""The surface: the functions that a person calls from Python."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from torch import nn

from nearplane.checkpoint.inspect import Anatomy
from nearplane.checkpoint.inspect import inspect as inspect_folder
from nearplane.checkpoint.load import LoadSettings, load_model
from nearplane.cli.terminal import Terminal
from nearplane.core.errors import SettingError
from nearplane.core.grid import Grid
from nearplane.data.own import keep
from nearplane.data.rows import Rows
from nearplane.data.windows import Tokens
from nearplane.evaluation.generation import Generation, threads_set
from nearplane.evaluation.generation import generate as generate_text
from nearplane.evaluation.perplexity import Evaluation, check_windows
from nearplane.evaluation.perplexity import evaluate as evaluate_model
from nearplane.evaluation.speed import bench
from nearplane.formats.parts import Writer
from nearplane.machine.devices import give_memory_back
from nearplane.machine.ranks import Ranks, together
from nearplane.machine.signals import Stop, stoppable
from nearplane.models.locate import given_path, locate, refuse_loaded
from nearplane.models.source import load_tokenizer
from nearplane.run.budget import decide
from nearplane.run.events import BlockDone, Show, StageDone
from nearplane.run.forecast import Forecast, forecast, refuse, without_check
from nearplane.run.job import Job
from nearplane.run.measure import Clock
from nearplane.run.names import config_of, every_setting
from nearplane.run.plan import Plan, complete, draft, own_text
from nearplane.run.report import Report, recordable
from nearplane.run.resume import Saver, restore
from nearplane.run.scale import scale
from nearplane.run.student import Tuned
from nearplane.run.tune import refuse_ranks, refused, tune
from nearplane.run.walk import walk

__all__ = ["bench", "evaluate", "generate", "inspect", "load", "plan", "quantize"]


def quantize(
    model: str | Path,
    out: str | Path,
    job: Job | None = None,
    *,
    show: Show | None = None,
    progress: bool = True,
    **settings: Any,
) -> Report:
    """Quantize every linear of the model's blocks and write a checkpoint that engines load.

    Under torchrun all ranks call ``quantize`` alike (docs/large_models.md): they share the samples and the solving, rank 0
    writes, and each returns the report. With glibc, large freed blocks of memory leave this process from now on;
    where even a generous guess of the memory fits, only those of 32 MiB and more.

    Args:
        model: a transformers folder, a hub id, or "demo".
        out: a folder that does not exist or is empty; with ``resume``, one that holds finished blocks.
        job: every setting; none: the defaults.
        show: reads the run's events, such as ``Terminal()``; none: nobody does.
        progress: show the run on standard error where ``show`` is not given.
        settings: fields of ``Job`` and of its parts to change, by name: ``bits=3, method="gptq", nsamples=64``.

    Returns:
        The report, which is also ``report.json`` in ``out``.

    Raises:
        SettingError: settings that cannot work, or a run that does not fit into memory or onto the disk.
        NumericalError: numbers that cannot be solved.
        NearplaneError: another reason why the run cannot go on. However a run ends, ``out`` holds the finished checkpoint,
            or finished blocks for a later ``resume``, or nothing.

    Example:
        >>> nearplane.quantize("demo", "out", bits=3, group_size=64, sym=False, nsamples=16)  # doctest: +SKIP
    """
    refuse_loaded(model)
    job, out = Job.of(job, settings), given_path("out", out)
    give_memory_back()
    with together(job.device) as ranks, show or Terminal(silent=not progress) as told:
        told.silent = told.silent or ranks.rank > 0
        writer = ranks.first(lambda: Writer(out, resume=job.resume))
        with told.waiting(f"opening {model}: its structure"):
            plan = draft(model, replace(job, device=ranks.device), reads=True)  # opened once; no weight is read
            refuse_ranks(job.tune, ranks.world)
            counted: dict[str, Any] = {}
            if not job.force:
                plan = without_check(plan, job.offload, ranks.world, ranks.machine)
                counted = refuse(plan, out, job.offload, ranks)
                give_memory_back(plenty=not counted["close"])
            _ = plan.settings  # refused here where report.json cannot hold one of them
        own = ranks.tell(ranks.first(partial(own_text, plan, out, told.counting)))
        with told.waiting(f"reading {model}: the tensors that are copied, and the calibration data"):
            plan = complete(plan, own)
        named = recordable(str(model), "MODEL"), recordable(str(out), "OUT")
        report = Report(named[0], plan.settings, named[1], data=plan.data, memory=counted)
        report.config = config_of(job, named[0])
        report.revision, report.commit = plan.source.revision, plan.source.commit
        report.check = None if plan.checked is None else plan.checked.record()
        report.events += plan.warnings()
        return ranks.tell(_run(plan, writer, report, ranks, told, own))


def _run(
    plan: Plan, writer: Writer | None, report: Report, ranks: Ranks, show: Show, own: Tokens | None = None
) -> Report:
    """Walk; the report, the saver and the terminal read the events. Only rank 0 has a writer.

    ``own``: samples that the model has written, which OUT keeps until the run is finished.
    """
    with writer or nullcontext(), stoppable(ranks.most, quiet=ranks.rank > 0) as stop:
        if plan.job.scales_channels:
            plan = _scale(plan, writer, report, ranks, show, stop)
        if plan.undecided:
            plan = _decide(plan, writer, report, ranks, show, stop)
        done = ranks.tell(ranks.first(lambda: restore(plan, writer, report, ranks.world) if writer else []) or [])
        if ranks.tell(writer is not None and writer.complete):  # an earlier session ended while it tidied up
            if writer:
                writer.finish()
            return report if writer is None else Report.read(writer.out)
        if writer and own is not None:
            keep(own, writer.out)
        saver = Saver(plan, writer, report, ranks.world) if writer else None
        clock = Clock()
        show.begin(report, plan.walked, len(done), resume=plan.job.resume, mixed=plan.mixed)
        for event in walk(plan, done, ranks):
            report.take(event)
            if saver:
                with clock("write"):
                    saver.take(event)
                report.spend(clock.take())
            show.take(event)
            if isinstance(event, BlockDone) or (isinstance(event, StageDone) and not event.last):
                stop.check()
        report.conclude()
        tuned = None if writer is None else _tune(plan, writer, report, show, stop)
        if saver:
            with clock("write"):
                saver.finish(tuned)
            report.spend(clock.take())
        show.end()
        return report


def _tune(plan: Plan, writer: Writer, report: Report, show: Show, stop: Stop) -> Tuned | None:
    """Tune where that was asked for; what is to be stored then, None for what was solved."""
    if plan.fresh is None:
        return None
    clock = Clock()
    show.end()  # the bar of the blocks
    with clock("tune"), show.counting("tune", plan.job.tune) as advance:
        tuned, report.tuning = tune(plan, plan.fresh, writer, advance, stop.check)
    report.spend(clock.take())
    report.events += refused(report.tuning)
    tuned_check = report.tuning.pop("check", None)
    if report.check is not None and tuned_check is not None:
        report.check.pop("unanswered", None)  # of the walk, which stops behind the last block that it solves
        report.check |= {**tuned_check, "judged_tuning": True}  # its windows chose the step that was kept
    return tuned


def _scale(plan: Plan, writer: Writer | None, report: Report, ranks: Ranks, show: Show, stop: Stop) -> Plan:
    """Return the plan of the model with scaled channels, and note what was scaled."""
    clock = Clock()
    with clock("scale"), show.counting("scale", len(plan.walked)) as advance:

        def tick() -> None:
            advance()
            stop.check()

        out = None if writer is None else writer.out
        plan, told = scale(plan, out, bool(writer and writer.records), ranks, tick)
    report.spend(clock.take())
    report.settings = plan.settings
    report.events += told
    return plan


def _decide(plan: Plan, writer: Writer | None, report: Report, ranks: Ranks, show: Show, stop: Stop) -> Plan:
    """Return the plan with the bits that its budget buys."""
    clock = Clock()
    with clock("budget"), show.counting("budget", sum(len(block.stages) for block in plan.blocks)) as advance:

        def tick() -> None:
            advance()
            stop.check()

        plan = decide(plan, writer.records if writer else [], ranks, tick)
    report.spend(clock.take())
    report.settings = plan.settings
    return plan


def plan(model: str | Path, job: Job | None = None, *, ranks: int = 1, **settings: Any) -> Forecast:
    """Say what ``quantize`` with the same settings will need: memory, disk, time, and which engines load the result.

    Args:
        model: as for ``quantize``; no weight is read, and a folder with a lone config.json will do.
        job: every setting; none: the defaults.
        ranks: processes of this machine that share the run; memory and time are each one's.
        settings: fields of ``Job`` and of its parts that are others, by name.

    Returns:
        The forecast. Printed, it is a text that ends with whether the run fits.

    Raises:
        NearplaneError: whatever cannot work, in one sentence.
    """
    return forecast(model, job, ranks=ranks, **settings)


def load(path: str | Path, **settings: Any) -> nn.Module:
    """Load a folder as an ordinary transformers model: quantized by us or others (compressed-tensors, GPTQ), or not at all.

    Quantized weights stay packed in memory and are multiplied as they are (docs/runtime.md).

    Args:
        path: a transformers folder, a hub id, or "demo".
        settings: fields of ``LoadSettings``: device, dtype, packed, arithmetic, decode, head_bits, revision, trust_remote_code.

    Returns:
        A ``torch.nn.Module``: the model's transformers class, in evaluation mode.

    Raises:
        NearplaneError: a folder that cannot be read, in one sentence.
    """
    return load_model(path, LoadSettings.of(settings))


def evaluate(
    model: str | Path,
    *,
    dataset: str | Path | Rows | None = None,
    dataset_split: str | None = None,
    dataset_column: str | None = None,
    seqlen: int | None = None,
    windows: int | None = None,
    bos: bool = True,
    protocol: str | None = None,
    reference: str | Path | None = None,
    kv_bits: int = 16,
    progress: bool = False,
    **settings: Any,
) -> Evaluation:
    """Measure perplexity; with ``reference`` also KL divergence per token and top-1 agreement.

    A quantized checkpoint is measured as it will run: packed. With glibc, freed blocks below 32 MiB stay in this process
    from now on.

    Args:
        model: a transformers folder, a hub id, or "demo".
        dataset: a file or dataset name, or rows in memory as ``Calibration`` takes them; none: the held-out part of the
            embedded text.
        dataset_split: split of the dataset; none: test or validation, where it has splits.
        dataset_column: column of the dataset's rows; none: the first known one.
        seqlen: tokens per window, cut to the model's own limit; none: 2048.
        windows: at most so many windows.
        bos: begin each window with the tokens that the tokenizer puts before a text, where it does so; they are not scored.
        protocol: cut and score as others do: "gptq", "llama.cpp" or "hf-stride" (docs/perplexity.md).
        reference: the original model.
        kv_bits: round keys and values to so many bits, 2 to 8, in this evaluation; 16: not at all.
        progress: show a bar.
        settings: fields of ``LoadSettings``; of the reference ``device``, ``dtype`` and ``trust_remote_code``. A revision of
            the reference stands behind an @.

    Returns:
        Perplexity, with KL (nats per token) and top-1 agreement where there is a reference, and the protocol.

    Raises:
        NearplaneError: a model or text that cannot be measured, in one sentence.
    """
    check_windows(seqlen, windows)
    for some in (model, reference):
        refuse_loaded(some)
    give_memory_back(plenty=True)
    chosen = LoadSettings.of(settings)
    loaded = load_model(model, chosen)
    original = None if reference is None else load_model(reference, chosen.of_original())
    tokenizer = load_tokenizer(locate(model, revision=chosen.revision), trust_remote_code=chosen.trust_remote_code)
    return evaluate_model(
        loaded, tokenizer, dataset=dataset, dataset_split=dataset_split, dataset_column=dataset_column, seqlen=seqlen,
        windows=windows, bos=bos, protocol=protocol, reference=original, kv_bits=kv_bits, progress=progress,
    )  # fmt: skip


def generate(
    model: str | Path | nn.Module,
    prompt: str,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 128,
    chat: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    threads: int | None = None,
    write: Callable[[str], None] | None = None,
    **settings: Any,
) -> Generation:
    """Continue a prompt, or with ``chat`` answer it.

    Args:
        model: a transformers folder, a hub id, "demo", or a model that ``load`` returned.
        prompt: the text to continue, or the user's message.
        tokenizer: of a model; none: the one in the folder that the model came from.
        max_new_tokens: stop after so many tokens.
        chat: put the prompt through the model's chat template.
        temperature: 0 takes the likeliest token; above, tokens are sampled.
        seed: for sampling.
        threads: CPU threads; none: as torch decides.
        write: is given the text as it comes.
        settings: fields of ``LoadSettings``, for a folder.

    Returns:
        The text, and how fast it came.

    Raises:
        NearplaneError: a model that cannot be loaded or generates no text, or settings that have no meaning.
    """
    with threads_set(threads):
        chosen = LoadSettings.of(settings)
        if isinstance(model, nn.Module) and settings:
            raise SettingError(f"{', '.join(settings)} is for loading a folder; this model is loaded already.")
        folder = (
            str(getattr(getattr(model, "config", None), "name_or_path", "")) if isinstance(model, nn.Module) else model
        )
        if tokenizer is None and not str(folder):
            raise SettingError("this model does not say which folder it came from; give its tokenizer.")
        loaded = model if isinstance(model, nn.Module) else load_model(model, chosen)
        tokenizer = tokenizer or load_tokenizer(
            locate(folder, revision=chosen.revision), trust_remote_code=chosen.trust_remote_code
        )
        return generate_text(
            loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, chat=chat, temperature=temperature, seed=seed,
            write=write or (lambda _: None),
        )  # fmt: skip


def inspect(
    model: str | Path, grid: Grid | None = None, *, revision: str | None = None, trust_remote_code: bool = False,
    **fields: Any,
) -> Anatomy:  # fmt: skip
    """Look into a folder: blocks, stages and sizes of a model, or the grids of a quantized checkpoint.

    Args:
        model: a transformers folder, a hub id, or "demo".
        grid: for which sizes after quantization are computed; none: ``Grid()``.
        revision: of a hub id, the branch, tag or commit.
        trust_remote_code: run Python code that comes with the model.
        fields: fields of ``Grid`` that are others, by name: ``bits=3``.

    Returns:
        What the folder holds. Printed, it is a text for people.

    Raises:
        NearplaneError: a folder that cannot be read, in one sentence.
    """
    given = Job(grid=grid or Grid())
    chosen = Job.of(given, fields)
    if replace(chosen, grid=given.grid) != given:
        raise SettingError(
            f"inspect takes settings of the grid only, such as bits and group_size; got {', '.join(fields)}."
        )
    return inspect_folder(model, chosen.grid, revision=revision, trust_remote_code=trust_remote_code)


def _name_settings(*functions: Callable[..., Any]) -> None:
    """Put the names of settings into signatures, so that help and completion know what ``**settings`` takes."""
    job = Job()
    named = {name: Parameter(name, Parameter.KEYWORD_ONLY, default=value) for name, value in every_setting(job).items()}
    for function in functions:
        own = signature(function)
        kept = {name: p for name, p in own.parameters.items() if p.kind is not Parameter.VAR_KEYWORD}
        function.__signature__ = own.replace(parameters=[*kept.values(), *(named[n] for n in named if n not in kept)])  # type: ignore[attr-defined]


_name_settings(quantize, plan)
