"""compressed-tensors, against the package of that name and against transformers."""

from collections.abc import Callable

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Grid, Quantized
from nearplane.formats import FORMATS
from nearplane.formats.read import open_checkpoint

CT = FORMATS["compressed-tensors"]
IDS = torch.arange(40)[None] % 128


def decompress(tensors: dict[str, torch.Tensor], grid: Grid) -> torch.Tensor:
    """What the package makes of our tensors under our configuration."""
    config = QuantizationConfig.model_validate(CT.config(grid, ignore=[], settings={}))
    local = {name.removeprefix("m."): tensor for name, tensor in tensors.items()}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    return compressor.decompress(local, config.config_groups["group_0"])["weight"]


GRIDS = [
    Grid(bits, size, sym, fit="minmax", scale_dtype=dtype)
    for bits, sym in [("ternary", True), *((bits, sym) for bits in range(2, 9) for sym in (True, False))]
    for size in (-1, 16)
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.bits}-{g.group_size}-{g.sym}-{g.scale_dtype}")
def test_the_package_reads_our_codes(rtn: Callable[..., Quantized], values, grid: Grid) -> None:
    quantized = rtn(37, 48, grid)
    tensors = CT.pack("m", quantized, grid)
    width, half = grid.storage_bits, 1 << (grid.storage_bits - 1)
    codes = unpack_from_int32(tensors["m.weight_packed"], width, torch.Size((37, 48)))
    assert torch.equal(codes.to(torch.int16) + half, quantized.codes.to(torch.int16))
    assert ("m.weight_zero_point" in tensors) is not grid.sym
    if not grid.sym:
        packed = tensors["m.weight_zero_point"]
        zero = unpack_from_int32(packed, width, quantized.zero.shape, packed_dim=0)
        assert torch.equal(zero.to(torch.int16) + half, quantized.zero.to(torch.int16))
    assert torch.equal(decompress(tensors, grid), values(quantized, grid).to(getattr(torch, grid.scale_dtype)))
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [-1, 32])
def test_transformers_gives_the_same_logits(write_llama, bits: int, size: int) -> None:
    written = write_llama(Grid(bits, size, fit="minmax"), shard_bytes=20000)
    loaded = AutoModelForCausalLM.from_pretrained(written.folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, written.model(IDS).logits)
    check_reader(written)


@pytest.mark.parametrize("size", [-1, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_transformers_gives_the_same_logits_asymmetric(write_llama, bits: int, size: int) -> None:
    written = write_llama(Grid(bits, size, sym=False, fit="minmax"))
    config = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(written.folder, dtype=torch.float32, quantization_config=config)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, written.model(IDS).logits)
    check_reader(written)


@pytest.mark.parametrize("load", [torch.float32, torch.bfloat16])
def test_weight_is_what_transformers_loads(write_llama, load: torch.dtype) -> None:
    """With 16-bit scales, in float32 and in the dtype of the scales."""
    written = write_llama(Grid(4, 32, fit="minmax", scale_dtype="bfloat16"))
    loaded = AutoModelForCausalLM.from_pretrained(written.folder, dtype=load)
    loaded(IDS)  # decompresses
    checkpoint = open_checkpoint(written.folder)
    for name in checkpoint.layers:
        assert torch.equal(checkpoint.weight(name, load), loaded.get_submodule(name).weight)


def check_reader(written) -> None:
    checkpoint = open_checkpoint(written.folder)
    assert checkpoint.format == "compressed-tensors" and checkpoint.layers.keys() == written.solved.keys()
    for name, solved in written.solved.items():
        read = checkpoint.quantized(name)
        assert all(torch.equal(a, b) for a, b in zip(read[:3], solved[:3], strict=True))
        assert torch.equal(checkpoint.weight(name), written.model.get_submodule(name).weight)
    assert "lm_head.weight" in checkpoint.dense and "model.norm.weight" in checkpoint.dense
    assert not any("weight_" in name for name in checkpoint.dense)


@pytest.mark.parametrize("sym", [True, False])
def test_a_tail_group_is_stored_and_read_here_and_refused_there(write_llama, sym: bool) -> None:
    grid = Grid(4, 64, sym, fit="minmax")
    assert CT.supports(grid, (64, 96)) is None and CT.warn(grid, (64, 64)) is None
    assert "group_size 64 does not divide the 96 input columns" in (CT.warn(grid, (64, 96)) or "")
    assert "8, 16, 24, 32, 48, 96, or -1" in (CT.warn(grid, (64, 96)) or "")
    written = write_llama(grid)
    check_reader(written)
    name = "model.layers.0.mlp.down_proj"
    with pytest.raises(ValueError, match="divisble"):
        decompress(
            {k.replace(name, "m"): v for k, v in CT.pack(name, written.solved[name], grid).items()},
            grid,
        )


def test_scale_dtype_is_the_models() -> None:
    assert [CT.scale_dtype(d) for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)] == [
        "float32",
        "float16",
        "bfloat16",
        "float32",
    ]


def test_what_disk_cannot_hold_exactly_is_refused(rtn: Callable[..., Quantized]) -> None:
    grid = Grid(4, 16, fit="minmax")
    good = rtn(8, 32, grid)
    bad = {
        "codes leave": good._replace(codes=good.codes + 16),
        "zero of a symmetric": good._replace(zero=good.zero - 1),
        "must both be": good._replace(scale=good.scale[:, :1]),
        "must be uint8": good._replace(codes=good.codes.int()),
        "not finite": good._replace(scale=good.scale * torch.inf),
    }
    for sentence, quantized in bad.items():
        with pytest.raises(NearplaneError, match=f"^m: .*{sentence}"):
            CT.pack("m", quantized, grid)
    with pytest.raises(NearplaneError, match="would round them after the codes were chosen"):
        CT.pack("m", good, Grid(4, 16, fit="minmax", scale_dtype="float16"))
    asymmetric = Grid(3, 16, sym=False, fit="minmax")
    solved = rtn(8, 32, asymmetric)
    with pytest.raises(NearplaneError, match="a zero point leaves"):
        CT.pack("m", solved._replace(zero=solved.zero + 8), asymmetric)
    with pytest.raises(NearplaneError, match="codes leave the grid's range 1 to 3"):
        CT.pack("m", rtn(8, 32, Grid(2, 16, fit="minmax")), Grid("ternary", 16))
