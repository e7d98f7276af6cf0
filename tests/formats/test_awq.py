"""AWQ's GEMM layout, against a reader of single words that shares nothing with the packer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from checkpoints import save
from transformers import AwqConfig

import nearplane
from nearplane import RTN, Grid, NearplaneError
from nearplane.core.errors import SettingError
from nearplane.core.grid import Quantized
from nearplane.formats import FORMATS
from nearplane.formats.read import open_checkpoint

AWQ = FORMATS["awq"]
IDS = tiny.tokens(2, 20, seed=3)
# Nibble of a word in which a column of its eight lies, as AutoAWQ's kernels shift: columns 0, 2, 4, 6, then 1, 3, 5, 7.
NIBBLE = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}


def code(words: list[list[int]], row: int, column: int) -> int:
    """The code at (in, out) of a packed matrix, by shifting one Python integer."""
    return (words[row][column // 8] & 0xFFFFFFFF) >> (4 * NIBBLE[column % 8]) & 15


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("size", [-1, 32])
def test_tensors(rtn: Callable[..., Quantized], sym: bool, size: int) -> None:
    grid = Grid(4, size, sym, fit="minmax", scale_dtype="float16")
    out, columns, groups = 24, 96, 1 if size == -1 else 3
    quantized = rtn(out, columns, grid)
    tensors = AWQ.pack("m", quantized, grid)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "m.qweight": ((columns, out // 8), torch.int32),
        "m.qzeros": ((groups, out // 8), torch.int32),
        "m.scales": ((groups, out), torch.float16),
    }
    qweight, qzeros = tensors["m.qweight"].tolist(), tensors["m.qzeros"].tolist()
    assert [[code(qweight, k, n) for k in range(columns)] for n in range(out)] == quantized.codes.tolist()
    assert [[code(qzeros, g, n) for g in range(groups)] for n in range(out)] == quantized.zero.tolist()
    assert torch.equal(tensors["m.scales"].T.float(), quantized.scale)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert sum(tensor.nbytes for tensor in tensors.values()) == AWQ.nbytes((out, columns), grid)
    assert not sym or set(quantized.zero.flatten().tolist()) == {8}


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("size", [-1, 16])
def test_read_back(write_llama: Any, sym: bool, size: int) -> None:
    written = write_llama(Grid(4, size, sym, fit="minmax", scale_dtype="float16"), "awq")
    checkpoint = open_checkpoint(written.folder)
    assert checkpoint.format == "awq" and checkpoint.layers.keys() == written.solved.keys()
    for name, solved in written.solved.items():
        read, layer = checkpoint.quantized(name), checkpoint.layers[name]
        assert layer.grid == Grid(4, size, sym, scale_dtype="float16") and layer.shape == solved.codes.shape
        assert torch.equal(read.codes, solved.codes) and torch.equal(read.zero, solved.zero)
        assert torch.equal(checkpoint.weight(name), written.model.get_submodule(name).weight)


def test_supports_says_why_not() -> None:
    assert AWQ.supports(Grid(4, 32, sym=False), (64, 96)) is None
    assert "awq stores 4 bits, not 3" in (AWQ.supports(Grid(3, 32), (64, 96)) or "")
    assert "awq stores 4 bits, not 2" in (AWQ.supports(Grid("ternary", 32), (64, 96)) or "")
    assert "by eights, and this weight has 63" in (AWQ.supports(Grid(4, 32), (63, 96)) or "")
    assert "64 does not divide the 96 input columns" in (AWQ.supports(Grid(4, 64), (64, 96)) or "")
    assert AWQ.scale_dtype(torch.bfloat16) == "float16"


def test_config() -> None:
    """Entries skip what they name: "mlp.gate" is a part of the name "mlp.gate_proj", which is quantized."""
    grids = {"a.mlp.gate_proj": Grid(4, 32), "a.mlp.up_proj": Grid(4, 32)}
    config = AWQ.config(Grid(4, 32), ignore=["lm_head", "a.mlp.gate"], settings={"version": "1", "x": 2}, grids=grids)
    assert config["modules_to_not_convert"] == ["lm_head", r"^a\.mlp\.gate$"]
    assert config["meta"] == {"quantizer": ["nearplane:1"], "symmetric": True, "x": 2}
    loaded = AwqConfig.from_dict(dict(config))
    assert (loaded.bits, loaded.group_size, loaded.zero_point, loaded.format) == (4, 32, True, "gemm")
    for name, wanted in {"a.mlp.gate": False, "a.mlp.gate_proj": True, "lm_head": False, "b": True}.items():
        assert AWQ.expects(config, {name}, "Linear") is wanted
    head = AWQ.config(Grid(4, 32), ignore=[], settings={"lm_head": ["lm_head"]})
    assert head["lm_head"] is True and AWQ.expects(head, {"lm_head"}, "Linear")


def test_transformers_skips_the_same_modules() -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = ["a.mlp.gate", "a.mlp.gate_proj", "a.mlp.gate.x", "b.mlp.gate", "a.head"]
    config = AWQ.config(Grid(4, 32), ignore=["a.mlp.gate"], settings={}, grids={"a.mlp.gate_proj": Grid(4, 32)})
    entries = config["modules_to_not_convert"]
    for name in names:
        assert AWQ.expects(config, {name}, "Linear") is should_convert_module(name, entries), name


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("awq") / "model")


def made(model: Path, out: Path, format: str, **settings: Any) -> Path:
    settings = {"grid": Grid(4, 32, sym=False), "dtype": "float16", **settings}
    nearplane.quantize(model, out, method=RTN(), format=format, progress=False, **settings)
    return out


def logits(path: Path, packed: bool) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = nearplane.load(path, packed=packed)(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("other", ["compressed-tensors", "gptq_v2"])
def test_there_and_back(sym: bool, other: str, model: Path, tmp_path: Path) -> None:
    """A run writes it, load and verify read it, and conversions keep every bit."""
    out = made(model, tmp_path / "out", "awq", grid=Grid(4, 32, sym))
    checked = nearplane.verify(out)
    assert checked.ok and checked.format == "awq" and checked.notes == ()
    nearplane.convert(out, tmp_path / "there", other)
    nearplane.convert(tmp_path / "there", tmp_path / "back", "awq")
    first, last = open_checkpoint(out), open_checkpoint(tmp_path / "back")
    assert first.layers.keys() == last.layers.keys() and len(first.layers) == 14
    for name in first.layers:
        assert first.layers[name].grid == last.layers[name].grid == Grid(4, 32, sym, scale_dtype="float16")
        assert all(torch.equal(*pair) for pair in zip(first.quantized(name)[:3], last.quantized(name)[:3], strict=True))
    for folder in (tmp_path / "there", tmp_path / "back"):
        assert torch.equal(logits(out, packed=False), logits(folder, packed=False))
    assert torch.allclose(logits(out, packed=True), logits(out, packed=False), atol=2e-3)  # dense weights are float16


def test_one_group_size(model: Path, tmp_path: Path) -> None:
    several = {"down_proj": {"group_size": 16}}
    with pytest.raises(SettingError, match=r"one group size for all weights, and model.* has 32, .*down_proj 16; give"):
        made(model, tmp_path / "out", "awq", override=several)
    with pytest.raises(SettingError, match="awq stores 4 bits, not 3"):
        made(model, tmp_path / "out", "awq", grid=Grid(3, 32))
    made(model, tmp_path / "ct", "compressed-tensors", override=several)
    with pytest.raises(NearplaneError, match="one group size for all weights"):
        nearplane.convert(tmp_path / "ct", tmp_path / "new", "awq")
    assert not (tmp_path / "new").exists()
    made(model, tmp_path / "mixed", "awq", override={"down_proj": {"sym": True}})  # zeros lie beside all weights
    assert nearplane.verify(tmp_path / "mixed").ok


GRID = Grid(4, 16, sym=False, scale_dtype="float16")
CASES: dict[str, tuple[str, Callable[[dict[str, Any], dict[str, Any]], Any]]] = {
    "layout": ("in the layout 'gemv'", lambda t, c: c.update(version="GEMV")),
    "bits": ("has bits 8", lambda t, c: c.update(bits=8)),
    "size": ("group_size 0; it must be positive", lambda t, c: c.update(group_size=0)),
    "type": ("group_size must be of type int", lambda t, c: c.update(group_size="16")),
    "part": (r"holds part of quantized layer m but no m\.scales", lambda t, c: t.pop("m.scales")),
    "zeros": (r"no m\.qzeros", lambda t, c: t.pop("m.qzeros")),
    "dtype": (r"m\.qweight in .* must be an int32 matrix", lambda t, c: t.update({"m.qweight": t["m.qweight"].long()})),
    "shape": (r"m\.scales in .* has shape \(3, 32\)", lambda t, c: t.update({"m.scales": t["m.scales"][:3].clone()})),
    "other size": (r"m\.scales in .* takes \(2, 32\)", lambda t, c: c.update(group_size=32)),
}


@pytest.mark.parametrize("case", CASES)
def test_refusals(case: str, rtn: Callable[..., Quantized], tmp_path: Path) -> None:
    words, change = CASES[case]
    tensors, config = AWQ.pack("m", rtn(32, 64, GRID), GRID), AWQ.config(GRID, ignore=[], settings={})
    change(tensors, config)
    with pytest.raises(NearplaneError, match=words):
        save(tmp_path, tensors, config)


def test_other_tools(rtn: Callable[..., Quantized], tmp_path: Path) -> None:
    """AutoAWQ's older names; no zeros; a ``sym`` that is only transformers' default; false claims of nearplane's own."""
    solved = rtn(32, 64, GRID)
    tensors = AWQ.pack("m", solved, GRID)
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 16, "zero_point": True, "version": "GEMM", "sym": True}
    checkpoint = save(tmp_path, tensors, old)
    assert checkpoint.layers["m"].grid.sym is False and torch.equal(checkpoint.quantized("m").zero, solved.zero)
    bare = {name: value for name, value in tensors.items() if name != "m.qzeros"}
    checkpoint = save(tmp_path, bare, old | {"zero_point": False})
    assert checkpoint.layers["m"].grid.sym and set(checkpoint.quantized("m").zero.flatten().tolist()) == {8}
    mine = AWQ.config(Grid(4, 16), ignore=[], settings={})
    with pytest.raises(NearplaneError, match="symmetric by its configuration, and has zeros other than 8"):
        save(tmp_path, tensors, mine).quantized("m")


def test_the_configuration_names_the_rest(model: Path, tmp_path: Path) -> None:
    out = made(model, tmp_path / "out", "awq", ignore=["layers.0.mlp"])
    told = json.loads((out / "config.json").read_text())["quantization_config"]
    wanted = {"lm_head", *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))}
    assert set(told["modules_to_not_convert"]) == wanted
