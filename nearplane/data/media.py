"""Images and audio -> what a model's forward reads, through the model's own processor.

Decides which files of a folder are taken and what happens to those that cannot be read: they are counted and named, and
more than one in twenty is an error.
"""

import textwrap
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch import Tensor

from nearplane.core.errors import NearplaneError, SettingError, some_of
from nearplane.data.text import Calibration
from nearplane.models import inputs

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
AUDIO_FILES = (".wav", ".npy")
WAVE_FILES = (".wav",)
# The share of files that may be unreadable.
UNREADABLE = 0.05
RECORDINGS = "recordings (.wav) or mel spectrograms (.npy)"
Media = tuple[Tensor, str, list[str]]
"""Values (samples, ...), where they came from, and what a user should know."""


class Owner(Protocol):
    """Whose processor is asked: a model folder."""

    @property
    def folder(self) -> Path:
        """Where its files are."""

    @property
    def config(self) -> Any:
        """Its configuration."""

    @property
    def trust_remote_code(self) -> bool:
        """Whether it may run code of its own."""


def images(source: Owner, calibration: Calibration) -> Media:
    """``nsamples`` images of a folder, at seeded random, as pixel values."""
    pixels, _, bad = pixel_values(source, some_files(calibration, IMAGE_FILES, "images"))
    return pixels, f"{calibration.dataset}: {len(pixels)} images", bad


def mels(source: Owner, calibration: Calibration) -> Media:
    """``nsamples`` recordings (.wav) or mel spectrograms (.npy) of a folder, at seeded random, as input features."""
    paths = some_files(calibration, AUDIO_FILES, RECORDINGS)
    found, bad = features(source, paths)
    return found, f"{calibration.dataset}: {len(found)} recordings", bad


def waves(source: Owner, calibration: Calibration) -> Media:
    """``nsamples`` recordings (.wav) of a folder, at seeded random, as input values."""
    found, bad = waveforms(source, some_files(calibration, WAVE_FILES, "recordings (.wav)"))
    return found, f"{calibration.dataset}: {len(found)} recordings", bad


def features(source: Owner, paths: list[Path]) -> tuple[Tensor, list[str]]:
    """Mel spectrograms of these files, and a note on those that are none. NearplaneError past one in twenty."""
    shape = inputs.mel_shape(source.config)
    return _heard(paths, lambda path: _mel(source, path, shape))


def waveforms(source: Owner, paths: list[Path]) -> tuple[Tensor, list[str]]:
    """Sound waves of these files: of a long one its middle, a short one again and again, so that nothing is padded."""
    (length,) = inputs.wave_shape(source.config)
    return _heard(paths, lambda path: _wave(source, path, length))


def _heard(paths: list[Path], read: Callable[[Path], Tensor]) -> tuple[Tensor, list[str]]:
    """What can be read of these files, and a note on what cannot."""
    found, bad = [], []
    for path in paths:
        try:
            found.append(read(path))
        except (OSError, ValueError, EOFError, wave.Error) as error:
            bad.append(f"{path.name} ({str(error).splitlines()[0][:80] if str(error) else type(error).__name__})")
    return torch.stack(_enough(found, bad, paths)), _notes(bad)


def labelled(source: Owner, folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[str], list[str]]:
    """Images and labels to train a probe on, the same to test on, the classes' names, and notes.

    A class is a folder; folders of classes called train and test are taken so, else every second image of a class trains.
    """
    if not folder.is_dir():
        raise NearplaneError(f"labels {folder} is no folder.")
    split = all((folder / part).is_dir() for part in ("train", "test"))
    parts = [folder / "train", folder / "test"] if split else [folder]
    names = sorted(path.name for path in parts[0].iterdir() if path.is_dir()) if parts[0].is_dir() else []
    if len(names) < 2:
        raise NearplaneError(f"labels {folder} holds {len(names)} folders of a class each; two are the least.")
    tested = names if not split else sorted(path.name for path in parts[1].iterdir() if path.is_dir())
    if tested != names:
        raise NearplaneError(
            f"labels {folder}: train and test hold different classes, {', '.join(names)} and {', '.join(tested)}."
        )
    found: list[tuple[Tensor, Tensor]] = []
    notes: list[str] = []
    for k in (0, 1):
        paths = []
        for name in names:
            files = files_below(parts[k if split else 0] / name, IMAGE_FILES, "images")
            paths += [(path, name) for path in (files if split else files[k::2])]
        if not paths:
            raise NearplaneError(f"labels {folder}: a class of one image leaves none to test on.")
        pixels, kept, bad = pixel_values(source, [path for path, _ in paths])
        label_of = {path: names.index(name) for path, name in paths}
        found.append((pixels, torch.tensor([label_of[path] for path in kept])))
        notes += bad
    return found[0], found[1], names, notes


def pixel_values(source: Owner, paths: list[Path]) -> tuple[Tensor, list[Path], list[str]]:
    """Pixel values of these files, those that are images, a note on those that are none. NearplaneError past one in twenty."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise NearplaneError("reading images needs Pillow: pip install 'nearplane[vision]'.") from error
    processor = image_processor(source)
    found, kept, bad = [], [], []
    for path in paths:
        try:
            with Image.open(path) as image:
                found.append(_pixels(processor, image.convert("RGB")))
            kept.append(path)
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            bad.append(f"{path.parent.name}/{path.name} ({type(error).__name__})")
    found = _enough(found, bad, paths)
    if len({value.shape for value in found}) > 1:
        raise NearplaneError(
            f"{source.folder}: its image processor makes images of several sizes; they must be of one."
        )
    return torch.stack(found), kept, _notes(bad)


def image_processor(source: Owner) -> Any:
    """The image processor in a model folder."""
    try:
        return transformers.AutoImageProcessor.from_pretrained(
            source.folder, trust_remote_code=source.trust_remote_code, use_fast=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise NearplaneError(
            f"{source.folder} has no image processor that transformers can load (preprocessor_config.json; {_first(error)})."
        ) from error


def some_files(calibration: Calibration, endings: tuple[str, ...], what: str) -> list[Path]:
    """``nsamples`` files below the dataset's folder, seeded; all, where there are fewer."""
    if calibration.dataset is None:
        raise SettingError(f"this model reads {what}, of which none come with nearplane; give --dataset FOLDER.")
    found = files_below(Path(calibration.dataset).expanduser(), endings, what)
    generator = torch.Generator().manual_seed(calibration.seed)
    order = torch.randperm(len(found), generator=generator)[: calibration.nsamples]
    return [found[i] for i in sorted(order.tolist())]


def files_below(folder: Path, endings: tuple[str, ...], what: str) -> list[Path]:
    """Files with these endings, sorted. NearplaneError where there is none."""
    if not folder.is_dir():
        raise NearplaneError(f"{folder} is no folder of {what}, which this model reads.")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file())
    if not found:
        raise NearplaneError(f"folder {folder} holds no {what}.")
    return found


def _pixels(processor: Any, image: Any) -> Tensor:
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    if not isinstance(pixels, Tensor) or pixels.dim() != 4:
        raise NearplaneError("this model's image processor cuts an image into several inputs, which is not supported.")
    return pixels[0].float()


def _mel(source: Owner, path: Path, shape: tuple[int, int]) -> Tensor:
    if path.suffix.lower() == ".npy":
        mel = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
        if tuple(mel.shape) != shape:
            raise ValueError(f"shape {list(mel.shape)}, not {list(shape)}")
        return mel
    samples, rate = _sound(path)
    features = torch.as_tensor(_extractor(source)(samples, sampling_rate=rate, return_tensors="pt")["input_features"])[
        0
    ]
    if tuple(features.shape) != shape:
        found = f"{list(features.shape)} (channels, frames), the model reads {list(shape)}"
        raise NearplaneError(f"{source.folder}: its feature extractor makes spectrograms of {found}.")
    return features.float()


def _wave(source: Owner, path: Path, length: int) -> Tensor:
    samples, rate = _sound(path)
    first = max(0, (len(samples) - length) // 2)
    piece = np.resize(samples[first : first + length], length)
    values = _extractor(source)(piece, sampling_rate=rate, return_tensors="pt")["input_values"]
    return torch.as_tensor(values)[0].float()


def _sound(path: Path) -> tuple[np.ndarray[Any, Any], int]:
    """Samples of a 16-bit recording, its channels averaged, and their rate."""
    with wave.open(str(path)) as sound:
        rate, channels, width = sound.getframerate(), sound.getnchannels(), sound.getsampwidth()
        raw = sound.readframes(sound.getnframes())
    if width != 2 or not raw:
        raise ValueError(f"{8 * width} bits, not 16" if raw else "empty")
    return np.frombuffer(raw, dtype="<i2").reshape(-1, channels).mean(1).astype(np.float32) / 32768, rate


def _extractor(source: Owner) -> Any:
    """The feature extractor in a model folder."""
    try:
        return transformers.AutoFeatureExtractor.from_pretrained(source.folder)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise NearplaneError(
            f"{source.folder} has no feature extractor that transformers can load ({_first(error)}); a model of mel "
            "spectrograms also takes them as .npy files."
        ) from error


def _enough(found: list[Tensor], bad: list[str], paths: list[Path]) -> list[Tensor]:
    """``found``, unless too many files were unreadable."""
    if not found or len(bad) > UNREADABLE * len(paths):
        raise NearplaneError(f"{len(bad)} of {len(paths)} files cannot be read: {some_of(bad)}.")
    return found


def _notes(bad: list[str]) -> list[str]:
    return [f"{len(bad)} files could not be read and are left out: {some_of(bad)}"] if bad else []


def _first(error: BaseException) -> str:
    return textwrap.shorten((str(error).strip().splitlines() or [type(error).__name__])[0], 120, placeholder=" ...")
