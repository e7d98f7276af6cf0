"""What a model calibrates on, by what it reads: text, images, sound; the decoder behind an encoder also text.

Decides which files those are and what becomes of them: text is cut into full windows, or into padded sentences; images
and audio go through the model's own processor; a decoder reads the text of the same windows, behind its start token. It
gets half of a window, so that its positions and its encoder's can be told apart.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nearplane.calibrate.batches import Batch
from nearplane.calibrate.data import Calibration, digest, read_text, sentences, tokenize
from nearplane.calibrate.media import (
    AUDIO_FILES,
    IMAGE_FILES,
    RECORDINGS,
    WAVE_FILES,
    Owner,
    features,
    files_below,
    images,
    mels,
    pixel_values,
    waveforms,
    waves,
)
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.models import classes
from nearplane.models.classes import AUDIO, DECODER, IMAGES, MEDIA, TEXT, WAVES
from nearplane.models.source import Source, load_tokenizer


class Samples(NamedTuple):
    """Arguments of the model's forward, and what identifies them."""

    arguments: Batch
    data: dict[str, Any]  # for the report
    notes: tuple[str, ...] = ()  # what a user should know of them

    @property
    def number(self) -> int:
        """Samples."""
        return len(next(iter(self.arguments.values())))

    @property
    def length(self) -> int | None:
        """Tokens of a text window; None where no text is read."""
        ids = self.arguments.get(TEXT, self.arguments.get(DECODER))
        return None if ids is None else ids.shape[1]


def gather(source: Source, calibration: Calibration) -> Samples:
    """The samples that a model calibrates on. NearplaneError where they cannot be had, in one sentence."""
    model, wanted = source.model, classes.reads(source.model)
    if calibration.sentences and wanted != (TEXT,):
        raise SettingError(f"sentences are for models that read text only; this one reads {', '.join(wanted)}.")
    found: Batch = {}
    data: dict[str, Any] = {}
    notes: list[str] = []
    media = {IMAGES: images, AUDIO: mels, WAVES: waves}
    for name in (name for name in wanted if name in media):
        found[name], origin, said = media[name](source, calibration)
        data |= {
            "windows": len(found[name]),
            "origin": origin,
            name: list(found[name].shape),
            "media_sha256": _hash(found[name]),
        }
        notes += said
    if TEXT in wanted or DECODER in wanted:
        samples = len(next(iter(found.values()))) if found else calibration.nsamples
        text = _text(source, calibration, samples, bool(found))
        found = text.arguments | found
        data = text.data | data if not found.keys() & media.keys() else {**data, "text": text.data}
        if DECODER in wanted:
            found = _decoded(model, found, keep=TEXT in wanted)
    return Samples(found, data, tuple(notes))


def held_out(
    owner: Owner, model: nn.Module, dataset: str | None, seqlen: int, windows: int | None
) -> tuple[Batch, str]:
    """What an encoder or a vision model is measured on: windows of held-out text, or all files of a folder, in order."""
    wanted = classes.reads(model)
    found: Batch = {}
    origin = ""
    if MEDIA & set(wanted):
        if dataset is None:
            raise SettingError("this model reads images or recordings; give --dataset FOLDER to measure it on.")
        if IMAGES in wanted:
            found[IMAGES] = pixel_values(owner, files_below(Path(dataset), IMAGE_FILES, "images")[:windows])[0]
        if AUDIO in wanted:
            found[AUDIO] = features(owner, files_below(Path(dataset), AUDIO_FILES, RECORDINGS)[:windows])[0]
        if WAVES in wanted:
            found[WAVES] = waveforms(owner, files_below(Path(dataset), WAVE_FILES, "recordings")[:windows])[0]
        origin, windows = dataset, len(next(iter(found.values())))
    if {TEXT, DECODER} & set(wanted):
        text = read_text(None if found else dataset, "evaluation")
        tokenizer = load_tokenizer(owner.folder, trust_remote_code=owner.trust_remote_code)
        ids, seqlen = tokenize(tokenizer, text), min(seqlen, longest_input(model) or seqlen)
        count = min(len(ids) // seqlen, windows or len(ids))
        if count == 0:
            raise NearplaneError(f"text {text.origin} has {len(ids)} tokens, fewer than one window of seqlen={seqlen}.")
        check_vocabulary(ids, model)
        found = {name: value[:count] for name, value in found.items()}
        found[TEXT] = ids[: count * seqlen].view(count, seqlen)
        origin = f"{origin} and {text.origin}".removeprefix(" and ")
        if DECODER in wanted:
            found = _decoded(model, found, keep=TEXT in wanted)
    return found, origin


def _text(source: Source, calibration: Calibration, count: int, embedded: bool) -> Samples:
    """Windows of text, or sentences; the embedded one where the dataset is another medium's."""
    longest = longest_input(source.model)
    if calibration.sentences:
        ids, mask, origin = sentences(calibration, source.tokenizer, longest)
        check_vocabulary(ids, source.model)
        size = {"windows": len(ids), "seqlen": ids.shape[1], "tokens": int(mask.sum())}
        what = {"origin": origin, "sha256": digest(ids * mask)}
        return Samples({TEXT: ids, "attention_mask": mask}, size | what)
    asked = replace(calibration, nsamples=count, dataset=None if embedded else calibration.dataset)
    tokens = asked.load(source.tokenizer, longest)
    check_vocabulary(tokens.ids, source.model)
    windows, seqlen = tokens.ids.shape
    size = {"windows": windows, "seqlen": seqlen, "tokens": windows * seqlen}
    return Samples({TEXT: tokens.ids}, size | {k: v for k, v in tokens._asdict().items() if k != "ids"})


def _decoded(model: nn.Module, found: Batch, *, keep: bool) -> Batch:
    """With what the decoder reads: its start token and the first half of the window."""
    config: Any = model.config
    ids = found[TEXT]
    start = next((s for s in (getattr(config, key, None) for key in
                  ("decoder_start_token_id", "bos_token_id", "pad_token_id")) if isinstance(s, int)), 0)  # fmt: skip
    half = max(1, ids.shape[1] // 2)
    decoder = torch.cat([torch.full((len(ids), 1), start), ids[:, : half - 1]], 1)
    rest = found if keep else {name: value for name, value in found.items() if name != TEXT}
    return rest | {DECODER: decoder}


def longest_input(model: nn.Module) -> int | None:
    """Positions of text the model was made for, where its configuration says."""
    config: Any = classes.text_config(model.config)
    limits = (getattr(config, key, None) for key in ("max_position_embeddings", "max_target_positions"))
    limit = next((n for n in limits if isinstance(n, int) and n > 1), None)
    if limit is None:
        return None
    for module in model.modules():  # some encoders begin to count behind the padding token
        if isinstance(module, nn.Embedding) and module.num_embeddings == limit and module.padding_idx is not None:
            return limit - module.padding_idx - 1
    return limit


def check_vocabulary(ids: Tensor, model: nn.Module) -> None:
    """Raise NearplaneError when the tokenizer makes ids that the model has no embedding for."""
    size = classes.text_config(model.config).vocab_size
    if int(ids.max()) >= size:
        raise NearplaneError(
            f"the tokenizer makes token {int(ids.max())}, the model's vocabulary has {size}: they do not belong together."
        )


def _hash(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
