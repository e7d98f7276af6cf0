"""The rows of the engines' matrix: what an engine answered, against ``nearplane.load`` and against ``verdict``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matrix.cases import Case
from matrix.models import DEMO, MODELS

import nearplane
from nearplane import Grid
from nearplane.checkpoint.engines import Described, Model, Verdict, Weight, described, verdict
from nearplane.core.activations import TokenGrid
from nearplane.formats.gguf.grids import grid_of, own_type
from nearplane.formats.read import open_checkpoint
from nearplane.models.source import open_skeleton

RECORD = Path(__file__).resolve().parents[1] / "engines.jsonl"
# Mean difference of log-probabilities that an arithmetic explains. Those of tiny random models spread by about 0.7, those of
# the demo model by 3.4.
EXACT, OFFSETS, ROUNDED = 1e-3, 0.01, 0.05
SPREAD = {DEMO: 5}


def read() -> list[dict[str, Any]]:
    """Read the record."""
    return [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []


def scored(model: Any, tokens: Any) -> np.ndarray:
    """Give a model's log-probabilities (sequences, length, vocabulary) of ``tokens`` (sequences, length)."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(tokens), use_cache=False).logits
    found: np.ndarray = logits.float().log_softmax(-1).numpy()
    return found


def followed(expected: np.ndarray, greedy: np.ndarray, bound: float) -> dict[str, Any]:
    """Compare the tokens that an engine chose with nearplane's log-probabilities in the same place.

    A token is equal where nearplane has none more likely. It is a tie where nearplane's most likely token is ahead of it by
    no more than ``bound``. Else it differs. nearplane is given the engine's own tokens, so that all of them are compared,
    those behind a tie, too.

    Args:
        expected: log-probabilities (sequences, N, vocabulary) before each token.
        greedy: tokens (sequences, N).
        bound: the largest lead that counts as a tie.
    """
    inside = greedy < expected.shape[-1]
    chosen = np.take_along_axis(expected, np.where(inside, greedy, 0)[..., None], -1)[..., 0]
    behind = np.where(inside, expected.max(-1) - chosen, np.inf)
    equal, tie = behind == 0, (behind > 0) & (behind <= bound)
    found = {"tokens": greedy.size, "equal": int(equal.sum()), "ties": int(tie.sum())}
    return found if equal.all() else {**found, "behind": float(f"{behind.max():.2g}")}


def row_of(engine: str, case: Case, checkpoint: Path, out: Path, ids: Path) -> dict[str, Any]:
    """Compare an engine's answer with nearplane's, and describe the checkpoint for ``verdict``."""
    opened = described(open_checkpoint(checkpoint), open_skeleton(checkpoint)[1])
    row = {"case": case.name, "engine": engine, "kind": MODELS[case.model][2], "real": case.model == DEMO}
    row |= {"described": told(opened)}
    row |= {"format": case.format, "bits": case.bits, "sym": case.sym, "group": case.group, "more": case.more}
    if not out.exists():
        return {**row, "version": "", "outcome": "refused", "reason": "the engine ended without an answer"}
    with np.load(out) as answer:
        about = json.loads(str(answer["about"]))
        first = next(iter(about["versions"].items()))
        row |= {"version": " ".join(first), "versions": about["versions"], "arithmetic": about["arithmetic"]}
        if "refused" in about:
            return {**row, "outcome": "refused", "reason": told_without(about["refused"], checkpoint)}
        logprobs, greedy = answer["logprobs"], answer["greedy"]
    given, bound = np.array(json.loads(ids.read_text())), tolerance(case, about["arithmetic"])
    model = nearplane.load(checkpoint, arithmetic="exact")
    expected = scored(model, given)
    off = np.abs(expected - logprobs[..., : expected.shape[-1]])
    inside = np.where(greedy < expected.shape[-1], greedy, 0)  # what lies outside differs already
    after = scored(model, np.concatenate([given, inside[:, :-1]], 1))[:, given.shape[1] - 1 :]
    row |= {"mean": float(f"{off.mean():.2g}"), "max": float(f"{off.max():.2g}")}
    row["greedy"] = followed(after, greedy, bound)
    agrees = row["greedy"]["equal"] + row["greedy"]["ties"] == greedy.size and float(off.mean()) <= bound
    wide = out.with_suffix(".wide.npz")
    if wide.exists():
        with np.load(wide) as answer:
            plain = float(np.abs(expected - answer["logprobs"]).mean())
        row["widened"], agrees = float(f"{plain:.2g}"), agrees and plain <= EXACT
    return {**row, "outcome": "ran" if agrees else "garbage"}


def told_without(words: str, checkpoint: Path) -> str:
    """Take the place, and the number, of a checkpoint out of an engine's words."""
    return (
        words.replace(str(checkpoint), "OUT")
        .replace(str(checkpoint.parent), "")
        .replace(f"/{checkpoint.name} ", "OUT ")
    )


def tolerance(case: Case, arithmetic: str) -> float:
    """Give the mean difference of log-probabilities that an arithmetic explains.

    mlx-lm rounds the offsets of awq, scale times zero, to the dtype of its scales.
    Deepseek's latent attention in vLLM differs by 0.01 and more from transformers' for the dense model, too.
    """
    spread = SPREAD.get(case.model, 1)
    if case.format == "awq" and "MLX" in arithmetic:
        return OFFSETS * spread
    plain = "float32" in arithmetic and "rounded" not in arithmetic
    exact = plain and "activations" not in case.more and case.model != "deepseek_v2"
    return (EXACT if exact else ROUNDED) * spread


def told(found: Described) -> dict[str, Any]:
    """Write down what ``verdict`` looks at."""
    weights = [
        {
            "type": own_type(w.grid) if found.format == "gguf" else None,
            "bits": w.grid.storage_bits, "group_size": w.grid.group_size, "sym": w.grid.sym, "shape": list(w.shape),
            "activations": None if w.activations is None else asdict(w.activations),
        }
        for w in found.weights
    ]  # fmt: skip
    model = None if found.model is None else {**asdict(found.model), "parts": sorted(found.model.parts)}
    return {
        "format": found.format,
        "weights": weights,
        "model": model,
        "online": found.online,
        "ordered": found.ordered,
    }


def described_of(row: dict[str, Any]) -> Described:
    """Read ``told`` back."""
    held = row["described"]
    weights = tuple(
        Weight(
            grid_of(w["type"]) if w.get("type") else Grid(w["bits"], w["group_size"], w["sym"]), tuple(w["shape"]),
            None if w["activations"] is None else TokenGrid(**w["activations"]),
        )
        for w in held["weights"]
    )  # fmt: skip
    facts = held["model"]
    model = (
        None
        if facts is None
        else Model(**{**facts, "parts": frozenset(facts["parts"]), "renamed": tuple(facts["renamed"])})
    )
    return Described(held["format"], weights, model, held["online"], held["ordered"])


def disagreement(row: dict[str, Any]) -> str | None:
    """Tell that the verdict says something else than what happened; None where it does not."""
    said: Verdict = verdict(row["engine"], described_of(row))
    if bool(said.refusals) == (row["outcome"] != "ran"):
        return None
    happened = row["outcome"] + (f" ({row['reason']})" if "reason" in row else "")
    return f"{row['engine']}, {row['case']}: {happened}, but the verdict is: {said}"
