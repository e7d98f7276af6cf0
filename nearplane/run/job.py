"""``Job``: every setting of one quantization, in one frozen dataclass that is validated once.

``quantize``, ``plan`` and the command line fill the same class. The report, the identity of a resumed run and ``--help``
are its fields. Fields of its parts (the grid, the calibration, the method, the rounding of activations) may be given by
their own names: ``Job.of(bits=3, nsamples=64, method="gptq", damp_percent=0.02)``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

from nearplane.core.activations import TokenGrid
from nearplane.core.errors import SettingError, plain, plain_numbers
from nearplane.core.grid import Fit, Grid
from nearplane.data.text import Calibration
from nearplane.formats import Format, pick_format
from nearplane.formats.gguf.grids import grid_of, known_type, own_type
from nearplane.machine.devices import Dtype, pick_dtype
from nearplane.methods import METHODS, Method, NearPlane
from nearplane.methods.base import check_method
from nearplane.models.locate import given_path
from nearplane.run.names import ALIASES, method_class, settings_of
from nearplane.transforms.rotation import Rotate, make_rotate
from nearplane.transforms.view import Transform

# Before the patterns of other tools: of compressed-tensors, and of GPTQModel's dynamic rules.
FORMS = ("re:", "-:", "+:")
OVERRIDDEN = ("bits", "group_size", "sym", "fit", "gguf_type")
# Fields of a job that are options of one format.
OF_FORMAT = ("template", "gguf_dense")
WIDTHS = (2, 3, 4, 8)
# Settings that are fields of ``TokenGrid``, by the names that a user gives them.
ACTIVATIONS = {"act_bits": "bits", "act_sym": "sym", "act_clip": "clip"}
NO_ROUNDING = 16


@dataclass(frozen=True)
class Override:
    """Fields of the grid that are others for the linears in whose names a pattern is found (``re.search``)."""

    pattern: str
    bits: int | Literal["ternary"] | None = None
    group_size: int | None = None
    sym: bool | None = None
    fit: Fit | None = None
    gguf_type: str | None = None

    def __post_init__(self) -> None:
        plain_numbers(self)
        compiled("override", self.pattern)
        if not self.fields:
            raise SettingError(f"override {self.pattern!r} changes nothing; give it {', '.join(OVERRIDDEN)}.")
        for name, right, what in (
            ("bits", type(self.bits) is int or self.bits in (None, "ternary"), "2 to 8, or ternary"),
            ("group_size", type(self.group_size) in (int, type(None)), "a whole number"),
            ("sym", type(self.sym) in (bool, type(None)), "true or false"),
            ("fit", self.fit in (None, *get_args(Fit)), f"one of {', '.join(get_args(Fit))}"),
            ("gguf_type", type(self.gguf_type) in (str, type(None)), "a GGUF type"),
        ):
            if not right:
                raise SettingError(f"override {self.pattern!r}: {name} must be {what}; got {getattr(self, name)!r}.")
        if self.gguf_type is None:
            self.apply(Grid(group_size=1))
            return
        decided = [name for name in ("bits", "group_size", "sym") if getattr(self, name) is not None]
        if decided:
            raise SettingError(
                f"override {self.pattern!r}: gguf_type decides {' and '.join(decided)}; give one of them."
            )
        known_type(self.gguf_type)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that it changes, with their values."""
        return {name: getattr(self, name) for name in OVERRIDDEN if getattr(self, name) is not None}

    def apply(self, grid: Grid) -> Grid:
        """Return the grid with these fields changed. SettingError where they do not go together."""
        changes = {name: value for name, value in self.fields.items() if name != "gguf_type"}
        try:
            if self.gguf_type is not None:
                kept = {name: getattr(grid, name) for name in ("fit", "scale_dtype", "negative_scales")}
                changes = kept | changes
                grid = grid_of(known_type(self.gguf_type))
            return replace(grid, **changes)
        except SettingError as error:
            raise SettingError(f"override {self.pattern!r}: {error}") from error

    def __str__(self) -> str:
        return f"{self.pattern!r} {' '.join(f'{name}={value}' for name, value in self.fields.items())}"

    @classmethod
    def parse(cls, word: str) -> "Override":
        """Read ``REGEX=FIELD=VALUE,...``; the pattern may hold signs of equality. SettingError for anything else."""
        found = re.fullmatch(r"(.+?)=(\w+=[^=,]*(?:,\w+=[^=,]*)*)", word)
        if not found:
            raise SettingError(
                f"--override {word!r} is not of the form REGEX=FIELD=VALUE,..., as 'down_proj=bits=8,sym=false'."
            )
        parts = [part.split("=") for part in found.group(2).split(",")]
        given = dict(parts)
        if len(given) < len(parts):
            raise SettingError(f"--override {word!r} gives a field twice.")
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name not in OVERRIDDEN:
                raise SettingError(f"--override {word!r}: an override knows {', '.join(OVERRIDDEN)}, not {name!r}.")
            number = name not in ("fit", "gguf_type") and re.fullmatch(r"-?\d+", value)
            values[name] = int(value) if number else value
            if name == "sym":
                values[name] = {"true": True, "false": False}.get(value.lower(), value)
        return cls(found.group(1), **values)


@dataclass(frozen=True)
class Job:
    """Settings of one quantization.

    Example:
        >>> job = Job.of(bits=3, group_size=64, method="gptq", nsamples=32)
        >>> job.grid.bits, job.calibration.nsamples
        (3, 32)
    """

    method: Method = field(default_factory=NearPlane)
    """How weights are solved: rtn, awq, obq, gptq, gptaq, rescomp, nearplane, or package.module:Class for your own."""
    grid: Grid = field(default_factory=Grid)
    calibration: Calibration = field(default_factory=Calibration)
    activations: TokenGrid | None = None
    """How the input of every quantized linear is rounded while the model runs; None: not at all."""
    override: tuple[Override, ...] = ()
    """Another grid where REGEX is found in a linear's name: bits, group_size, sym or fit. Repeatable; the last one wins.
    As 'down_proj=bits=8,group_size=64'."""
    head_bits: int | None = None
    """Quantize the output head, too, with so many bits. A head that shares the input embedding's weight gets a tensor of its
    own. --override 'lm_head=bits=8,group_size=32' does the same with any grid."""
    ignore: tuple[str, ...] = ()
    """Leave dense the linears in whose names REGEX is found. Repeatable."""
    towers: tuple[str, ...] = ()
    """Quantize only these towers of a model that has several: text, vision, encoder, decoder, or as they are named in it."""
    budget: float | None = None
    """Choose the bits of every stage, from widths, so that quantized weights take so many bits on average, scales and zeros
    counted, at the least sum of errors. The errors are measured first; bits is not used."""
    widths: tuple[int, ...] = WIDTHS
    """The bits that a budget chooses from."""
    rotate: tuple[str, ...] = ()
    """Rotations fused into the weights before they are quantized: r1 of the residual stream, r2 of every head's values. Applied
    while the model runs, by nearplane alone: r4 of the down projection's input, r3 of keys where eval --kv-bits rounds them."""
    rotate_seed: int = 0
    """Seed of the rotations' random signs."""
    transforms: tuple[Transform, ...] = ()
    """Equivalent models of your own that are quantized in place of the model, after the rotations (Python only)."""
    scale: Literal["auto", "none", "awq"] = "auto"
    """Scale the input channels of linears before they are quantized, by the method that follows: awq (arXiv 2306.00978), folded
    into the norm or the linear before them where that is exact; auto: as the method asks, which only awq does."""
    tune: int = 0
    """Steps of a short tuning after the codes stand (0: none): group scales, norms and biases move until the model's words are
    its original's again; codes and storage stay. Held-out windows judge; what does not help is undone. The whole model is in
    memory then."""
    check: bool = True
    """End with what the quantization changes on a few windows that calibration has not used: KL to the original, and the error
    of the hidden state behind each block. No step of the run depends on it; --no-check skips it."""
    format: str | Format = "compressed-tensors"
    """Checkpoint format: compressed-tensors, gptq, gptq_v2, awq (4 bits), mlx (offsets of their own, whatever --sym
    says), or gguf for llama.cpp, Ollama and LM Studio."""
    gguf_type: str | None = None
    """With --format gguf, the type of quantized weights, which decides the grid: Q4_0 (the default), Q8_0, Q5_0, Q4_1, Q5_1,
    Q2_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K. Of some linears: --override 'down_proj=gguf_type=Q5_0'."""
    template: Path | None = None
    """With --format gguf, a GGUF file of the original model, which gives metadata, tokenizer and names; demo has its own."""
    gguf_dense: str | None = None
    """With --format gguf, the type of embedding and output head: Q8_0, Q6_K or F16; as in the template where it is not given."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, ..."""
    dtype: Dtype = "auto"
    """What dense tensors and scales are stored in; auto: as in MODEL. On CPU hidden states are always float32."""
    offload: Path | None = None
    """Keep hidden states in files below this folder, not in memory."""
    resume: bool = False
    """Go on after the last finished block in OUT; with the same settings, but for damp_percent and nsamples."""
    force: bool = False
    """Run even if the estimate of memory or disk says that the run cannot fit."""
    revision: str | None = None
    """Of a hub id, the branch, tag or commit; MODEL@REVISION says the same."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    given: tuple[str, ...] | None = None
    """Set by ``of``: the names of the settings that were given. None: all, as the job was made from whole objects."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_method(self.method)
        for pattern in self.ignore:
            compiled("ignore", pattern)
        if not all(isinstance(word, str) and word for word in self.towers):
            raise SettingError(f"towers are names, such as text or vision; got {list(self.towers)}.")
        if self.head_bits is not None and (type(self.head_bits) is not int or not 2 <= self.head_bits <= 8):
            raise SettingError(f"head_bits must be a whole number from 2 to 8; got {self.head_bits!r}.")
        if self.budget is not None and not (isfinite(self.budget) and self.budget > 0):
            raise SettingError(f"budget must be a positive number of bits per weight; got {self.budget}.")
        if not self.widths or any(type(width) is not int or not 2 <= width <= 8 for width in self.widths):
            raise SettingError(f"widths must be some of the bits from 2 to 8; got {list(self.widths)}.")
        if not isinstance(self.check, bool):
            raise SettingError(f"check must be True or False; got {self.check!r}.")
        if type(self.tune) is not int or self.tune < 0:
            raise SettingError(f"tune must be a whole number of steps, 0 for none; got {self.tune!r}.")
        if self.scale not in ("auto", "none", "awq"):
            raise SettingError(f"scale must be auto, none or awq; got {self.scale!r}.")
        pick_dtype(self.dtype)
        _ = self.checkpoint_format
        for transform in (self.rotation, *self.transforms):
            if isinstance(transform, type) or not (hasattr(transform, "promise") and hasattr(transform, "apply")):
                raise SettingError(f"a transform is an object with promise and apply; got {transform!r}.")

    def was_given(self, name: str) -> bool:
        """Tell whether a setting of the grid was given, by its name or within a whole grid."""
        return self.given is None or not {name, "grid"}.isdisjoint(self.given)

    @property
    def checkpoint_format(self) -> Format:
        """The format, with the options of its own."""
        given = {name: getattr(self, name) for name in OF_FORMAT if getattr(self, name) is not None}
        format = pick_format(self.format).asked(given)
        format.grid(self.grid, self.gguf_type, ())
        return format

    @property
    def rotation(self) -> Rotate:
        """The rotations, with their seed."""
        return make_rotate(self.rotate, self.rotate_seed)

    @property
    def scales_channels(self) -> bool:
        """Whether input channels are scaled before the run."""
        return (getattr(self.method, "scale", "none") if self.scale == "auto" else self.scale) == "awq"

    @property
    def reads_data(self) -> bool:
        """Whether calibration data is read before linears are solved, or while they are."""
        return bool(self.method.needs) or self.scales_channels

    @property
    def equivalences(self) -> tuple[Transform, ...]:
        """Every transform, in the order in which they are applied."""
        return (self.rotation, *self.transforms) if self.rotation.kinds else self.transforms

    @classmethod
    def read(cls, config: Any) -> "Job":
        """Make a job from settings that are kept elsewhere.

        Args:
            config: a dict by the names of ``of``, or by those of another toolkit's quantize_config; an object with ``to_dict``,
                such as transformers' GPTQConfig; or a JSON or YAML file of these, or the report.json of a run to repeat.

        Raises:
            SettingError: a name or a value that has no meaning here.
        """
        settings = settings_of(config)
        try:
            return cls.of(settings=settings)
        except SettingError as error:
            if isinstance(config, str | Path):
                raise SettingError(f"{config}: {error}") from error
            raise

    @classmethod
    def of(cls, job: "Job | None" = None, settings: Mapping[str, Any] | None = None, **more: Any) -> "Job":
        """Make a job from another one and settings, by the names of its fields, of its parts' fields, or known aliases.

        Args:
            job: what the settings change; none: the defaults.
            settings: values by name. ``method`` may be a name, ``override`` a dict ``{regex: {field: value}}`` or words.

        Raises:
            SettingError: an unknown name, with the nearest known one; or a value that has no meaning.
        """
        job = job or cls(given=())
        given = {name: plain(value) for name, value in _canonical({**(settings or {}), **more}).items()}
        names = None if job.given is None else tuple(sorted({*job.given, *given}))
        named = {name for name, value in given.items() if value is not None}
        method = _method(given.pop("method", None), job.method)
        parts: dict[str, Any] = {"method": method, "grid": _whole("grid", given, job.grid)}
        parts["calibration"] = _whole("calibration", given, job.calibration)
        rounding = {name: given.pop(name) for name in ACTIVATIONS if name in given}
        parts["activations"] = _activations(given.pop("activations", job.activations), rounding)
        own = {f.name for f in fields(cls)} - {"given"}
        changes: dict[str, Any] = {name: given.pop(name) for name in list(given) if name in own}
        for name, part in parts.items():
            taken = {key: given.pop(key) for key in list(given) if is_dataclass(part) and key in _names(part)}
            changes[name] = replace(part, **taken) if taken else part
        if given:
            raise SettingError(_unknown(next(iter(given)), method, own | _known(parts)))
        converted = {name: _CONVERTED.get(name, _same)(value) for name, value in changes.items()}
        made = replace(job, **converted, given=names)
        decides = {"format", "gguf_type", "grid", *(f.name for f in fields(Grid))} & named
        named |= {"grid"} if job.grid != Grid() and own_type(job.grid) is None else set()  # chosen before
        return replace(made, grid=made.checkpoint_format.grid(made.grid, made.gguf_type, named)) if decides else made


def compiled(what: str, pattern: str) -> Callable[[str], re.Match[str] | None]:
    """Compile a user's regular expression to a function of a name.

    A plain one is searched for. In other tools' form, ``re:REGEX`` (compressed-tensors), ``-:REGEX`` and ``+:REGEX``
    (GPTQModel), it matches from the name's start, as in those tools.

    Raises:
        SettingError: no regular expression, or a form that means another setting than ``what``.
    """
    if not isinstance(pattern, str) or not pattern:
        raise SettingError(f"{what} takes a regular expression; got {pattern!r}.")
    form = next((form for form in FORMS if pattern.startswith(form)), "")
    other = {("override", "-:"): "leaves linears dense; give it to ignore", ("ignore", "+:"): "changes the grid of linears; "
             "give it to override"}.get((what, form))  # fmt: skip
    if other is not None:
        raise SettingError(f"{what} {pattern!r}: in this form a pattern {other}.")
    plain = pattern.removeprefix(form)
    if not plain:
        raise SettingError(f"{what} {pattern!r} has no regular expression behind {form!r}.")
    try:
        regex = re.compile(plain)
    except re.error as error:
        raise SettingError(f"{what} {pattern!r} is no regular expression ({error}).") from error
    return regex.match if form else regex.search


def _method(given: Any, current: Method) -> Method:
    if given is None:
        return current
    return method_class(given)() if isinstance(given, str) else given


def _whole(name: str, given: dict[str, Any], current: Any) -> Any:
    """Take a part that is given as an object. SettingError for one of another type."""
    found = given.pop(name, None)
    kind = Grid if name == "grid" else Calibration
    if found is not None and not isinstance(found, kind):
        raise SettingError(f"{name} must be a {kind.__name__}, or give its fields by name; got {type(found).__name__}.")
    return current if found is None else found


def _activations(given: TokenGrid | None, rounding: dict[str, Any]) -> TokenGrid | None:
    """The rounding of activations from ``act_bits`` (16: none), ``act_sym`` and ``act_clip``."""
    if not rounding:
        return given
    bits = rounding.pop("act_bits", NO_ROUNDING if given is None else given.bits)
    values = {ACTIVATIONS[name]: value for name, value in rounding.items()}
    if bits == NO_ROUNDING:
        if values != {name: value for name, value in (("sym", True), ("clip", 1.0)) if name in values}:
            raise SettingError("--act-sym and --act-clip say how activations are rounded; give --act-bits, too.")
        return None
    return replace(given or TokenGrid(), bits=bits, **values)


def _overrides(given: Any) -> tuple[Override, ...]:
    """From a dict ``{regex: {field: value}}``, or Overrides and words ``REGEX=FIELD=VALUE``."""
    found: list[Override] = []
    for entry in given.items() if isinstance(given, Mapping) else given or ():
        if isinstance(entry, Override | str):
            found.append(Override.parse(entry) if isinstance(entry, str) else entry)
            continue
        pattern, values = entry
        unknown = sorted(set(values) - set(OVERRIDDEN)) if isinstance(values, Mapping) else [repr(values)]
        if unknown:
            raise SettingError(f"override {pattern!r} knows {', '.join(OVERRIDDEN)}; got {', '.join(unknown)}.")
        found.append(Override(pattern, **values))
    return tuple(found)


def _words(given: str | Sequence[str]) -> tuple[str, ...]:
    """Names separated by commas, or a sequence of them."""
    return tuple(word.strip() for word in given.split(",")) if isinstance(given, str) and given else tuple(given)


def _patterns(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _same(value: Any) -> Any:
    return value


_CONVERTED: dict[str, Any] = {
    "override": _overrides,
    "ignore": _patterns,
    "towers": _words,
    "rotate": _words,
    "widths": tuple,
    "transforms": tuple,
    "offload": lambda path: None if path is None else given_path("offload", path),
    "template": lambda path: None if path is None else given_path("template", path),
    "gguf_type": lambda name: None if name is None else known_type(name),
    "gguf_dense": lambda name: None if name is None else str(name).upper(),
}


def _canonical(given: Mapping[str, Any]) -> dict[str, Any]:
    """Known aliases under the one name used inside. SettingError where two names of one setting are given."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        key = ALIASES.get(name, name)
        if key in found:
            raise SettingError(f"{key} is given twice, once as {name}.")
        found[key] = value
    return found


def _names(part: Any) -> set[str]:
    """Fields of a part that a user sets."""
    return {f.name for f in fields(part)} - {"scale_dtype"}


def _known(parts: Mapping[str, Any]) -> set[str]:
    """Names of all parts' fields."""
    found = {name for part in parts.values() if is_dataclass(part) for name in _names(part)}
    return found | set(ACTIVATIONS)


def _unknown(name: str, method: Method, known: set[str]) -> str:
    others = [other for other, kind in METHODS.items() if is_dataclass(kind) and name in {f.name for f in fields(kind)}]
    if others:
        return f"{name} is a setting of method {others[0]}, not of {type(method).__name__}."
    near = get_close_matches(name, sorted(known), n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; the settings are {', '.join(sorted(known))}."
    return f"unknown setting {name!r}{hint}"
