"""config.json as engines read it: the class, the dtype, and older names beside the newest."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

import nearplane
from nearplane import RTN, Grid
from nearplane.checkpoint.config import in_dtype, written_config

# Model types of many kinds of rotary positions, of experts, towers and none of them.
TYPES = (
    "llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma", "gemma2", "gemma3_text", "gemma3", "gemma3n", "gemma4_text",
    "phi", "phi3", "phimoe", "gpt_neox", "gpt2", "gptj", "stablelm", "granite", "olmo2", "olmo3", "cohere2", "exaone4", "glm4",
    "glm4_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4", "mistral3", "mistral4", "qwen2_vl", "qwen3_next", "qwen3_5",
    "modernbert", "bert", "t5", "whisper", "clip", "vit", "mamba", "dbrx", "mpt", "falcon", "step3p5", "mellum", "lfm2",
    "laguna", "dots3_note", "muse_spark", "nemotron", "persimmon", "t5gemma2",
)  # fmt: skip


class Opened(torch.nn.Module):
    """Stands for the class that was opened."""


def equal(read: Any, before: Any, new: Any, raw: Any) -> None:
    """Two configurations as dictionaries are equal, but for older names, which some classes keep as they read them."""
    for key in read.keys() | before.keys():
        if isinstance(before.get(key), dict):
            inside = [part.get(key) if isinstance(part.get(key), dict) else {} for part in (new, raw)]
            equal(read[key], before[key], *inside)
        elif key == "type" and read.get(key) == read.get("rope_type"):
            continue
        elif key not in before or read.get(key) != before[key]:
            name = key.removeprefix("_")
            assert name in new and name not in raw and read[key] == new[name], key


@pytest.mark.parametrize("kind", TYPES)
def test_transformers_reads_an_equal_configuration(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind)
    raw = json.loads(config.to_json_string())
    new = written_config(copy.deepcopy(raw), type(config), Opened())
    read, before = (type(config).from_dict(copy.deepcopy(c)).to_dict() for c in (new, raw))
    equal(read, before, new, raw)
    assert new["architectures"] == ["Opened"]


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"
OLDER: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
        {"rope_theta": 50000.0, "rope_scaling": None},
    ),
    "scaled": (
        "llama",
        {"rope_parameters": LLAMA3},
        {"rope_theta": 50000.0, "rope_scaling": {"type": "llama3", **{k: v for k, v in LLAMA3.items() if k != "rope_theta"}}},
    ),
    "by type of layer": (
        "gemma3_text",
        {
            "num_hidden_layers": 6,
            "layer_types": [SLIDING, SLIDING, FULL] * 2,
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 7000.0},
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 70000.0},
            },
        },
        {
            "rope_theta": 70000.0, "rope_local_base_freq": 7000.0, "sliding_window_pattern": 3,
            "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 8.0},
        },
    ),
    "another name": (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        {"rotary_emb_base": 500.0, "rotary_pct": 0.5},
    ),
    "a part of the head": (
        "stablelm",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
    ),
    "a part, kept by the class": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.75}},
        {"rope_theta": 500.0, "partial_rotary_factor": 0.75},
    ),
    "experts": (
        "qwen3_moe",
        {"num_local_experts": 4, "hidden_size": 64, "num_attention_heads": 4},
        {"num_experts": 4, "head_dim": 16},
    ),
    "no rotary positions": ("gpt2", {"n_positions": 48}, {"n_ctx": 48}),
}  # fmt: skip


@pytest.mark.parametrize("case", OLDER)
def test_older_names_have_the_values_of_the_newest(case: str) -> None:
    kind, settings, wanted = OLDER[case]
    config = transformers.AutoConfig.for_model(kind, **settings)
    new = written_config(json.loads(config.to_json_string()), type(config), Opened())
    assert {key: new.get(key) for key in wanted} == wanted
    if kind != "gpt2":
        assert new["rope_parameters"] == config.rope_parameters


def test_the_newest_names_stand_beside_older_ones() -> None:
    raw = {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = written_config(raw, transformers.LlamaConfig, Opened())
    assert new["rope_parameters"] == {"type": "linear", "rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    assert raw.items() <= new.items()


def test_parts_have_older_names_too() -> None:
    text = {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    raw = {"model_type": "llava", "text_config": text, "architectures": ["LlavaForConditionalGeneration"]}
    new = written_config(raw, transformers.LlavaConfig, Opened())
    assert new["text_config"]["rope_theta"] == 500.0 and "rope_theta" not in text and "rope_theta" not in new
    assert new["architectures"] == ["LlavaForConditionalGeneration"]


def test_a_configuration_that_its_class_refuses_stays_as_it_is() -> None:
    raw = {
        "model_type": "llama",
        "architectures": ["A"],
        "rope_parameters": {"rope_type": "llama3"},
        "hidden_size": "x",
    }
    assert written_config(raw, transformers.LlamaConfig, Opened()) == raw


def test_the_dtype_has_both_names() -> None:
    raw = {"torch_dtype": "float32", "text_config": {"dtype": "float32"}, "vision_config": {"torch_dtype": "float32"}}
    half = {"dtype": "float16", "torch_dtype": "float16"}
    assert in_dtype(raw, torch.float16, every=True) == {"text_config": half, "vision_config": half, **half}
    assert in_dtype(raw, torch.float16, every=False)["vision_config"] == {"torch_dtype": "float32"}


@pytest.mark.parametrize("converted", [False, True])
def test_a_run_and_a_conversion_write_them(converted: bool, tmp_path: Path) -> None:
    """The tiny model's file names no class, like one made by ``gguf_file`` of transformers."""
    folder = tiny.save(
        tiny.build("llama", rope_parameters={"rope_type": "default", "rope_theta": 50000.0}), tmp_path / "model"
    )
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "architectures"}))
    nearplane.quantize(folder, tmp_path / "out", method=RTN(), grid=Grid(4, 32), dtype="float16", progress=False)
    if converted:
        path = tmp_path / "out" / "config.json"
        told = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in told.items() if k not in ("architectures", "rope_theta")}))
        nearplane.convert(tmp_path / "out", tmp_path / "new", "gptq")
    found = json.loads((tmp_path / ("new" if converted else "out") / "config.json").read_text())
    assert found["architectures"] == ["LlamaForCausalLM"] and found["rope_theta"] == 50000.0
    assert found["dtype"] == found["torch_dtype"] == "float16"
