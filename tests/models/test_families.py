"""Families whose checkpoints or blocks are unlike others': stored in another layout, run many times, of linears of their own."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
import transformers
from torch import Tensor

import nearplane
from nearplane import GPTQ, RTN, Calibration, Grid, NearplaneError
from nearplane.core.grid import dequantize
from nearplane.evaluation.features import final_states
from nearplane.models.discover import discover
from nearplane.models.inputs import is_causal
from nearplane.models.source import open_source
from nearplane.run.stream import Place, stream

GRID = Grid(bits=8, group_size=16)
# Of each type: sizes beside the usual ones, and tensors that lie on disk otherwise than in the model.
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3_vl_moe_text": ({}, ""),
    "kimi_linear": ({"linear_head_dim": 16, "linear_num_heads": 4}, "q_conv1d"),
    "olmo_hybrid": ({}, "q_conv1d"),
    "deepseek_v4": ({"o_lora_rank": 32, "index_head_dim": 16}, "wo_a"),
    "nomic_bert": ({}, "Wqkv"),
    "gte": ({}, "qkv_proj"),
    "albert": ({"num_hidden_layers": 3}, ""),
    "openai-gpt": ({}, ""),
}


def config_of(kind: str, **settings: Any) -> Any:
    default, usual = transformers.AutoConfig.for_model(kind), {**tiny.SIZES, **tiny.EXPERTS}
    sizes = {key: value for key, value in usual.items() if hasattr(default, key)}
    sizes |= dict(tiny.LATENT) if hasattr(default, "kv_lora_rank") else {}
    return transformers.AutoConfig.for_model(kind, **{**sizes, **KINDS.get(kind, ({}, ""))[0], **settings})


def build(config: Any, make: Any = None) -> Any:
    torch.manual_seed(0)
    if make is None:
        masked = type(config) in transformers.AutoModelForMaskedLM._model_mapping
        auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
        make = auto.from_config if type(config) in auto._model_mapping else transformers.AutoModel.from_config
    return tiny.with_experts(make(config).float().eval())


def features(model: Any) -> Tensor:
    with torch.no_grad():
        if is_causal(model):
            logits: Tensor = model(input_ids=tiny.tokens(2, 12), use_cache=False).logits
            return logits
        return next(iter(final_states(model, {"input_ids": tiny.tokens(2, 12)}).values()))


def there_and_back(model: Any, folder: Path) -> nearplane.Report:
    """Quantize to 8 bits; every parameter that comes back is the original's, rounded where it was quantized."""
    format: Any = "gptq" if model.config.model_type == "openai-gpt" else "compressed-tensors"
    report = nearplane.quantize(
        folder / "model", folder / "out", method=RTN(), grid=GRID, format=format, progress=False, dtype="float32"
    )
    dense = nearplane.load(folder / "out", packed=False)
    quantized, original = {row.name for row in report.linears}, model.state_dict()
    assert dense.state_dict().keys() == original.keys()
    for name, value in dense.state_dict().items():
        experts = ".experts." in name and value.dim() == 3
        if experts or name.removesuffix(".weight") in quantized:
            assert 0 < float((value - original[name]).norm()) < 0.01 * float(original[name].norm()), name
        else:
            assert torch.equal(value, original[name]), name
    found, wanted = features(nearplane.load(folder / "out")), features(dense)
    assert float((found - wanted).norm()) < 1e-3 * float(wanted.norm())
    assert nearplane.verify(folder / "out").ok
    return report


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits_there_and_back(kind: str, tmp_path: Path) -> None:
    model = build(config_of(kind))
    tiny.save(model, tmp_path / "model")
    stored = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    apart = {name for name in stored if KINDS[kind][1] and KINDS[kind][1] in name}
    assert bool(apart) == bool(KINDS[kind][1])
    report = there_and_back(model, tmp_path)
    assert len(report.linears) >= 6
    assert any("merges or splits" in event for event in report.events) == (
        kind in ("nomic_bert", "gte", "kimi_linear", "olmo_hybrid")
    )
    if kind in ("kimi_linear", "olmo_hybrid"):  # what stays dense is copied as it is stored
        index = {
            name for path in (tmp_path / "out").glob("*.safetensors") for name in safetensors.torch.load_file(path)
        }
        assert apart <= index and not any(".conv1d.weight" in name for name in index)


@pytest.mark.parametrize("turned", [True, False])
def test_experts_stored_transposed(turned: bool, tmp_path: Path) -> None:
    """Qwen3-VL's checkpoints hold (experts, in, out); transformers takes both, by their shapes."""
    text = {k: v for k, v in {**tiny.SIZES, **tiny.EXPERTS}.items() if hasattr(config_of("qwen3_vl_moe_text"), k)}
    vision = {"hidden_size": 64, "num_heads": 4, "depth": 1, "intermediate_size": 96, "out_hidden_size": 64, "patch_size": 8,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**text, "rope_parameters": rope}, vision_config=vision, tie_word_embeddings=True
    )
    model = build(config, transformers.Qwen3VLMoeForConditionalGeneration._from_config)
    tiny.save(model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = next(name for name in tensors if name.endswith("0.mlp.experts.down_proj"))
    assert tensors[name].shape == (4, 64, 48)
    if turned:
        for key in [key for key in tensors if ".mlp.experts." in key]:
            tensors[key] = tensors[key].transpose(1, 2).contiguous()
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    assert len(there_and_back(model, tmp_path).linears) == 2 * (4 + 4 * 3)
    tensors[name] = tensors[name][:, :40, :40].contiguous()
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NearplaneError, match=r"experts\.down_proj has shape"):
        open_source(tmp_path / "model")


def test_a_rule_that_does_not_fit_what_is_stored(tmp_path: Path) -> None:
    tiny.save(build(config_of("nomic_bert")), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = next(name for name in tensors if "Wqkv.weight" in name)
    tensors[name] = tensors[name][:100].contiguous()
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NearplaneError, match=r"q_proj\.weight has shape \[34, 64\], config.json asks for \[64, 64\]"):
        open_source(tmp_path / "model")


def test_linears_of_a_class_of_its_own_stay_dense_where_they_compute_otherwise(tmp_path: Path) -> None:
    """DeepSeek V4's grouped output projection: found by what it computes, and said."""
    model = build(config_of("deepseek_v4"))
    tiny.save(model, tmp_path / "model")
    for sketch in (True, False):
        blocks = discover(open_source(tmp_path / "model", sketch=sketch))
        assert [block.strange for block in blocks] == [[f"{block.name}.self_attn.o_a_proj"] for block in blocks]
        assert not any(site.name.endswith("o_a_proj") for block in blocks for site in block.sites)
    report = nearplane.quantize(tmp_path / "model", tmp_path / "out", method=RTN(), grid=GRID, progress=False)
    assert any(
        "2 linears of class DeepseekV4GroupedLinear, which compute otherwise" in event for event in report.events
    )
    reasons = {row["reason"] for row in report.dense if "wo_a" in row["name"]}
    assert reasons == {"computes otherwise than nn.Linear"}


def test_a_model_without_a_forward_of_its_own_names_its_parts(tmp_path: Path) -> None:
    """Qwen-Omni is a thinker, a talker and a vocoder, which generate by turns; the thinker alone is a model."""
    part = {k: v for k, v in {**tiny.SIZES, **tiny.EXPERTS}.items() if hasattr(config_of("qwen3_omni_moe_text"), k)}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    audio = {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "output_dim": 64,
             "num_hidden_layers": 1, "downsample_hidden_size": 16}  # fmt: skip
    vision = {"hidden_size": 64, "num_heads": 4, "depth": 1, "intermediate_size": 96, "out_hidden_size": 64, "patch_size": 8,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    thinker = {"text_config": {**part, "rope_parameters": rope}, "audio_config": audio, "vision_config": vision}
    config = transformers.Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
    kind = transformers.Qwen3OmniMoeForConditionalGeneration
    with torch.device("meta"):
        kind._from_config(config)
    model = build(config, kind._from_config)
    tiny.save(model, tmp_path / "whole")
    with pytest.raises(
        NearplaneError, match=r"has no forward of its own, only its parts have \(thinker.*thinker\.save_pretrained"
    ):
        discover(open_source(tmp_path / "whole"))
    tiny.save(model.thinker, tmp_path / "model")
    assert len(there_and_back(model.thinker, tmp_path).linears) == 2 * (4 + 4 * 3)


def test_blocks_without_a_linear_are_named(tmp_path: Path) -> None:
    """SqueezeBERT multiplies by convolutions."""
    tiny.save(build(config_of("squeezebert")), tmp_path / "model")
    with pytest.raises(NearplaneError, match=r"transformer\.encoder\.layers: its modules hold no linear, but Conv1d;"):
        discover(open_source(tmp_path / "model"))


# --- blocks that run more than once -------------------------------------------------------------------------------


def whole_inputs(model: Any, name: str, ids: Tensor) -> Tensor:
    """What goes into a linear in all of its calls."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in ids.split(2):
            model(input_ids=batch)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_block_that_runs_many_times_is_solved_on_all_its_inputs(
    groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ALBERT, of 4 layers in one group or two: H and D over all calls, against two whole models."""
    monkeypatch.setattr(nearplane.run.stream, "BATCH_TOKENS", 32)
    model = build(config_of("albert", num_hidden_layers=4, num_hidden_groups=groups))
    source, ids = open_source(tiny.save(model, tmp_path / "model")), tiny.tokens(4, 16)
    plain, rounded = (nearplane.load(tmp_path / "model").double() for _ in range(2))
    blocks = discover(source)
    assert [block.calls for block in blocks] == [4 // groups] * groups
    place, drift = Place(torch.device("cpu"), torch.float64), 0.0
    for opened in stream(source, blocks, ids, place=place, reference=True):
        for stage in opened.stages:
            found = opened.observe(stage, frozenset({"H", "D", "R", "held_out"}))
            x, xhat = (whole_inputs(m, stage[0].name, ids) for m in (plain, rounded))
            assert found.tokens == len(x) == 4 * 16 * 4 // groups and found.R is None and found.held is not None
            assert found.held.tokens == found.tokens // 4
            torch.testing.assert_close(found.H, xhat.T @ xhat / len(x), rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(found.D, (x - xhat).T @ xhat / len(x), rtol=1e-6, atol=1e-9)
            drift = max(drift, float((x - xhat).norm() / x.norm()))
            for site in stage:
                grid = Grid(bits=2, group_size=16)
                quantized = RTN().solve(opened.weight(site), None, grid)
                opened.replace(site, quantized, grid)
                rounded.get_submodule(site.name).weight.data = dequantize(quantized, grid).double()
        if opened.k + 1 == len(blocks):
            with torch.no_grad():
                wanted = rounded.base_model(input_ids=ids[:2]).last_hidden_state  # type: ignore[operator, union-attr]
            torch.testing.assert_close(opened.output(0), wanted, rtol=1e-9, atol=1e-12)
    assert drift > 0.01


def test_a_calibrated_albert_beats_rounding(tmp_path: Path) -> None:
    tiny.save(build(config_of("albert", num_hidden_layers=4)), tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.text(500))
    report = nearplane.quantize(
        tmp_path / "model", tmp_path / "out", method=GPTQ(), grid=Grid(bits=3, group_size=32), progress=False,
        calibration=Calibration(dataset=str(tmp_path / "text.txt"), nsamples=8, seqlen=24),
    )  # fmt: skip
    assert len(report.linears) == 6
    for row in report.linears:
        assert row.error is not None and row.rtn_error is not None and row.error < row.rtn_error
        assert row.tokens == 4 * 8 * 24


def test_blocks_that_run_by_turns_again_are_named(tmp_path: Path) -> None:
    source = open_source(tiny.save(tiny.build("llama"), tmp_path / "model"))
    model: Any = source.model.model
    rotary, forward = (torch.ones(1, 8, 16), torch.zeros(1, 8, 16)), model.norm.forward
    model.norm.forward = lambda x: forward(model.layers[0](x, position_embeddings=rotary))
    with pytest.raises(NearplaneError, match=r"model\.layers\.0 runs again after others"):
        discover(source)
