"""From the words of a command line to the dataclass of its command: other toolkits' names, the method's own flags, complaints."""

import contextlib
import importlib
import io
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import tyro

from nearplane.core.errors import SettingError
from nearplane.methods import METHODS, Method
from nearplane.run.mix import FIELDS, Override

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


def override(word: str) -> Override:
    """``REGEX=FIELD=VALUE,...``; the pattern may hold signs of equality itself."""
    found = re.fullmatch(r"(.+?)=(\w+=[^=,]*(?:,\w+=[^=,]*)*)", word)
    if not found:
        raise SettingError(
            f"--override {word!r} is not of the form REGEX=FIELD=VALUE,..., as 'down_proj=bits=8,sym=false'."
        )
    pattern, parts = found.group(1), [part.split("=") for part in found.group(2).split(",")]
    fields = dict(parts)
    if len(fields) < len(parts):
        raise SettingError(f"--override {word!r} gives a field twice.")
    values: dict[str, Any] = {}
    for field, value in fields.items():
        if field not in FIELDS:
            raise SettingError(f"--override {word!r}: an override knows {', '.join(FIELDS)}, not {field!r}.")
        values[field] = value
        if field == "sym":
            values[field] = {"true": True, "false": False}.get(value.lower(), value)
        elif field != "fit" and re.fullmatch(r"-?\d+", value):
            values[field] = int(value)
    return Override(pattern, **values)


def method_class(argv: list[str]) -> tuple[type[Method], Callable[[], Method]]:
    """The class that --method names: its fields become flags."""
    given = [b for a, b in pairwise(argv) if a == "--method"]
    given += [a.partition("=")[2] for a in argv if a.startswith("--method=")]
    if len(given) > 1:
        raise SettingError(f"--method is given {len(given)} times; give it once.")
    name = given[0] if given else "nearplane"
    if name in METHODS:
        return METHODS[name], METHODS[name]
    module, _, attribute = name.partition(":")
    if not attribute or not module:
        raise SettingError(f"unknown method {name!r}; the methods are {', '.join(METHODS)}, or package.module:Class.")
    sys.path.insert(0, "")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SettingError(f"method {name!r} cannot be imported ({error}).") from error
    if not (isinstance(kind, type) and all(hasattr(kind, part) for part in ("needs", "prepare", "solve"))):
        raise SettingError(f"method {name!r} is not a class with needs, prepare and solve (nearplane.Method).")
    try:
        kind()
    except TypeError as error:
        raise SettingError(f"method {name!r} needs a default for every field ({error}).") from error
    return kind, kind
