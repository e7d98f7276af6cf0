"""From the words of a command line to settings. Help and mistakes need no torch: dataclasses are read as source, not imported.

A flag is a field of a dataclass: of a verb's own ``Options``, of ``Job`` and its parts, of ``LoadSettings``, of the chosen
method. Its default is the field's default, its help the docstring below the field. Nothing is listed a second time.
"""

import argparse
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

from nearplane.cli.fields import NO_DEFAULT, Field, Kind, constant, fields_of, made_by, methods
from nearplane.core.errors import SettingError
from nearplane.run.names import ALIASES, model_in, read_config

JOB = "nearplane.run.job:Job"
# What people use first, in this order; other options follow in groups.
FIRST = ("bits", "group_size", "sym", "method", "dataset", "nsamples", "seqlen", "format", "device", "resume")
USED_FIRST = "options used first"
# What the settings of a class are called in help; those of its parts by the name of the part.
GROUPS = {"Job": "run", "LoadSettings": "loading", "Grid": "grid"}
# Fields without a default that are words by their place; other fields without one are flags that must be given.
BY_PLACE = ("model", "out", "new", "repo")
# Flags that may be given several times.
REPEATED = ("override", "ignore")
# Settings that a file may name, and that are given as objects in Python: refused with what to give in their place.
UNFLAGGED = {"grid", "calibration", "activations", "transforms"}
# Set by the run, not by a user.
HIDDEN = ("scale_dtype", "given")
METAVARS = {
    "config": "FILE",
    "override": "REGEX=FIELD=VALUE,...", "ignore": "REGEX", "towers": "NAME,...", "rotate": "r1,r2[,r4]",
    "budget": "BITS", "tune": "STEPS", "offload": "DIR", "labels": "DIR", "dataset": "FILE|NAME",
    "dataset_split": "NAME", "dataset_column": "NAME", "method": "NAME", "device": "NAME",
    "revision": "REV", "format": "NAME", "engine": "NAME", "reference": "MODEL", "prompt": "TEXT",
    "template": "FILE", "gguf_type": "TYPE", "gguf_dense": "TYPE", "original": "MODEL", "output": "FILE",
    "push_to_hub": "REPO", "tasks": "NAME,...", "include_path": "DIR",
}  # fmt: skip
# Switches of other toolkits that stand for a flag and its value.
SWITCHES = {
    "--act-order": ["--order", "activation"], "--actorder": ["--order", "activation"], "--desc-act": ["--order", "activation"],
    "--asym": ["--no-sym"], "--act-asym": ["--no-act-sym"], "--true-sequential": [],
}  # fmt: skip
WIDTH = 80


@dataclass(frozen=True)
class Option(Field):
    """A field that is an option of a verb."""

    group: str
    own: bool = False
    """A field of the verb's ``Options``; others are settings."""

    @property
    def flag(self) -> str:
        """The option's long flag."""
        return "--" + self.name.replace("_", "-")

    @property
    def by_place(self) -> bool:
        """Whether the option is a word without a flag."""
        return self.own and self.name in BY_PLACE and self.default is NO_DEFAULT

    @property
    def flags(self) -> list[str]:
        """The flags that help shows."""
        switch = "bool" in self.kind.types and self.default is True
        return [self.flag, f"--no-{self.flag[2:]}"] if switch else [self.flag]

    @property
    def metavar(self) -> str:
        """What stands for the value."""
        if self.by_place:
            return self.name.upper()
        words = ["N"] * ("int" in self.kind.types) + ["X"] * ("float" in self.kind.types) + [*self.kind.choices]
        return METAVARS.get(self.name) or "|".join(words) or self.name.upper()

    @property
    def shown_default(self) -> str:
        """The default in words; empty where there is none to show."""
        if self.default in (None, NO_DEFAULT, "", ()) or self.default is False:
            return ""
        if isinstance(self.default, bool):
            return self.flag
        return " ".join(map(str, self.default)) if isinstance(self.default, tuple) else str(self.default)

    def value(self, word: str) -> Any:
        """Read a word. SettingError, saying what the option takes, for one that is no such value."""
        if word in self.kind.choices:
            return word
        readers: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "Path": Path}
        for name, read in readers.items():
            if name in self.kind.types:
                try:
                    return read(word)
                except ValueError:
                    continue
        wanted = ["a whole number"] * ("int" in self.kind.types) + ["a number"] * ("float" in self.kind.types)
        *most, last = [*wanted, *self.kind.choices]
        near = get_close_matches(word, self.kind.choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise SettingError(f"{self.flag} takes {', '.join(most) + ' or ' * bool(most)}{last}; got {word!r}{hint}")


def options_of(verb: ModuleType, method: str | None = None) -> list[Option]:
    """All options of a verb: fields of its ``Options``, of its ``SETTINGS``, and of the method (none: the default one)."""
    found = [Option(**vars(field), group="options", own=True) for field in fields_of(f"{verb.__name__}:Options")]
    for reference, names in verb.SETTINGS.items():
        made = _settings(reference, method)
        found += made if names is None else [option for option in made if option.name in names]
    groups = {name: title for title, names in getattr(verb, "GROUPS", {}).items() for name in names}
    first = FIRST if takes_job(verb) else ()
    return [
        replace(o, group=USED_FIRST if o.name in first and not o.own else groups.get(o.name, o.group)) for o in found
    ]


def takes_job(verb: ModuleType) -> bool:
    """Whether a verb takes the settings of a quantization."""
    return JOB in verb.SETTINGS


def _settings(reference: str, method: str | None) -> list[Option]:
    """Options from the fields of a settings dataclass and its parts."""
    found: list[Option] = []
    module, _, owner = reference.partition(":")
    for field in fields_of(reference):
        if field.name in HIDDEN:
            continue
        if field.name == "method":
            default = next(
                name for name, kind in methods().items() if kind.endswith(f":{made_by(reference, field.name)}")
            )
            word = Kind(types=("str",))
            found.append(Option("method", word, default, field.doc, "method"))
            own = fields_of(_method_reference(method or default))
            found += [Option(**vars(each), group=f"method {method or default}") for each in own]
        elif field.kind.types or field.kind.choices or field.name in REPEATED:
            kind = field.kind if field.kind.types or field.kind.choices else Kind(types=("str",), many=True)
            found.append(Option(field.name, kind, field.default, field.doc, GROUPS[owner]))
        elif field.kind.parts and field.kind.optional:  # the rounding of activations, by other names
            inner = {each.name: each for each in fields_of(field.kind.parts[0])}
            for name, part in constant(f"{module}:ACTIVATIONS").items():
                each = replace(inner[part], name=name)
                if part == "bits":
                    off = constant(f"{module}:NO_ROUNDING")
                    each = replace(
                        each, default=off, doc=f"{field.doc.partition(';')[0]}. {each.doc} {off}: not at all."
                    )
                found.append(Option(**vars(each), group=field.name))
        elif field.kind.parts and not field.kind.many:  # several objects are given in Python only
            inner_fields = (each for each in fields_of(field.kind.parts[0]) if each.name not in HIDDEN)
            plain = (each for each in inner_fields if each.kind.types or each.kind.choices)
            found += [Option(**vars(each), group=field.name) for each in plain]
    return found


def _method_reference(name: str) -> str:
    """``module:Class`` of a method; a user's own is imported, and must be one."""
    if name in methods():
        return methods()[name]
    if not re.fullmatch(r"[^:]+:[^:]+", name):
        near = get_close_matches(name, methods(), n=1)
        hint = (
            f"; did you mean {near[0]}?"
            if near
            else f"; the methods are {', '.join(methods())}, or package.module:Class."
        )
        raise SettingError(f"unknown method {name!r}{hint}")
    from nearplane.run.names import method_class

    kind = method_class(name)
    return f"{kind.__module__}:{kind.__qualname__}"


def canonical(words: Sequence[str]) -> list[str]:
    """Put the name used inside for every alias; underscores of a flag become dashes.

    Raises:
        SettingError: ``--scale-dtype``, which no flag sets.
    """
    result: list[str] = []
    for word in words:
        if not word.startswith("--"):
            if word.startswith("-:") and result and result[-1][2:] in REPEATED:  # a pattern of GPTQModel's, no flag
                result[-1] += f"={word}"
            else:
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
            name = flag[2:].replace("-", "_")
            result.append("--" + ALIASES.get(name, name).replace("_", "-") + equals + value)
    return result


def given_once(words: Sequence[str], flag: str) -> str | None:
    """The value of a flag among the words, None where it is not there. SettingError where it is there several times."""
    given = [after for word, after in pairwise(words) if word == flag]
    given += [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    if len(given) > 1:
        raise SettingError(f"{flag} is given {len(given)} times; give it once.")
    return given[0] if given else None


def parse(verb: ModuleType, words: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """Read the words of a verb.

    Returns:
        The verb's ``Options``, and the settings that were given, by name.

    Raises:
        SettingError: an unknown option, with the nearest known one; a value of the wrong type; a missing word.
    """
    words = canonical(words)
    file = given_once(words, "--config") if takes_job(verb) else None
    kept = read_config(file) if file else {}
    method = (given_once(words, "--method") or _named(kept)) if takes_job(verb) else None
    options = options_of(verb, method)
    _refuse_unknown(verb, words, options, method)
    _refuse_unknown_in(file or "", kept, options, method)
    parser = _parser(verb, options)
    several = any(option.by_place and option.kind.many for option in options)
    try:
        given, left = (parser.parse_known_intermixed_args if several else parser.parse_known_args)(words)
    except SettingError as error:
        known = model_in(file) if file and "OUT" in str(error).partition(" must be given")[0] else None
        if known is None:
            raise
        raise SettingError(f"{error} MODEL and OUT are both words by place; {file} names the model {known}.") from None
    if left:
        raise SettingError(f"unexpected word {left[0]!r}; {advice(verb)}")
    values = vars(given)
    values |= {o.name: _flat(o, values[o.name]) for o in options if o.name in values}
    own = {option.name: values.pop(option.name) for option in options if option.own and option.name in values}
    return verb.Options(**own), kept | values


def _refuse_unknown_in(file: str, kept: dict[str, Any], options: Sequence[Option], method: str | None) -> None:
    """Refuse a setting of a file that the run does not know: one of another method, or a misspelt one."""
    known = {option.name for option in options if not option.own} | UNFLAGGED
    for name in kept:
        if name in known:
            continue
        other = next((each for each in methods() if name in {field.name for field in fields_of(methods()[each])}), None)
        if other is not None:
            chosen = f"of {method}" if method else "of the default method"
            raise SettingError(f"--config {file}: {name} is a setting of method {other}, not {chosen}.")
        near = get_close_matches(name, sorted(known), n=1)
        hint = f"did you mean {near[0]}?" if near else "docs/cli.md lists the settings, by names with dashes."
        raise SettingError(f"--config {file}: unknown setting {name!r}; {hint}")


def _named(kept: dict[str, Any]) -> str | None:
    """The method that a file of settings names."""
    found = kept.get("method")
    if found is not None and not isinstance(found, str):
        raise SettingError(f"--config: method is a name; got {found!r}.")
    return found


def _flat(option: Option, value: Any) -> Any:
    """Several words of one option as a tuple."""
    return tuple(value) if option.kind.many and isinstance(value, list) else value


def _refuse_unknown(verb: ModuleType, words: Sequence[str], options: list[Option], method: str | None) -> None:
    known = {flag for option in options for flag in (option.flag, f"--no-{option.flag[2:]}") if not option.by_place}
    for word in words:
        flag = word.partition("=")[0]
        if word == "--":
            return
        if not re.match(r"-[^\d\s.]", word) or " " in flag or flag in known:
            continue
        for other in methods() if takes_job(verb) else ():
            if flag.replace("--no-", "--") in {f"--{f.name.replace('_', '-')}" for f in fields_of(methods()[other])}:
                raise SettingError(
                    f"{flag} is an option of --method {other}, not of {method or 'nearplane'}; {advice(verb)}"
                )
        shown = {flag for option in options for flag in option.flags if not option.by_place}
        names = {
            f"--{name.replace('_', '-')}": name
            for name, real in ALIASES.items()
            if f"--{real.replace('_', '-')}" in shown  # of another verb's options none is advised
        }
        near = get_close_matches(flag, [*sorted(shown), *names, *SWITCHES], n=1)
        real = [f"--{ALIASES[names[n]].replace('_', '-')}" if n in names else n for n in near]
        raise SettingError(f"unknown option {flag}{f'; did you mean {real[0]}?' if real else ';'} {advice(verb)}")


def advice(verb: ModuleType) -> str:
    """Where a verb's options are listed."""
    return f"nearplane {verb_name(verb)} --help lists the options."


def verb_name(verb: ModuleType) -> str:
    """The word that a user types."""
    return verb.__name__.rpartition(".")[2]


class _Parser(argparse.ArgumentParser):
    """A parser that raises, where others print and exit."""

    def error(self, message: str) -> Any:
        """Raise SettingError with argparse's complaint in our words."""
        missing = re.fullmatch(r"the following arguments are required: (.*)", message)
        if missing:
            raise SettingError(f"{missing[1]} must be given; {self.prog} --help says how.")
        expected = re.fullmatch(r"argument ([^\s:,/]+).*expected (?:at least )?one argument", message)
        if expected:
            raise SettingError(f"{expected[1]} needs a value; {self.prog} --help lists the options.")
        raise SettingError(f"{message}; {self.prog} --help lists the options.")


class _Formatter(argparse.HelpFormatter):
    """Help in at most 80 columns."""

    def __init__(self, prog: str) -> None:
        width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) - 1
        super().__init__(prog, max_help_position=26, width=width)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)
        return "\n".join(indent + line for line in lines)


def _parser(verb: ModuleType, options: list[Option]) -> _Parser:
    """The argparse parser of a verb; nothing that was not given is in what it returns."""
    name, by_place = verb_name(verb), [option for option in options if option.by_place]
    places = [
        f"{option.metavar} [{option.metavar}2 ...]" if option.kind.many else option.metavar for option in by_place
    ]
    required = [f"{o.flag} {o.metavar}" for o in options if not o.by_place and o.own and o.default is NO_DEFAULT]
    parser = _Parser(
        prog=f"nearplane {name}",
        usage=" ".join(["nearplane", name, *places, *required, "[options]"]),
        description=" ".join((verb.Options.__doc__ or "").split()).replace("%", "%%"),
        epilog=getattr(verb, "EPILOG", None),
        formatter_class=_Formatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    groups: dict[str, Any] = {}
    for option in sorted(options, key=_rank):
        title = "arguments" if option.by_place else option.group
        group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        _add(group, option, hidden=option.name in getattr(verb, "WITHOUT", ()))
    return parser


def _rank(option: Option) -> tuple[int, int]:
    """What is shown first: words by place, what people use first, other groups as they come."""
    if option.by_place:
        return 0, 0
    return (1, FIRST.index(option.name)) if option.group == USED_FIRST else (2, 0)


def _add(group: Any, option: Option, *, hidden: bool) -> None:
    default = option.shown_default
    text = (option.doc + f" (default: {default})" * bool(default)).replace("%", "%%")
    text = argparse.SUPPRESS if hidden else text
    if option.by_place:
        several: dict[str, Any] = {"nargs": "+"} if option.kind.many else {}
        group.add_argument(option.name, metavar=option.metavar, help=text, type=option.value, **several)
    elif "bool" in option.kind.types:
        if option.default is True:
            group.add_argument(option.flag, action=argparse.BooleanOptionalAction, help=text)
            return
        group.add_argument(option.flag, action="store_true", help=text)
        group.add_argument(f"--no-{option.flag[2:]}", dest=option.name, action="store_false", help=argparse.SUPPRESS)
    else:
        more: dict[str, Any] = {"required": True} if option.own and option.default is NO_DEFAULT else {}
        if option.name in REPEATED:
            more["action"] = "append"
        elif option.kind.many and ("int" in option.kind.types or option.kind.choices):
            more["nargs"] = "+"
        group.add_argument(option.flag, dest=option.name, metavar=option.metavar, help=text, type=option.value, **more)


def help_text(verb: ModuleType, words: Sequence[str]) -> str:
    """The help of a verb, with the options of the method that the words name."""
    words = canonical(words)
    method = given_once(words, "--method") if takes_job(verb) else None
    return _parser(verb, options_of(verb, method)).format_help()
