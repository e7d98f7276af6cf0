"""Experts taken apart: what a model computes stays the same, every expert is a site, and every checkpoint loads."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
import transformers
from close import near
from torch import nn

import nearplane
from nearplane import RTN, Grid
from nearplane.checkpoint.verify import verify
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.core.grid import dequantize
from nearplane.formats.read import open_checkpoint
from nearplane.formats.store import Store
from nearplane.models.discover import discover
from nearplane.models.experts import EXPERT, Experts, experts_of, routers, set_visit
from nearplane.models.experts_disk import split
from nearplane.models.source import open_source
from nearplane.run.stream import Place, stream

CPU = torch.device("cpu")
# Checkpoints that store fused tensors: quantized, transformers does not find their experts.
FUSED = {"gpt_oss", "granitemoe", "dbrx"}
GRID = Grid(bits=4, group_size=16)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tiny.tokens(2, 20, seed=5), use_cache=False).logits
    return result


@pytest.mark.parametrize("kind", tiny.MIXTURES)
def test_a_model_taken_apart_computes_the_same(kind: str, tmp_path: Path) -> None:
    """Whatever experts are shown: the outputs that count are those of the router's choice."""
    model = tiny.build_mixture(kind)
    model.set_experts_implementation("eager")
    expected = logits(model)
    source = open_source(tiny.save(model, tmp_path / "m"))
    source.load("", CPU, torch.float32)
    source.model.tie_weights()  # type: ignore[operator]
    assert experts_of(source.model) and not any(p.is_meta for p in source.model.parameters())
    for visit in ("hit", "each", "all", "probe"):
        set_visit(source.model, visit)
        near(logits(source.model), expected, sums=96)


@pytest.mark.parametrize("kind", tiny.MIXTURES)
def test_every_expert_is_quantized_and_every_checkpoint_loads(kind: str, tmp_path: Path) -> None:
    """Packed, dense, by transformers, and as the walk itself computed: one and the same model."""
    folder = tiny.save(tiny.build_mixture(kind), tmp_path / "m")
    source, ids = open_source(folder), tiny.tokens(2, 20, seed=5)
    blocks, experts = discover(source), experts_of(source.model)
    linears = {f"{p}.{e}.{n}" for p, m in experts.items() for e in range(4) for n in m.layout.parts}
    sites = {site.name for block in blocks for site in block.sites}
    assert linears and linears <= sites and not sites & set(routers(source.model))
    assert all(m.layout.experts == 4 for m in experts.values())
    for block in blocks:  # gate and up of one expert read one tensor, and nothing of another's
        stages = [[s.name for s in stage] for stage in block.stages if EXPERT.fullmatch(stage[0].name)]
        assert all(len({name.rpartition(".")[0] for name in stage}) == 1 for stage in stages)
    report = nearplane.quantize(folder, tmp_path / "out", method=RTN(), grid=GRID, progress=False)
    assert {row.name for row in report.linears} == sites
    assert any("fused tensors" in event for event in report.events) == (kind in FUSED | {"llama4_text"})
    dense = nearplane.load(tmp_path / "out", packed=False)
    assert not experts_of(dense)
    expected = logits(dense)
    torch.testing.assert_close(
        logits(nearplane.load(tmp_path / "out", arithmetic="exact")), expected, rtol=1e-4, atol=1e-4
    )
    hidden: dict[str, torch.Tensor] = {}
    last = dense.get_submodule(blocks[-1].name)
    last.register_forward_hook(lambda _m, _a, y: hidden.__setitem__("y", y[0] if isinstance(y, tuple) else y))
    logits(dense)
    for opened in stream(source, blocks, ids, place=Place(CPU, torch.float32), reference=False):
        for site in opened.block.sites:
            opened.replace(site, RTN().solve(opened.weight(site), None, GRID), GRID)
        output = opened._forward(0, 0).until(None)
    near(output, hidden["y"], sums=96)
    found = verify(tmp_path / "out")
    assert found.ok, found.problems
    judged = verify(tmp_path / "out", "transformers")
    assert judged.ok == (kind not in FUSED), judged
    assert not any("dequantize=True" in note for note in judged.notes)  # no condition: it loads either way
    for dense in (False, True) if kind not in FUSED and find_spec("compressed_tensors") else ():
        near(logits(by_transformers(tmp_path / "out", dense)), expected, sums=96)


def by_transformers(folder: Path, dense: bool) -> Any:
    config = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dense else {}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **config
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w1"),
        ("qwen3_moe", "model.layers.0.mlp.experts.3.gate_proj"),
        ("gpt_oss", "model.layers.0.mlp.experts.3.gate_proj"),
        ("granitemoe", "model.layers.0.block_sparse_moe.experts.3.gate_proj"),
        ("llama4_text", "model.layers.0.feed_forward.experts.3.gate_proj"),
    ],
)
def test_names_on_disk(kind: str, name: str, tmp_path: Path) -> None:
    """The original's where it stores experts by themselves; where it stores them fused, those that vLLM reads."""
    model = tiny.build_mixture(kind)
    folder = tiny.save(model, tmp_path / "m")
    nearplane.quantize(folder, tmp_path / "out", method=RTN(), grid=GRID, progress=False)
    written = Store(tmp_path / "out").names
    assert {f"{name}.weight_packed", f"{name}.weight_scale"} <= written
    others = {
        n for n in Store(folder).names if "experts." not in n and "_linear" not in n and n.endswith("gate.weight")
    }
    assert others <= written  # routers


@pytest.mark.parametrize("kind", tiny.MIXTURES)
def test_a_model_saved_again_has_the_names_of_the_original(kind: str, tmp_path: Path) -> None:
    """load(packed=False) makes fused tensors; save_pretrained stores experts as the original does, and their values."""
    folder = tiny.save(tiny.build_mixture(kind), tmp_path / "m")
    nearplane.quantize(folder, tmp_path / "out", method=RTN(), grid=GRID, progress=False)
    dense = nearplane.load(tmp_path / "out", packed=False)
    dense.save_pretrained(tmp_path / "again")
    assert Store(tmp_path / "again").names == Store(folder).names
    near(logits(nearplane.load(tmp_path / "again")), logits(dense), sums=96)


def test_granite_as_it_was_written_once_still_loads(tmp_path: Path) -> None:
    """Its experts were w1, w3 and w2, which vLLM does not read: loaded here, and refused for vLLM."""
    folder = tiny.save(tiny.build_mixture("granitemoe"), tmp_path / "m")
    nearplane.quantize(folder, tmp_path / "out", method=RTN(), grid=GRID, progress=False)
    expected = logits(nearplane.load(tmp_path / "out", arithmetic="exact"))
    assert verify(tmp_path / "out", "vllm").ok
    former = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    tiny.one_shard(tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.safetensors")
    state = safetensors.torch.load_file(path)
    for name in [name for name in state if ".experts." in name]:
        head, linear, tail = name.rsplit(".", 2)
        state[f"{head}.{former[linear]}.{tail}"] = state.pop(name)
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    assert torch.equal(logits(nearplane.load(tmp_path / "out", arithmetic="exact")), expected)
    (problem,) = verify(tmp_path / "out", "vllm").problems
    assert "names experts w1, w2, w3" in problem and "quantize the model again" in problem


def test_a_weight_is_its_slice_of_the_fused_tensor(tmp_path: Path) -> None:
    """gpt-oss stores (experts, in, out) with gate and up in alternate columns, biases too."""
    model = tiny.build_mixture("gpt_oss")
    folder = tiny.save(model, tmp_path / "m")
    source = open_source(folder)
    fused, bias = model.model.layers[1].mlp.experts.gate_up_proj, model.model.layers[1].mlp.experts.gate_up_proj_bias
    prefix = "model.layers.1.mlp.experts.2"
    assert torch.equal(source.tensor(f"{prefix}.gate_proj.weight"), fused[2, :, 0::2].T)
    assert torch.equal(source.tensor(f"{prefix}.up_proj.weight"), fused[2, :, 1::2].T)
    assert torch.equal(source.tensor(f"{prefix}.up_proj.bias"), bias[2, 1::2])
    assert source.store.shape(f"{prefix}.up_proj.weight") == (96, 64)
    nearplane.quantize(folder, tmp_path / "out", method=RTN(), grid=GRID, progress=False)
    loaded = nearplane.load(tmp_path / "out", packed=False).model.layers[1].mlp.experts
    assert torch.equal(loaded.gate_up_proj_bias, bias)
    solved = dequantize(RTN().solve(fused[2, :, 0::2].T.detach().contiguous(), None, GRID), GRID)
    assert torch.equal(loaded.gate_up_proj[2, :, 0::2].T, solved)


def test_a_layer_whose_experts_stay_dense_stays_fused(tmp_path: Path) -> None:
    """ignore leaves the first layer's experts as they are; the model loads packed, dense, and by verify's reading."""
    folder = tiny.save(tiny.build_mixture("gpt_oss"), tmp_path / "m")
    pattern = r"layers\.0\.mlp\.experts"
    nearplane.quantize(folder, tmp_path / "out", method=RTN(), grid=GRID, ignore=[pattern], progress=False)
    names = Store(tmp_path / "out").names
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert "model.layers.1.mlp.experts.gate_up_proj" not in names
    packed, dense = (nearplane.load(tmp_path / "out", packed=p, arithmetic="exact") for p in (True, False))
    near(logits(packed), logits(dense), sums=96)
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize("kind", ["gpt_oss", "granitemoe", "mixtral"])
@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_dense_experts_are_left_out_by_every_name_that_engines_ask_for(kind: str, format: str, tmp_path: Path) -> None:
    """vLLM asks for expert 0 by names on disk, or of a class's own, and for the module that holds all experts."""
    folder = tiny.save(tiny.build_mixture(kind), tmp_path / "m")
    ignore = [r"layers\.0\..*experts"]
    grid = Grid(bits=4, group_size=32)
    nearplane.quantize(folder, tmp_path / "out", method=RTN(), grid=grid, ignore=ignore, format=format, progress=False)
    opened = open_checkpoint(tmp_path / "out")
    parent = "mlp" if kind == "gpt_oss" else "block_sparse_moe"
    asked = {"mixtral": ("w1", "w3", "w2"), "gpt_oss": ("w1", "gate_proj"), "granitemoe": ("gate_proj", "down_proj")}[
        kind
    ]
    for layer, dense in ((0, True), (1, False)):
        module = f"model.layers.{layer}.{parent}.experts"
        names = [module] if format == "gptq" else [f"{module}.0.{leaf}" for leaf in asked]
        assert all(opened.expects({name}, "Linear") != dense for name in names), (layer, names)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "granitemoe"])
def test_gptq_of_several_grids_has_a_rule_for_the_experts_as_engines_fuse_them(kind: str, tmp_path: Path) -> None:
    """vLLM asks for the grid of a layer's experts by the name of the module that holds them all."""
    folder = tiny.save(tiny.build_mixture(kind, moe_intermediate_size=64), tmp_path / "m")
    settings: dict[str, Any] = {"method": RTN(), "grid": Grid(4, 32), "format": "gptq", "progress": False}
    nearplane.quantize(folder, tmp_path / "out", override={"experts": {"bits": 8}}, **settings)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    parent = "mlp" if kind == "qwen3_moe" else "block_sparse_moe"
    for layer in range(2):
        module = f"model.layers.{layer}.{parent}.experts"
        rules = [change for rule, change in config["dynamic"].items() if re.match(rule.removeprefix("+:"), module)]
        assert (rules[0]["bits"] if rules else config["bits"]) == 8
        attention = f"model.layers.{layer}.self_attn.qkv_proj"
        rules = [change for rule, change in config["dynamic"].items() if re.match(rule.removeprefix("+:"), attention)]
        assert (rules[0]["bits"] if rules else config["bits"]) == 4


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build_mixture("qwen3_moe"), tmp_path / "m")
    nearplane.quantize(folder, tmp_path / "out", method=RTN(), grid=GRID, progress=False)
    tiny.one_shard(tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj"
    state = {k: v for k, v in safetensors.torch.load_file(path).items() if not k.startswith(name)}
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.unlink()
    for packed in (True, False):
        with pytest.raises(NearplaneError, match=f"lacks weights.*{name}"):
            nearplane.load(tmp_path / "out", packed=packed)
    assert any(name in problem for problem in verify(tmp_path / "out").problems)


def test_a_fused_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build_mixture("gpt_oss"), tmp_path / "m")
    skeleton = open_source(tiny.save(tiny.build_mixture("gpt_oss", intermediate_size=32), tmp_path / "two")).model
    with pytest.raises(NearplaneError, match=r"experts.* has shape \[4, 96, 64\], .* asks for \[4, 32, 64\]"):
        split(skeleton, Store(folder))


def test_asymmetric_experts_are_noted(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build_mixture("qwen3_moe"), tmp_path / "m")
    grid = Grid(bits=4, group_size=16, sym=False)
    report = nearplane.quantize(folder, tmp_path / "out", method=RTN(), grid=grid, progress=False)
    assert any("zero points" in event for event in report.events)
    packed, dense = (nearplane.load(tmp_path / "out", packed=p, arithmetic="exact") for p in (True, False))
    near(logits(packed), logits(dense), sums=96)
    if find_spec("compressed_tensors"):  # should this begin to work, the note is to go
        with pytest.raises(RuntimeError):
            by_transformers(tmp_path / "out", True)


def test_all_experts_of_a_model_without_any_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("llama"), tmp_path / "m")
    calibration = nearplane.Calibration(all_experts=True)
    with pytest.raises(SettingError, match="has no experts"):
        nearplane.quantize(folder, tmp_path / "out", calibration=calibration, progress=False)


def test_routers_are_told_from_shared_experts() -> None:
    """A shared expert whose width is the number of experts is none."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            self.gate, self.weigh = nn.Linear(8, 4), nn.Sequential(nn.Linear(8, 4))
            self.shared = nn.ModuleDict({"gate_proj": nn.Linear(8, 4), "down_proj": nn.Linear(4, 8)})

    assert set(routers(nn.ModuleDict({"mlp": Mixture()}))) == {"mlp.gate", "mlp.weigh.0"}


def test_an_expert_runs_on_no_token_only_where_it_is_watched() -> None:
    config: Any = tiny.build_mixture("qwen3_moe").config
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from nearplane.models.experts import _layout

    fused = Qwen3MoeExperts(config)
    layout = _layout(fused)
    assert layout is not None
    experts = Experts(fused, layout, "hit")
    for linear in (m for m in experts.modules() if isinstance(m, nn.Linear)):
        linear.weight = nn.Parameter(torch.randn(linear.weight.shape) / 8)
    seen: list[tuple[int, int]] = []
    for e in range(4):
        experts.get_submodule(f"{e}.gate_proj").register_forward_pre_hook(
            lambda _m, args, e=e: seen.append((e, len(args[0])))
        )
    index, weights = torch.tensor([[0, 2], [2, 0], [2, 0]]), torch.ones(3, 2)
    x, shown = torch.randn(3, 64), {}
    for visit in ("hit", "each", "all"):
        experts.visit = visit  # type: ignore[assignment]
        seen.clear()
        shown[visit] = experts(x, index, weights), list(seen)
    assert shown["hit"][1] == [(0, 3), (2, 3)]
    assert shown["each"][1] == [(0, 3), (1, 0), (2, 3), (3, 0)]
    assert shown["all"][1] == [(e, 3) for e in range(4)]
    torch.testing.assert_close(shown["hit"][0], shown["all"][0])
