"""What stays dense: excluded by its name on disk, and kept in the dtype in which it was stored."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
import transformers
from torch import Tensor

import nearplane
from nearplane.formats.gptq import OF_A_MODULE
from nearplane.formats.read import open_checkpoint

Tensors = dict[str, Tensor]
FORMATS = ("compressed-tensors", "gptq")
COPIES = ("compressed-tensors", "gptq", "converted")
ROUNDED: dict[str, Any] = {"method": "rtn", "group_size": 32, "progress": False}


def tensors(folder: Path) -> Tensors:
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


def rewrite(folder: Path, state: Tensors) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    safetensors.torch.save_file(
        {name: value.clone() for name, value in state.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )


def quantized(model: Path, out: Path, copy: str, **settings: Any) -> Path:
    """Quantize to one format, or to compressed-tensors and from there to GPTQ."""
    first = out / "first"
    format = "compressed-tensors" if copy == "converted" else copy
    scales = {"dtype": "float16"} if copy == "converted" else {}
    nearplane.quantize(model, first, format=format, **{**ROUNDED, **scales, **settings})
    if copy == "converted":
        nearplane.convert(first, out / "second", "gptq")
    return out / ("second" if copy == "converted" else "first")


def excluded(folder: Path) -> set[str]:
    """Names that the configuration leaves out."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    rules = config.get("dynamic", {})
    return set(config.get("ignore", ())) | {named(rule) for rule in rules if rule.startswith("-:")}


def named(rule: str) -> str:
    """Name of the module in one of our rules."""
    return rule[3:].removesuffix(OF_A_MODULE).replace("\\", "")


def forget(folder: Path, names: set[str]) -> None:
    """Take names out of the configuration."""
    for path in (folder / "config.json", folder / "quantize_config.json"):
        if not path.exists():
            continue
        content = json.loads(path.read_text())
        part = content.get("quantization_config", content)
        if "ignore" in part:
            part["ignore"] = [name for name in part["ignore"] if name not in names]
        else:
            part["dynamic"] = {rule: v for rule, v in part["dynamic"].items() if named(rule) not in names}
        path.write_text(json.dumps(content))
    (folder / "SHA256SUMS").unlink(missing_ok=True)


def check_forgotten(folder: Path, name: str) -> None:
    """``verify`` passes, and no longer once the configuration does not leave out ``name``."""
    assert nearplane.verify(folder).ok, nearplane.verify(folder).problems
    forget(folder, {name})
    found = nearplane.verify(folder)
    assert any(name in problem and "look for codes" in problem for problem in found.problems), found.problems


def with_next_token_layer(model: Path, last: int) -> Tensors:
    """Add a layer behind the last one, as models with layers that predict further tokens store it."""
    state = tensors(model)
    before, behind = f"model.layers.{last}.", f"model.layers.{last + 1}."
    more = {name.replace(before, behind): value for name, value in state.items() if name.startswith(before)}
    width = state["model.embed_tokens.weight"].shape[1]
    more[f"{behind}eh_proj.weight"] = torch.randn(width, 2 * width)
    more[f"{behind}enorm.weight"] = torch.ones(width)
    more[f"{behind}shared_head.head.weight"] = state["model.embed_tokens.weight"]
    rewrite(model, state | more)
    return more


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("kind", ["llama", "glm4_moe"])
def test_matrices_that_no_parameter_takes_are_left_out(kind: str, copy: str, tmp_path: Path) -> None:
    made = tiny.build(kind) if kind == "llama" else tiny.build_mixture(kind, moe_intermediate_size=64)
    model = tiny.save(made, tmp_path / "model")
    more = with_next_token_layer(model, 1)
    out = quantized(model, tmp_path, copy)
    matrices = {name.removesuffix(".weight") for name, value in more.items() if value.dim() > 1}
    assert matrices >= {"model.layers.2.eh_proj", "model.layers.2.self_attn.q_proj"}
    assert (kind == "llama") != ("model.layers.2.mlp.experts.3.down_proj" in matrices)
    assert matrices <= excluded(out)
    assert not excluded(out) & {f"model.layers.1.self_attn.{side}_proj" for side in "qkvo"}
    for name, value in more.items():
        torch.testing.assert_close(tensors(out)[name].float(), value, rtol=1e-3, atol=1e-3)
    check_forgotten(out, "model.layers.2.self_attn.q_proj")


@pytest.mark.parametrize("copy", COPIES)
def test_stray_experts_and_bare_matrices_are_left_out(copy: str, tmp_path: Path) -> None:
    """Fused experts of a layer that the model has not, and a matrix that is no module's weight."""
    model = tiny.save(tiny.build("llama"), tmp_path / "model")
    experts = "model.layers.2.mlp.experts"
    more = {f"{experts}.gate_up_proj": torch.randn(4, 64, 64), "model.mtp.proj": torch.randn(64, 64)}
    rewrite(model, tensors(model) | more | {"model.ids": torch.arange(4)[None]})
    out = quantized(model, tmp_path, copy)
    assert {experts, *more} <= excluded(out)
    assert nearplane.verify(out).ok
    # The module, and whatever an engine calls one of its experts: a regular expression, in GPTQ one without an end.
    forget(out, {experts, rf"re:^{re.escape(experts)}\.", f"{experts}."})
    assert nearplane.verify(out).ok  # the tensor's own name is enough
    forget(out, set(more))
    assert any(experts in problem for problem in nearplane.verify(out).problems)


@pytest.mark.parametrize("copy", ["gptq", "converted"])
def test_fused_names_are_left_out_too(copy: str, tmp_path: Path) -> None:
    """GPTQ's rules are asked by the name of the fused module."""
    model = tiny.save(tiny.build("llama"), tmp_path / "model")
    with_next_token_layer(model, 1)
    out = quantized(model, tmp_path, copy)
    check_forgotten(out, "model.layers.2.self_attn.qkv_proj")


def gemma3(folder: Path) -> Path:
    """A Gemma 3 with its image tower, stored under the names that its checkpoints have."""
    default = transformers.AutoConfig.for_model("gemma3")
    parts = {
        part: {key: value for key, value in tiny.SIZES.items() if hasattr(getattr(default, part), key)}
        for part in ("text_config", "vision_config")
    }
    torch.manual_seed(0)
    config = transformers.Gemma3Config(**parts, mm_tokens_per_image=4)
    tiny.save(transformers.Gemma3ForConditionalGeneration(config).eval(), folder)
    state = {name.replace("vision_tower.", "vision_tower.vision_model."): v for name, v in tensors(folder).items()}
    rewrite(folder, state)
    return folder


@pytest.mark.parametrize("copy", COPIES)
def test_names_on_disk_are_left_out_where_the_model_has_others(copy: str, tmp_path: Path) -> None:
    out = quantized(gemma3(tmp_path / "model"), tmp_path, copy)
    disk, module = "vision_tower.vision_model.encoder.layers.0.mlp.fc1", "model.vision_tower.encoder.layers.0.mlp.fc1"
    assert {disk, module} <= excluded(out)
    dense = {name for name, value in tensors(out).items() if value.dim() == 2 and ".vision_model.encoder." in name}
    assert len(dense) == 12 and {name.removesuffix(".weight") for name in dense} <= excluded(out)
    forget(out, {module})
    found = nearplane.verify(out)
    assert found.ok and any(module in note and "transformers" in note for note in found.notes)
    check_forgotten(out, disk)


@pytest.mark.parametrize("copy", FORMATS)
def test_experts_left_dense_are_named_as_on_disk(copy: str, tmp_path: Path) -> None:
    model = tiny.save(tiny.build_mixture("mixtral"), tmp_path / "model")
    assert any(name.endswith("block_sparse_moe.experts.0.w1.weight") for name in tensors(model))
    out = quantized(model, tmp_path, copy, ignore=("experts",))
    name = "model.layers.0.block_sparse_moe.experts.0.w1"
    assert {name, "model.layers.0.mlp.experts.0.gate_proj"} <= excluded(out)
    check_forgotten(out, name)


@pytest.mark.parametrize("copy", COPIES)
def test_fused_experts_left_dense_are_named(copy: str, tmp_path: Path) -> None:
    model = tiny.save(tiny.build_mixture("gpt_oss"), tmp_path / "model")
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors(model)
    out = quantized(model, tmp_path, copy, ignore=("experts",))
    stored = tensors(out)
    assert "model.layers.0.mlp.experts.gate_up_proj" in stored
    assert {"model.layers.0.mlp.experts", "model.layers.0.mlp.experts.gate_up_proj"} <= excluded(out)
    assert nearplane.verify(out).ok


def deepseek(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A DeepSeek V3 in 16 bits, but for the biases of its routers, whose values 16 bits do not tell apart."""
    tiny.save(tiny.build_mixture("deepseek_v3", moe_intermediate_size=64).to(dtype), folder)
    state = tensors(folder)
    for name in state:
        if name.endswith("e_score_correction_bias"):
            state[name] = 10 + torch.arange(4) / 1000
            assert len(state[name].to(dtype).unique()) == 1
    rewrite(folder, state)
    return folder


@pytest.mark.parametrize("asked", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("copy", FORMATS)
def test_what_is_kept_in_float32_stays_exact(copy: str, asked: str, tmp_path: Path) -> None:
    model = deepseek(tmp_path / "model")
    out = quantized(model, tmp_path, copy, dtype=asked, ignore=("self_attn",))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    before, after = tensors(model), tensors(out)
    assert after[name].dtype == torch.float32 and torch.equal(after[name], before[name])
    assert len(after[name].unique()) == 4
    wanted = torch.float16 if asked == "float16" else torch.bfloat16
    assert after["model.embed_tokens.weight"].dtype == wanted
    assert json.loads((out / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
    for dtype in ("auto", "bfloat16", "float16"):
        loaded = nearplane.load(out, dtype=dtype)  # type: ignore[arg-type]
        assert torch.equal(loaded.get_buffer(name), before[name]), dtype
    report = json.loads((out / "report.json").read_text())
    assert any("keep their own dtype" in event for event in report["events"]) == (asked != "auto")
    assert report["bytes"]["dense"] == sum(after[n].nbytes for n in open_checkpoint(out).dense)


def test_each_tensor_keeps_its_own_dtype(tmp_path: Path) -> None:
    """Norms in float32 beside 16-bit weights, and a linear of another dtype; one dtype for all where one is asked for."""
    model = tiny.save(tiny.build("llama").to(torch.bfloat16), tmp_path / "model")
    state = tensors(model)
    for name in state:
        if "norm" in name:
            state[name] = 1 + torch.rand(64, generator=torch.Generator().manual_seed(0)) / 1000
    state["lm_head.weight"] = state["lm_head.weight"].half()
    rewrite(model, state)
    nearplane.quantize(model, tmp_path / "auto", **ROUNDED)
    nearplane.quantize(model, tmp_path / "float16", **ROUNDED, dtype="float16")
    own, one = tensors(tmp_path / "auto"), tensors(tmp_path / "float16")
    for name in open_checkpoint(tmp_path / "auto").dense:
        assert own[name].dtype == state[name].dtype and torch.equal(own[name], state[name]), name
        assert one[name].dtype == torch.float16, name
    assert own["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16


@pytest.mark.parametrize("asked", ["auto", "float16"])
def test_the_text_part_names_the_same_dtype(asked: str, tmp_path: Path) -> None:
    model = gemma3(tmp_path / "model")
    rewrite(model, {name: value.bfloat16() for name, value in tensors(model).items()})
    path = model / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    path.write_text(json.dumps(config))
    nearplane.quantize(model, tmp_path / "out", **ROUNDED, dtype=asked)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    dtype = "bfloat16" if asked == "auto" else "float16"
    assert (written["dtype"], written["text_config"]["dtype"]) == (dtype, dtype)
    assert written["vision_config"]["dtype"] == ("float32" if asked == "auto" else dtype)
