"""Images and recordings: calibration through a model's own processor, features and accuracy, bad files."""

import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers

import nearplane
from nearplane import GPTQ, Calibration, Grid, NearplaneError
from nearplane.cli.main import main
from nearplane.data import media
from nearplane.data.samples import positions
from nearplane.evaluation.features import Probe
from nearplane.models import inputs as classes
from nearplane.models.discover import discover
from nearplane.models.source import open_source

GRID = Grid(bits=4, group_size=32)


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A tiny ViT with its image processor."""
    pytest.importorskip("PIL")
    folder = tiny.save(tiny.build("vit", num_labels=2, id2label={0: "bright", 1: "dark"}), tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "do_resize": true}'
    )
    return folder


def pictures(folder: Path, count: int, level: int = 128, seed: int = 0) -> Path:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed)
    for i in range(count):
        pixels = np.clip(noise.normal(level, 40, (40, 50, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return folder


def run(model: Path, out: Path, dataset: Path | None, **settings: Any) -> nearplane.Report:
    calibration = Calibration(**{"dataset": None if dataset is None else str(dataset), "nsamples": 20} | settings)
    return nearplane.quantize(model, out, method=GPTQ(), grid=GRID, calibration=calibration, progress=False)


def test_calibrated_on_images(vit: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "images", 24)
    report = run(vit, tmp_path / "out", folder)
    assert report.data["windows"] == 20 and report.data["pixel_values"] == [20, 3, 32, 32]
    assert report.check is not None and not report.check["held_out"] and report.check["error"] > 0
    assert report.check["unanswered"] == "ViTForImageClassification predicts no tokens"
    assert len(report.linears) == 12 and {row.tokens for row in report.linears} == {20 * 17}
    assert all(
        row.error < row.rtn_error for row in report.linears if row.error is not None and row.rtn_error is not None
    )
    found = nearplane.compare(tmp_path / "out", reference=vit, dataset=str(folder))
    assert 0 < found.error["last_hidden_state"] < 0.5 and 0.8 < found.cosine["last_hidden_state"] < 1
    assert found.samples == 24 and str(folder) in found.protocol
    same = nearplane.compare(vit, reference=vit, dataset=str(folder), windows=3)
    assert (
        same.error["last_hidden_state"] == 0
        and same.cosine["last_hidden_state"] == pytest.approx(1)
        and same.samples == 3
    )


def test_files_that_are_no_images(vit: Path, tmp_path: Path) -> None:
    """One of 24 is left out and named; two of 24 are too many."""
    folder = pictures(tmp_path / "images", 23)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not an image")
    report = run(vit, tmp_path / "out", folder, nsamples=24)
    assert report.data["windows"] == 23 and any(
        "1 files could not be read" in e and "broken.jpg" in e for e in report.events
    )
    (folder / "other.png").write_bytes(b"")
    with pytest.raises(NearplaneError, match=r"2 of 25 files cannot be read: [^ ]*broken.jpg"):
        run(vit, tmp_path / "again", folder, nsamples=25)
    assert not (tmp_path / "again").exists()


def test_folders_and_processors_that_are_missing(vit: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for dataset, words in (
        (None, "give --dataset FOLDER"),
        (tmp_path / "empty", "holds no images"),
        (tmp_path / "no", "is no folder"),
    ):
        with pytest.raises(NearplaneError, match=words):
            run(vit, tmp_path / "out", dataset)
    (vit / "preprocessor_config.json").unlink()
    with pytest.raises(NearplaneError, match="has no image processor"):
        run(vit, tmp_path / "out", pictures(tmp_path / "images", 2))


def test_accuracy_of_a_probe_and_of_the_head(vit: Path, tmp_path: Path) -> None:
    """Classes that brightness tells apart: the probe learns them, a head of random weights is what it is."""
    for number, (name, level) in enumerate((("low", 60), ("middle", 130), ("high", 200))):
        pictures(tmp_path / "labels" / name, 12, level, seed=number)
    found = nearplane.compare(vit, labels=tmp_path / "labels")
    assert (
        found.accuracy is not None and found.accuracy > 0.9 and found.samples == 18 and found.reference_accuracy is None
    )
    assert "trained on the model's own features of 18 images" in found.protocol
    for name, level in (("Bright", 200), ("dark", 60)):
        for part, count in (("train", 2), ("test", 6)):
            pictures(tmp_path / "split" / part / name, count, level)
    head = nearplane.compare(vit, reference=vit, labels=tmp_path / "split")
    assert head.accuracy == head.reference_accuracy and head.samples == 12 and "classifier head" in head.protocol
    with pytest.raises(NearplaneError, match="holds 0 folders"):
        nearplane.compare(vit, labels=tmp_path / "labels" / "low")
    with pytest.raises(NearplaneError, match="nowhere is no folder"):
        nearplane.compare(vit, labels=tmp_path / "nowhere")
    pictures(tmp_path / "split" / "test" / "other", 2)
    with pytest.raises(NearplaneError, match="train and test hold different classes"):
        nearplane.compare(vit, labels=tmp_path / "split")


def test_the_probe_is_ridge_regression() -> None:
    """Its gradient is zero: the closed form of the penalised least squares."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(40, 6, generator=generator).double(), torch.arange(40) % 3
    probe = Probe(x, labels, 3)
    z = (x - x.mean(0)) / x.std(0)
    target = torch.nn.functional.one_hot(labels, 3).double()
    residual = probe.scores(x) - target
    torch.testing.assert_close(z.T @ residual / 40 + 0.1 * probe.weight, torch.zeros(6, 3).double(), rtol=0, atol=1e-10)


def recording(path: Path, samples: Any, rate: int = 16000) -> None:
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 2, rate, 0, "NONE", ""))
        sound.writeframes(np.asarray(samples).astype("<i2").tobytes())


def test_wav2vec2_on_recordings(tmp_path: Path) -> None:
    """Of a long recording its middle, a short one again and again: nothing is padded, every position counts."""
    folder = tiny.save(tiny.build("wav2vec2"), tmp_path / "model")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    sounds, noise = tmp_path / "sounds", np.random.default_rng(0)
    sounds.mkdir()
    for i, length in enumerate((30_000, 80_000, 100_000, 80_001)):
        recording(sounds / f"{i}.wav", noise.normal(0, 3000, length))
    found, bad = media.waveforms(open_source(folder), sorted(sounds.glob("*.wav")))
    assert found.shape == (4, classes.WAVE) and not bad
    assert positions([(1, 62, 64)], {"input_values": found}) == 62  # frames, not samples of the wave
    torch.testing.assert_close(found[0, :50_000], found[0, 30_000:], rtol=0, atol=0)
    with wave.open(str(sounds / "2.wav")) as sound:
        whole = torch.from_numpy(np.frombuffer(sound.readframes(100_000), "<i2").astype(np.float32))
    middle = whole[10_000:90_000]
    torch.testing.assert_close(found[2], (middle - middle.mean()) / middle.std(), rtol=1e-3, atol=1e-3)
    report = run(folder, tmp_path / "out", sounds)
    frames = tiny.build("wav2vec2")._get_feat_extract_output_lengths(classes.WAVE)
    assert len(report.linears) == 12 and {row.tokens for row in report.linears} == {4 * int(frames)}
    assert all(
        row.error < row.rtn_error for row in report.linears if row.error is not None and row.rtn_error is not None
    )
    compared = nearplane.compare(tmp_path / "out", reference=folder, dataset=str(sounds))
    assert 0 < compared.error["last_hidden_state"] < 0.5 and compared.samples == 4
    recording(sounds / "0.wav", noise.normal(0, 3000, 30_000), rate=8000)
    with pytest.raises(NearplaneError, match=r"1 of 4 files cannot be read: 0\.wav"):
        run(folder, tmp_path / "again", sounds)


def test_whisper_on_mel_spectrograms_and_recordings(tmp_path: Path) -> None:
    """Its decoder reads the text; what its cross-attention asks of the encoder, all of its positions."""
    folder = tiny.save(tiny.build("whisper"), tmp_path / "whisper")
    transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1, hop_length=333, n_fft=400).save_pretrained(
        folder
    )
    (tmp_path / "sounds").mkdir()
    noise = np.random.default_rng(0)
    for i in range(5):
        np.save(tmp_path / "sounds" / f"{i}.npy", noise.normal(size=(16, 48)).astype(np.float32))
    recording(tmp_path / "sounds" / "tone.wav", 8000 * np.sin(np.arange(16000) / 9))
    report = run(folder, tmp_path / "out", tmp_path / "sounds", seqlen=20)
    longer = shutil.copytree(folder, tmp_path / "longer")
    transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=2, hop_length=333, n_fft=400).save_pretrained(
        longer
    )
    with pytest.raises(NearplaneError, match=r"makes input_features of \[16, 96\].* reads \[16, 48\]"):
        run(longer, tmp_path / "refused", tmp_path / "sounds", seqlen=20)
    tokens = {row.name: row.tokens for row in report.linears}
    assert tokens["model.encoder.layers.0.fc1"] == tokens["model.decoder.layers.1.encoder_attn.k_proj"] == 6 * 24
    assert tokens["model.decoder.layers.0.self_attn.q_proj"] == 6 * 10
    found = nearplane.compare(tmp_path / "out", reference=folder, dataset=str(tmp_path / "sounds"), seqlen=20)
    assert 0 < found.error["encoder"] < 1 and found.kl is not None and found.kl > 0


# Of models whose configuration does not say how long their inputs are: the feature extractor, and what it makes of five seconds.
HEARD: dict[str, tuple[Any, tuple[int, ...]]] = {
    "audio-spectrogram-transformer": (
        lambda: transformers.ASTFeatureExtractor(max_length=64, num_mel_bins=16),
        (64, 16),
    ),
    "moonshine": (transformers.Wav2Vec2FeatureExtractor, (80_000,)),
    "speech_to_text": (lambda: transformers.Speech2TextFeatureExtractor(feature_size=16, num_mel_bins=16), (498, 16)),
    "wav2vec2-bert": (lambda: transformers.SeamlessM4TFeatureExtractor(feature_size=16, num_mel_bins=16), (249, 32)),
}


@pytest.mark.parametrize("kind", HEARD)
def test_a_feature_extractor_says_how_long_the_inputs_are(kind: str, tmp_path: Path) -> None:
    """Recordings of any length become the middle five seconds; every position of them counts, and none is padding."""
    extractor, shape = HEARD[kind]
    folder = tiny.save(tiny.build(kind), tmp_path / "model")
    with pytest.raises(NearplaneError, match=r"has no feature extractor .*hears a recording"):
        discover(open_source(folder))
    extractor().save_pretrained(folder)
    sounds, noise = tmp_path / "sounds", np.random.default_rng(0)
    sounds.mkdir()
    for i, length in enumerate((30_000, 80_000, 100_001)):
        recording(sounds / f"{i}.wav", noise.normal(0, 3000, length))
    report = run(folder, tmp_path / "out", sounds, seqlen=20)
    name = "input_features" if "input_features" in report.data else "input_values"
    assert tuple(report.data[name]) == (3, *shape)
    first = report.linears[0]
    assert (
        first.tokens % 3 == 0
        and first.error is not None
        and first.rtn_error is not None
        and first.error < first.rtn_error
    )


@pytest.mark.parametrize(
    ("case", "said"),
    [("broken", "2 of 5 files cannot be read: images/0.png (UnidentifiedImageError), images/1.png"),
     ("empty", "holds no images"), ("nowhere", "is no folder"),
     ("none given", "give --dataset FOLDER"), ("no processor", "has no image processor"),
     ("format", "gptq cannot say that activations are rounded"), ("bits", "act_bits and kv_bits are 2 to 8")],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_status_2(
    case: str, said: str, vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures(tmp_path / "images", 3)
    words = ["--dataset", str(folder), "--method", "gptq", "--group-size", "32"]
    if case == "broken":
        pictures(folder, 5)
        for i in (0, 1):
            (folder / f"{i:03}.png").rename(folder / f"{i}.png")
            (folder / f"{i}.png").write_bytes(b"\x89PNG, and then nothing")
    elif case == "no processor":
        (vit / "preprocessor_config.json").unlink()
    elif case in ("format", "bits"):
        words += ["--act-bits", "4", "--format", "gptq"] if case == "format" else ["--act-bits", "1"]
    else:
        (tmp_path / "empty").mkdir()
        words = words[2:] + ([] if case == "none given" else ["--dataset", str(tmp_path / case)])
    assert main(["quantize", str(vit), str(tmp_path / "out"), *words]) == 2
    message = capsys.readouterr().err
    lines = [line for line in message.splitlines() if line.startswith("nearplane: ")]
    assert len(lines) == 1 and said in lines[0] and "Traceback" not in message and not (tmp_path / "out").exists()
