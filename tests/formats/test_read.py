"""Checkpoints of other tools: read as their own tools read them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import IN, OUT, Tensors, by_package, ct_config, named, save

from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Grid, Quantized
from nearplane.formats import FORMATS
from nearplane.formats.read import open_checkpoint


@pytest.mark.parametrize("layout", ["int-quantized", "pack-quantized"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize(
    "groups", [{"strategy": "channel"}, {"group_size": 16}, {"group_size": -1}, {"strategy": "group", "group_size": 32}]
)
def test_written_by_the_package(tmp_path: Path, layout: str, sym: bool, bits: int, groups: dict[str, Any]) -> None:
    scheme = {"num_bits": bits, "symmetric": sym, **groups}
    tensors, weight = by_package(scheme, layout)
    dense = {"m.bias": torch.zeros(OUT), "norm.weight": torch.ones(3)}
    checkpoint = save(tmp_path, {**named("m", tensors), **dense}, ct_config(layout, (["Linear"], scheme)))
    assert torch.equal(checkpoint.weight("m"), weight)
    assert checkpoint.format == "compressed-tensors" and checkpoint.dense == ["m.bias", "norm.weight"]
    layer, quantized = checkpoint.layers["m"], checkpoint.quantized("m")
    assert (layer.grid.bits, layer.grid.sym, layer.shape) == (bits, sym, (OUT, IN))
    assert layer.grid.group_size == (groups["group_size"] if groups.get("group_size", -1) > 0 else -1)
    assert (
        quantized.codes.dtype == quantized.zero.dtype == torch.uint8 and quantized.zero.shape == quantized.scale.shape
    )


@pytest.mark.parametrize("sym", [True, False])
def test_one_scale_per_tensor(tmp_path: Path, sym: bool) -> None:
    scheme = {"num_bits": 8, "symmetric": sym, "strategy": "tensor"}
    tensors, weight = by_package(scheme, "int-quantized")
    checkpoint = save(tmp_path, named("m", tensors), ct_config("int-quantized", (["Linear"], scheme)))
    assert torch.equal(checkpoint.weight("m"), weight) and checkpoint.quantized("m").scale.shape == (OUT, 1)


def test_older_zero_points_are_not_packed(tmp_path: Path) -> None:
    scheme = {"num_bits": 4, "symmetric": False, "group_size": 16}
    tensors, _ = by_package(scheme, "pack-quantized")
    config = ct_config("pack-quantized", (["Linear"], scheme))
    packed = save(tmp_path, named("m", tensors), config).quantized("m")
    tensors["weight_zero_point"] = (packed.zero.to(torch.int16) - 8).to(torch.int8)
    plain = save(tmp_path, named("m", tensors), config).quantized("m")
    assert torch.equal(plain.zero, packed.zero)


def test_groups_by_name_pattern_and_class(tmp_path: Path) -> None:
    schemes = [{"num_bits": bits, "symmetric": True, "group_size": 16} for bits in (2, 4, 8)]
    targets = [["Linear"], ["re:.*down_proj"], ["a.down_proj"]]
    names, weights, tensors = ["a.up_proj", "b.down_proj", "a.down_proj"], {}, {"lm_head.weight": torch.ones(3)}
    for seed, (name, scheme) in enumerate(zip(names, schemes, strict=True)):
        part, weights[name] = by_package(scheme, "pack-quantized", seed)
        tensors.update(named(name, part))
    config = ct_config("pack-quantized", *zip(targets, schemes, strict=True), ignore=["lm_head", "re:.*router"])
    checkpoint = save(tmp_path, tensors, config)
    assert {name: checkpoint.layers[name].grid.bits for name in names} == {names[0]: 2, names[1]: 4, names[2]: 8}
    assert all(torch.equal(checkpoint.weight(name), weights[name]) for name in names)
    assert checkpoint.dense == ["lm_head.weight"]
    config["ignore"].append("a.up_proj")
    with pytest.raises(NearplaneError, match=r"lists a\.up_proj under ignore, yet the layer is stored quantized"):
        save(tmp_path, tensors, config)


def test_groups_may_differ_in_format(tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "symmetric": True, "strategy": "channel"}
    a, weight_a = by_package(scheme, "pack-quantized", 0)
    b, weight_b = by_package(scheme, "int-quantized", 1)
    config = ct_config("mixed-precision", (["a"], scheme), (["b"], scheme))
    config["config_groups"]["group_0"]["format"] = "pack-quantized"
    config["config_groups"]["group_1"]["format"] = "int-quantized"
    b["input_scale"] = torch.ones(1)
    checkpoint = save(tmp_path, {**named("a", a), **named("b", b)}, config)
    assert torch.equal(checkpoint.weight("a"), weight_a) and torch.equal(checkpoint.weight("b"), weight_b)
    assert not checkpoint.dense


def permuted(rtn: Callable[..., Quantized], format: str, grid: Grid) -> tuple[Tensors, torch.Tensor, torch.Tensor]:
    """A checkpoint whose groups are spread over the columns: tensors, group of each column, and the weight."""
    solved = rtn(OUT, IN, grid)
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(1))
    group = torch.arange(IN)[order] // grid.group_size
    weight = torch.empty(OUT, IN)
    for k in range(IN):  # column k has the scale and zero of group[k]
        scale, zero = solved.scale[:, group[k]], solved.zero[:, group[k]].float()
        weight[:, k] = (solved.codes[:, k].float() - zero) * scale
    return FORMATS[format].pack("m", solved, grid), group, weight


@pytest.mark.parametrize("sym", [True, False])
def test_activation_order_in_gptq(tmp_path: Path, rtn: Callable[..., Quantized], sym: bool) -> None:
    grid = Grid(4, 16, sym, fit="minmax", scale_dtype="float16")
    tensors, group, weight = permuted(rtn, "gptq_v2", grid)
    tensors["m.g_idx"] = group.to(torch.int32)
    config = FORMATS["gptq_v2"].config(grid, ignore=[], settings={}) | {"desc_act": True}
    checkpoint = save(tmp_path, tensors, config)
    assert torch.equal(checkpoint.weight("m"), weight)
    with pytest.raises(NearplaneError, match=r"^m in .* activation-ordered groups \(desc_act\)"):
        checkpoint.quantized("m")
    tensors["m.g_idx"][5] = 4
    with pytest.raises(NearplaneError, match=r"m\.g_idx .* names groups 0 to 4, and there are 4"):
        save(tmp_path, tensors, config).weight("m")


def test_activation_order_in_compressed_tensors(tmp_path: Path, rtn: Callable[..., Quantized]) -> None:
    grid = Grid(4, 16, sym=False, fit="minmax")
    tensors, group, weight = permuted(rtn, "compressed-tensors", grid)
    config = FORMATS["compressed-tensors"].config(grid, ignore=[], settings={})
    tensors["m.weight_g_idx"] = group.to(torch.int32)
    assert torch.equal(save(tmp_path, tensors, config).weight("m"), weight)
    tensors["m.weight_g_idx"] = torch.full((IN,), -1, dtype=torch.int32)
    assert save(tmp_path, tensors, config).quantized("m").zero.shape == (OUT, 4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zeros_of_version_1_wrap(tmp_path: Path, rtn: Callable[..., Quantized], bits: int) -> None:
    """A zero of 0 is stored as the greatest code."""
    grid = Grid(bits, 16, sym=False, fit="minmax", scale_dtype="float16")
    solved = rtn(OUT, IN, grid)
    solved.zero[:4] = torch.tensor([0, 2**bits - 1, 1, 0], dtype=torch.uint8)[:, None]
    stored = solved._replace(zero=(solved.zero - 1) & (2**bits - 1))
    tensors = FORMATS["gptq_v2"].pack("m", stored, grid)
    config = FORMATS["gptq_v2"].config(grid, ignore=[], settings={}) | {"checkpoint_format": "gptq"}
    assert torch.equal(save(tmp_path, tensors, config).quantized("m").zero, solved.zero)


def test_old_autogptq(tmp_path: Path, rtn: Callable[..., Quantized], values) -> None:
    """The configuration in a file of its own, which names neither method nor version; and no g_idx."""
    grid = Grid(3, 32, fit="minmax", scale_dtype="float16")
    solved = rtn(OUT, IN, grid)
    tensors = FORMATS["gptq"].pack("m", solved, grid) | {"m.bias": torch.zeros(OUT)}
    del tensors["m.g_idx"]
    beside = {"bits": 3, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True}
    checkpoint = save(tmp_path, tensors, None, beside)
    assert checkpoint.format == "gptq" and torch.equal(checkpoint.weight("m"), values(solved, grid))
    assert checkpoint.dense == ["m.bias"]


def test_layers_that_dynamic_rules_vary(tmp_path: Path, rtn: Callable[..., Quantized]) -> None:
    grids = {"a": Grid(4, 32), "b": Grid(8, 16), "c": Grid(2, -1)}
    tensors, solved = {}, {}
    for name, grid in grids.items():
        solved[name] = rtn(OUT, IN, Grid(grid.bits, grid.group_size, fit="minmax", scale_dtype="float16"))
        tensors |= FORMATS["gptq"].pack(name, solved[name], Grid(grid.bits, grid.group_size, scale_dtype="float16"))
    config = FORMATS["gptq"].config(Grid(4, 32), ignore=["lm_head"], settings={})
    with pytest.raises(NearplaneError, match=r"tensor b\.q.* has shape"):
        save(tmp_path, tensors, config)
    checkpoint = save(tmp_path, tensors, config | {"dynamic": {"b": {"bits": 8, "group_size": 16}}})
    for name, grid in grids.items():
        read = checkpoint.layers[name].grid
        assert (read.bits, read.group_size) == (grid.bits, grid.group_size)
        assert torch.equal(checkpoint.quantized(name).codes, solved[name].codes)


def test_a_mislabelled_version_is_recognised(tmp_path: Path, rtn: Callable[..., Quantized]) -> None:
    grid = Grid(4, 32, fit="minmax", scale_dtype="float16")
    for written, claimed in (("gptq", "gptq_v2"), ("gptq_v2", "gptq")):
        tensors = FORMATS[written].pack("m", rtn(OUT, IN, grid), grid)
        checkpoint = save(tmp_path, tensors, FORMATS[claimed].config(grid, ignore=[], settings={}))
        with pytest.raises(NearplaneError, match=f"checkpoint_format must be {written}, not {claimed}"):
            checkpoint.weight("m")


def test_dense(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, {"b": torch.ones(1), "a": torch.ones(2)}, None)
    assert checkpoint.quantization is None and checkpoint.format is None and not checkpoint.layers
    assert checkpoint.dense == ["a", "b"] and checkpoint.config == {"model_type": "x"}
    with pytest.raises(NearplaneError, match="no quantized layer named a"):
        checkpoint.weight("a")
    (tmp_path / "config.json").unlink()
    with pytest.raises(NearplaneError, match=r"config\.json does not exist"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(NearplaneError, match=r"config\.json is not valid JSON"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "text_config"])
def test_where_the_configuration_may_be(tmp_path: Path, rtn: Callable[..., Quantized], place: str) -> None:
    grid = Grid(4, 16, fit="minmax")
    config = FORMATS["compressed-tensors"].config(grid, ignore=[], settings={})
    save(tmp_path, FORMATS["compressed-tensors"].pack("m", rtn(OUT, IN, grid), grid), config)
    part = {"quantization_config": config} if place == "text_config" else config
    (tmp_path / "config.json").write_text(json.dumps({place: part}))
    assert open_checkpoint(tmp_path).layers.keys() == {"m"}
