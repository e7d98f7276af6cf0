"""Which files of a model's folder go along: all but weights, indexes, other tools' quantization, caches, other models."""

import json
import os
from pathlib import Path

import pytest
import torch

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.formats import companions as module
from nearplane.formats.companions import companions
from nearplane.formats.journal import STATE
from nearplane.formats.parts import Writer
from nearplane.formats.store import SUMS

COPIED = [
    "tokenizer.json", "tokenizer.model", "chat_template.json", "chat_template.jinja", "chat_templates/tool_use.jinja",
    "video_preprocessor_config.json", "modules.json", "1_Pooling/config.json", "config_sentence_transformers.json", "LICENSE",
    "licence.md", "NOTICE.txt", "USE_POLICY.md", "vocab.bpe", "spiece.model", "generation_config.json", "modeling_own.py",
    "package/helpers.py", "original/params.json", "speaker_embeddings/de_1.npy", "custom_generate/generate.py", "a b.txt",
    "tekken.json", "2_Dense/config.json", "2_Dense/model.safetensors", "preset ü.json",
]  # fmt: skip
LEFT = {
    "weights": ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model.gguf", "model.Q4_K_M.GGUF", "weights.npz",
                "onnx/", "original/consolidated.00.pth", "coreml/", "training_args.bin", "x.onnx_data"],
    "an index of weights": ["pytorch_model.bin.index.json", "model.fp16.safetensors.index.json"],
    "of another quantization": ["quantize_config.json", "quant_config.json", "hf_quant_config.json", "recipe.yaml"],
    "caches and hidden files": [".cache/", ".git/", ".gitattributes", "__pycache__/", "part-00001.unfinished"],
    "describes the original": ["README.md", "README_zh.md"],
    "a model of its own": ["checkpoint-500/"],
    "a link that leads nowhere": ["gone.json"],
    "a link to a folder": ["up/"],
    "a name that sums cannot hold": ["two\\nlines.txt"],
}  # fmt: skip


def fill(folder: Path) -> Path:
    """A folder with every kind of file beside its own weights."""
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    dense = {"idx": 1, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, dense, "odd"]))
    inside = {"onnx/": "model.onnx", ".cache/": "x", ".git/": "config", "__pycache__/": "a.pyc", "checkpoint-500/": "vocab.txt",
              "coreml/": "float.mlmodel"}  # fmt: skip
    for names in LEFT.values():
        for name in names:
            if name.endswith("/") and name != "up/":
                (folder / name).mkdir(parents=True)
                (folder / name / inside[name]).write_text("x")
            elif "\\n" in name:
                (folder / "two\nlines.txt").write_text("x")
            elif name not in ("gone.json", "up/"):
                (folder / name).write_text("x")
    (folder / "onnx" / "model.onnx_data").write_text("x")
    (folder / "checkpoint-500" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "gone.json").symlink_to(folder / "nowhere")
    (folder / "up").symlink_to(folder.parent)
    for name in (
        "config.json",
        "report.json",
        "report.html",
        SUMS,
        "model.safetensors.index.json",
        "model.safetensors",
    ):
        (folder / name).write_text("{}")
    (folder / "empty").mkdir()
    return folder


def test_what_is_copied_and_what_is_left_is_told(tmp_path: Path) -> None:
    found = companions(fill(tmp_path / "model"))
    assert found.copied == sorted(COPIED)
    assert found.left == {reason: sorted(names) for reason, names in LEFT.items()}
    note = found.note()
    assert note is not None and note.startswith("not copied: ") and "\n" not in note
    assert "README.md, README_zh.md (describes the original)" in note and "onnx/" in note
    assert companions(tmp_path / "model" / "1_Pooling").note() is None


def test_many_names_are_counted(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"pytorch_model-{i:05}.bin").write_text("")
    assert "pytorch_model-00019.bin and 10 more (weights)" in str(companions(tmp_path).note())


def test_size_number_and_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 10 << 20)
    monkeypatch.setattr(module, "MOST_FILES", 3)
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate((10 << 20) + 1)
    (tmp_path / "data").mkdir()
    for i in range(4):
        (tmp_path / "data" / f"{i}.txt").write_text("")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "secret.json").write_text("{}")
    monkeypatch.setattr(module.os, "access", lambda path, _: "secret" not in str(path))
    assert companions(tmp_path).left == {
        "over 10 MB": ["big.json"], "more than 3 files": ["data/"], "not a file": ["pipe"], "cannot be read": ["secret.json"],
    }  # fmt: skip


def test_the_hub_caches_links_are_followed(tmp_path: Path) -> None:
    """A snapshot is a folder of links to blobs beside it."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    (snapshot / "1_Pooling").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1f").write_text("pooled")
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/1f")
    assert companions(snapshot).copied == ["1_Pooling/config.json"]
    with Writer(tmp_path / "out") as writer:
        writer.put({"a": torch.zeros(1)})
        writer.companions(snapshot)
        writer.finish()
    copied = tmp_path / "out" / "1_Pooling" / "config.json"
    assert copied.read_text() == "pooled" and not copied.is_symlink()


def test_an_output_inside_the_model_is_not_copied_into_itself(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with Writer(tmp_path / "sub" / "out") as writer:
        writer.put({"a": torch.zeros(1)})
        assert (writer.out / STATE).is_dir()
        writer.companions(tmp_path)
        writer.finish()
    assert sorted(path.name for path in writer.out.iterdir()) == sorted(
        ["tokenizer.json", SUMS, "model.safetensors.index.json", "model-00001-of-00001.safetensors"]
    )


def test_what_was_written_is_not_overwritten(tmp_path: Path) -> None:
    fill(tmp_path / "model")
    with Writer(tmp_path / "out") as writer:
        writer.put({"a": torch.zeros(1)})
        writer.json("tokenizer.json", {"ours": 1})
        writer.companions(tmp_path / "model")
        for name in ("../x", "/x", "a/../../x", "a//b", "./a", ""):
            with pytest.raises(SettingError, match="not a file name") if name else pytest.raises(NearplaneError):
                writer.copy(tmp_path / "model" / "LICENSE", name) if name else writer.copy(tmp_path / "absent")
        writer.finish()
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"ours": 1}
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {*COPIED, SUMS, "model.safetensors.index.json", "model-00001-of-00001.safetensors"}
    sums = [line[66:] for line in (tmp_path / "out" / SUMS).read_text().splitlines()]
    assert sorted(sums) == sorted(names - {SUMS})


@pytest.mark.parametrize("there", [False, True])
def test_an_error_takes_sub_folders_back(tmp_path: Path, there: bool) -> None:
    fill(tmp_path / "model")
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(ValueError), Writer(tmp_path / "out") as writer:
        writer.companions(tmp_path / "model")
        assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
        raise ValueError
    assert not any((tmp_path / "out").iterdir()) if there else not (tmp_path / "out").exists()
