"""From the words of a command line to the dataclass of its command: other toolkits' names, the method's own flags, complaints."""

import contextlib
import io
from itertools import pairwise
from typing import Any

import tyro

from nearplane.core.errors import SettingError

# Names that users of other toolkits type; one name inside.
ALIASES = {
    "--wbits": "--bits", "--w-bit": "--bits", "--num-bits": "--bits", "--nbits": "--bits",
    "--groupsize": "--group-size", "--q-group-size": "--group-size",
    "--percdamp": "--damp-percent", "--dampening-frac": "--damp-percent",
    "--a-bits": "--act-bits", "--abits": "--act-bits",
    "--nsample": "--nsamples", "--num-calibration-samples": "--nsamples", "--max-seq-length": "--seqlen",
}  # fmt: skip
# Switches of other toolkits that stand for a flag and its value.
SWITCHES = {
    "--act-order": ["--order", "activation"], "--actorder": ["--order", "activation"], "--desc-act": ["--order", "activation"],
    "--asym": ["--no-sym"], "--act-asym": ["--no-act-sym"], "--true-sequential": [],
}  # fmt: skip


def parse(command: Any, name: str, argv: list[str]) -> Any:
    """The command's fields from its flags; the parser's box about a wrong one becomes a sentence like any other."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(command, prog=f"nearplane {name}", args=argv, config=(tyro.conf.AvoidSubcommands,))
    except SystemExit as stop:
        if not complaint.getvalue():  # --help
            raise
        # A box, plainer where the terminal is: its title, a rule, what is wrong, a rule or an empty line, more.
        lines = [line.strip("│").rstrip() for line in complaint.getvalue().splitlines()[1:]]
        rule = [not line.strip("─- ") for line in lines]
        first = 1 if rule[0] else 0
        told = lines[first : rule.index(True, first)]
        words = " ".join(line.strip() for line in told if not line.startswith(" " * 8)).rstrip(".")
        raise SettingError(f"{words}; nearplane {name} --help lists the options.") from stop


def canonical(argv: list[str]) -> list[str]:
    """Known aliases under the one name used inside; underscores become dashes."""
    result: list[str] = []
    for word in argv:
        if not word.startswith("--"):
            result.append(word)
            continue
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if flag == "--scale-dtype":
            raise SettingError(
                "scales are stored in the dtype that --format and --dtype imply; there is no flag for it."
            )
        if flag in SWITCHES and not equals:
            result += SWITCHES[flag]
        else:
            result.append(ALIASES.get(flag, flag) + equals + value)
    return result


def method_name(argv: list[str]) -> str:
    """The method that --method names."""
    given = [b for a, b in pairwise(argv) if a == "--method"]
    given += [a.partition("=")[2] for a in argv if a.startswith("--method=")]
    if len(given) > 1:
        raise SettingError(f"--method is given {len(given)} times; give it once.")
    return given[0] if given else "nearplane"
