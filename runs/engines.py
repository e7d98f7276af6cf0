"""What engines really do with checkpoints: the record, and docs/engines.md made of it.

    python runs/engines.py run [--engines vllm ...] [--cases REGEX]     # run, and replace these rows of the record
    python runs/engines.py check [--engines vllm ...] [--cases REGEX]   # run, and compare with verdict() alone
    python runs/engines.py table                                        # docs/engines.md and nearplane's ran.json

A case (``matrix/cases.py``) is a tiny random model, or the demo model, quantized to some format. Its checkpoint goes to the
runner of an engine (``engines/NAME.py``), which runs in the engine's own environment: ``.engines/NAME``, made by
``make engines``, or ``$NEARPLANE_ENGINES/NAME``. An engine without an environment is left out. Log-probabilities and greedy
tokens are compared with ``nearplane.load`` (``matrix/rows.py``). Every row also holds what ``verdict`` looks at, so that a
test compares the two without a model. The record is written after every row.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from matrix.cases import Case, cases
from matrix.page import COLUMNS, PAGE, cell, page, ran
from matrix.rows import RECORD, described_of, disagreement, followed, read
from matrix.runner import Workshop, python_of

from nearplane.checkpoint.engines.judge import RAN

__all__ = ["PAGE", "RAN", "Case", "cases", "cell", "described_of", "disagreement", "followed", "page", "ran", "read"]


def write(rows: list[dict[str, Any]]) -> None:
    """Write the record, in the order of the cases, without rows whose case is no more."""
    order: dict[str, int] = {}
    for case in cases():
        order.setdefault(case.name, len(order))
    kept = [row for row in rows if row["case"] in order]
    kept.sort(key=lambda row: (order[row["case"]], COLUMNS.index(row["engine"])))
    RECORD.write_text("".join(json.dumps(row) + "\n" for row in kept))


def run(engines: list[str], wanted: str, keep: bool) -> list[str]:
    """Run the cases whose names match, engine by engine.

    Args:
        engines: names of engines that have an environment.
        wanted: a regular expression.
        keep: whether rows go to the record.

    Returns:
        Outcomes that are not what ``verdict`` says.
    """
    chosen, wrong = [case for case in cases() if re.search(wanted, case.name)], list[str]()
    held = {(row["case"], row["engine"]): row for row in read()}
    with Workshop() as workshop:
        for engine in engines:
            for row in workshop.tried(engine, chosen):
                reason = disagreement(row)
                wrong += [] if reason is None else [reason]
                told = "" if reason is None else "   <- not the verdict"
                print(f"{row['engine']:<14} {row['case']}: {cell(row)}{told}", flush=True)
                held[row["case"], row["engine"]] = row
                if keep:
                    write(list(held.values()))
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("run", "check", "table"))
    parser.add_argument("--engines", nargs="*", default=list(COLUMNS), choices=COLUMNS, metavar="ENGINE")
    parser.add_argument("--cases", default="", metavar="REGEX")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    wrong = list[str]()
    if args.step != "table":
        here = [engine for engine in args.engines if python_of(engine) is not None]
        for engine in sorted(set(args.engines) - set(here)):
            print(f"{engine}: not run here, there is no environment (make engines)", flush=True)
        wrong = run(here, args.cases, args.step == "run")
    if args.step != "check":
        rows = read()
        RAN.write_text(json.dumps(ran(rows), indent=1) + "\n")
        PAGE.write_text(page(rows))
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
