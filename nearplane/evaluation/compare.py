"""What ``compare`` measures: encoders, encoder-decoders and vision models against their originals."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from nearplane.checkpoint.load import LoadSettings, load_model
from nearplane.core.errors import SettingError
from nearplane.data.media import labelled
from nearplane.data.rows import Rows
from nearplane.data.samples import held_out
from nearplane.evaluation.features import Features, classify
from nearplane.evaluation.features import compare as compare_models
from nearplane.evaluation.perplexity import check_windows
from nearplane.machine.progress import say
from nearplane.models import inputs
from nearplane.models.locate import locate, read_config, refuse_loaded
from nearplane.models.source import open_skeleton


class Folder(NamedTuple):
    """A model folder whose processor is asked."""

    folder: Path
    config: Any
    trust_remote_code: bool


def compare(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    dataset: str | Path | Rows | None = None,
    dataset_split: str | None = None,
    dataset_column: str | None = None,
    labels: str | Path | None = None,
    seqlen: int = 512,
    windows: int | None = None,
    bos: bool = True,
    progress: bool = False,
    **settings: Any,
) -> Features:
    """Measure how far the final hidden states of a model are from its original's, or the accuracy that they allow.

    Args:
        model: a transformers folder, a hub id, or "demo": an encoder, an encoder-decoder or a vision model.
        reference: its original.
        dataset: a text (a file, a name, or rows in memory as ``Calibration`` takes them), or a folder of images or
            recordings; none: the held-out part of the embedded text.
        dataset_split: split of a text dataset.
        dataset_column: column of a text dataset.
        labels: a folder of images for each class: top-1 accuracy instead, which needs no ``reference``.
        seqlen: tokens per window of text.
        windows: at most so many windows, or files.
        bos: begin each window with the tokens that the tokenizer puts before a text, where it does so.
        progress: show a bar.
        settings: fields of ``LoadSettings``; of the reference ``device``, ``dtype`` and ``trust_remote_code``.

    Returns:
        Relative error and cosine of the final hidden states, or top-1 accuracy with ``labels``.

    Raises:
        NearplaneError: with one sentence, for a model or inputs that cannot be measured.
    """
    chosen = LoadSettings.of(settings)
    for some in (model, reference):
        refuse_loaded(some)
    if reference is None and labels is None:
        raise SettingError(
            "such a model is measured against its original (--reference), or on images of classes (--labels)."
        )
    windows = check_windows(seqlen, windows)[1]
    trust = chosen.trust_remote_code
    folder = locate(model, revision=chosen.revision)
    loaded = load_model(model, chosen)
    original = None if reference is None else load_model(reference, chosen.of_original())
    if original is not None and type(original.config) is not type(loaded.config):
        raise SettingError(
            f"{model} is a {type(loaded).__name__}, {reference} a {type(original).__name__}: nothing to compare."
        )
    owner = Folder(folder, read_config(folder, trust_remote_code=trust), trust)
    if labels is not None:
        return _classify(owner, loaded, original, labels)
    assert original is not None
    samples, origin = held_out(
        owner, loaded, dataset, seqlen, windows, dataset_split=dataset_split, dataset_column=dataset_column, bos=bos
    )
    return compare_models(loaded, original, samples, origin, progress=progress)


def _classify(owner: Folder, model: nn.Module, original: nn.Module | None, labels: str | Path) -> Features:
    """Measure top-1 accuracy on images of classes."""
    if inputs.reads(model) != (inputs.IMAGES,):
        raise SettingError("labels are for models that read images only.")
    train, test, names, notes = labelled(owner, Path(labels).expanduser())
    for note in notes:
        say(f"note: {note}")
    return classify(model, original, train, test, names, str(labels))


def is_language_model(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> bool:
    """Whether a model is measured by perplexity: a decoder of text."""
    folder = locate(model, revision=revision)
    return inputs.is_causal(open_skeleton(folder, trust_remote_code=trust_remote_code)[1])
