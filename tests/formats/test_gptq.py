"""GPTQ, versions 1 and 2, against an unpacker that shifts whole rows as Python integers."""

import re
from collections.abc import Callable

import pytest
import torch
from transformers import GPTQConfig

from nearplane.core.grid import Grid, Quantized
from nearplane.formats import FORMATS
from nearplane.formats.gptq import GPTQ, OF_A_MODULE
from nearplane.formats.read import open_checkpoint


def stream(words: list[int], bits: int, n: int) -> list[int]:
    """The first ``n`` codes of a row of words: one long integer, read from its lowest bit."""
    whole = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [whole >> (i * bits) & ((1 << bits) - 1) for i in range(n)]


@pytest.mark.parametrize(
    ("format", "sym", "bits"),
    [("gptq", True, bits) for bits in (2, 3, 4, 8, "ternary")]
    + [("gptq_v2", sym, bits) for sym in (True, False) for bits in (2, 3, 4, 8)],
)
@pytest.mark.parametrize("size", [-1, 32])
def test_tensors(rtn: Callable[..., Quantized], format: str, sym: bool, bits, size: int) -> None:
    grid = Grid(bits, size, sym, fit="minmax", scale_dtype="float16")
    out, columns, groups = 32, 96, 1 if size == -1 else 3
    quantized = rtn(out, columns, grid)
    tensors = FORMATS[format].pack("m", quantized, grid)
    width = grid.storage_bits
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "m.qweight": ((columns * width // 32, out), torch.int32),
        "m.qzeros": ((groups, out * width // 32), torch.int32),
        "m.scales": ((groups, out), torch.float16),
        "m.g_idx": ((columns,), torch.int32),
    }
    shift = 1 if format == "gptq" else 0
    qweight, qzeros, g_idx = (tensors[f"m.{name}"].tolist() for name in ("qweight", "qzeros", "g_idx"))
    for row in range(out):
        assert stream([words[row] for words in qweight], width, columns) == quantized.codes[row].tolist()
    for group in range(groups):
        assert [zero + shift for zero in stream(qzeros[group], width, out)] == quantized.zero[:, group].tolist()
    assert torch.equal(tensors["m.scales"].T.float(), quantized.scale)
    assert g_idx == [0 if size == -1 else k // size for k in range(columns)]
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize(("format", "sym"), [("gptq", True), ("gptq_v2", True), ("gptq_v2", False)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_read_back(write_llama, format: str, sym: bool, bits: int) -> None:
    written = write_llama(Grid(bits, 32, sym, fit="minmax", scale_dtype="float16"), format)
    checkpoint = open_checkpoint(written.folder)
    assert checkpoint.format == format and checkpoint.layers.keys() == written.solved.keys()
    for name, solved in written.solved.items():
        read, layer = checkpoint.quantized(name), checkpoint.layers[name]
        assert layer.grid.bits == bits and layer.grid.group_size == 32 and layer.grid.sym is sym
        assert layer.grid.scale_dtype == "float16" and layer.shape == solved.codes.shape
        assert torch.equal(read.codes, solved.codes) and torch.equal(read.zero, solved.zero)
        assert torch.equal(read.scale.float(), solved.scale)
        assert torch.equal(checkpoint.weight(name), written.model.get_submodule(name).weight)


def test_supports_says_why_not() -> None:
    v1, v2 = FORMATS["gptq"], FORMATS["gptq_v2"]
    assert v1.supports(Grid(4, 32), (64, 96)) is None and v2.supports(Grid(4, 32, sym=False), (64, 96)) is None
    assert "2, 3, 4 or 8 bits, not 5" in (v1.supports(Grid(5, 32), (64, 96)) or "")
    assert "use gptq_v2 or compressed-tensors" in (v1.supports(Grid(4, 32, sym=False), (64, 96)) or "")
    assert "multiples of 32" in (v1.supports(Grid(4, -1), (63, 96)) or "")
    assert "multiples of 32" in (v2.supports(Grid(4, -1), (64, 90)) or "")
    assert "divide the 96 input columns; what divides them: 8, 16" in (v2.supports(Grid(4, 64), (64, 96)) or "")
    assert "group_size 128 does not divide the 96" in (v2.supports(Grid(4, 128), (64, 96)) or "")
    assert v1.scale_dtype(torch.bfloat16) == "float16"


def test_a_rule_matches_a_module_and_its_tensors_only() -> None:
    """vLLM and gptqmodel ask with the name of a module, ONNX Runtime GenAI with the names of its tensors."""
    other, grid = Grid(8, 64), Grid(4, 64)
    config = GPTQ().config(grid, ignore=["a.dense"], settings={}, grids={"a.up": other, "a.down": grid})
    rules = {rule[2:]: change for rule, change in config["dynamic"].items()}
    for pattern, name in zip(rules, ("a.dense", "a.down"), strict=True):
        for found in (name, f"{name}.qweight", f"{name}.qzeros", f"{name}.scales", f"{name}.g_idx"):
            assert re.match(pattern, found), found
        for missed in (f"{name}2", f"{name}.0", f"{name}.0.qweight", f"b.{name}", f"{name}.qweight2"):
            assert not re.match(pattern, missed), missed


def test_config() -> None:
    settings = {"version": "1.2", "damp_percent": 0.01, "true_sequential": True, "static_groups": True, "method": "x"}
    config = FORMATS["gptq_v2"].config(Grid(4, 32), ignore=["lm_head", "a.b", "re:.*gate"], settings=settings)
    assert config["checkpoint_format"] == "gptq_v2" and config["meta"] == {
        "quantizer": ["nearplane:1.2"],
        "method": "x",
    }
    assert config["dynamic"] == {f"-:^a\\.b{OF_A_MODULE}": {}, "-:.*gate": {}} and config["desc_act"] is False
    assert FORMATS["gptq_v2"].extra_files(config) == {"quantize_config.json": config}
    loaded = GPTQConfig.from_dict(dict(config))
    assert loaded.bits == 4 and loaded.group_size == 32 and loaded.sym is True and loaded.damp_percent == 0.01
    undamped = FORMATS["gptq"].config(Grid(4, 32), ignore=["lm_head"], settings={"damp_percent": 0})
    assert "dynamic" not in undamped and GPTQConfig.from_dict(dict(undamped)).bits == 4
