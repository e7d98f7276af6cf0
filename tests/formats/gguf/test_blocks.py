"""Blocks: bytes against the ``gguf`` package's decoder, and grids against blocks."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.core.grid import Grid, Quantized, dequantize, fit_groups, round_to_nearest
from nearplane.core.scales import Affine
from nearplane.formats.gguf.blocks import BLOCKS, Parts
from nearplane.formats.gguf.file import TYPES, decode
from nearplane.formats.gguf.grids import cheapest, fits, grid_of, known_type, own_type, pack, reason, refusal, unpack

THEIRS = {name: GGMLQuantizationType[name] for name in BLOCKS if name != "Q2_0"}  # newer than the package


def weight(rows: int = 24, columns: int = 512) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / 50


def solved(grid: Grid, value: torch.Tensor) -> Quantized:
    return round_to_nearest(value, *fit_groups(value, grid), grid)


def test_numbers_and_sizes_are_the_packages() -> None:
    for name, (number, size, nbytes) in TYPES.items():
        if name in ("Q2_0", "Q8_1"):  # of Q8_1 the package says 40 bytes, ggml itself 36; no file holds such a tensor
            continue
        kind = GGMLQuantizationType[name]
        assert (int(kind), *GGML_QUANT_SIZES[kind]) == (number, size, nbytes), name
    # What ggml says of the newest type, asked of the library in xllamacpp 2026.10.
    assert TYPES["Q2_0"] == (42, 64, 18)


@pytest.mark.parametrize("name", THEIRS)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_every_byte_of_a_block_is_read_as_the_package_reads_it(name: str, seed: int) -> None:
    block, drawn = BLOCKS[name], torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (3, 2 * block.nbytes), generator=drawn, dtype=torch.uint8)
    codes, parts = block.unpack(data)
    whole = torch.randn(parts.super_scale.shape, generator=drawn).half().float()
    offset = None if parts.super_offset is None else whole.flip(1)
    data = block.pack(codes, parts._replace(super_scale=whole, super_offset=offset))
    assert np.array_equal(gguf.quants.dequantize(data.numpy(), THEIRS[name]), block.values(data).numpy())
    again, kept = block.unpack(data)
    assert torch.equal(again, codes) and torch.equal(kept.super_scale, whole)
    assert torch.equal(block.pack(again, kept), data)


def test_a_block_of_q2_0_is_as_ggml_decoded_it() -> None:
    # Found by running ggml's own decoder (xllamacpp 2026.10) on blocks with one bit set: byte j holds columns 4j to 4j + 3.
    data = torch.zeros(1, 18, dtype=torch.uint8)
    data[0, :2] = torch.tensor([1.0]).half().view(torch.uint8)
    data[0, 2], data[0, 3] = 0b11100100, 0b00000001
    wanted = torch.full((64,), -1.0)
    wanted[:5] = torch.tensor([-1.0, 0.0, 1.0, 2.0, 0.0])
    assert torch.equal(BLOCKS["Q2_0"].values(data)[0], wanted)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_solved_weight_comes_back_code_for_code(name: str) -> None:
    grid, value = grid_of(name), weight()
    assert own_type(grid) == name == cheapest(grid, 512)
    q = solved(grid, value)
    data = pack(name, q, grid, "m")
    assert data.shape == (24, BLOCKS[name].row_bytes(512))
    back = unpack(name, data)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.zero, q.zero)
    assert torch.equal(back.scale.float(), q.scale.float())
    got = (
        torch.from_numpy(gguf.quants.dequantize(data.numpy(), THEIRS[name]))
        if name in THEIRS
        else decode(data, name, "m")
    )
    steps = q.scale.float().abs().max()
    assert (got - dequantize(q, grid)).abs().max() <= (4e-6 * steps if grid.scales.free else 0)


EXACT = [  # bits, group_size, sym, the smallest type
    (2, 64, True, "Q2_0"), (2, 32, True, "Q4_0"), ("ternary", 128, True, "Q2_0"), (3, 64, True, "Q4_0"), (4, 128, True, "Q4_0"),
    (5, 32, True, "Q5_0"), (6, -1, True, "Q8_0"), (8, 64, True, "Q8_0"), (2, 64, False, "Q4_0"), (3, 32, False, "Q4_0"),
    (4, 64, False, "Q5_0"), (5, 32, False, "Q8_0"), (7, 128, False, "Q8_0"),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "group_size", "sym", "type"), EXACT)
@pytest.mark.parametrize("columns", [512, 192])  # the last group of 192 columns may be smaller
def test_integer_grids_keep_every_value_in_the_smallest_type(
    bits: int, group_size: int, sym: bool, type: str, columns: int
) -> None:
    grid = Grid(bits, group_size, sym, scale_dtype="float16")  # type: ignore[arg-type]
    q = solved(grid, weight(columns=columns))
    assert cheapest(grid, columns) == type
    for fit in fits(grid, columns):
        values = BLOCKS[fit.type].values(pack(fit.type, q, grid, "m"))
        error = (values - dequantize(q, grid).float()).abs().max()
        assert error == 0 if fit.exact else error < 2**-11 * 2**5 * q.scale.float().max(), fit  # an offset of float16


def test_offsets_of_their_own_go_into_types_that_have_one() -> None:
    for bits, type in ((2, "Q4_1"), (4, "Q4_1"), (5, "Q5_1")):
        grid = Grid.of(scales=Affine("float16"), bits=bits, group_size=64, sym=False)
        q = solved(grid, weight())
        assert cheapest(grid, 512) == type
        values = BLOCKS[type].values(pack(type, q, grid, "m"))
        assert torch.allclose(values, dequantize(q, grid), atol=1e-6 * float(q.scale.float().max()))
    assert cheapest(Grid.of(scales=Affine("float16"), bits=6, group_size=64, sym=False), 512) is None


def test_what_no_type_holds_is_said() -> None:
    f16 = {"scale_dtype": "float16"}
    assert "groups must be whole blocks of 32" in refusal(Grid(4, 16, **f16), 512)  # type: ignore[arg-type]
    assert "no block of a GGUF type divides 40 inputs" in refusal(Grid(4, 8, **f16), 40)  # type: ignore[arg-type]
    assert "asymmetric 8 bits in groups of 32 exactly" in refusal(Grid(8, 32, False, **f16), 512)  # type: ignore[arg-type]
    assert "blocks of 256 inputs, which do not divide 576 as those of Q4_0" in refusal(grid_of("Q4_K"), 576)
    assert "K types hold their own grids only" in str(reason("Q4_K", Grid(4, 32, **f16), 512))  # type: ignore[arg-type]
    assert "levels reach from -15 to 15" in str(reason("Q4_0", Grid(4, 32, False, **f16), 512))  # type: ignore[arg-type]
    assert "no integers" in str(reason("Q4_0", Grid.named("nf4", **f16), 512))
    with pytest.raises(SettingError, match=r"did you mean Q4_K\? A suffix as _M means a mix"):
        known_type("q4_k_m")


def test_scales_that_float16_rounds_are_refused() -> None:
    grid = Grid(4, 32)
    with pytest.raises(NearplaneError, match=r"m: \d+ of 384 scales have no exact value in float16, the dtype of Q4_0"):
        pack("Q4_0", solved(grid, weight()), grid, "m")


def test_parts_without_offsets_multiply_out() -> None:
    block = BLOCKS["Q6_K"]
    parts = Parts(torch.tensor([[0.5]]), torch.arange(-8, 8, dtype=torch.int32)[None])
    codes = torch.full((1, 256), 33, dtype=torch.uint8)
    assert torch.equal(block.values(block.pack(codes, parts))[0, ::16], torch.arange(-8.0, 8) / 2)
