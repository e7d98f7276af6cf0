"""Which tensor of a template is which of our matrices, found by values; no table of architectures.

A template may hold rows in another order (llama.cpp permutes rows of q and k for its rotary embedding), stack experts,
merge matrices, or hold a fused one in parts. So a matrix is found by what no order of its rows changes, and its rows by
random projections. Then *every* row is compared with the row that it is taken for. Both sides may be quantized: the error
of a right row is its rounding, and its cosine far above that of a wrong row, which is about 1 / sqrt(columns).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import log, sqrt
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearplane.core.errors import NearplaneError, some_of
from nearplane.formats.gguf.file import GGUFFile

# Cosine by which a row is known; most rows of a matrix must have it. Two bits keep 0.8 on the average; of 64 columns, one
# wrong row in 10^10 reaches 0.7.
FOUND = 0.7
# Least cosine of the other rows, each of which must be nearer to its partner than to any other row: so much, or so many times
# the largest of as many random cosines. A row whose codes were clipped may be far from what it was.
LEAST, CLEAR = 0.4, 2.0
# Below this no row shows that two matrices have to do with each other; nor below so many times what chance gives.
STRANGE, CHANCE = 0.35, 1.3
# A matrix of ours is a multiple of the template's where their best ratio is further from 1.
SCALED = 0.25
# Rows that tell whether it is worth while to look at all of them.
SAMPLE = 64
# Columns of a random projection.
SKETCH = 64
# Of candidates, by what no order of rows changes, so many are compared row by row.
TRIED = 4
# Numbers that are compared at once, and at most for rows that a projection did not tell.
CHUNK, MOST_EXACT = 1 << 24, 1 << 36
# Two partners are equally good where the errors of all their rows together differ by less.
SAME = 1.05


class Piece(NamedTuple):
    """Rows of one of our matrices that are rows of a matrix in a template."""

    name: str
    at: Int[Tensor, "rows"]
    """In the template's matrix."""
    rows: Int[Tensor, "rows"]
    """In ours."""


class Slice(NamedTuple):
    """One matrix of a template; stacked experts are many."""

    tensor: str
    number: int


@dataclass(frozen=True)
class Matrix:
    """One of our matrices."""

    name: str
    shape: tuple[int, int]
    """(out, in)."""
    read: Callable[[int, int], Float[Tensor, "rows in"]] = field(compare=False)
    """Gives rows as float32: the first, and how many."""
    needed: bool = True
    """Whether the template must hold it: a quantized weight."""


@dataclass(frozen=True)
class Mapping:
    """What was found."""

    pieces: dict[Slice, list[Piece]]
    """Of every matrix that has partners; they cover all of its rows."""
    alone: list[str]
    """Tensors of the template that are matrices and have no partner."""

    def of(self, tensor: str) -> list[list[Piece]]:
        """List the pieces of each matrix of a tensor; empty where it has no partner."""
        found = {at.number: some for at, some in self.pieces.items() if at.tensor == tensor}
        return [found[index] for index in sorted(found)]

    def tensors(self) -> dict[str, list[str]]:
        """Name our matrices in each tensor that has partners."""
        found: dict[str, dict[str, None]] = {}
        for at, some in self.pieces.items():
            found.setdefault(at.tensor, {}).update({piece.name: None for piece in some})
        return {tensor: list(names) for tensor, names in found.items()}


Tick = Callable[[int, int], None]
"""Hears of the steps that are done, and all steps."""


def silent(done: int, total: int) -> None:
    """Say nothing of a search's steps."""


def find(template: GGUFFile, matrices: list[Matrix], tick: Tick = silent) -> Mapping:
    """Find the partners of a template's matrices.

    Args:
        template: a file of the same model, in any type that can be decoded.
        matrices: ours, quantized or not. Those that are ``needed`` must be found, all of their rows once.
        tick: called after each matrix of ours, and twice after each of the template: read, and compared.

    Raises:
        NearplaneError: names the matrix that is not found, fits too coarsely, or has two equally good partners.
    """
    return _Search(template, matrices, tick).run()


class _Search:
    """One search; ``free``: matrices of ours whose rows have no place yet."""

    def __init__(self, template: GGUFFile, matrices: list[Matrix], tick: Tick) -> None:
        self.template, self.tick = template, tick
        self.ours = {matrix.name: matrix for matrix in matrices}
        self.slices = [Slice(i.name, n) for i in template.tensors.values() for n in range(i.matrices)]
        self.marks: dict[Any, Tensor] = {}
        self.best: dict[str, tuple[float, str]] = {}  # by name of ours: the nearest cosine, and with which tensor
        self.pieces: dict[Slice, list[Piece]] = {}
        self.draw = torch.Generator().manual_seed(0)
        self.probes: dict[int, Tensor] = {}

    def run(self) -> Mapping:
        """Pair matrices of equal shapes, then look for the rows of what is left in each other."""
        columns = {matrix.shape[1] for matrix in self.ours.values()}
        self.slices = [at for at in self.slices if self._shape(at)[1] in columns]
        total, done = len(self.ours) + 2 * len(self.slices), 0
        for matrix in self.ours.values():
            self.marks[matrix.name] = self._mark(matrix.read, matrix.shape)
            self.tick(done := done + 1, total)
        for at in self.slices:
            self.marks[at] = self._mark(self._reader(at), self._shape(at))
            self.tick(done := done + 1, total)
        for at in self.slices:
            self._pair(at)
            self.tick(done := done + 1, total)
        for at in self.slices:
            if at not in self.pieces:
                self._gather(at)
        self._check()
        tensors = [info.name for info in self.template.tensors.values() if info.matrices]
        partial = {at.tensor for at in self.slices if at not in self.pieces}
        whole = {at: some for at, some in self.pieces.items() if at.tensor not in partial}
        return Mapping(whole, [name for name in tensors if name not in {at.tensor for at in whole}])

    def _pair(self, at: Slice) -> None:
        """Look for one of our matrices with all rows of this one. The nearest wins; a second as near is a refusal."""
        shape = self._shape(at)
        alike = [m for m in self.ours.values() if m.shape == shape]
        likely = sorted(alike, key=lambda m: -self._likeness(at, m.name))[:TRIED]
        fits: list[tuple[float, Matrix, Tensor]] = []
        for matrix in likely:
            if fits and self._likeness(at, matrix.name) < 0.8 * self._likeness(at, fits[0][1].name):
                break
            rows, error = self._align(at, [matrix])
            if rows is not None:
                fits.append((error, matrix, rows))
        if not fits:
            return
        fits.sort(key=lambda fit: fit[0])
        error, matrix, rows = fits[0]
        for other, second, _ in fits[1:]:
            if other <= SAME * error + 1e-9 and (matrix.needed or second.needed):
                raise NearplaneError(
                    f"tensor {at.tensor} of {self.template.path} is as near to {_plain(second.name)} as to "
                    f"{_plain(matrix.name)}; which of them it is cannot be told by values."
                )
        taken = [where for where, some in self.pieces.items() if any(piece.name == matrix.name for piece in some)]
        if taken and matrix.needed:
            raise NearplaneError(
                f"tensors {taken[0].tensor} and {at.tensor} of {self.template.path} are both nearest to "
                f"{_plain(matrix.name)}; which of them it is cannot be told by values."
            )
        if not taken:
            self.pieces[at] = [Piece(matrix.name, torch.arange(shape[0]), rows)]

    def _gather(self, at: Slice) -> None:
        """Look for the rows of a matrix in several of ours, or in a larger one."""
        placed = {piece.name: 0 for some in self.pieces.values() for piece in some}
        for some in self.pieces.values():
            for piece in some:
                placed[piece.name] += len(piece.rows)
        rows, columns = self._shape(at)
        free = [
            m for m in self.ours.values()
            if m.needed and m.shape[1] == columns and m.shape[0] != rows and placed.get(m.name, 0) < m.shape[0]
        ]  # fmt: skip
        likely = sorted(free, key=lambda m: -self._likeness(at, m.name))[: 2 * TRIED]
        if sum(m.shape[0] for m in likely) < rows:
            return
        found, _ = self._align(at, likely)
        if found is None:
            return
        starts = torch.tensor([0, *(m.shape[0] for m in likely)]).cumsum(0)
        pieces = []
        for number, matrix in enumerate(likely):
            mine = ((found >= starts[number]) & (found < starts[number + 1])).nonzero().flatten()
            if len(mine):
                pieces.append(Piece(matrix.name, mine, found[mine] - starts[number]))
        self.pieces[at] = pieces

    def _align(self, at: Slice, matrices: list[Matrix]) -> tuple[Tensor | None, float]:
        """Find the row of ours (counted through all ``matrices``) for each row of a template's matrix.

        Returns:
            Distinct rows, or None where one has no partner; and the share of all squares that is error.
        """
        shape = self._shape(at)
        theirs = self._reader(at)
        rows: Tensor | None = None
        if len(matrices) == 1 and matrices[0].shape == shape:
            cosines, ratio, error = self._compare(theirs, matrices[0].read, shape)
            rows = torch.arange(shape[0]) if float((cosines >= FOUND).double().mean()) > 0.5 else None
        if rows is None:
            if shape[0] * shape[1] > MOST_EXACT // 64:
                return None, 1.0
            a, b = theirs(0, shape[0]), torch.cat([m.read(0, m.shape[0]) for m in matrices])
            rows, cosines = self._match(a, b)
            a, b = a.double(), b[rows].double()
            ratio = float((a * b).sum() / a.square().sum().clamp_min(1e-300))
            error = float((a - b).square().sum() / a.square().sum().clamp_min(1e-300))
        typical = float(cosines.median())
        for matrix in matrices:
            self.best[matrix.name] = max(self.best.get(matrix.name, (-1.0, "")), (typical, at.tensor))
        if typical < FOUND or len(cosines) < len(rows) or not self._nearest(theirs, matrices, rows, cosines):
            return None, error
        if abs(ratio - 1) > SCALED:
            raise NearplaneError(
                f"tensor {at.tensor} of {self.template.path} is {some_of([_plain(m.name) for m in matrices])} times "
                f"{1 / ratio:.4g}; a template that scales weights cannot take our codes."
            )
        return rows, error

    def _nearest(
        self, theirs: Callable[[int, int], Tensor], matrices: list[Matrix], rows: Tensor, cosines: Tensor
    ) -> bool:
        """Tell whether the rows that are not known by their cosine alone are nearer to their partners than to any other."""
        low = (cosines < FOUND).nonzero().flatten()
        if not len(low):
            return True
        many = sum(m.shape[0] * m.shape[1] for m in matrices)
        least = min(LEAST, CLEAR * _chance(sum(m.shape[0] for m in matrices), matrices[0].shape[1]))
        if float(cosines.min()) < least or len(low) * many > MOST_EXACT:
            return False
        a = torch.cat([theirs(int(row), 1) for row in low])
        best = torch.cat([_similar(a, m.read(0, m.shape[0])) for m in matrices], 1).amax(1)
        return bool((cosines[low] >= best - 1e-5).all())

    def _compare(
        self, theirs: Callable[[int, int], Tensor], ours: Callable[[int, int], Tensor], shape: tuple[int, int]
    ) -> tuple[Tensor, float, float]:
        """Compare equal rows: the cosine of each, the ratio of all, and the error's share of the squares."""
        cosines, sums = [], torch.zeros(3, dtype=torch.float64)
        for first, count in _steps(shape):
            a, b = theirs(first, count), ours(first, count)
            cosines.append(_cosines(a, b))
            parts = (
                (a * b).sum(1).double().sum(),
                a.square().sum(1).double().sum(),
                (a - b).square().sum(1).double().sum(),
            )
            sums += torch.stack(parts)
            if (
                float((cosines[-1] < FOUND).double().mean()) > 0.5
            ):  # another order, or another matrix: the rest tells no more
                break
        square = max(float(sums[1]), 1e-300)
        return torch.cat(cosines), float(sums[0]) / square, float(sums[2]) / square

    def _match(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Give each row of ``a`` a row of ``b`` of its own, by projections, where they do not tell by all columns."""
        probe = self._probe(a.shape[1])
        left, right = _unit(_unit(a) @ probe), _unit(_unit(b) @ probe)
        some = torch.linspace(0, len(a) - 1, min(len(a), SAMPLE)).long()
        cosines = _cosines(a[some], b[(left[some] @ right.T).argmax(1)])
        if float((cosines >= FOUND).float().mean()) < 0.5:  # another matrix
            return torch.zeros(len(a), dtype=torch.long), cosines
        nearest = torch.cat([(part @ right.T).argmax(1) for part in torch.split(left, max(1, CHUNK // len(b)))])
        cosines = _cosines(a, b[nearest])
        # Of several rows with one partner the nearest keeps it.
        order = torch.argsort(cosines, descending=True, stable=True)
        first = torch.zeros(len(b), dtype=torch.bool)
        good = torch.zeros(len(a), dtype=torch.bool)
        for row, partner in zip(order.tolist(), nearest[order].tolist(), strict=True):
            if cosines[row] < FOUND:
                break
            good[row] = not first[partner]
            first[partner] = True
        lost, free = (~good).nonzero().flatten(), (~first).nonzero().flatten()
        if not len(lost) or len(lost) * len(free) * a.shape[1] > MOST_EXACT or len(lost) > len(free):
            return nearest, cosines if not len(lost) else cosines.masked_fill(~good, -1)
        from scipy.optimize import linear_sum_assignment

        table = _similar(a[lost], b[free])
        _, chosen = linear_sum_assignment(table.numpy(), maximize=True)
        nearest[lost] = free[torch.as_tensor(chosen)]
        cosines[lost] = table[torch.arange(len(lost)), torch.as_tensor(chosen)]
        return nearest, cosines

    def _check(self) -> None:
        """Refuse where rows of a needed matrix have no place, or two."""
        count = {m.name: torch.zeros(m.shape[0], dtype=torch.int32) for m in self.ours.values() if m.needed}
        for some in self.pieces.values():
            for piece in some:
                if piece.name in count:
                    count[piece.name][piece.rows] += 1
        twice = [name for name, rows in count.items() if int(rows.max()) > 1]
        if twice:
            raise NearplaneError(
                f"rows of {_plain(twice[0])} are in several tensors of {self.template.path}; which of them they are cannot be "
                "told by values."
            )
        lost = [name for name, rows in count.items() if int(rows.min()) < 1]
        if not lost:
            return
        near, tensor = self.best.get(lost[0], (-1.0, ""))
        rows, columns = self.ours[lost[0]].shape
        if near < max(STRANGE, CHANCE * _chance(rows, columns)):
            raise NearplaneError(
                f"{self.template.path} is of another model: it holds no rows of {_plain(lost[0])} ({rows} x {columns}) in "
                f"whatever order, nor of {len(lost) - 1} more linears; give a GGUF of the original model."
            )
        if near >= FOUND:
            raise NearplaneError(
                f"{_plain(lost[0])} is {tensor} of {self.template.path} by most of its rows (typical cosine {near:.2f}), and "
                "some are like no row of that; either the template is of a changed model, or quantizing spoiled these rows: "
                "calibrate on more tokens, or take more bits."
            )
        raise NearplaneError(
            f"{self.template.path} is too coarse to match: {_plain(lost[0])} is nearest to {tensor}, with a typical cosine of "
            f"{near:.2f} of their rows; most must have {FOUND}; give a finer GGUF of the original, as F16 or Q8_0."
        )

    def _shape(self, at: Slice) -> tuple[int, int]:
        info = self.template.tensors[at.tensor]
        return info.rows, info.columns

    def _reader(self, at: Slice) -> Callable[[int, int], Tensor]:
        base = at.number * self.template.tensors[at.tensor].rows
        return lambda first, count: self.template.values(at.tensor, base + first, count)

    def _probe(self, columns: int) -> Tensor:
        """Give the random projection of so many columns; below 64 columns none is needed."""
        if columns not in self.probes:
            wide = columns > SKETCH
            drawn = torch.randn(columns, SKETCH, generator=self.draw) / sqrt(SKETCH) if wide else torch.eye(columns)
            self.probes[columns] = drawn
        return self.probes[columns]

    def _mark(self, read: Callable[[int, int], Tensor], shape: tuple[int, int]) -> Tensor:
        """Compute what no order of rows changes: the sum of rows, and the second moment times a random vector."""
        probe = self._probe(shape[1])[:, 0]
        total, moment = torch.zeros(shape[1]), torch.zeros(shape[1])
        for first, count in _steps(shape):
            part = read(first, count)
            total += part.sum(0)
            moment += part.T @ (part @ probe)
        return torch.stack([_unit(total), _unit(moment)])

    def _likeness(self, at: Slice, name: str) -> float:
        return float((self.marks[at] * self.marks[name]).sum())


def _chance(rows: int, columns: int) -> float:
    """Estimate the largest of the cosines between one row and so many random rows."""
    return sqrt(2 * log(rows + 1) / columns)


def _plain(name: str) -> str:
    """Give a linear's name."""
    return name.removesuffix(".weight")


def _steps(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Cut rows into runs of some megabytes: first row, number of rows."""
    step = max(1, CHUNK // shape[1])
    return ((first, min(step, shape[0] - first)) for first in range(0, shape[0], step))


def _unit(rows: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / length.clamp_min(1e-30)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of rows; of two rows of zeros 1."""
    return torch.where(_zero(a) & _zero(b), torch.ones(len(a)), (_unit(a) * _unit(b)).sum(1))


def _similar(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of all rows with all others; of two rows of zeros 1."""
    return torch.where(_zero(a)[:, None] & _zero(b), torch.ones(()), _unit(a) @ _unit(b).T)


def _zero(rows: Tensor) -> Tensor:
    return (rows != 0).sum(1) == 0
