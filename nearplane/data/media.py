"""Read images and audio from files, and convert both to a model's inputs by the model's own processor.

Files are found by their endings and drawn with a seed. Files that cannot be read are left out, counted and named; more
than one in twenty is an error. Nothing is padded: a long sound wave is cut to its middle, a short one is repeated.
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
# Share of the files that may be unreadable.
UNREADABLE = 0.05
RECORDINGS = "recordings (.wav) or mel spectrograms (.npy)"
Media = tuple[Tensor, str, list[str]]
"""Values of shape (samples, ...), their origin, and remarks for the user."""


class Owner(Protocol):
    """A model folder whose processor is used."""

    @property
    def folder(self) -> Path:
        """The folder."""

    @property
    def config(self) -> Any:
        """The model's configuration."""

    @property
    def trust_remote_code(self) -> bool:
        """Whether Python code that comes with the model may run."""


def images(source: Owner, calibration: Calibration) -> Media:
    """Read ``nsamples`` seeded images of a folder as pixel values (samples, channels, height, width)."""
    pixels, _, bad = pixel_values(source, some_files(calibration, IMAGE_FILES, "images"))
    return pixels, f"{calibration.dataset}: {len(pixels)} images", bad


def mels(source: Owner, calibration: Calibration) -> Media:
    """Read ``nsamples`` seeded recordings (.wav) or mel spectrograms (.npy), in the model's order of channels and frames."""
    paths = some_files(calibration, AUDIO_FILES, RECORDINGS)
    spectrograms, bad = features(source, paths)
    return spectrograms, f"{calibration.dataset}: {len(spectrograms)} recordings", bad


def waves(source: Owner, calibration: Calibration) -> Media:
    """Read ``nsamples`` seeded recordings (.wav) of a folder as sound waves (samples, length)."""
    values, bad = waveforms(source, some_files(calibration, WAVE_FILES, "recordings (.wav)"))
    return values, f"{calibration.dataset}: {len(values)} recordings", bad


def pixel_values(source: Owner, paths: list[Path]) -> tuple[Tensor, list[Path], list[str]]:
    """Read image files.

    Args:
        source: the model folder, whose image processor is used.
        paths: the files.

    Returns:
        Pixel values (images, channels, height, width), the files that could be read, and a remark on the others.

    Raises:
        NearplaneError: Pillow or the processor is missing, more than one file in twenty is no image, or sizes differ.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise NearplaneError("reading images needs Pillow: pip install 'nearplane[vision]'.") from error
    processor = image_processor(source)
    pixels, kept, bad = [], [], []
    for path in paths:
        try:
            with Image.open(path) as image:
                pixels.append(_pixels(processor, image.convert("RGB")))
            kept.append(path)
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            bad.append(f"{path.parent.name}/{path.name} ({type(error).__name__})")
    pixels = _enough(pixels, bad, paths)
    if len({value.shape for value in pixels}) > 1:
        raise NearplaneError(
            f"{source.folder}: its image processor makes images of several sizes; they must be of one."
        )
    return torch.stack(pixels), kept, _notes(bad)


def features(source: Owner, paths: list[Path]) -> tuple[Tensor, list[str]]:
    """Read recordings or stored mel spectrograms.

    Args:
        source: the model folder, whose feature extractor is used.
        paths: the files.

    Returns:
        Mel spectrograms of one shape (files, ...), and a remark on files that could not be read.

    Raises:
        NearplaneError: more than one file in twenty cannot be read, or the feature extractor makes another shape.
    """
    shape = inputs.sound_shape(source.config, source.folder, inputs.AUDIO)
    return _heard(paths, lambda path: _mel(source, path, shape))


def waveforms(source: Owner, paths: list[Path]) -> tuple[Tensor, list[str]]:
    """Read recordings as sound waves of one length: the middle of a longer one, a shorter one repeated.

    Args:
        source: the model folder, whose feature extractor is used.
        paths: the files.

    Returns:
        Sound waves (files, length), and a remark on files that could not be read.

    Raises:
        NearplaneError: more than one file in twenty cannot be read.
    """
    shape = inputs.sound_shape(source.config, source.folder, inputs.WAVES)
    return _heard(paths, lambda path: _sounding(source, path, shape, inputs.WAVES))


def labelled(source: Owner, folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[str], list[str]]:
    """Read labelled images to train and test a probe on. A class is a folder of images.

    Folders of classes called train and test are used as such. Otherwise every second image of a class trains, the rest tests.

    Args:
        source: the model folder, whose image processor is used.
        folder: the folder of classes, or of train and test.

    Returns:
        Pixel values and labels to train on, the same to test on, names of the classes, and remarks.

    Raises:
        NearplaneError: fewer than two classes, other classes in train than in test, no test image, or unreadable files.
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
    parted: list[tuple[Tensor, Tensor]] = []
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
        parted.append((pixels, torch.tensor([label_of[path] for path in kept])))
        notes += bad
    return parted[0], parted[1], names, notes


def image_processor(source: Owner) -> Any:
    """Load the image processor in a model folder. NearplaneError if there is none that transformers can load."""
    try:
        return transformers.AutoImageProcessor.from_pretrained(
            source.folder, trust_remote_code=source.trust_remote_code, use_fast=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise NearplaneError(
            f"{source.folder} has no image processor that transformers can load (preprocessor_config.json; {_first(error)})."
        ) from error


def some_files(calibration: Calibration, endings: tuple[str, ...], what: str) -> list[Path]:
    """Draw ``nsamples`` files below the dataset's folder, seeded; all files if there are fewer.

    Args:
        calibration: folder, number and seed.
        endings: endings of file names, in lower case.
        what: word for such files, for errors.
    """
    if calibration.dataset is None:
        raise SettingError(f"this model reads {what}, of which none come with nearplane; give --dataset FOLDER.")
    files = files_below(Path(str(calibration.dataset)).expanduser(), endings, what)
    generator = torch.Generator().manual_seed(calibration.seed)
    order = torch.randperm(len(files), generator=generator)[: calibration.nsamples]
    return [files[i] for i in sorted(order.tolist())]


def files_below(folder: Path, endings: tuple[str, ...], what: str) -> list[Path]:
    """List the files with these endings below a folder, sorted. NearplaneError if there is none."""
    if not folder.is_dir():
        raise NearplaneError(f"{folder} is no folder of {what}, which this model reads.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file())
    if not files:
        raise NearplaneError(f"folder {folder} holds no {what}.")
    return files


def _heard(paths: list[Path], read: Callable[[Path], Tensor]) -> tuple[Tensor, list[str]]:
    """Read every file; return the stacked values and a remark on files that could not be read."""
    values, bad = [], []
    for path in paths:
        try:
            values.append(read(path))
        except (OSError, ValueError, EOFError, wave.Error) as error:
            bad.append(f"{path.name} ({str(error).splitlines()[0][:80] if str(error) else type(error).__name__})")
    return torch.stack(_enough(values, bad, paths)), _notes(bad)


def _pixels(processor: Any, image: Any) -> Tensor:
    """Process one image to pixel values (channels, height, width)."""
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    if not isinstance(pixels, Tensor) or pixels.dim() != 4:
        raise NearplaneError("this model's image processor cuts an image into several inputs, which is not supported.")
    return pixels[0].float()


def _mel(source: Owner, path: Path, shape: tuple[int, ...]) -> Tensor:
    """Read one file as a mel spectrogram of one shape."""
    if path.suffix.lower() == ".npy":
        mel = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
        if tuple(mel.shape) != shape:
            raise ValueError(f"shape {list(mel.shape)}, not {list(shape)}")
        return mel
    return _sounding(source, path, shape, inputs.AUDIO)


def _sounding(source: Owner, path: Path, shape: tuple[int, ...], name: str) -> Tensor:
    """Read one recording as the model's input ``name``. Five seconds of it, unless the configuration says how much is heard."""
    samples, rate = _sound(path)
    extractor = inputs.feature_extractor(source.folder)
    stated = inputs.stated_sound(source.config, name)
    if stated is None or name == inputs.WAVES:
        length = inputs.five_seconds(extractor) if stated is None else stated[0]
        first = max(0, (len(samples) - length) // 2)
        samples = np.resize(samples[first : first + length], length)
    values = inputs.extract(extractor, samples, rate, name, source.folder)
    if tuple(values.shape) != shape:
        raise NearplaneError(
            f"{source.folder}: its feature extractor makes {name} of {list(values.shape)}, the model reads {list(shape)}."
        )
    return values


def _sound(path: Path) -> tuple[np.ndarray[Any, Any], int]:
    """Read a 16-bit recording: samples averaged over channels, between -1 and 1, and the sampling rate."""
    with wave.open(str(path)) as sound:
        rate, channels, width = sound.getframerate(), sound.getnchannels(), sound.getsampwidth()
        raw = sound.readframes(sound.getnframes())
    if width != 2 or not raw:
        raise ValueError(f"{8 * width} bits, not 16" if raw else "empty")
    return np.frombuffer(raw, dtype="<i2").reshape(-1, channels).mean(1).astype(np.float32) / 32768, rate


def _enough(values: list[Tensor], bad: list[str], paths: list[Path]) -> list[Tensor]:
    """Return ``values``. NearplaneError if too many files were unreadable."""
    if not values or len(bad) > UNREADABLE * len(paths):
        raise NearplaneError(f"{len(bad)} of {len(paths)} files cannot be read: {some_of(bad)}.")
    return values


def _notes(bad: list[str]) -> list[str]:
    """Write the remark on unreadable files, if any."""
    return [f"{len(bad)} files could not be read and are left out: {some_of(bad)}"] if bad else []


def _first(error: BaseException) -> str:
    """Shorten an error's message to its first line."""
    return textwrap.shorten((str(error).strip().splitlines() or [type(error).__name__])[0], 120, placeholder=" ...")
