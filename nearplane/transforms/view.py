"""What a rotation makes of every tensor that it touches, computed when it is read.

With x' = x R for every vector of the residual stream (R1), each tensor that touches the stream is replaced by one that
makes the same of x' as its original made of x; the values that attention passes on are turned head by head (R2). The
scales of norms move into the linears that read them first, because only a bare norm commutes with R. ``ChangedStore.get``
computes a tensor when it is asked for, in float64, a slice at a time: nothing is resident that was not before.
The mathematics is in docs/rotation.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from nearplane.core.errors import SettingError
from nearplane.formats.store import Store
from nearplane.models.source import Source
from nearplane.transforms.hadamard import Rotation, online, rotation
from nearplane.transforms.hooks import KEY
from nearplane.transforms.roles import Anatomy, Norm

# Numbers that are turned at a time, in float64.
AT_ONCE = 1 << 21
# A shift that stays in its norm is divided by the norm's scale: not by one this small beside its largest.
LEAST_SCALE = 1e-6
Turn = Callable[[Tensor], Tensor]


class Change(NamedTuple):
    """A tensor that is not as it is on disk: whose shape and dtype it has, and how it is made."""

    like: str
    make: Callable[[], Tensor]


class Transform(Protocol):
    """An equivalent model: the same outputs, other weights. A user's own class needs no entry anywhere.

    Fields of a frozen dataclass are its settings; the report and the identity of a resumed run hold them.
    """

    def promise(self, source: Source) -> Source:
        """Return a view with the sizes that ``apply`` will give, before a weight is read. SettingError where it cannot be."""

    def apply(self, source: Source, device: torch.device) -> Source:
        """Return the view whose tensors are changed as they are read, once it is known to be the same model."""


class ChangedStore(Store):
    """The tensors of a store, some of them changed, perhaps a few more."""

    def __init__(self, original: Store, changes: dict[str, Change]) -> None:
        self.original, self.changes = original, changes
        self.folder, self.names = original.folder, original.names | changes.keys()

    def get(self, name: str) -> Tensor:
        """One tensor; a changed one in float32 at least: rounding is left to whoever stores it."""
        return self.changes[name].make() if name in self.changes else self.original.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; reads no data."""
        return self.original.shape(self._like(name))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of its original, in which it is stored."""
        return self.original.dtype(self._like(name))

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in that dtype."""
        return self.original.nbytes(self._like(name))

    def _like(self, name: str) -> str:
        return self.changes[name].like if name in self.changes else name


@dataclass
class ChangedSource(Source):
    """A source whose store is a ChangedStore."""

    @property
    def original(self) -> Store:
        """The tensors on disk."""
        store = self.store
        while isinstance(store, ChangedStore):
            store = store.original
        return store

    def digest(self, name: str, value: Tensor) -> str:
        """Hash of what is on disk: the last digits of a changed tensor depend on the number of threads."""
        return super().digest(name, self.original.get(name)) if name in self.original.names else ""


@dataclass
class RotatedSource(ChangedSource):
    """A rotated source, whose output head may be its own."""

    untied: bool = False
    online: list[str] = field(default_factory=list)  # linears whose inputs are turned while the model runs

    def written_config(self) -> dict[str, Any]:
        """config.json for the rotated weights."""
        told = {**self.settings["rotate"], **({"online": self.online} if self.online else {})}
        raw = {**super().written_config(), KEY: told}
        if not self.untied:
            return raw
        nested = raw.get("text_config")
        inner = {"text_config": {**nested, "tie_word_embeddings": False}} if isinstance(nested, dict) else {}
        return {**raw, **inner, "tie_word_embeddings": False}


def changed(source: Source, name: str, changes: dict[str, Change], settings: dict[str, Any]) -> ChangedSource:
    """Return a view of a source with some tensors changed, by their names on disk.

    Args:
        name: of the transform, for the report.
        changes: what the tensors become; shapes and dtypes are those of ``Change.like``.
        settings: of the transform, for JSON.
    """
    parts = (source.name, source.folder, source.config, ChangedStore(source.store, changes), source.model, source.names)
    told = {**source.settings, name: settings}
    return ChangedSource(*parts, source.trust_remote_code, told, list(source.notes), sketch=source.sketch)


class Changes:
    """What becomes of every tensor that a rotation touches."""

    def __init__(self, source: Source, anatomy: Anatomy, kinds: tuple[str, ...], seed: int) -> None:
        self.source, self.anatomy, self.store = source, anatomy, source.store
        self.stream: Rotation | None = None
        self.heads: dict[str, Rotation] = {}  # of linears whose columns are heads
        self.values: dict[
            str, tuple[Rotation, list[int]]
        ] = {}  # of linears that give values: the first row of each head
        self.found: dict[str, Change] = {}
        self.centred = any(norm.centred for norm in anatomy.norms.values())
        if "r1" in kinds:
            self.stream = rotation(anatomy.width, seed, keeps_mean=self.centred)
        self.inputs: dict[str, Rotation] = {}  # of linears whose whole input is turned while the model runs
        if "r4" in kinds:
            self.inputs = {n: online(self._columns(n), seed) for n in anatomy.writes if n not in anatomy.heads}
        self.kinds = kinds
        for k, (name, heads) in enumerate(anatomy.heads.items() if "r2" in kinds else ()):
            self.heads[name] = turn = rotation(heads.width, seed + 1 + k)
            for linear, row in dict.fromkeys(heads.sources):
                self.values.setdefault(linear, (turn, []))[1].append(row)

    def words(self) -> str:
        """What they are made of."""
        words = [] if self.stream is None else [f"r1 ({self.stream})"]
        words += [f"r2 ({turn})" for turn in list(self.heads.values())[:1]]
        words += ["r3 (of keys, where a cache is rounded)"] if "r3" in self.kinds else []
        words += [f"r4 ({turn})" for turn in list(self.inputs.values())[:1]]
        return ", ".join(words)

    def all(self) -> dict[str, Change]:
        """By name on disk."""
        anatomy = self.anatomy
        kept = {name: self._stays(norm) for name, norm in anatomy.norms.items()} if self.stream else {}
        touched = [*anatomy.reads, *anatomy.writes] if self.stream else []
        for name in dict.fromkeys([*touched, *self.heads, *self.values, *self.inputs]):
            self._linear(name, kept)
        if self.stream is None:
            return self.found
        for name in anatomy.embeddings:
            disk = self.source.names[f"{name}.weight"]
            self._set(disk, disk, partial(self._embedding, disk))
        for norm in anatomy.norms.values():
            self._norm(norm, kept[norm.name])
        return self.found

    def _set(self, name: str, like: str, make: Callable[[], Tensor]) -> None:
        self.found[name] = Change(like, make)

    def _into_stream(self, x: Tensor) -> Tensor:
        """A row that is added to the stream, rotated; less its mean where every reader subtracts that."""
        assert self.stream is not None
        return self.stream.apply(x - x.mean(-1, keepdim=True) if self.centred else x)

    def _embedding(self, disk: str) -> Tensor:
        return _turned(self.store.get(disk), self._into_stream)

    def _linear(self, name: str, kept: dict[str, bool]) -> None:
        """A linear's weight and bias."""
        module, names = self.source.model.get_submodule(name), self.source.names
        norm = self.anatomy.norms.get(self.anatomy.reads.get(name, "")) if self.stream else None
        target = f"{name}.weight"
        disk = names.get(target)
        if disk is None:  # a tied head: it becomes a tensor of its own
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
        """What is done to a linear's output."""
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
        """A norm without its scale, and with its shift only where that has nowhere to go."""
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
        shape = self.store.shape(self.source.names[f"{name}.weight"])
        return shape[0 if isinstance(self.source.model.get_submodule(name), Conv1D) else 1]

    def _stays(self, norm: Norm) -> bool:
        """Whether a norm keeps its shift, because some linear that reads it has no bias to take it."""
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
        width = self.anatomy.width
        if not norm.weight:
            return torch.ones(width, dtype=torch.float64)
        return self._vector(norm, "weight") + (1 - norm.unit)

    def _vector(self, norm: Norm, part: str) -> Tensor:
        return self.store.get(self.source.names[f"{norm.name}.{part}"]).double()


def _turned(x: Tensor, turn: Turn) -> Tensor:
    """``turn`` of every row, computed in float64 by slices of rows."""
    result = torch.empty(x.shape, dtype=_at_least_float32(x))
    step = max(1, AT_ONCE // x.shape[1])
    for first in range(0, len(x), step):
        result[first : first + step] = turn(x[first : first + step].double())
    return result


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
