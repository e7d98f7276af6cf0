"""The table of engines, row by row as docs/formats.md prints it."""

import pytest

from nearplane.checkpoint.engines import ENGINES, caveat, order_refusal, refusal
from nearplane.checkpoint.engines import FORMATS as NAMES
from nearplane.core.errors import SettingError
from nearplane.core.grid import Grid
from nearplane.formats import FORMATS

SHAPES = [(64, 128), (256, 128)]
CT = "compressed-tensors"


def loads(engine: str, format: str, bits: int, sym: bool = True) -> bool:
    return refusal(engine, format, Grid(bits, 64, sym), SHAPES) is None


def test_the_formats_are_those_that_can_be_written() -> None:
    assert set(NAMES) == set(FORMATS)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors(bits: int, sym: bool) -> None:
    assert loads("vllm", CT, bits, sym)
    assert loads("sglang", CT, bits, sym) == (bits in (4, 8))
    assert loads("transformers", CT, bits, sym)


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(format: str, bits: int) -> None:
    assert loads("vllm", format, bits) == (bits in (4, 8))
    assert not loads("vllm", format, bits, sym=False)
    for engine in ("sglang", "transformers"):
        assert loads(engine, format, bits) and loads(engine, format, bits, sym=False)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("format", NAMES)
def test_a_tail_group_loads_nowhere(engine: str, format: str) -> None:
    """Whichever of the shapes has it."""
    grid = Grid(4, 64)
    assert refusal(engine, format, grid, [(64, 128)]) is None
    reason = refusal(engine, format, grid, [(64, 128), (64, 96)]) or ""
    assert reason.startswith("group_size 64 does not divide the 96 input columns")
    assert "only nearplane" in reason and not reason.endswith(".")
    assert caveat(engine, format, grid, [(64, 96)]) is None
    assert refusal(engine, format, Grid(4, -1), [(64, 96)]) is None


def test_groups_in_activation_order() -> None:
    assert "desc_act" in (order_refusal("vllm", Grid(4, 64)) or "")
    assert order_refusal("vllm", Grid(4, -1)) is None
    assert order_refusal("sglang", Grid(4, 64)) is None and order_refusal("transformers", Grid(4, 64)) is None


def test_caveats() -> None:
    def said(engine: str, format: str, grid: Grid) -> str:
        return caveat(engine, format, grid, SHAPES) or ""

    assert said("vllm", CT, Grid(4, 64)) == said("vllm", CT, Grid(4, 64, sym=False)) == ""
    assert said("sglang", CT, Grid(8, -1)) == said("vllm", "gptq", Grid(4, 128)) == ""
    assert "take group sizes 32, 64, 128 and -1; another must run 16" in said("vllm", CT, Grid(4, 16))
    assert "3 bits by a CUDA kernel" in said("vllm", CT, Grid(3, 64))
    assert "2 bits by a CUDA kernel" in said("vllm", CT, Grid("ternary", 64))
    assert "8 bits symmetric only" in said("vllm", CT, Grid(8, 64, sym=False))
    assert "without its Marlin kernels" in said("sglang", "gptq", Grid(3, 64))
    assert "without its Marlin kernels" in said("sglang", "gptq_v2", Grid(4, 64, sym=False))
    assert said("sglang", CT, Grid(3, 64)) == said("vllm", "gptq", Grid(3, 64)) == ""  # refused: no condition helps
    assert "dequantize=True" in said("transformers", CT, Grid(4, 64, sym=False))
    assert "needs the package compressed-tensors" in said("transformers", CT, Grid(4, 64))
    assert said("transformers", "gptq", Grid(4, 64)).endswith("optimum and gptqmodel for it")
    assert "plain torch kernel" in said("transformers", "gptq", Grid(3, 64))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SettingError, match="engine must be one of vllm, sglang, transformers; got 'tgi'"):
        refusal("tgi", CT, Grid(), SHAPES)
    with pytest.raises(SettingError, match=r"format must be one of .*; got 'awq'"):
        caveat("vllm", "awq", Grid(), SHAPES)
