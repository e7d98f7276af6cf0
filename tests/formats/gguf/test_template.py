"""Partners by values: whatever the order of rows, merged, stacked, rounded; and what cannot be told is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Grid, dequantize, fit_groups, round_to_nearest
from nearplane.formats.gguf.file import GGUFFile
from nearplane.formats.gguf.format import _numbers, _short
from nearplane.formats.gguf.template import Mapping, Matrix, Slice, find

Make = Callable[..., GGUFFile]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def write(tensors: dict[str, Tensor], type: str = "F16") -> GGUFFile:
        writer = gguf.GGUFWriter(tmp_path / "t.gguf", "any")
        for name, value in tensors.items():
            data = value.numpy().astype(np.float32)
            kind = gguf.GGMLQuantizationType[type]
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return GGUFFile(tmp_path / "t.gguf")

    return write


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shuffled(rows: int, seed: int = 9) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


def matrix(name: str, value: Tensor, bits: int | None = None, **kind: Any) -> Matrix:
    """A matrix of ours, rounded to so many bits."""
    if bits is not None:
        grid = Grid(bits, 32)
        value = dequantize(round_to_nearest(value, *fit_groups(value, grid), grid), grid)
    return Matrix(name, (value.shape[0], value.shape[1]), lambda first, count: value[first : first + count], **kind)


def whole(found: Mapping, tensor: str) -> list[tuple[str, list[int], list[int]]]:
    return [(piece.name, piece.at.tolist(), piece.rows.tolist()) for piece in found.of(tensor)[0]]


@pytest.mark.parametrize("bits", [None, 4, 2])
@pytest.mark.parametrize("type", ["F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("columns", [64, 256])
def test_rows_are_found_in_any_order_though_both_sides_are_rounded(
    make: Make, bits: int | None, type: str, columns: int
) -> None:
    ours = {f"w{i}": drawn(48, columns, seed=i) for i in range(5)}
    orders = {name: shuffled(48, seed=i) for i, name in enumerate(ours)}
    file = make({f"t.{name}": value[orders[name]] for name, value in ours.items()}, type)
    found = find(file, [matrix(name, value, bits) for name, value in ours.items()])
    for name, order in orders.items():
        assert whole(found, f"t.{name}") == [(name, list(range(48)), order.tolist())]
    assert not found.alone


def test_merged_stacked_and_divided_matrices_are_found_by_their_rows(make: Make) -> None:
    gate, up, qkv = drawn(32, 64, seed=1), drawn(48, 64, seed=2), drawn(96, 64, seed=3)
    experts = drawn(4, 16, 64, seed=4)
    both = torch.cat([up, gate])[(order := shuffled(80))]
    parts = {"q": qkv[:48][shuffled(48)], "k": qkv[48:72], "v": qkv[72:]}
    file = make(
        {"both": both, **parts, "exps": experts[[2, 0, 3, 1]], "extra": drawn(8, 64, seed=7), "norm": drawn(64)}
    )
    ours = [matrix("gate", gate, 4), matrix("up", up, 4), matrix("qkv", qkv, 4)]
    ours += [matrix(f"e{i}", expert, 4) for i, expert in enumerate(experts)]
    found = find(file, ours)
    pieces = {name: (torch.tensor(at), torch.tensor(rows)) for name, at, rows in whole(found, "both")}
    assert torch.equal(torch.cat([up, gate])[order][pieces["gate"][0]], gate[pieces["gate"][1]])
    assert torch.equal(both[pieces["up"][0]], up[pieces["up"][1]])
    assert [whole(found, name)[0][2] for name in ("q", "k", "v")] == [
        shuffled(48).tolist(), list(range(48, 72)), list(range(72, 96))
    ]  # fmt: skip
    assert [pieces[0].name for pieces in found.of("exps")] == ["e2", "e0", "e3", "e1"]
    assert found.pieces[Slice("exps", 1)][0].rows.tolist() == list(range(16))
    assert found.alone == ["extra"]


def test_equal_rows_and_rows_of_zeros_have_a_place_each(make: Make) -> None:
    value = drawn(16, 64)
    value[3] = value[7]
    value[[5, 9]] = 0
    found = find(make({"t": value[shuffled(16)]}), [matrix("w", value)])
    ((_, _, rows),) = whole(found, "t")
    assert sorted(rows) == list(range(16)) and torch.equal(value[rows], value[shuffled(16)])


def test_a_dense_matrix_that_is_not_there_is_no_error(make: Make) -> None:
    value = drawn(16, 64)
    found = find(make({"t": value}), [matrix("w", value), matrix("d", drawn(16, 64, seed=5), needed=False)])
    assert found.tensors() == {"t": ["w"]}


def test_what_values_do_not_tell_is_refused(make: Make) -> None:
    value, other = drawn(16, 64), drawn(16, 64, seed=1)
    with pytest.raises(
        NearplaneError, match=r"tensor t of .* is as near to (a|b) as to (a|b); which of them it is cannot be told"
    ):
        find(make({"t": value}), [matrix("a", value), matrix("b", value)])
    with pytest.raises(NearplaneError, match=r"tensors t and u of .* are both nearest to a; which"):
        find(make({"t": value, "u": value}), [matrix("a.weight", value), matrix("b", other)])
    with pytest.raises(NearplaneError, match=r"is of another model: it holds no rows of a \(16 x 64\)"):
        find(make({"t": other}), [matrix("a.weight", value)])
    with pytest.raises(NearplaneError, match=r"is of another model: it holds no rows of a \(16 x 96\)"):
        find(make({"t": other}), [matrix("a", drawn(16, 96))])
    with pytest.raises(
        NearplaneError, match=r"is too coarse to match: a is nearest to t, with a typical cosine of 0\.[456]"
    ):
        find(make({"t": value + 1.5 * other}), [matrix("a", value)])
    with pytest.raises(NearplaneError, match=r"tensor t of .* is a times 2; a template that scales weights"):
        find(make({"t": 2 * value}), [matrix("a", value)])
    with pytest.raises(NearplaneError, match="is of another model: it holds no rows of b"):
        find(make({"t": value}), [matrix("a", value), matrix("b", other)])


def test_one_wrong_row_is_enough_to_refuse(make: Make) -> None:
    value = drawn(32, 64)
    changed = value.clone()
    changed[11] = drawn(64, seed=3)
    with pytest.raises(
        NearplaneError, match=r"a is t of .* by most of its rows \(typical cosine 1\.00\), and some are like no row"
    ):
        find(make({"t": changed[shuffled(32)]}), [matrix("a", value)])


def test_a_row_that_quantizing_spoiled_has_its_partner_still(make: Make) -> None:
    """Clipped codes left one row of a real matrix a cosine of 0.38: far above what chance gives over so many columns."""
    value = drawn(96, 1536)
    spoiled = value.clone()
    spoiled[50] = value[50] + 2.7 * drawn(1536, seed=5)
    assert 0.33 < float(torch.cosine_similarity(value[50], spoiled[50], 0)) < 0.4
    found = find(make({"t": value}), [matrix("a", spoiled)])
    piece = next(iter(found.pieces.values()))[0]
    assert torch.equal(piece.at, torch.arange(96)) and torch.equal(piece.rows, torch.arange(96))


@pytest.mark.parametrize(
    "rows",
    [
        torch.arange(12), torch.arange(12).view(2, 2, 3).transpose(1, 2).flatten(), torch.arange(5, 9), torch.tensor([3]),
        torch.arange(24).view(2, 3, 4).transpose(0, 1).flatten(), shuffled(12), torch.tensor([4, 2]),
    ],
)  # fmt: skip
def test_row_numbers_are_written_short_and_read_back(rows: Tensor) -> None:
    told = _short(rows)
    again = _numbers(told, len(rows))
    assert again is not None and torch.equal(again, rows)
    assert _numbers(told, len(rows) + 1) is None
