"""What ``compare`` measures: encoders, encoder-decoders and vision models against their originals."""

from pathlib import Path
from typing import Any, NamedTuple

from nearplane.checkpoint.load import LoadSettings, load_model
from nearplane.core.errors import SettingError
from nearplane.data.media import labelled
from nearplane.data.samples import held_out
from nearplane.evaluation.features import Features, classify
from nearplane.evaluation.features import compare as compare_models
from nearplane.machine.progress import say
from nearplane.models import inputs
from nearplane.models.locate import locate, read_config
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
    dataset: str | None = None,
    labels: str | Path | None = None,
    seqlen: int = 512,
    windows: int | None = None,
    progress: bool = False,
    **settings: Any,
) -> Features:
    """Measure how far the final hidden states of a model are from its original's, or the accuracy that they allow.

    Args:
        model: a transformers folder, a hub id, or "demo": an encoder, an encoder-decoder or a vision model.
        reference: its original.
        dataset: a text, or a folder of images or recordings; none: the held-out part of the embedded text.
        labels: a folder of images for each class: top-1 accuracy instead, which needs no ``reference``.
        seqlen: tokens per window of text.
        windows: at most so many windows, or files.
        progress: show a bar.
        settings: fields of ``LoadSettings``; of the reference ``device``, ``dtype`` and ``trust_remote_code``.

    Returns:
        Relative error and cosine of the final hidden states, or top-1 accuracy with ``labels``.

    Raises:
        NearplaneError: with one sentence, for a model or inputs that cannot be measured.
    """
    chosen = LoadSettings.of(settings)
    if reference is None and labels is None:
        raise SettingError(
            "such a model is measured against its original (--reference), or on images of classes (--labels)."
        )
    if seqlen < 2 or (windows is not None and windows < 1):
        raise SettingError(f"seqlen must be at least 2 and windows at least 1; got {seqlen} and {windows}.")
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
        if inputs.reads(loaded) != (inputs.IMAGES,):
            raise SettingError("labels are for models that read images only.")
        train, test, names, notes = labelled(owner, Path(labels).expanduser())
        for note in notes:
            say(f"note: {note}")
        return classify(loaded, original, train, test, names, str(labels))
    assert original is not None
    samples, origin = held_out(owner, loaded, dataset, seqlen, windows)
    return compare_models(loaded, original, samples, origin, progress=progress)


def is_language_model(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> bool:
    """Whether a model is measured by perplexity: a decoder of text."""
    folder = locate(model, revision=revision)
    return inputs.is_causal(open_skeleton(folder, trust_remote_code=trust_remote_code)[1])
