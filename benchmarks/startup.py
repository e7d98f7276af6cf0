"""CPU seconds until the command line answers, and until a run says its first line.

    python benchmarks/startup.py [--rounds 3] [--model demo]

Every case is a process of its own; user and system time of it and of what it starts, the least of the rounds. The first line of
``quantize`` is timed by ending the process when the line has come.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

CLI = ["-m", "nearplane"]
CASES = {
    "import nearplane": (["-c", "import nearplane"], 0.3),
    "nearplane --help": ([*CLI, "--help"], 0.5),
    "nearplane --version": ([*CLI, "--version"], 0.5),
    "nearplane quantize --help": ([*CLI, "quantize", "--help"], 0.5),
    "an unknown command": ([*CLI, "quantise"], 0.5),
    "an unknown option": ([*CLI, "quantize", "demo", "out", "--bit", "3"], 0.5),
    "a missing model folder": ([*CLI, "quantize", "./nowhere", "out"], 0.5),
}


def spent(words: list[str], first_line: bool = False) -> float:
    """CPU seconds of a python process; with ``first_line`` until it has printed one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    if first_line:
        assert process.stderr.readline().startswith(b"opening ")
        process.kill()
    process.stderr.read()
    process.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="demo")
    args = parser.parse_args()
    print("| | CPU s | aimed at |\n|---|---|---|")
    for name, (words, most) in CASES.items():
        print(f"| {name} | {min(spent(words) for _ in range(args.rounds)):.2f} | {most} |")
    with tempfile.TemporaryDirectory() as folder:
        words = [*CLI, "quantize", args.model, str(Path(folder) / "out"), "--method", "rtn"]
        least = min(spent(words, first_line=True) for _ in range(args.rounds))
    print(f"| quantize, its first line | {least:.2f} | 2.0 |")


if __name__ == "__main__":
    main()
