"""Plain transformers with ``nearplane.enable()``: the same packed model as ``nearplane.load``, and nothing without the call."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoQuantizationConfig,
)

import nearplane
from nearplane import RTN, NearplaneError, SettingError
from nearplane.runtime.linear import QuantizedLinear, quantized_linears

IDS = tiny.tokens(2, 20, seed=5)
CAUSAL = transformers.AutoModelForCausalLM
PLAIN = (dict(AUTO_QUANTIZATION_CONFIG_MAPPING), dict(AUTO_QUANTIZER_MAPPING))


@pytest.fixture
def enabled() -> Any:
    with nearplane.enable():
        yield


def written(folder: Path, model: Any, **settings: Any) -> Path:
    tiny.save(model, folder / "model")
    given = {"method": RTN(), "bits": 4, "group_size": 32, "progress": False} | settings
    nearplane.quantize(folder / "model", folder / "out", **given)
    return folder / "out"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.build("llama", tie_word_embeddings=False, attention_bias=True)
    return written(tmp_path_factory.mktemp("enabled"), model.bfloat16())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def plain(folder: Path, kind: Any = CAUSAL, **options: Any) -> Any:
    """What transformers loads; nothing is missing and nothing is left over."""
    model, told = kind.from_pretrained(folder, output_loading_info=True, **{"dtype": torch.float32} | options)
    assert not any(told.values()), told
    return model


def same(folder: Path, kind: Any = CAUSAL) -> Any:
    """Compare transformers' model with ``nearplane.load``'s: the logits are equal, and as many linears are packed."""
    model, wanted = plain(folder, kind), nearplane.load(folder)
    assert type(model) is type(wanted) and not model.training
    assert quantized_linears(model).keys() == quantized_linears(wanted).keys() != set()
    assert torch.equal(logits(model), logits(wanted))
    return model


MADE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {}), ("llama", {}, {"bits": 3, "sym": False}), ("llama", {}, {"bits": 2}), ("qwen2", {}, {"bits": 5}),
    ("llama", {}, {"bits": 6, "sym": False, "group_size": -1}), ("qwen3", {}, {"bits": 8}), ("gemma2", {}, {}),
    ("llama", {}, {"format": "gptq"}), ("llama", {}, {"format": "gptq", "bits": 8}), ("gpt2", {}, {"format": "gptq_v2"}),
    ("qwen2", {}, {"format": "gptq_v2", "bits": 2, "sym": False}), ("llama", {}, {"format": "gptq_v2", "bits": 3, "sym": False}),
    ("llama", {"tie_word_embeddings": True}, {}), ("llama", {"tie_word_embeddings": True}, {"head_bits": 8}),
    ("llama", {"tie_word_embeddings": False}, {"head_bits": 4, "format": "gptq"}),
    ("llama", {}, {"override": {"down_proj": {"bits": 8}}, "ignore": ["o_proj"]}),
    ("llama", {}, {"override": {"down_proj": {"bits": 8, "group_size": 16}}, "format": "gptq"}),
    ("llama", {}, {"bits": 8, "group_size": -1, "act_bits": 8}), ("llama", {}, {"rotate": "r1,r2,r4"}),
    ("mamba2", {"num_heads": 4, "head_dim": 32, "n_groups": 1, "state_size": 8}, {"group_size": 16}),
    ("falcon_mamba", {}, {"group_size": 16}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "sizes", "settings"), MADE, ids=str)
def test_logits_are_those_of_load(kind: str, sizes: Any, settings: Any, tmp_path: Path, enabled: None) -> None:
    same(written(tmp_path, tiny.build(kind, **sizes), **settings))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("mixtral", {"sym": False}), ("qwen3_moe", {"bits": 3, "group_size": 16}), ("mixtral", {"format": "gptq_v2"}),
     ("gpt_oss", {"group_size": 16}), ("granitemoe", {"group_size": 16}), ("llama4_text", {"group_size": 16}),
     ("mixtral", {"ignore": ["experts"]}), ("mixtral", {"ignore": [r"layers\.1\..*experts"]})],
    ids=str,
)  # fmt: skip
def test_experts(kind: str, settings: dict[str, Any], tmp_path: Path, enabled: None) -> None:
    """One by one on disk or fused there, all packed, some or none."""
    same(written(tmp_path, tiny.build_mixture(kind), **settings))


@pytest.mark.parametrize(
    ("kind", "name"),
    [("vit", "AutoModelForImageClassification"), ("t5", "AutoModelForSeq2SeqLM"), ("whisper", "AutoModelForSpeechSeq2Seq"),
     ("bert", "AutoModelForMaskedLM"), ("clip", "AutoModel"), ("wav2vec2", "AutoModelForCTC")],
)  # fmt: skip
def test_other_kinds_of_models(kind: str, name: str, tmp_path: Path, enabled: None) -> None:
    folder = written(tmp_path, tiny.build(kind), group_size=16)
    model, wanted = plain(folder, getattr(transformers, name)), nearplane.load(folder)
    with torch.no_grad():
        found, expected = model(**tiny.batch(kind, 2)), wanted(**tiny.batch(kind, 2))
    assert quantized_linears(model).keys() == quantized_linears(wanted).keys() != set()
    for key, value in expected.items():
        assert not torch.is_tensor(value) or torch.equal(found[key], value), key


def test_classes_without_the_head_or_with_another(out: Path, tmp_path: Path, enabled: None) -> None:
    wanted = nearplane.load(out)
    bare = transformers.AutoModel.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(bare(input_ids=IDS)[0], wanted.model(input_ids=IDS)[0])  # type: ignore[operator]
    judge, told = transformers.AutoModelForSequenceClassification.from_pretrained(
        out, num_labels=3, output_loading_info=True
    )
    assert len(quantized_linears(judge)) == len(quantized_linears(bare)) == 14
    assert told["missing_keys"] == {"score.weight"} and told["unexpected_keys"] == {"lm_head.weight"}
    headed = written(tmp_path, tiny.build("llama"), head_bits=8, rotate="r1,r2,r4")
    bare = transformers.AutoModel.from_pretrained(headed, dtype=torch.float32)  # which has no place for the packed head
    with torch.no_grad():
        assert torch.equal(bare(input_ids=IDS)[0], nearplane.load(headed).model(input_ids=IDS)[0])  # type: ignore[operator]


CPU = torch.device("cpu")  # to transformers another device than "cpu": modules on "cpu" are offloaded from it
MAPS: list[Any] = [
    "auto", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": CPU},
    {"model.embed_tokens": CPU, "model.rotary_emb": CPU, "model.norm": CPU, "model.layers.0": "cpu", "model.layers.1": CPU,
     "lm_head": CPU},
]  # fmt: skip


@pytest.mark.parametrize("places", MAPS, ids=str)
def test_device_maps(places: Any, out: Path, enabled: None) -> None:
    """Of the last two, accelerate brings modules to where they run, packed weights too, and takes them away again."""
    model, wanted = plain(out, device_map=places), nearplane.load(out)
    for _ in range(2):
        assert torch.equal(logits(model), logits(wanted))
    assert (
        model.generate(IDS[:1], max_new_tokens=3, do_sample=False).tolist()
        == wanted.generate(  # type: ignore[operator]
            IDS[:1], max_new_tokens=3, do_sample=False
        ).tolist()
    )
    far = isinstance(places, dict) and len(places) > 1
    assert (
        {m.codes.device.type for m in quantized_linears(model).values()}
        == ({"meta", "cpu"} if len(places) == 6 else {"meta"})
        if far
        else {"cpu"}
    )


def test_a_map_is_inferred_from_packed_sizes(out: Path, enabled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holes would take no room, and the first device would get everything."""
    from transformers.integrations import accelerate as placed

    seen: list[int] = []
    real = placed.infer_auto_device_map

    def infer(model: Any, **options: Any) -> Any:
        seen.append(placed.compute_module_sizes(model)[0][""])
        return real(model, **options)

    monkeypatch.setattr(placed, "infer_auto_device_map", infer)
    model = plain(out, device_map="auto")
    held = sum(t.nbytes for t in model.parameters()) + sum(m.tiles.nbytes for m in quantized_linears(model).values())
    assert abs(seen[0] / held - 1) < 0.1


def test_nothing_is_left_on_disk(out: Path, tmp_path: Path, enabled: None) -> None:
    for places in ({"model": "cpu", "lm_head": "disk"}, "auto"):
        with pytest.raises(NearplaneError, match="not left on disk"):
            plain(out, device_map=places, max_memory={"cpu": 20000}, offload_folder=tmp_path)


def test_dtypes(out: Path, enabled: None) -> None:
    for asked, expected in (("auto", "bfloat16"), (torch.float16, "float16"), ("bfloat16", "bfloat16")):
        model = plain(out, dtype=asked)
        assert {str(p.dtype) for p in model.parameters()} == {f"torch.{expected}"}
        assert torch.equal(logits(model), logits(nearplane.load(out, dtype=expected)))


def test_generation_settings_and_pipelines(out: Path, tmp_path: Path, enabled: None) -> None:
    folder = shutil.copytree(out, tmp_path / "out")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "repetition_penalty": 3.5}))
    model, wanted = plain(folder), nearplane.load(folder)
    assert model.generation_config.repetition_penalty == 3.5 and model.generation_config.eos_token_id == 7
    assert torch.equal(*(m.generate(IDS[:1], max_new_tokens=8, do_sample=False) for m in (model, wanted)))
    line = transformers.pipeline("text-generation", str(folder), dtype=torch.float32)
    assert len(quantized_linears(line.model)) == 14
    assert line("w5 w6", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("w5 w6")


def test_a_loaded_model_is_copied_and_not_saved(out: Path, tmp_path: Path, enabled: None) -> None:
    model = plain(out)
    assert "packed" not in model.config.to_json_string() or "pack-quantized" in model.config.to_json_string()
    assert (
        model.config.to_dict()["quantization_config"]
        == json.loads((out / "config.json").read_text())["quantization_config"]
    )
    nearplane.disable()  # loaded models stay as they are
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.model):
        assert twin is model.model or torch.equal(logits(twin), logits(model))
        with pytest.raises(NearplaneError, match="copy the checkpoint's folder"):
            twin.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_lora(out: Path, tmp_path: Path, enabled: None) -> None:
    """By peft, and by transformers' own calls of it: trained beside packed linears, saved alone, loaded with the base."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False)
    tuned = peft.get_peft_model(plain(out), settings)
    tuned.train()(input_ids=IDS, labels=IDS).loss.backward()
    learned = [p for p in tuned.parameters() if p.requires_grad]
    assert len(learned) == 8 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in learned)
    own = plain(out)
    own.add_adapter(peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False))
    own.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*"))
    again = CAUSAL.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert quantized_linears(again) and torch.equal(logits(again), logits(own))
    assert not torch.equal(logits(again), logits(plain(out)))


NOT_OURS: list[dict[str, Any]] = [
    {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}}},
    {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 16}}}},
    {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
                    "input_activations": {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}}}},
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"},
]  # fmt: skip


@pytest.mark.parametrize("stated", NOT_OURS, ids=lambda value: value.get("format", "marlin"))
def test_what_nearplane_does_not_read_goes_to_the_original(
    stated: dict[str, Any], enabled: None, capsys: pytest.CaptureFixture[str]
) -> None:
    method = stated["quant_method"]
    found = AutoQuantizationConfig.from_dict(copy.deepcopy(stated))
    assert type(found) is PLAIN[0][method] and found.quant_method == method
    assert "loaded by transformers' own quantizer: " in capsys.readouterr().err


def test_a_configuration_given_by_hand_is_transformers_own(out: Path, enabled: None) -> None:
    pytest.importorskip("compressed_tensors")
    dense = transformers.CompressedTensorsConfig(dequantize=True)
    model = CAUSAL.from_pretrained(out, dtype=torch.float32, quantization_config=dense)
    assert not quantized_linears(model)
    wanted = logits(nearplane.load(out, packed=False))
    assert (logits(model) - wanted).norm() <= 1e-2 * wanted.norm()  # it multiplies in bfloat16


def damage(folder: Path, change: Any) -> None:
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        save_file(change(state), path, metadata={"format": "pt"})
    tensors = {name: path.name for path in sorted(folder.glob("*.safetensors")) for name in load_file(path)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": tensors}))


def without(*parts: str) -> Any:
    return lambda state: (
        {n: t for n, t in state.items() if not any(part in n for part in parts)} or {"x": torch.ones(1)}
    )


def poisoned(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t * float("nan") if n.endswith("input_layernorm.weight") else t for n, t in state.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [(without("layers.1.mlp.up_proj.weight_scale"), "layers.1.mlp.up_proj"),
     (without("layers.1.mlp.up_proj.weight"), "lacks weights that config.json asks for: model.layers.1.mlp.up_proj.weight"),
     (without("layers.1.input_layernorm"), "lacks weights .*input_layernorm"),
     (poisoned, "input_layernorm.weight holds NaN"),
     (lambda state: {n: t[:-1] if n.endswith("q_proj.weight_packed") else t for n, t in state.items()}, "q_proj.weight_packed")],
    ids=["a scale", "a layer", "a norm", "NaN", "rows"],
)  # fmt: skip
def test_damage_is_one_sentence(change: Any, words: str, out: Path, tmp_path: Path, enabled: None) -> None:
    folder = shutil.copytree(out, tmp_path / "out")
    damage(folder, change)
    with pytest.raises(NearplaneError, match=words):
        CAUSAL.from_pretrained(folder)


def test_what_cannot_be_is_one_sentence(out: Path, tmp_path: Path, enabled: None) -> None:
    config = transformers.AutoConfig.from_pretrained(out)
    with pytest.raises(NearplaneError, match="give from_pretrained a folder, no state_dict"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict={"x": torch.ones(1)})
    with pytest.raises(NearplaneError, match=r"no quantized layer of .* belongs to a BertModel"):
        transformers.BertModel.from_pretrained(out, config=transformers.BertConfig(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, vocab_size=128,
            quantization_config=config.quantization_config))  # fmt: skip
    (tmp_path / "other").mkdir()
    other = shutil.copytree(out, tmp_path / "other" / "out")
    raw = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(raw | {"intermediate_size": 128}))
    with pytest.raises(NearplaneError, match="has shape"):
        CAUSAL.from_pretrained(other)
    with pytest.raises(SettingError, match="arithmetic"):
        nearplane.enable("fast")  # type: ignore[arg-type]


def test_arithmetic_is_that_of_the_call(out: Path) -> None:
    with nearplane.enable("exact"):
        model = plain(out)
    assert {module.arithmetic for module in quantized_linears(model).values()} == {"exact"}
    assert torch.equal(logits(model), logits(nearplane.load(out, arithmetic="exact")))


def test_code_of_a_model_runs_where_it_is_trusted(out: Path, tmp_path: Path, enabled: None) -> None:
    folder = shutil.copytree(out, tmp_path / "out")
    (folder / "own_model.py").write_text(
        "import transformers\n\nclass Own(transformers.LlamaForCausalLM):\n    own = 5\n"
    )
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"auto_map": {"AutoModelForCausalLM": "own_model.Own"}}))
    model = CAUSAL.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert model.own == 5 and torch.equal(logits(model), logits(nearplane.load(out)))
    assert not hasattr(CAUSAL.from_pretrained(folder, trust_remote_code=False), "own")


def test_transformers_is_its_own_again(out: Path) -> None:
    """After ``disable`` or the block, however often; ``nearplane.load`` and originals do not care."""
    nearplane.enable()
    with nearplane.enable():
        assert torch.equal(logits(nearplane.load(out)), logits(plain(out)))
        original = CAUSAL.from_pretrained(out.parent / "model")
        assert (
            not quantized_linears(original) and original.hf_quantizer is None
            if hasattr(original, "hf_quantizer")
            else True
        )
    nearplane.disable()
    assert (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING) == PLAIN
    assert all(AUTO_QUANTIZATION_CONFIG_MAPPING[name] is kind for name, kind in PLAIN[0].items())


UNTOUCHED = """
import sys
from transformers.quantizers import auto, base
from transformers import modeling_utils, core_model_loading
kinds = (modeling_utils.PreTrainedModel, core_model_loading.WeightConverter, base.HfQuantizer)
def seen():
    tables = [dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), dict(auto.AUTO_QUANTIZER_MAPPING)]
    modules = [dict(vars(m)) for m in (auto, base, modeling_utils, core_model_loading)]
    return tables, modules, [dict(vars(kind)) for kind in kinds]
before = seen()
import nearplane
import nearplane.checkpoint.enable
nearplane.load(sys.argv[1])
after = seen()
assert before[0] == after[0] and before[2] == after[2]
for old, new in zip(before[1], after[1]):
    assert old.keys() == new.keys()
    assert all(old[key] is new[key] for key in old), [key for key in old if old[key] is not new[key]]
nearplane.enable()
assert seen()[0] != before[0]
nearplane.disable()
assert seen()[0] == before[0]
"""


def test_without_the_call_nothing_of_transformers_is_touched(out: Path) -> None:
    paths = [str(Path(nearplane.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "-c", UNTOUCHED, str(out)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


def test_a_packed_linear_is_a_linear(out: Path, enabled: None) -> None:
    up = plain(out).model.layers[0].mlp.up_proj
    assert isinstance(up, QuantizedLinear) and tuple(up.weight.shape) == (96, 64)
