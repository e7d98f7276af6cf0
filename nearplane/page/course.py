"""What a run cost, what happened in it, who loads its result, and how to repeat it: the later sections of the page.

Decides the words for phases of time, for memory, for what differed from what was asked, and the command of each engine.
"""

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from nearplane.formats.store import REPORT
from nearplane.page.facts import Linear, Run, listing, mapping, number, text, whole
from nearplane.page.words import clock, grouped, listed, many, options_in, size_of, tuning_line

# Phases of a run, in the order in which they are shown.
PHASES = {
    "samples": "writing its own samples", "budget": "choosing bits by the budget", "forward": "running the blocks",
    "observe": "measuring the inputs of linears", "prepare": "factoring what was measured", "solve": "solving the weights",
    "measure": "measuring errors", "check": "comparing with the original", "tune": "tuning", "write": "writing files",
}  # fmt: skip
# How each engine opens a folder; docs/serve.md has more of each.
COMMANDS = {
    "vllm": "vllm serve {out}",
    "sglang": "python -m sglang.launch_server --model-path {out}",
    "transformers": "python -c {python}",  # with nearplane's kernels: weights stay packed
    "llama.cpp": "llama-completion -m {file} -p 'Hello' -n 32 -no-cnv",
    "mlx": "mlx_lm.generate --model {out} --prompt 'Hello'",
    "onnxruntime-genai": "python -m onnxruntime_genai.models.builder -i {out} -o {out}-onnx -p int4 -e cpu -c cache",
    "openvino": "python runs/engines/openvino.py {out} IDS.json OUT.npz",
}
TITLES = {
    "vllm": "vLLM", "sglang": "SGLang", "mlx": "MLX", "onnxruntime-genai": "ONNX Runtime GenAI", "openvino": "OpenVINO",
}  # fmt: skip
# Dense parameters that are listed.
DENSE = 12


class Phase(NamedTuple):
    """Time spent on one kind of work."""

    name: str
    time: str
    share: float
    """Of the whole, 0 to 1."""


class Engine(NamedTuple):
    """What one engine makes of the checkpoint."""

    name: str
    verdict: str
    """yes, if or no."""
    reasons: list[str]
    basis: str
    command: str


class Dense(NamedTuple):
    """A parameter that stayed dense."""

    name: str
    size: str
    reason: str


def phases(run: Run) -> list[Phase]:
    """Return the time by stage of work, the longest first."""
    ranked = sorted(((name, spent) for name, spent in run.seconds.items() if spent > 0), key=lambda pair: -pair[1])
    total = sum(spent for _, spent in ranked)
    return [Phase(PHASES.get(name, name), _time(spent), spent / total) for name, spent in ranked]


def total_time(run: Run) -> str:
    """Return the time of the whole run; empty where it is not recorded."""
    return _time(sum(run.seconds.values())) if run.seconds else ""


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)


def memory(run: Run) -> list[str]:
    """Say how much memory the run took, and what it was let start with."""
    held = mapping(run.raw.get("memory"))
    peak, planned, available = (number(held.get(name)) for name in ("peak", "planned", "available"))
    if peak is None:
        return ["not recorded"]
    said = [f"At most {size_of(peak)} of main memory were held by the process."]
    of = "" if available is None else f", of {size_of(available)} that were free"
    if planned is None:
        said.append("Nothing was counted beforehand (--force).")
    elif held.get("close"):
        said.append(f"{size_of(planned)} were counted on beforehand{of}.")
    else:
        said.append(
            f"The run was let start because even a generous guess, {size_of(planned)}{of}, fitted; nearplane plan "
            "counts closely. So with glibc freed blocks below 32 MiB stayed in the process, which is faster."
        )
    return said


def happened(run: Run) -> list[str]:
    """Say what differed from a plain run, in plain words, most of it counted from linears."""
    said = _about_linears(run.linears)
    rounds = mapping(run.raw.get("rounds"))
    kept, undone = whole(rounds.get("kept")) or 0, whole(rounds.get("rejected")) or 0
    if kept or undone:
        said.append(
            f"{many(kept, 'refinement round')} helped on held-out tokens and stayed; {undone:,} did not and "
            f"{'was' if undone == 1 else 'were'} undone."
        )
    resumed = whole(run.raw.get("resumed")) or 0
    if resumed:
        said.append(
            f"The run was ended and went on {many(resumed, 'time')}; its result is that of an uninterrupted run."
        )
    said += _tuning(run)
    choices = [row for row in listing(run.settings.get("choices")) if isinstance(row, Mapping)]
    counts: dict[str, int] = {}
    for row in choices:
        counts[str(row.get("bits"))] = counts.get(str(row.get("bits")), 0) + len(listing(row.get("linears")))
    if counts:
        chosen = ", ".join(f"{count:,} at {bits} bits" for bits, count in sorted(counts.items()))
        said.append(f"The budget chose the bits of linears: {chosen}.")
    return said


def _about_linears(linears: list[Linear]) -> list[str]:
    raised = [linear.name for linear in linears if linear.damp_raised]
    rounded = [linear.name for linear in linears if linear.rounded]
    dropped = [linear.name for linear in linears if linear.dropped]
    few = [linear for linear in linears if ".experts." in linear.name and linear.tokens is not None]
    said = []
    if raised:
        said.append(
            f"{many(len(raised), 'linear')} needed more damping than was set, or the equations had no solution: {listed(raised)}."
        )
    if rounded:
        said.append(
            f"{many(len(rounded), 'linear')} fell back to rounding to nearest, because no token reached "
            f"{'it' if len(rounded) == 1 else 'them'}: {listed(rounded)}. More --nsamples reach more experts."
        )
    if dropped:
        said.append(f"{many(len(dropped), 'linear')} left out tokens with NaN or Inf: {listed(dropped)}.")
    if few:
        tokens = [linear.tokens or 0 for linear in few]
        said.append(f"Experts were shown {min(tokens):,} to {max(tokens):,} tokens each.")
    return said


def _tuning(run: Run) -> list[str]:
    record = mapping(run.raw.get("tuning"))
    if not record:
        return []
    before, after = mapping(record.get("before")), mapping(record.get("after"))
    known = all(number(before[name]) is not None and number(after.get(name)) is not None for name in before)
    if not whole(record.get("kept")) or not before or not known:
        return ["A tuning of scales and norms was tried, and nothing of it was kept."]
    line = tuning_line(record)
    return [f"{line[0].upper()}{line[1:]}."]


def notes(run: Run) -> list[str]:
    """Return every event, those of many linears together, with advice."""
    return grouped(run.events)


def dense(run: Run) -> tuple[list[Dense], int]:
    """Return the largest parameters that stayed dense, and how many more there are."""
    rows = [row for row in listing(run.raw.get("dense")) if isinstance(row, Mapping) and text(row.get("name"))]
    rows.sort(key=lambda row: -(number(row.get("bytes")) or 0))
    found = [
        Dense(text(row["name"]), size_of(number(row.get("bytes")) or 0), text(row.get("reason")))
        for row in rows[:DENSE]
    ]
    return found, max(0, len(rows) - DENSE)


def engines(run: Run) -> list[Engine]:
    """Return what each engine makes of the checkpoint: those that load it first."""
    found = []
    for name, said in mapping(run.raw.get("engines")).items():
        held = mapping(said)
        refusals, caveats = (
            [text(word) for word in listing(held.get(key)) if text(word)] for key in ("refusals", "caveats")
        )
        verdict = "no" if refusals else "if" if caveats else "yes"
        command = "" if refusals else command_of(name, run)
        if name == "transformers":  # the verdict is of transformers by itself
            refusals, caveats = (
                [f"without nearplane.enable(): {word}" for word in some] for some in (refusals, caveats)
            )
        found.append(Engine(TITLES.get(name, name), verdict, refusals or caveats, text(held.get("basis")), command))
    return sorted(found, key=lambda engine: ("yes", "if", "no").index(engine.verdict))


def command_of(engine: str, run: Run) -> str:
    """Return the command with which an engine opens a run's folder; empty for an engine that has none here."""
    out = run.out or "OUT"
    named = next((m[1] for event in run.events if (m := re.match(r"(\S+\.gguf): ", event))), "MODEL.gguf")
    file = f"{out.rstrip('/')}/{named}"
    kind = "AutoModel" if run.checked("perplexity") is None else "AutoModelForCausalLM"
    python = f"import nearplane, transformers as t; nearplane.enable(); print(t.{kind}.from_pretrained({out!r}))"
    python = f'"{python}"' if re.fullmatch(r"[\w./-]+", out) else shlex.quote(python)
    return COMMANDS.get(engine, "").format(out=shlex.quote(out), file=shlex.quote(file), python=python)


def commands(run: Run) -> list[str]:
    """Return the commands that repeat a run: in its words, and from its report. None where the words are not recorded."""
    config = mapping(run.raw.get("config"))
    if not config:
        return []
    words = ["nearplane", "quantize", run.model, "NEW", *options_in(config)]
    kept = [] if config.get("not_kept") else [shlex.join([*words[:4], "--config", f"{run.out}/{REPORT}"])]
    after = [shlex.join(["nearplane", "convert", "NEW", "NEWER", "--format", run.format])] if run.made_as else []
    return [shlex.join(words), *kept, *after]


def repeat(run: Run) -> list[tuple[str, str]]:
    """Return what another needs to make the same checkpoint: names and values."""
    data, settings = run.data, run.settings
    calibration, rotation = (mapping(settings.get(name)) for name in ("calibration", "rotate"))
    origin = text(data.get("origin"))
    amount = f", {data['windows']} windows of {data['seqlen']} tokens" if {"windows", "seqlen"} <= data.keys() else ""
    rows = [
        ("model", run.model), ("revision", text(run.raw.get("revision"))), ("commit", text(run.raw.get("commit"))),
        ("calibration text", f"{origin}{amount}" if origin else ""), ("sha256 of the windows", text(data.get("sha256"))),
        ("seed of the windows", _shown(calibration.get("seed", ""))), ("seed of the rotation", _shown(rotation.get("seed", ""))),
    ]  # fmt: skip
    for row in listing(data.get("sources")):
        held = mapping(row)
        told = ", ".join(f"{key} {_shown(held[key])}" for key in ("weight", "windows", "seed", "sha256") if key in held)
        rows.append((f"source {text(held.get('source'))}", told))
    versions = mapping(run.raw.get("versions"))
    rows.append(("versions", ", ".join(f"{name} {_shown(value)}" for name, value in versions.items())))
    return [(name, value) for name, value in rows if value]


def settings(run: Run) -> list[tuple[str, str]]:
    """Return every setting that decides the result, by dotted name."""
    left = ("choices",)  # a table of their own
    return [pair for key, value in run.settings.items() if key not in left for pair in _flat(str(key), value)]


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [pair for key, part in value.items() for pair in _flat(f"{name}.{key}", part)]
    return [(name, _shown(value))]


def _shown(value: Any) -> str:
    """Return a value as JSON has it, words without quotes."""
    if value is None:
        return "none"
    return text(value) if isinstance(value, str) else text(json.dumps(value, ensure_ascii=False, default=str))
