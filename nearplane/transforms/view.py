"""View a source with some tensors changed, each computed when it is read.

A ``Transform`` gives an equivalent model: the same outputs from other weights. ``ChangedStore.get`` computes
a changed tensor anew at every read, so that changed tensors take no memory of their own.

A rotation is such a transform. Every vector x of the residual stream becomes x R (R1). Each tensor that touches the stream
is replaced by one with the same effect on x R. The values that attention passes on are rotated head by head (R2).
The scale of a norm moves into the linears that read the norm first, because only a norm without scale commutes with R.
All of this is computed in float64, a slice of rows at a time. The mathematics is in docs/rotation.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from nearplane.core.errors import SettingError
from nearplane.formats.store import Store, Twice
from nearplane.models.source import Source, without_tie
from nearplane.transforms.hadamard import Rotation, online, rotation
from nearplane.transforms.hooks import KEY
from nearplane.transforms.roles import Anatomy, Norm

# Elements that are rotated at a time, in float64.
AT_ONCE = 1 << 21
# A shift that stays in its norm is divided by the norm's scale: the least scale for that, relative to the largest.
LEAST_SCALE = 1e-6
Turn = Callable[[Tensor], Tensor]


class Change(NamedTuple):
    """A changed tensor: the stored tensor ``like`` with its shape and dtype, and a function that makes the values."""

    like: str
    make: Callable[[], Tensor]


class Transform(Protocol):
    """An equivalent model: the same outputs from other weights. A user's own class needs no registration.

    Fields of a frozen dataclass are its settings; the report and the identity of a resumed run hold them.
    """

    def promise(self, source: Source) -> Source:
        """Return a view with the sizes that ``apply`` will give; reads no weight.

        Raises:
            SettingError: the transform does not apply to this model.
        """

    def apply(self, source: Source, device: torch.device) -> Source:
        """Return the view whose tensors are changed as they are read, proved to be the same model."""


class ChangedStore(Store):
    """A store with some tensors changed or added."""

    def __init__(self, original: Store, changes: dict[str, Change]) -> None:
        """Wrap ``original``; ``changes``: by name on disk."""
        self.original, self.changes = original, changes
        self.folder, self.names = original.folder, original.names | changes.keys()

    def get(self, name: str) -> Tensor:
        """Read a tensor. A changed one is float32 at least, and not yet rounded to its stored dtype."""
        return self.changes[name].make() if name in self.changes else self.original.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; reads no data."""
        return self.original.shape(self._like(name))

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor will be stored in."""
        return self.original.dtype(self._like(name))

    def nbytes(self, name: str) -> int:
        """Return a tensor's size in bytes in that dtype."""
        return self.original.nbytes(self._like(name))

    def reading(self, name: str) -> int:
        """Count the bytes of memory that reading the stored tensor takes."""
        return self.original.reading(self._like(name))

    def rejoined(self, quantized: set[str]) -> frozenset[str]:
        """Return the names to copy beside the ``quantized`` ones. What is stored fused stays so where no part is changed."""
        changed = set(self.changes)
        return self.original.rejoined(quantized | changed) | (changed - quantized)

    def _like(self, name: str) -> str:
        return self.changes[name].like if name in self.changes else name


@dataclass
class ChangedSource(Source):
    """A source with a ``ChangedStore``."""

    inner: Source | None = None  # the source that was changed

    def written_config(self) -> dict[str, Any]:
        """Return config.json as the changed source has it: a transform before this one may have changed it."""
        return super().written_config() if self.inner is None else self.inner.written_config()

    @property
    def original(self) -> Store:
        """The tensors on disk, before any transform."""
        store = self.store
        while isinstance(store, ChangedStore):
            store = store.original
        return store.store if isinstance(store, Twice) else store

    def digest(self, name: str, value: Tensor) -> str:
        """Hash the original tensor: the last digits of a changed one depend on the number of threads."""
        return super().digest(name, self.original.get(name)) if name in self.original.names else ""


@dataclass
class RotatedSource(ChangedSource):
    """A rotated source, whose output head may have become a tensor of its own."""

    untied: bool = False
    online: list[str] = field(default_factory=list)  # linears whose inputs are rotated while the model runs

    def written_config(self) -> dict[str, Any]:
        """Return config.json for the rotated weights."""
        entry = {**self.settings["rotate"], **({"online": self.online} if self.online else {})}
        raw = {**super().written_config(), KEY: entry}
        return without_tie(raw) if self.untied else raw


def changed(source: Source, name: str, changes: dict[str, Change], settings: dict[str, Any]) -> ChangedSource:
    """View a source with some tensors changed.

    Args:
        source: the source to wrap.
        name: name of the transform, for the report.
        changes: changed tensors by name on disk.
        settings: settings of the transform, JSON values.
    """
    parts = (source.name, source.folder, source.config, ChangedStore(source.store, changes), source.model, source.names)
    merged = {**source.settings, name: settings}
    return ChangedSource(*parts, source.trust_remote_code, merged, list(source.notes), inner=source)


class Changes:
    """The changes that rotations make to the tensors of a model."""

    def __init__(self, source: Source, anatomy: Anatomy, kinds: tuple[str, ...], seed: int) -> None:
        """Make the rotations.

        Args:
            source: the model.
            anatomy: the roles of its modules.
            kinds: names of rotations, of r1, r2, r3 and r4.
            seed: seed of all rotations.
        """
        self.source, self.anatomy, self.store = source, anatomy, source.store
        self.stream: Rotation | None = None
        self.heads: dict[str, Rotation] = {}  # of output projections, whose columns are heads
        self.values: dict[str, tuple[Rotation, list[int]]] = {}  # of value projections, with each head's first row
        self.changes: dict[str, Change] = {}
        self.centred = any(norm.centred for norm in anatomy.norms.values())
        if "r1" in kinds:
            self.stream = rotation(anatomy.width, seed, keeps_mean=self.centred)
        self.inputs: dict[str, Rotation] = {}  # of linears whose inputs are rotated while the model runs
        if "r4" in kinds:
            self.inputs = {n: online(self._columns(n), seed) for n in anatomy.writes if n not in anatomy.heads}
        self.kinds = kinds
        for k, (name, heads) in enumerate(anatomy.heads.items() if "r2" in kinds else ()):
            self.heads[name] = turn = rotation(heads.width, seed + 1 + k)
            for linear, row in dict.fromkeys(heads.sources):
                self.values.setdefault(linear, (turn, []))[1].append(row)

    def words(self) -> str:
        """Describe the rotations for the user."""
        words = [] if self.stream is None else [f"r1 ({self.stream})"]
        words += [f"r2 ({turn})" for turn in list(self.heads.values())[:1]]
        words += ["r3 (of keys, where a cache is rounded)"] if "r3" in self.kinds else []
        words += [f"r4 ({turn})" for turn in list(self.inputs.values())[:1]]
        return ", ".join(words)

    def all(self) -> dict[str, Change]:
        """Return the changes by name on disk."""
        anatomy = self.anatomy
        kept = {name: self._stays(norm) for name, norm in anatomy.norms.items()} if self.stream else {}
        touched = [*anatomy.reads, *anatomy.writes] if self.stream else []
        for name in dict.fromkeys([*touched, *self.heads, *self.values, *self.inputs]):
            self._linear(name, kept)
        if self.stream is None:
            return self.changes
        for name in anatomy.embeddings:
            disk = self.source.names[f"{name}.weight"]
            self._set(disk, disk, partial(self._embedding, disk))
        for norm in anatomy.norms.values():
            self._norm(norm, kept[norm.name])
        return self.changes

    def _set(self, name: str, like: str, make: Callable[[], Tensor]) -> None:
        """Note a change of the tensor ``name``."""
        self.changes[name] = Change(like, make)

    def _into_stream(self, x: Tensor) -> Tensor:
        """Rotate rows that are added to the stream, centred if every reader subtracts the mean."""
        assert self.stream is not None
        return self.stream.apply(x - x.mean(-1, keepdim=True) if self.centred else x)

    def _embedding(self, disk: str) -> Tensor:
        """Rotate an embedding."""
        return _turned(self.store.get(disk), self._into_stream)

    def _linear(self, name: str, kept: dict[str, bool]) -> None:
        """Note the changes of a linear's weight and bias."""
        module, names = self.source.model.get_submodule(name), self.source.names
        norm = self.anatomy.norms.get(self.anatomy.reads.get(name, "")) if self.stream else None
        target = f"{name}.weight"
        disk = names.get(target)
        if disk is None:  # a tied head becomes a tensor of its own
            embedding = self.source.model.get_input_embeddings()  # type: ignore[operator]
            disk = next(names[f"{n}.weight"] for n, m in self.source.model.named_modules() if m is embedding)
            self._set(target, disk, lambda: self._weight(name, disk, norm, False))
        else:
            self._set(disk, disk, lambda: self._weight(name, disk, norm, isinstance(module, Conv1D)))
        bias = names.get(f"{name}.bias")
        if bias is None:
            return
        shift = norm if norm is not None and not kept[norm.name] else None
        if shift is not None or self._rows_turn(name):
            self._set(bias, bias, lambda: self._bias(name, bias, disk, shift, isinstance(module, Conv1D)))

    def _rows_turn(self, name: str) -> list[Turn]:
        """Return the rotations of a linear's output."""
        turns: list[Turn] = []
        if name in self.values:
            turn, rows = self.values[name]

            def by_heads(y: Tensor) -> Tensor:
                y = y.clone()
                for row in rows:
                    y[..., row : row + turn.order] = turn.apply(y[..., row : row + turn.order])
                return y

            turns.append(by_heads)
        if self.stream is not None and name in self.anatomy.writes:
            turns.append(self._into_stream)
        return turns

    def _weight(self, name: str, disk: str, norm: Norm | None, transposed: bool) -> Tensor:
        """Compute a linear's weight, with the scale of the norm that the linear reads."""
        weight = self.store.get(disk)
        weight = weight.T if transposed else weight
        if norm is not None:
            scale, stream = self._scale(norm), self.stream
            assert stream is not None
            weight = _turned(weight, lambda w: stream.apply(w * scale))
        if name in self.heads:
            turn = self.heads[name]
            weight = _turned(weight, lambda w: turn.apply(w.reshape(len(w), -1, turn.order)).flatten(-2))
        if name in self.inputs:
            weight = _turned(weight, self.inputs[name].apply)
        for rows in self._rows_turn(name):
            weight = _turned(weight.T, rows).T
        return (weight.T if transposed else weight).contiguous()

    def _bias(self, name: str, bias: str, disk: str, norm: Norm | None, transposed: bool) -> Tensor:
        """Compute a linear's bias, with the shift of the norm that the linear reads."""
        stored = self.store.get(bias)
        b = stored.double()
        if norm is not None and norm.bias:
            weight = self.store.get(disk)
            weight = weight.T if transposed else weight
            shift = self._vector(norm, "bias")
            step = max(1, AT_ONCE // weight.shape[1])
            b = b + torch.cat([weight[i : i + step].double() @ shift for i in range(0, len(weight), step)])
        for turn in self._rows_turn(name):
            b = turn(b)
        return b.to(_at_least_float32(stored))

    def _norm(self, norm: Norm, kept: bool) -> None:
        """Note the changes of a norm: no scale, and a shift only if ``kept``."""
        weight, bias = (self.source.names.get(f"{norm.name}.{part}") for part in ("weight", "bias"))
        if weight is not None:
            self._set(weight, weight, lambda: torch.full_like(self.store.get(weight), norm.unit))
        if bias is not None and kept:
            stream = self.stream
            assert stream is not None
            like = _at_least_float32(self.store.get(bias))
            self._set(bias, bias, lambda: stream.apply(self._vector(norm, "bias") / self._scale(norm)).to(like))
        elif bias is not None:
            self._set(bias, bias, lambda: torch.zeros_like(self.store.get(bias)))

    def _columns(self, name: str) -> int:
        """Return the input width of a linear."""
        shape = self.store.shape(self.source.names[f"{name}.weight"])
        return shape[0 if isinstance(self.source.model.get_submodule(name), Conv1D) else 1]

    def _stays(self, norm: Norm) -> bool:
        """Return whether a norm keeps its shift, because a linear that reads the norm has no bias."""
        readers = [name for name, read in self.anatomy.reads.items() if read == norm.name]
        if not norm.bias or all(f"{name}.bias" in self.source.names for name in readers):
            return False
        shift, scale = self._vector(norm, "bias"), self._scale(norm).abs()
        if bool((scale[shift != 0] < LEAST_SCALE * scale.max()).any()):
            bare = next(name for name in readers if f"{name}.bias" not in self.source.names)
            raise SettingError(
                f"{self.source.folder} cannot be rotated: {bare} has no bias to take the shift of {norm.name}, whose scale "
                "is zero where its shift is not."
            )
        return bool(shift.any())

    def _scale(self, norm: Norm) -> Tensor:
        """Return the scale of a norm (width,), float64."""
        width = self.anatomy.width
        if not norm.weight:
            return torch.ones(width, dtype=torch.float64)
        return self._vector(norm, "weight") + (1 - norm.unit)

    def _vector(self, norm: Norm, part: str) -> Tensor:
        """Read a parameter of a norm (width,), float64."""
        return self.store.get(self.source.names[f"{norm.name}.{part}"]).double()


def _turned(x: Tensor, turn: Turn) -> Tensor:
    """Apply ``turn`` to the rows of a matrix in float64, one slice at a time."""
    result = torch.empty(x.shape, dtype=_at_least_float32(x))
    step = max(1, AT_ONCE // x.shape[1])
    for first in range(0, len(x), step):
        result[first : first + step] = turn(x[first : first + step].double())
    return result


def _at_least_float32(x: Tensor) -> torch.dtype:
    """Return the dtype of a changed tensor."""
    return torch.promote_types(x.dtype, torch.float32)
