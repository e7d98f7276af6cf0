"""What a finished folder holds besides weights: the model's other files, its code, and what is said of the rest."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

import nearplane
from nearplane import RTN, NearplaneError
from nearplane.cli.main import main
from nearplane.formats.companions import card_text, is_ours
from nearplane.models.locate import HUB_PATTERNS, HUB_WEIGHTS
from nearplane.run.estimate import estimate
from nearplane.run.plan import make_plan

FILES = {
    "chat_template.json": "{}", "video_preprocessor_config.json": "{}", "modules.json": "[]", "LICENSE": "free",
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}', "chat_templates/tool_use.jinja": "{{ messages }}",
}  # fmt: skip
CODE = {
    "configuration_own.py": "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n",
    "modeling_own.py": "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n"
    "from .layers_own import KEPT\n\n\nclass OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n    kept = KEPT\n",
    "layers_own.py": "KEPT = 5\n",
    "processing_own.py": "",
}  # fmt: skip
MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


def model(folder: Path, files: dict[str, str], **config: Any) -> Path:
    tiny.save(tiny.build("llama"), folder)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | config))
    return folder


def quantized(folder: Path, out: Path, **settings: Any) -> nearplane.Report:
    return nearplane.quantize(
        folder, out, method=RTN(), bits=4, group_size=32, dtype="float16", progress=False, **settings
    )


def test_companions_go_along_and_the_rest_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through quantize and convert; the sums know them, and ``verify`` sees a change in a sub-folder."""
    folder, out, new = model(tmp_path / "model", FILES), tmp_path / "out", tmp_path / "new"
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "pytorch_model.bin").write_bytes(b"x" * 1000)
    report = quantized(folder, out)
    note = "not copied: README.md (describes the original); pytorch_model.bin (weights)"
    assert report.events.count(note) == 1
    assert main(["convert", str(out), str(new), "--format", "gptq"]) == 0
    assert "not copied" not in capsys.readouterr().out  # of the checkpoint everything goes along
    for place in (out, new):
        assert {name: (place / name).read_text() for name in FILES} == FILES
        assert is_ours(card_text(place)) and not (place / "pytorch_model.bin").exists()
        assert nearplane.verify(place).ok
        assert "1_Pooling/config.json" in [file.name for file in nearplane.verify(place).files]
    (new / "quant_config.json").write_text("{}")
    conversion = nearplane.convert(new, tmp_path / "back", "compressed-tensors")
    assert conversion.note == "not copied: quant_config.json, quantize_config.json (of another quantization)"
    assert (
        str(conversion).endswith(f"\nnote: {conversion.note}")
        and not (tmp_path / "back" / "quantize_config.json").exists()
    )
    (out / "1_Pooling" / "config.json").write_text("{}")
    assert any("1_Pooling/config.json is not what was written" in problem for problem in nearplane.verify(out).problems)
    (out / "1_Pooling" / "config.json").unlink()
    assert any("1_Pooling/config.json is named in SHA256SUMS" in problem for problem in nearplane.verify(out).problems)


def test_the_disk_estimate_counts_companions(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", FILES)
    settings: dict[str, Any] = {"method": RTN(), "bits": 4, "group_size": 32}
    before = estimate(make_plan(folder, sketch=True, **settings)).disk["other files"]
    (folder / "1_Pooling" / "vocab.txt").write_bytes(b"x" * 12345)
    (folder / "model.gguf").write_bytes(b"x" * 99999)
    assert estimate(make_plan(folder, sketch=True, **settings)).disk["other files"] == before + 12345


def test_code_goes_along_and_runs_where_it_is_trusted(tmp_path: Path) -> None:
    """A model of its own code: the files that auto_map names, and those that they import."""
    folder, out = model(tmp_path / "model", CODE, model_type="own", auto_map=MAP), tmp_path / "out"
    with pytest.raises(NearplaneError, match="trust_remote_code"):
        quantized(folder, out)
    quantized(folder, out, trust_remote_code=True)
    assert json.loads((out / "config.json").read_text())["auto_map"] == MAP
    assert {name: (out / name).read_text() for name in CODE} == CODE
    loaded: Any = nearplane.load(out, trust_remote_code=True, packed=False)
    assert loaded.kept == 5
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    ids = tiny.tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, loaded(ids).logits)
    (out / "layers_own.py").unlink()
    (out / "modeling_own.py").unlink()
    assert any(
        "names code in modeling_own.py" in line for line in nearplane.verify(out, trust_remote_code=False).problems
    )


@pytest.mark.parametrize("files", [CODE, {}])
def test_a_known_type_is_written_without_code_that_did_not_run(tmp_path: Path, files: dict[str, str]) -> None:
    """transformers' own class was quantized; entries of other repositories, tokenizers and processors stay."""
    kept = {"AutoTokenizer": ["tokenization_own.Own", None], "AutoProcessor": "processing_own.Own"}
    elsewhere = {"AutoModel": "someone/repo--modeling.Own"}
    folder = model(tmp_path / "model", files, auto_map=MAP | kept | elsewhere)
    report, out = quantized(folder, tmp_path / "out"), tmp_path / "out"
    assert json.loads((out / "config.json").read_text())["auto_map"] == kept | elsewhere
    assert any("auto_map" in event and "AutoConfig, AutoModelForCausalLM" in event for event in report.events)
    assert all((out / name).exists() for name in files)
    nearplane.convert(out, tmp_path / "new", "gptq")
    plain = model(tmp_path / "plain", files, auto_map=MAP)
    quantized(plain, tmp_path / "less")
    assert "auto_map" not in json.loads((tmp_path / "less" / "config.json").read_text())
    for place in (out, tmp_path / "less"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(place)  # asks nothing
        assert type(loaded) is transformers.LlamaForCausalLM


def test_a_tokenizer_of_its_own_code_goes_along(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", {"tokenization_own.py": "", "own/parts.py": ""})
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}})
    )
    quantized(folder, tmp_path / "out")
    assert (tmp_path / "out" / "tokenization_own.py").exists() and (tmp_path / "out" / "own" / "parts.py").exists()
    assert nearplane.verify(tmp_path / "out").notes == ()
    (tmp_path / "out" / "tokenization_own.py").unlink()
    assert any(
        "tokenizer_config.json names code in tokenization_own.py" in n for n in nearplane.verify(tmp_path / "out").notes
    )


def test_a_hub_id_brings_its_companions_and_no_weights_too_early() -> None:
    from huggingface_hub.utils import filter_repo_objects

    files = [
        *FILES,
        *CODE,
        "tokenizer.model",
        "merges.txt",
        "License.md",
        "custom_generate/generate.py",
        "speaker/de.npy",
    ]
    weights = ["model.safetensors", "2_Dense/model.safetensors"]
    others = ["pytorch_model.bin", "model.gguf", "onnx/model.onnx", "onnx/model.onnx_data", "tf_model.h5", "a.msgpack"]
    every = [*files, *weights, *others]
    assert list(filter_repo_objects(every, allow_patterns=HUB_PATTERNS)) == files
    assert list(filter_repo_objects(every, allow_patterns=HUB_PATTERNS + HUB_WEIGHTS)) == files + weights


def test_broken_generation_settings_are_refused_before_the_run(tmp_path: Path) -> None:
    """They would go along into a folder that nobody loads."""
    model = tiny.save(tiny.build("llama"), tmp_path / "model")
    (model / "generation_config.json").write_text("{broken")
    with pytest.raises(NearplaneError, match=r"generation_config\.json"):
        nearplane.quantize(model, tmp_path / "out", method="rtn", group_size=32, progress=False)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_file_that_describes_no_quantization(tmp_path: Path) -> None:
    model = tiny.save(tiny.build("llama"), tmp_path / "model")
    (model / "quantize_config.json").write_text("{}")
    nearplane.quantize(model, tmp_path / "out", method="rtn", group_size=32, progress=False)
    assert not (tmp_path / "out" / "quantize_config.json").exists() and nearplane.load(model) is not None
