"""timm's models, inside the wrapper that transformers has for them. Skipped where timm is not installed (the extra ``timm``)."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import nearplane
from nearplane import GPTQ, RTN, Calibration, Grid
from nearplane.cli.main import main
from nearplane.models.discover import discover
from nearplane.models.source import open_source

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}
# DeiT; EVA-02 with rotary positions and SwiGLU, as base and large are built; and as tiny and small are.
KINDS: dict[str, tuple[str, dict[str, Any], list[list[str]], list[str]]] = {
    "deit": ("deit_tiny_patch16_224", SMALL, [["attn.qkv"], ["attn.proj"], ["mlp.fc1"], ["mlp.fc2"]], []),
    "eva02": (
        "eva02_large_patch14_224",
        SMALL | {"img_size": 28},
        [["attn.q_proj", "attn.k_proj", "attn.v_proj"], ["attn.proj"], ["mlp.fc1_g", "mlp.fc1_x"], ["mlp.fc2"]],
        [],
    ),
    "eva02, fused": (
        "eva02_tiny_patch14_224",
        SMALL | {"img_size": 28},
        [["attn.proj"], ["mlp.fc1"], ["mlp.fc2"]],
        ["attn.qkv"],  # its forward multiplies by the weight itself, since query and value have biases of their own
    ),
}


@pytest.fixture(scope="module")
def timm() -> Any:
    return pytest.importorskip("timm", reason="timm is not installed: pip install 'nearplane[timm]'")


def save(folder: Path, architecture: str, sizes: dict[str, Any] | None) -> Any:
    """A random model with three classes, as transformers writes it."""
    config = transformers.TimmWrapperConfig(
        architecture=architecture,
        model_args=sizes,
        num_labels=3,
        architectures=["TimmWrapperForImageClassification"],
    )
    pixels = (sizes or {}).get("img_size", 160)
    config.pretrained_cfg = {"input_size": [3, pixels, pixels], "mean": [0.5] * 3, "std": [0.5] * 3}
    torch.manual_seed(0)
    model = transformers.TimmWrapperForImageClassification(config).eval()
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return model


def pictures(folder: Path, count: int) -> Path:
    image = pytest.importorskip("PIL.Image")
    drawn = torch.Generator().manual_seed(0)
    for name, level in (("bright", 180), ("dark", 70)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = (level + 30 * torch.randn(40, 50, 3, generator=drawn)).clamp(0, 255).byte()
            image.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, timm: Any, tmp_path: Path) -> None:
    """Stages; a run on images through timm's own transforms; transformers and we compute the same from the checkpoint."""
    architecture, sizes, stages, dense = KINDS[kind]
    original = save(tmp_path / "model", architecture, sizes)
    blocks = discover(open_source(tmp_path / "model"))
    assert [block.name for block in blocks] == ["timm_model.blocks.0", "timm_model.blocks.1"]
    for block in blocks:
        assert [[s.name.removeprefix(block.name + ".") for s in stage] for stage in block.stages] == stages
        assert block.unreached == [f"{block.name}.{name}" for name in dense]
    folder = pictures(tmp_path / "images", 5)
    report = nearplane.quantize(
        tmp_path / "model", tmp_path / "out", method=GPTQ(), grid=Grid(bits=4, group_size=-1), progress=False,
        calibration=Calibration(dataset=str(folder), nsamples=8),
    )  # fmt: skip
    side = sizes["img_size"]
    assert report.data["pixel_values"] == [8, 3, side, side]
    assert {row.tokens for row in report.linears} == {8 * blocks[0].shape[1]}
    assert [event for event in report.events if "did not reach" in event] == [
        f"{block.name}.{name}: the probe forward did not reach it, stays dense" for block in blocks for name in dense
    ]
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        mine = nearplane.load(tmp_path / "out", packed=False)(pixel_values=pixels).logits
        packed = nearplane.load(tmp_path / "out")(pixel_values=pixels).logits
        assert torch.equal(theirs(pixel_values=pixels).logits, mine)
        off = float((mine - original(pixel_values=pixels).logits).norm() / mine.norm())
    torch.testing.assert_close(packed, mine, rtol=0, atol=1e-3 * float(mine.abs().max()))
    assert 0 < off < 1
    found = nearplane.compare(tmp_path / "out", reference=tmp_path / "model", dataset=str(folder))
    assert found.samples == 10 and 0 < found.error["last_hidden_state"] < 0.5
    probed = nearplane.compare(tmp_path / "out", reference=tmp_path / "model", labels=folder)
    assert probed.accuracy is not None and "linear probe" in probed.protocol


def test_a_folder_as_timm_publishes_it(timm: Any, tmp_path: Path) -> None:
    """No model_type, no number of layers, tensors without the wrapper's prefix."""
    original = save(tmp_path / "wrapped", "test_vit", None)
    (tmp_path / "model").mkdir()
    safetensors.torch.save_file(original.timm_model.state_dict(), tmp_path / "model" / "model.safetensors")
    published = {"architecture": "test_vit", "num_classes": 3, "label_names": ["a", "b", "c"]}
    settings = {"input_size": [3, 160, 160], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 3}
    (tmp_path / "model" / "config.json").write_text(json.dumps(published | {"pretrained_cfg": settings}))
    report = nearplane.quantize(
        tmp_path / "model", tmp_path / "out", method=RTN(), grid=Grid(bits=8, group_size=-1), progress=False
    )
    assert len(report.linears) == 4 * len(original.timm_model.blocks)
    pixels = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        mine = nearplane.load(tmp_path / "out", packed=False)(pixel_values=pixels).logits
        assert torch.equal(mine, theirs(pixel_values=pixels).logits)
        assert float((mine - original(pixel_values=pixels).logits).norm() / mine.norm()) < 0.1


@pytest.mark.parametrize(
    ("content", "words"),
    [("raise ImportError('no timm')", "holds a timm model, which needs timm: pip install 'nearplane[timm]'"),
     ("raise RuntimeError('operator torchvision::nms does not exist')", "torchvision must be of the same")],
)  # fmt: skip
def test_timm_that_is_missing_or_broken(
    content: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence and exit status 2, before anything is read. Needs no timm."""
    (tmp_path / "site" / "timm").mkdir(parents=True)
    (tmp_path / "site" / "timm" / "__init__.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architecture": "deit_tiny_patch16_224", "pretrained_cfg": {}}')
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in " ".join(said.split()) and "Traceback" not in said
