"""Weights stored as 8-bit or 4-bit floats with scales, shown as the dense weights that they stand for.

Publishers store originals so: FP8 with one scale per tensor, row or block (DeepSeek, Qwen), FP4 in blocks of 16 or 32
inputs (gpt-oss, NVFP4). ``DenseStore`` is a view of such a store. A weight is made dense when it is read, and only the part
that is asked for is in memory. Codes times scales is computed in float32 and not rounded to the model's dtype: the solver
and a model in float32 get the stored numbers. A product of an 8-bit float and a scale is rounded once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from nearplane.core.errors import NearplaneError
from nearplane.formats.store import SMALL_FLOATS, Store

# Elements that are made dense at a time.
AT_ONCE = 1 << 22
# By the three bits after the sign: 2 of the exponent, 1 of the mantissa.
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP4 = torch.cat([E2M1, -E2M1])
# The two numbers of a byte, the low half first, as one word, which is gathered faster.
PAIRS = torch.stack([FP4.repeat(16), FP4.repeat_interleave(16)], 1).view(torch.int64).flatten()
# The number of each code.
EIGHT = {dtype: torch.arange(256, dtype=torch.uint8).view(dtype).float() for dtype in SMALL_FLOATS}
# Scales that are a power of two, by their byte; the last is NaN.
POWERS = torch.tensor([2.0 ** (byte - 127) for byte in range(255)] + [float("nan")])
# Endings of a scale, after the whole name of its weight.
AFTER = ("_scale_inv", "_scale")
# Endings of a scale that stand in place of "weight".
INSTEAD = ("scale", "qscale_weight")
# Reads a stored tensor, or the rows of it that are asked for.
Part = Callable[[str], Tensor]


@dataclass(frozen=True)
class Sizes:
    """What a configuration says of stored weights."""

    block: tuple[int | None, int | None] = (None, None)
    """Rows and columns that share a scale; None: as many as the number of scales divides."""
    pairs: bool = False
    """An int8 tensor with scales holds two FP4 numbers a byte, in blocks of 32 inputs (expert_dtype fp4)."""


@dataclass(frozen=True)
class Coded:
    """How a dense weight is stored."""

    codes: str
    scale: str
    shape: tuple[int, ...]
    """Of the codes, each FP4 number counted; the last two sizes are a matrix."""
    grid: tuple[int, ...]
    """Number of scales along each dimension."""
    block: tuple[int, int]
    """Rows and columns that share a scale."""
    halves: bool = False
    """The rows of gate and those of up have blocks of their own."""
    packed: bool = False
    """Two FP4 numbers a byte."""
    turned: bool = False
    """The dense weight is the transpose (gpt-oss)."""
    second: str | None = None
    """A scale of the scales."""
    divides: bool = False
    """The second scale divides."""

    @property
    def dense(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        *first, rows, columns = self.shape
        return (*first, columns, rows) if self.turned else self.shape

    @property
    def tensors(self) -> set[str]:
        """Names of the stored tensors."""
        return {self.codes, self.scale} | ({self.second} if self.second else set())


class DenseStore(Store):
    """A store whose coded weights appear as dense ones, without their scales."""

    def __init__(self, store: Store, coded: dict[str, Coded], dropped: set[str], dtype: torch.dtype) -> None:
        """Wrap a store.

        Args:
            store: the tensors on disk.
            coded: by name of the dense weight.
            dropped: other tensors that are not shown.
            dtype: what dense weights count as, and are written in.
        """
        self.store, self.coded, self._dtype = store, coded, dtype
        self.folder, self.lost = store.folder, store.lost
        taken = {name for weight in coded.values() for name in weight.tensors}
        self.names = (store.names - taken - dropped) | coded.keys()

    def get(self, name: str) -> Tensor:
        """Read a tensor; a dense weight is made in float32."""
        coded = self.coded.get(name)
        return self.store.get(name) if coded is None else self._read(coded, 0, coded.shape[0], self.store.get)

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Read some rows of a tensor's first dimension."""
        coded = self.coded.get(name)
        if coded is None:
            return self.store.rows(name, first, count)
        if coded.turned and len(coded.shape) == 2:
            return self.get(name)[first : first + count]
        return self._read(coded, first, count, lambda stored: self.store.rows(stored, first, count))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; reads no data."""
        return self.coded[name].dense if name in self.coded else self.store.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype; of a dense weight that of the model."""
        return self._dtype if name in self.coded else self.store.dtype(name)

    def nbytes(self, name: str) -> int:
        """Return a tensor's size in bytes in that dtype; reads no data."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def reading(self, name: str) -> int:
        """Count the bytes of memory that reading a tensor takes: of a dense weight codes, scales and float32."""
        if name not in self.coded:
            return self.store.reading(name)
        coded = self.coded[name]
        return 4 * prod(coded.shape) * (2 if coded.turned else 1) + sum(map(self.store.nbytes, coded.tensors))

    @property
    def total(self) -> int:
        """Bytes of all tensors on disk."""
        return self.store.total

    @property
    def kinds(self) -> list[str]:
        """What weights are stored as."""
        return sorted({"FP4" if coded.packed else "FP8" for coded in self.coded.values()})

    def _read(self, coded: Coded, first: int, count: int, part: Part) -> Tensor:
        """Make ``count`` rows of the first dimension dense; ``part`` reads these rows of a stored tensor."""
        codes, scale = part(coded.codes), self._scale(coded, first, count, part)
        result = torch.empty((count, *coded.shape[1:]))
        if len(coded.shape) == 2:
            _fill(result, codes.reshape(count, -1), scale, coded, first)
        else:
            for number in range(count):
                one = codes[number].reshape(coded.shape[1], -1)
                _fill(result[number], one, scale[number if len(scale) > 1 else 0], coded, 0)
        return result.transpose(-1, -2).contiguous() if coded.turned else result

    def _scale(self, coded: Coded, first: int, count: int, part: Part) -> Tensor:
        """Read scales as float32, shaped like ``grid``; of a tensor of matrices those of ``count`` matrices."""
        matrices = len(coded.shape) > 2 and coded.grid[0] > 1
        value = part(coded.scale) if matrices else self.store.get(coded.scale)
        scale = _number(value).reshape(count if matrices else coded.grid[0], *coded.grid[1:])
        if coded.second is not None:
            second = self.store.get(coded.second).float()
            if second.numel() > 1:  # one for each matrix
                second = second.reshape(-1, *[1] * (scale.dim() - 1))[first : first + count]
            scale = scale / second if coded.divides else scale * second
        return scale


def find_coded(
    store: Store, sizes: Sizes, broken: dict[str, str] | None = None
) -> tuple[dict[str, Coded], dict[str, str]]:
    """Find weights stored as small floats with scales.

    Args:
        store: the tensors on disk.
        sizes: what the configuration says.
        broken: where a weight whose scales are missing or do not fit goes, by module with the reason.

    Returns:
        How each is stored, by name of the dense weight; and the reasons that went to ``broken``, by tensor.

    Raises:
        NearplaneError: a scale is missing or does not fit its weight, and ``broken`` is None.
    """
    coded: dict[str, Coded] = {}
    left: dict[str, str] = {}
    for name in sorted(store.names):
        try:
            found = _coded(store, name, sizes)
        except NearplaneError as error:
            if broken is None:
                raise
            broken[name.rpartition(".")[0]] = left[name] = str(error)
            continue
        if found is not None:
            coded[dense_name(name)] = found
    return coded, left


def is_scale(name: str) -> bool:
    """Tell whether a tensor's name is that of a scale."""
    leaf = name.rpartition(".")[2]
    return leaf in INSTEAD or leaf.endswith((*AFTER, "_scales", "_scale_2"))


def dense_name(codes: str) -> str:
    """Return the name of the dense weight whose codes are a tensor of this name."""
    return codes.removesuffix("_packed").removesuffix("_blocks")


def _coded(store: Store, name: str, sizes: Sizes) -> Coded | None:
    """Describe the weight whose codes are ``name``; None for any other tensor."""
    if is_scale(name):
        return None
    dtype, stem, found = store.dtype(name), name.rpartition(".")[0], None
    scales = [f"{name}{ending}" for ending in AFTER]
    scales += [f"{stem}.{ending}" for ending in INSTEAD] if name.endswith(".weight") else []
    if dtype in SMALL_FLOATS:
        found = _fitted(store, name, scales, sizes)
    elif dtype == torch.int8 and sizes.pairs and any(scale in store.names for scale in scales):
        found = _fitted(store, name, scales, Sizes((1, 32)), packed=True)
    elif dtype == torch.uint8 and name.endswith("_blocks") and len(store.shape(name)) in (3, 4):
        found = _blocks(store, name)
    elif dtype == torch.uint8 and name.endswith(".weight_packed"):
        found = _fitted(store, name, [f"{stem}.weight_scale"], sizes, packed=True)
        second = f"{stem}.weight_global_scale"
        found = replace(found, second=second if second in store.names else None, divides=True)
    elif dtype == torch.uint8 and f"{name}_scale_2" in store.names:  # ModelOpt
        found = replace(_fitted(store, name, scales, Sizes((1, 16)), packed=True), second=f"{name}_scale_2")
    return found


def _blocks(store: Store, name: str) -> Coded:
    """Describe gpt-oss's blocks (experts, out, blocks, 16 bytes) with a scale for each block of 32 inputs."""
    scale, shape = f"{name.removesuffix('_blocks')}_scales", store.shape(name)
    _need(store, name, [scale])
    if store.shape(scale) != shape[:-1] or store.dtype(scale) != torch.uint8:
        raise NearplaneError(_misfit(store, name, scale))
    *first, rows, blocks, width = shape
    sizes, grid = (*first, rows, blocks * width * 2), (*first, rows, blocks)
    return Coded(name, scale, sizes, grid, (1, 2 * width), packed=True, turned=True)


def _fitted(store: Store, name: str, scales: list[str], sizes: Sizes, *, packed: bool = False) -> Coded:
    """Describe a weight, its scales fitted to its shape. Raises NearplaneError where they do not fit."""
    scale = _need(store, name, scales)
    stored = store.shape(name)
    shape = (*stored[:-1], 2 * stored[-1]) if packed and stored else stored
    grid = _grid(shape, store.shape(scale))
    if grid is None or len(shape) not in (2, 3) or store.dtype(scale) in (torch.int8, torch.int32, torch.int64):
        raise NearplaneError(_misfit(store, name, scale))
    rows, columns = shape[-2:]
    wanted = sizes.block
    halves = "gate_up" in name and wanted[0] is not None and _halved(rows, grid[-2], wanted[0])
    block = (wanted[0] if halves else _block(rows, grid[-2], wanted[0]), _block(columns, grid[-1], wanted[1]))
    if block[0] is None or block[1] is None or (len(shape) == 3 and grid[0] not in (1, shape[0])):
        raise NearplaneError(_misfit(store, name, scale))
    return Coded(name, scale, shape, grid, (block[0], block[1]), halves, packed)


def _need(store: Store, name: str, scales: list[str]) -> str:
    """Return the first of these scales that exists. Raises NearplaneError where none does."""
    found = next((scale for scale in scales if scale in store.names), None)
    if found is None:
        raise NearplaneError(
            f"{store.folder}: {name} is stored as {str(store.dtype(name))[6:]} without its scale ({scales[0]}), so its "
            "values are unknown; download the model again."
        )
    return found


def _misfit(store: Store, name: str, scale: str) -> str:
    """Write the sentence about scales that do not fit their weight."""
    shapes = f"{list(store.shape(scale))} ({str(store.dtype(scale))[6:]})", f"{list(store.shape(name))}"
    return (
        f"{store.folder}: the scales {scale} of shape {shapes[0]} do not fit {name} of shape {shapes[1]} in the blocks that "
        "its quantization_config names; download the model again."
    )


def _grid(shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the number of scales along each dimension of a weight; None where the shapes do not fit."""
    ones = (1,) * len(shape)
    if prod(scale) == 1:
        return ones
    if len(scale) == len(shape):
        return scale
    if len(scale) < len(shape) and scale == shape[: len(scale)]:  # one per row, or per matrix
        return (*scale, *ones[len(scale) :])
    return None


def _block(size: int, parts: int, wanted: int | None) -> int | None:
    """Return how many of ``size`` share one of ``parts`` scales; None where that does not fit ``wanted``."""
    if parts == 1:
        return size
    if wanted is not None and -(-size // wanted) == parts:
        return wanted
    if parts == size:
        return 1
    return size // parts if wanted is None and size % parts == 0 else None


def _halved(rows: int, parts: int, wanted: int) -> bool:
    """Tell whether blocks begin anew at the middle row, where up follows gate."""
    return rows % 2 == 0 and -(-rows // wanted) != parts == 2 * -(-(rows // 2) // wanted)


def _number(value: Tensor) -> Tensor:
    """Convert stored scales to float32; bytes are exponents."""
    if value.dtype.itemsize == 1 and value.dtype not in SMALL_FLOATS:
        return POWERS[value.view(torch.uint8).int()]
    return value.float()


def _fill(result: Tensor, codes: Tensor, scale: Tensor, coded: Coded, first: int) -> None:
    """Write codes times scales into ``result`` (rows, columns); ``first``: place of its first row in the weight."""
    (height, width), (rows, columns) = coded.block, coded.shape[-2:]
    row = torch.arange(first, first + len(result))
    if coded.halves:
        half = rows // 2
        row = row % half // height + row // half * -(-half // height)
    else:
        row = row // height
    column = torch.arange(columns) // width
    for some in _slices(len(result), columns):
        values, each = _values(codes[some], coded.packed), scale[row[some]] if len(scale) > 1 else scale
        if columns % width:
            torch.mul(values, each[:, column], out=result[some])
        else:  # without a scale for each column in memory
            blocks = (len(values), -1, width)
            torch.mul(values.view(blocks), each[..., None], out=result[some].view(blocks))


def _values(codes: Tensor, packed: bool) -> Tensor:
    """Look up the numbers of codes (rows, columns), or of two codes a byte."""
    table = PAIRS if packed else EIGHT[codes.dtype]
    found = torch.index_select(table, 0, codes.reshape(-1).view(torch.uint8).int())
    return found.view(torch.float32).view(len(codes), -1)


def _slices(rows: int, columns: int) -> Iterator[slice]:
    """Cut rows into slices of at most ``AT_ONCE`` elements."""
    step = max(1, AT_ONCE // columns)
    return (slice(first, first + step) for first in range(0, rows, step))
