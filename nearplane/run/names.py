"""Names and files of settings: what users of other toolkits type and keep, and what repeats a finished run.

Imports no torch, so that the command line can help, complain and read a file before it knows which options there are.
"""

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearplane.core.errors import SettingError

if TYPE_CHECKING:
    from nearplane.methods import Method
    from nearplane.run.job import Job

# Names of other toolkits, and the one name used inside.
ALIASES = {
    "wbits": "bits",
    "w_bit": "bits",
    "num_bits": "bits",
    "nbits": "bits",
    "groupsize": "group_size",
    "q_group_size": "group_size",
    "percdamp": "damp_percent",
    "dampening_frac": "damp_percent",
    "a_bits": "act_bits",
    "abits": "act_bits",
    "nsample": "nsamples",
    "num_calibration_samples": "nsamples",
    "max_seq_length": "seqlen",
}
# What AutoGPTQ, GPTQModel, AutoAWQ and transformers keep beside settings, or what changes no code here: names and places of
# files, how a model is run later, how fast it is calibrated. The linears of a block are always solved in sequence, groups are
# always static, codes stay where their columns are, and damping is raised where a Cholesky factorization fails.
WITHOUT_EFFECT = frozenset(
    {
        "act_group_aware", "auto_gptq_version", "backend", "batch_size", "cache_block_outputs", "cache_examples_on_gpu",
        "damp_auto_increment", "device_map", "disable_exllama", "do_fuse", "exllama_config", "fuse_max_seq_len", "hyb_act",
        "is_marlin_format", "low_cpu_mem_usage", "max_input_length", "max_memory", "meta", "model_file_base_name",
        "model_name_or_path", "offload_to_disk", "offload_to_disk_path", "pack_dtype", "pad_token_id", "static_groups",
        "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama", "use_safetensors", "use_triton",
    }
)  # fmt: skip
# Formats by the names of other toolkits.
FORMATS = {
    "gptq": "gptq",
    "gptq_v2": "gptq_v2",
    "awq": "awq",
    "gemm": "awq",
    "compressed-tensors": "compressed-tensors",
}
# A report's own entry, and entries of it that are no settings.
ENTRY, ABOUT = "config", ("nearplane", "model", "not_kept")
# Parts of a job whose fields are settings by their own names; what is no setting, or has other names; what only says how a
# run is started.
PARTS = ("method", "grid", "calibration")
NO_SETTING, STARTED = ("given", "scale_dtype", "activations"), ("resume", "force", "offload")


def settings_of(config: Any, where: str = "quantize_config") -> dict[str, Any]:
    """Return settings by the names of ``Job`` and its parts.

    Args:
        config: a mapping; a file, as ``read_config`` takes it; or an object with ``to_dict``, such as transformers' GPTQConfig.
        where: what it is called in errors.

    Raises:
        SettingError: a value that has no meaning here, or what is no configuration of a quantization.
    """
    if isinstance(config, str | Path):
        return read_config(config)
    given = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(given, Mapping):
        raise SettingError(f"{where} must hold settings by name; got {type(config).__name__}.")
    if isinstance(given.get(ENTRY), Mapping) and "linears" in given:  # a report.json
        given = given[ENTRY]
    elif "linears" in given and "settings" in given:
        raise SettingError(f"{where} is the report of an earlier version, which does not hold what repeats its run.")
    if isinstance(given.get("quantization_config"), Mapping):  # a config.json
        given = given["quantization_config"]
    if "config_groups" in given:
        raise SettingError(
            f"{where} describes a checkpoint in compressed-tensors, whose groups are no settings; give its report.json."
        )
    lost = [name for name in given.get("not_kept", ()) if name not in given]
    if lost:
        raise SettingError(
            f"{where}: the run was given {', '.join(lost)} as a Python object, which no file holds; give the settings by hand."
        )
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name == "sym" and "zero_point" in given:  # AWQ's word for it; transformers' AwqConfig has an unused sym, too
            continue
        if name in ABOUT or name in WITHOUT_EFFECT or value is None:
            continue
        for ours, meant in _meaning(str(name), value, given, where).items():
            if found.setdefault(ours, meant) != meant:
                raise SettingError(f"{where}: {ours} is said twice, as {found[ours]!r} and by {name}: {value!r}.")
    return found


def read_config(path: str | Path) -> dict[str, Any]:
    """Read settings from a JSON or YAML file.

    Args:
        path: a file of settings by name, another toolkit's quantize_config.json, or the report.json of a run.

    Raises:
        SettingError: no such file, no mapping in it, or a setting without meaning.
    """
    path, where = Path(path), f"--config {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise SettingError(f"{where} cannot be read ({reason}).") from error
    try:
        return settings_of(_parsed(path, text), where)
    except ValueError as error:
        line = " ".join(str(error).split())
        raise SettingError(f"{where} is neither JSON nor YAML ({line}).") from error


def model_in(path: str | Path) -> str | None:
    """Return the model that a file names, which ``read_config`` has read: the ``report.json`` of a run does."""
    found = _parsed(Path(path), Path(path).read_text(encoding="utf-8"))
    found = found.get(ENTRY, found)
    named = found.get("model") if isinstance(found, Mapping) else None
    return named if isinstance(named, str) else None


def config_of(job: "Job", model: str) -> dict[str, Any]:
    """Return what repeats a run: its model, the version, and the settings that were given, as JSON holds them.

    Args:
        job: the run's.
        model: as it was named.
    """
    from nearplane.core.grid import Grid
    from nearplane.methods import METHODS

    found: dict[str, Any] = {"nearplane": version("nearplane"), "model": model}
    names = {kind: name for name, kind in METHODS.items()}
    kind = type(job.method)
    if kind is not _default(job, "method") or "method" in (job.given or ()):
        found["method"] = names.get(kind, f"{kind.__module__}:{kind.__qualname__}")
    given = None if job.given is None else set(job.given)
    lost = ["grid"] * (type(job.grid) is not Grid and (given is None or "grid" in given))  # levels or scales of its own
    for part, field, value in _settings(job):
        if field.name in STARTED or part in lost or (given is not None and not {field.name, part} & given):
            continue
        kept = _written(field.name, value)
        if kept is None and value is not None:
            lost.append(field.name)
        elif kept != _written(field.name, _made(field)) or field.name in (job.given or ()):
            found[field.name] = kept
    if job.activations is not None:
        found |= {
            k: v for k, v in _rounding(job).items() if k == "act_bits" or given is None or {k, "activations"} & given
        }
    return found | ({"not_kept": lost} if lost else {})


def _default(job: "Job", name: str) -> Any:
    """Return the class that makes a field of a job where nothing is given."""
    return next(field.default_factory for field in fields(job) if field.name == name)


def every_setting(job: "Job") -> dict[str, Any]:
    """Return all settings that may be given by name, with their values in a job."""
    whole = {name: getattr(job, name) for name in PARTS}
    return whole | {field.name: value for _, field, value in _settings(job)} | _rounding(job)


def _settings(job: "Job") -> Iterator[tuple[str, "Field[Any]", Any]]:
    """Yield every setting that is a field: the part that it belongs to, its field, its value."""
    for field in fields(job):
        value = getattr(job, field.name)
        if field.name in PARTS and is_dataclass(value):
            for each in fields(value):
                if each.name not in NO_SETTING:
                    yield field.name, each, getattr(value, each.name)
        elif field.name not in (*PARTS, *NO_SETTING):
            yield "", field, value


def _rounding(job: "Job") -> dict[str, Any]:
    """Return the settings of the rounding of activations."""
    from nearplane.core.activations import TokenGrid
    from nearplane.run.job import ACTIVATIONS, NO_ROUNDING

    grid = job.activations or TokenGrid()
    found = {name: getattr(grid, part) for name, part in ACTIVATIONS.items()}
    return found if job.activations else {**found, "act_bits": NO_ROUNDING}


def _made(field: "Field[Any]") -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _written(name: str, value: Any) -> Any:
    """Return a setting as JSON holds it; None for an object that it cannot hold."""
    if name == "override":
        words = {True: "true", False: "false"}
        return [
            f"{each.pattern}="
            + ",".join(f"{key}={words.get(v, v) if key == 'sym' else v}" for key, v in each.fields.items())
            for each in value
        ]
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, list | tuple):
        return None
    if name == "dataset":  # a mix of named sources; rows in memory are not kept
        mix = [
            each
            for each in value
            if isinstance(each, list | tuple) and len(each) == 2 and isinstance(each[0], str | Path)
        ]
        return [[str(source), weight] for source, weight in mix] if len(mix) == len(value) else None
    return list(value) if all(isinstance(each, bool | int | float | str) for each in value) else None


def _parsed(path: Path, text: str) -> Any:
    """Parse a file's text. ValueError where it is neither JSON nor YAML."""
    if path.suffix == ".json":
        return json.loads(text)
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _meaning(name: str, value: Any, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what a setting of another toolkit means here; one of ours as it is."""
    known = OF_OTHERS.get(name)
    if known is None:
        mixed = name == "dataset" and isinstance(value, list)  # pairs of a source and its weight
        return {ALIASES.get(name, name): [tuple(e) if _is_pair(e) else e for e in value] if mixed else value}
    try:
        return known(value, given)
    except (KeyError, TypeError, AttributeError) as error:
        raise SettingError(f"{where}: {name} of {value!r} has no meaning here.") from error


def _is_pair(entry: Any) -> bool:
    return (
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], int | float)
    )


def _format(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """A format by its name; of GPTQ's two, checkpoint_format says which."""
    word = str(given.get("checkpoint_format") or given.get("format") or value)
    return {"format": FORMATS.get(word.lower(), word)}


# Comments within a regular expression: between rules that must not match, and behind them, before the rule itself.
OR, THEN = "(?#or)|", "(?#then)"
# What counts groups of a pattern, or names them, and means another group in a longer pattern.
COUNTED = re.compile(r"\\[1-9]|\(\?P[<=]|\(\?\(")


def _dynamic(rules: Mapping[str, Any]) -> dict[str, Any]:
    """GPTQModel's rules by name: ``-:`` leaves linears dense, ``+:`` or nothing changes their grid.

    There the first rule that matches a name counts, alone. Overrides add up here, and the last one wins. So a rule is written
    as a pattern that none of the rules before it matches.
    """
    dense: list[str] = []
    others: dict[str, dict[str, Any]] = {}
    before: list[str] = []
    for pattern, rule in rules.items():
        form, plain = pattern[:2], _scoped(pattern[2:])
        if form not in ("-:", "+:"):
            form, plain = "+:", _scoped(pattern)
        if len(rules) > 1 and COUNTED.search(plain):
            raise SettingError(f"the rule {pattern!r} of dynamic refers to a group of its own; write it without.")
        grouped = f"(?:{plain})" if "|" in plain else plain
        name = form + (f"(?!{OR.join(before)}){THEN}{grouped}" if before else plain)
        if form == "-:":
            dense.append(name)
        elif rule:
            others[name] = {ALIASES.get(key, key): each for key, each in rule.items()}
        before.append(plain)
    return ({"ignore": tuple(dense)} if dense else {}) | ({"override": others} if others else {})


def _scoped(pattern: str) -> str:
    """Return a pattern whose flags, as of ``(?i)name``, hold for itself alone, so that it may be a part of another."""
    found = re.match(r"\(\?([aiLmsux]+)\)(.*)", pattern, re.DOTALL)
    return f"(?{found[1]}:{found[2]})" if found else pattern


def parts_of(pattern: str) -> list[str]:
    """Return a pattern without the rules of ``dynamic`` that came before it, and each of those."""
    before, then, plain = pattern.partition(THEN)
    if not then:
        return [pattern]
    form, before = pattern[:2], before[2:].removeprefix("(?!").removesuffix(")")
    return [form + each for each in (plain, *before.split(OR))]


# Settings of other toolkits that are no aliases: what each value means here.
OF_OTHERS: dict[str, Callable[[Any, Mapping[str, Any]], dict[str, Any]]] = {
    "desc_act": lambda value, _: {"order": "activation"} if value else {},
    "zero_point": lambda value, _: {"sym": not value},
    "mse": lambda value, _: {"fit": "mse"} if value else {},
    "format": _format,
    "quant_method": _format,
    "checkpoint_format": _format,
    "version": lambda value, given: _format("awq", given),
    "lm_head": lambda value, given: {"head_bits": given["bits"]} if value else {},
    "dynamic": lambda rules, _: _dynamic(rules),
    "torch_dtype": lambda value, _: {"dtype": str(value).removeprefix("torch.")},
    "model_seqlen": lambda value, _: {"seqlen": value},
    "modules_to_not_convert": lambda names, _: {"ignore": tuple(re.escape(name) for name in names)} if names else {},
}


def method_class(name: str) -> "type[Method]":
    """Find the class of a method: by its short name, or as ``package.module:Class``. SettingError where there is none."""
    from nearplane.methods import METHODS

    if name in METHODS:
        return METHODS[name]
    module, _, attribute = name.partition(":")
    if not attribute or not module:
        raise SettingError(f"unknown method {name!r}; the methods are {', '.join(METHODS)}, or package.module:Class.")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module in the working folder
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
    return kind
