"""The contract of an on-disk format in both directions, and the checks and readers' helpers that formats share.

One file per format holds all that is known of it: how a weight is packed, found and unpacked, what the configuration
says, *why* a weight cannot be stored (``supports``) or loads nowhere else (``warn``), what is wrong with a stored one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from nearplane.core.activations import TokenGrid
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.core.grid import Grid, Quantized, ScaleDtype
from nearplane.core.levels import Uniform
from nearplane.formats.store import Store

# Group sizes worth suggesting: kernels read at least 8 columns at a time, and beyond 256 one scale per row is near.
SUGGESTED = range(8, 257, 8)
ONLY_HERE = "only nearplane loads such a weight"
ONLINE_ONLY_HERE = "only nearplane does; transformers, vLLM and SGLang do not know its format, and refuse it"

SCALE_NAMES: dict[torch.dtype, ScaleDtype] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


@dataclass(frozen=True)
class StoredLayer:
    """One quantized weight on disk."""

    name: str
    """Module prefix of its tensors."""
    grid: Grid
    """As far as the checkpoint tells: a ternary weight is a 2-bit one, and ``fit`` is not stored."""
    shape: tuple[int, int]
    """(out, in)."""
    tensors: dict[str, str] = field(hash=False)
    """Name on disk by suffix."""
    layout: str = ""
    """How the tensors hold the codes, where the format has several ways."""
    order: str | None = None
    """Tensor with the group of each input column; None: groups are contiguous."""
    activations: TokenGrid | None = None
    """How the input of the linear is rounded."""


class Decoded(NamedTuple):
    """A weight as read: ``scale[:, group] * (codes - zero[:, group])``."""

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: UInt8[Tensor, "out groups"] | Float32[Tensor, "out groups"]  # float32 where offsets are free
    group: Int[Tensor, "in"]


class Format(ABC):
    """How quantized weights and their description lie on disk, written and read.

    Abstract members are what every format must say; the others have the answer of a plain format.
    """

    container: ClassVar[Literal["safetensors", "gguf"]] = "safetensors"
    """What holds the tensors: a folder of safetensors shards with an index, or one .gguf file made of a template."""
    reads: ClassVar[str] = ""
    """What ``find`` reads, in words; empty: ``name``."""
    holds_conv1d: ClassVar[bool] = False
    """Whether loaders look for this format in GPT-2's transposed Conv1D, too."""
    casts_scales: ClassVar[bool] = False
    """Whether loaders cast scales to the dtype of the model."""
    order_key: ClassVar[str] = ""
    """Key of the configuration that announces groups in activation order."""
    fused_rules: ClassVar[bool] = False
    """Whether the configuration must also name the modules into which engines fuse linears that stay dense."""
    beside: ClassVar[str | None] = None
    """JSON file beside config.json in which older tools describe this format alone."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name that users give, and the key in ``FORMATS``."""

    def running(self, activations: TokenGrid | None, online: bool) -> "Format":
        """Give the variant for inputs that are rounded, or rotated (``online``), while the model runs.

        Raises:
            SettingError: where the format cannot state that.
        """
        if online:
            raise SettingError(
                f"r4 rotates inputs while the model runs, and whatever loads {self.name} would not; use --format "
                "compressed-tensors, which is marked as nearplane's own then, or rotate by r1,r2."
            )
        if activations is not None:
            raise SettingError(f"{self.name} cannot say that activations are rounded; use --format compressed-tensors.")
        return self

    def asked(self, options: Mapping[str, Any]) -> "Format":
        """Take those options of a job that are for gguf: template, gguf_dense. Raises SettingError in any other format."""
        for name in options:
            raise SettingError(f"--{name.replace('_', '-')} is for --format gguf, and the format is {self.name}.")
        return self

    def grid(self, grid: Grid, type: str | None, given: Container[str]) -> Grid:
        """Give the grid of all linears, where ``gguf_type`` decides it. SettingError where ``given`` fields contradict it."""
        if type is not None:
            raise SettingError(f"--gguf-type is for --format gguf, and the format is {self.name}.")
        return grid

    def help(self, refused: Mapping[str, tuple[Grid, tuple[int, int]]]) -> str:
        """Tell which setting would do for refused linears, by name with grid and (out, in); empty where none is known."""
        return ""

    def store(self, store: Store, config: Mapping[str, Any]) -> Store:
        """Give the tensors of a folder: its safetensors, and those in files of the format's own."""
        return store

    def supports(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Tell why a weight of this (out, in) shape on this grid cannot be stored; None if it can."""
        return levels_reason(grid) or scales_reason(grid)

    def together(self, grids: Mapping[str, Grid], model_type: str) -> str | None:
        """Tell why weights on these grids, by names of their modules, cannot be one checkpoint of such a model."""
        return None

    def solved_on(self, grid: Grid) -> Grid:
        """Give the grid on which a run solves weights that were asked for on ``grid``, scale dtype included."""
        return grid

    def rounds(self, quantized: Quantized, grid: Grid) -> float:
        """Measure how far ``pack`` moves the offset of a group at most, in steps of its scale; of an exact format 0."""
        return 0.0

    def warn(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Tell why engines will refuse a weight that can be stored; None if none is known to."""
        return None

    def scale_dtype(self, model_dtype: torch.dtype) -> ScaleDtype:
        """Name the dtype of stored scales, which a grid must know before codes are chosen."""
        return SCALE_NAMES.get(model_dtype, "float32")

    @abstractmethod
    def pack(self, name: str, quantized: Quantized, grid: Grid) -> dict[str, Tensor]:
        """Pack a solved weight.

        Args:
            name: of the module on disk, the prefix of its tensors.
            quantized: codes (out, in), scales and zeros (out, groups).
            grid: with ``scale_dtype`` as the scales are to be stored.

        Returns:
            The tensors of the module by name, on the CPU and contiguous.

        Raises:
            NearplaneError: names the module whose values the format cannot hold exactly.
        """

    @abstractmethod
    def nbytes(self, shape: tuple[int, int], grid: Grid) -> int:
        """Count the bytes of the tensors of a weight of this (out, in) shape; ``grid.scale_dtype`` counts."""

    @abstractmethod
    def config(
        self, grid: Grid, *, ignore: Sequence[str], settings: Mapping[str, Any], grids: Mapping[str, Grid] | None = None
    ) -> dict[str, Any]:
        """Describe the checkpoint in the ``quantization_config`` of config.json.

        Args:
            grid: of all modules, unless ``grids`` says otherwise.
            ignore: modules left dense.
            settings: of the run, for formats that have fields for them.
            grids: grid of each quantized module by name, where they differ.
        """

    def entries(self, config: dict[str, Any]) -> dict[str, Any]:
        """Give the entries of config.json that hold ``config``'s answer."""
        return {"quantization_config": config}

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Give further JSON files that loaders want beside config.json, by name."""
        return {}

    @abstractmethod
    def claims(self, config: Mapping[str, Any]) -> bool:
        """Tell whether a ``quantization_config`` is of this format; ``find`` then says what is wrong with it."""

    @abstractmethod
    def find(
        self, store: Store, config: dict[str, Any], broken: dict[str, str] | None = None
    ) -> dict[str, "StoredLayer"]:
        """Find every quantized weight of a folder, by module, and check shapes and dtypes.

        Args:
            store: the folder's tensors; no weight is read.
            config: a ``quantization_config`` that this format claims.
            broken: where layers that do not fit are listed, with the reason; None: the first of them raises.

        Raises:
            NearplaneError: names what is not supported or contradicts the configuration.
        """

    @abstractmethod
    def unpack(self, store: Store, layer: "StoredLayer") -> "Decoded":
        """Read a layer. Raises NearplaneError where its values contradict the configuration."""

    def expects(self, config: dict[str, Any], names: set[str], kind: str) -> bool:
        """Tell whether the configuration says that a module is quantized.

        Args:
            config: the ``quantization_config``.
            names: of the module, in the model and on disk.
            kind: its class, "Linear" or another.
        """
        return not names & set(setting(config, "ignore", list, [], "quantization_config"))

    def ordered(self, config: Mapping[str, Any]) -> bool:
        """Tell whether the configuration announces groups in activation order."""
        return bool(config.get(self.order_key))

    def foreign(self, config: dict[str, Any]) -> str | None:
        """Tell why weights that a configuration describes are none that this format reads; None if it reads them."""
        return None

    def besides_weights(self, config: Mapping[str, Any]) -> list[str]:
        """Name the keys by which the configuration quantizes more than weights."""
        return []

    def run_settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Give what the configuration records of the run, as ``settings`` for another format's ``config``."""
        return {}

    def flaws(self, store: Store, layer: "StoredLayer", decoded: "Decoded") -> Iterator[str]:
        """List what is wrong with a layer that could be read, in sentences."""
        yield from ()

    def remarks(self, layer: "StoredLayer") -> Iterator[str]:
        """List what is unusual about a layer and not wrong, in sentences."""
        yield from ()


def by_grid(grid: Grid, grids: Mapping[str, Grid] | None) -> dict[Grid, list[str]]:
    """Group modules by what disk tells of their grids, the grid of most first; of one grid alone no names."""
    found: dict[Grid, list[str]] = {}
    for name, some in (grids or {}).items():
        found.setdefault(stored_grid(some), []).append(name)
    if len(found) > 1:
        return dict(sorted(found.items(), key=lambda pair: -len(pair[1])))
    return {next(iter(found), grid): []}


def stored_grid(grid: Grid) -> Grid:
    """Give what disk tells of a grid: bits, group size, symmetry, and scales that are no plain floats."""
    fields: dict[str, Any] = {"bits": grid.storage_bits, "group_size": grid.group_size, "sym": grid.sym}
    return Grid(**fields) if grid.scales.held_in is None else Grid.of(scales=grid.scales, **fields)


def scales_reason(grid: Grid) -> str | None:
    """Tell that scales are no plain floats above 0 beside zeros that are codes; None if they are."""
    if grid.scales.held_in is None:
        return None
    kind = getattr(grid.scales, "kind", type(grid.scales).__name__)
    told = ", whose offsets are numbers of their own" if grid.scales.free else ""
    return f"this format holds no {kind} scales{told}; the formats gguf and mlx hold those of their own types"


def levels_reason(grid: Grid) -> str | None:
    """Tell that levels are no integers: parts and checkpoints hold integer codes with zeros; None if they are."""
    if isinstance(grid.levels, Uniform):
        return None
    name = getattr(grid.levels, "name", type(grid.levels).__name__)
    return f"no checkpoint format holds the levels {name}, which are no integers; solve on such a grid with examples/own_grid.py"


def tail_reason(grid: Grid, in_features: int) -> str | None:
    """Tell that the last group is smaller, or a group larger than the row; None if groups divide the row."""
    if grid.group_size == -1 or in_features % grid.group_size == 0:
        return None
    fitting = [str(size) for size in SUGGESTED if in_features % size == 0]
    choice = f"{', '.join(fitting)}, or -1 (one scale per row)" if fitting else "-1 (one scale per row) only"
    return f"group_size {grid.group_size} does not divide the {in_features} input columns; what divides them: {choice}"


def conv1d_reason(format: Format) -> str | None:
    """Tell why a Conv1D cannot be stored; None if it can."""
    if format.holds_conv1d:
        return None
    return f"{format.name} knows nn.Linear only, loaders would fill this Conv1D with random weights; use gptq"


def check(name: str, quantized: Quantized, grid: Grid, *, any_scales: bool = False) -> Quantized:
    """Check that disk can hold a weight exactly.

    Args:
        name: of the module.
        quantized: codes (out, in), scales and zeros (out, groups).
        grid: its grid.
        any_scales: whether the format holds scales of the kind that ``scales_reason`` refuses.

    Returns:
        The weight on the CPU, its scales in ``grid.held_in``.

    Raises:
        NearplaneError: for codes or zeros off the grid, shapes that do not fit together, and scales that are not
            finite or that storing would round: the codes were chosen for other values then.
    """
    codes, scale, zero = (tensor.detach().cpu() for tensor in quantized[:3])
    groups = (codes.shape[0], grid.group_count(codes.shape[1]))
    reason = None if any_scales else scales_reason(grid)
    if reason is not None:
        raise NearplaneError(f"{name}: {reason}.")
    free = grid.scales.free
    if codes.dtype != torch.uint8 or zero.dtype != (torch.float32 if free else torch.uint8):
        wanted = "codes must be uint8 and zeros float32" if free else "codes and zeros must be uint8"
        raise NearplaneError(f"{name}: {wanted}, and are {codes.dtype} and {zero.dtype}.")
    if scale.shape != groups or zero.shape != groups:
        raise NearplaneError(
            f"{name}: scales {tuple(scale.shape)} and zeros {tuple(zero.shape)} must both be {groups} (out, groups)."
        )
    least, greatest = grid.code_range
    if int(codes.min()) < least or int(codes.max()) > greatest:
        raise NearplaneError(f"{name}: codes leave the grid's range {least} to {greatest}.")
    half = 1 << (grid.storage_bits - 1)
    if grid.sym and bool((zero != half).any()):
        raise NearplaneError(f"{name}: every zero of a symmetric grid of {grid.storage_bits} bits must be {half}.")
    if free and not bool(zero.isfinite().all()):
        raise NearplaneError(f"{name}: an offset is not finite.")
    if not free and int(zero.max()) > greatest:
        raise NearplaneError(f"{name}: a zero point leaves the grid's range 0 to {greatest}.")
    stored = scale.to(getattr(torch, grid.held_in))
    if not bool(stored.isfinite().all()):
        raise NearplaneError(f"{name}: a scale is not finite in {grid.held_in}.")
    if not torch.equal(stored.to(scale.dtype), scale):
        raise NearplaneError(
            f"{name}: storing the scales in {grid.held_in} would round them after the codes were chosen; "
            "solve with this scale_dtype."
        )
    return Quantized(codes, stored.contiguous(), zero)


def tensors_of(store: Store, name: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Find those tensors of a module that exist, by suffix."""
    return {suffix: f"{name}.{suffix}" for suffix in suffixes if f"{name}.{suffix}" in store.names}


def collect(
    names: Iterable[str], find: Callable[[str], StoredLayer], broken: dict[str, str] | None
) -> dict[str, StoredLayer]:
    """Find the layers of these names, sorted. One that does not fit raises, or is listed in ``broken``."""
    layers = {}
    for name in sorted(names):
        try:
            layers[name] = find(name)
        except NearplaneError as error:
            if broken is None:
                raise
            broken[name] = str(error)
    return layers


def named(store: Store, *suffixes: str) -> set[str]:
    """Name the modules that have a tensor of one of these suffixes."""
    return {name.removesuffix(f".{s}") for s in suffixes for name in store.names if name.endswith(f".{s}")}


def expect_words(store: Store, names: Iterable[str], dtype: torch.dtype = torch.int32) -> None:
    """Raise NearplaneError unless tensors are matrices of packed codes, of at least one word."""
    for name in names:
        sides = store.shape(name)
        if store.dtype(name) != dtype or len(sides) != 2 or min(sides) < 1:
            kind = "an int32" if dtype == torch.int32 else f"a {str(dtype).removeprefix('torch.')}"
            stacked = " (stacked experts, as mlx_lm.convert writes them, are not read)" if len(sides) == 3 else ""
            raise NearplaneError(f"tensor {name} in {store.folder} must be {kind} matrix{stacked}.")


def group_size_of(config: dict[str, Any], default: int, where: str) -> int:
    """Read the group size of a configuration. Raises NearplaneError unless it is positive or -1."""
    size: int = setting(config, "group_size", int, default, where)
    if size != -1 and size < 1:
        raise NearplaneError(f"{where} has group_size {size}; it must be positive or -1.")
    return size


def require(store: Store, layer: dict[str, str], name: str, suffixes: tuple[str, ...]) -> None:
    """Raise NearplaneError unless the module has all of these tensors."""
    for suffix in suffixes:
        if suffix not in layer:
            raise NearplaneError(f"{store.folder} holds part of quantized layer {name} but no {name}.{suffix}.")


def expect(store: Store, name: str, wanted: tuple[int, ...], why: str) -> None:
    """Raise NearplaneError unless a tensor has the wanted shape; ``why``: what the configuration says."""
    shape = store.shape(name)
    if shape != wanted:
        raise NearplaneError(f"tensor {name} in {store.folder} has shape {shape}, but {why} takes {wanted}.")


def scale_dtype_of(store: Store, name: str) -> ScaleDtype:
    """Name the dtype of stored scales."""
    dtype = store.dtype(name)
    if dtype not in SCALE_NAMES:
        raise NearplaneError(f"scales {name} in {store.folder} are {dtype}, not float32, float16 or bfloat16.")
    return SCALE_NAMES[dtype]


def setting(config: dict[str, Any], key: str, kind: type, default: object, where: str) -> Any:
    """Get a value of a configuration and check its type; ``null`` counts as absent."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise NearplaneError(f"{where}: {key} must be of type {kind.__name__}, and is {value!r}.")
    return value


def group_of_columns(store: Store, name: str | None, grid: Grid, in_features: int) -> Int[Tensor, "in"]:
    """Give the group of each input column: as tensor ``name`` orders them, else contiguous."""
    contiguous = torch.arange(in_features) // grid.group_width(in_features)
    if name is None:
        return contiguous
    stored = store.get(name).long()
    if bool((stored == -1).all()):  # compressed-tensors' mark for "no order was used"
        return contiguous
    if int(stored.min()) < 0 or int(stored.max()) >= grid.group_count(in_features):
        raise NearplaneError(
            f"tensor {name} in {store.folder} names groups {int(stored.min())} to {int(stored.max())}, "
            f"and there are {grid.group_count(in_features)}."
        )
    return stored


def grid_name(grid: Grid) -> str:
    """Describe a grid as it is stored, in words."""
    groups = "one scale per row" if grid.group_size == -1 else f"groups of {grid.group_size}"
    return f"{grid.storage_bits} bits in {groups}{'' if grid.sym else ', asymmetric'}"
