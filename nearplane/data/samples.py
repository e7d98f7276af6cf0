"""What a model calibrates on, by what it reads: text, images, sound; the decoder behind an encoder also text.

Decides which files those are and what becomes of them: text is cut into full windows, or into padded sentences; images
and audio go through the model's own processor; a decoder reads the text of the same windows, behind its start token. It
gets half of a window, so that its positions and its encoder's can be told apart.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.data.media import (
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
from nearplane.data.text import Calibration, digest, read_text, sentences, tokenize
from nearplane.models import inputs
from nearplane.models.inputs import AUDIO, DECODER, IMAGES, MEDIA, TEXT, WAVES
from nearplane.models.source import Source, load_tokenizer

Batch = dict[str, Tensor]
"""Keyword arguments of the model's forward; the rows of each are samples."""


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
    model, wanted = source.model, inputs.reads(source.model)
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
    wanted = inputs.reads(model)
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
    config: Any = inputs.text_config(model.config)
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
    size = inputs.text_config(model.config).vocab_size
    if int(ids.max()) >= size:
        raise NearplaneError(
            f"the tokenizer makes token {int(ids.max())}, the model's vocabulary has {size}: they do not belong together."
        )


def _hash(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def as_batch(samples: Tensor | Mapping[str, Tensor]) -> Batch:
    """Arguments by name; token ids alone are ``input_ids``."""
    return {"input_ids": samples} if isinstance(samples, Tensor) else dict(samples)


def masks(batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The arguments that say which positions are real: (sequences, positions)."""
    return [value for name, value in batch.items() if name.endswith("attention_mask") and value.dim() == 2]


def cut(samples: Mapping[str, Tensor], first: int, last: int, device: torch.device) -> Batch:
    """Samples ``first`` to ``last``, without the columns in which all of them are padded, at the end."""
    batch = {name: value[first:last].to(device) for name, value in samples.items()}
    for name, mask in list(batch.items()):
        if not name.endswith("attention_mask") or mask.dim() != 2:
            continue
        longest = int(mask.any(0).nonzero().max()) + 1 if bool(mask.any()) else 1
        prefix = name.removesuffix("attention_mask")  # decoder_attention_mask goes with decoder_input_ids
        for other in (name, prefix + "input_ids", prefix + "token_type_ids"):
            if other in batch:
                batch[other] = batch[other][:, :longest]
    return batch


def real(batch: Mapping[str, Tensor], leading: torch.Size, where: str) -> Tensor | None:
    """Which rows of an input, that lay as ``leading`` says, are no padding; None where all are real.

    NearplaneError where the model has laid them out so that padding cannot be told.
    """
    if all(bool(mask.all()) for mask in masks(batch)):
        return None
    prefixes = {name.removesuffix("attention_mask").removesuffix("input_ids"): None for name in batch}
    read = [(batch.get(f"{p}input_ids"), batch.get(f"{p}attention_mask")) for p in prefixes]
    known = [mask if mask is not None else torch.ones_like(ids) for ids, mask in read if ids is not None]
    known += [mask for ids, mask in read if ids is None and mask is not None]
    fitting = [m for m in known if m.shape == leading or (len(leading) == 1 and m.numel() == leading[0])]
    if len(fitting) != 1:
        raise NearplaneError(
            f"{where}: its input of shape {list(leading)} does not show which of its tokens are padding; calibrate on full "
            "windows of text."
        )
    return None if bool(fitting[0].all()) else fitting[0].bool().flatten()


def positions(shapes: list[tuple[int, ...]], samples: Mapping[str, Tensor]) -> int:
    """Positions of one sample where a model holds most: of a text its tokens, of an image its patches.

    ``shapes``: of the hidden state of each block.
    """
    texts = [value.shape[1] for value in samples.values() if value.dim() == 2 and not value.is_floating_point()]
    others = [] if len(texts) == len(samples) else [torch.Size(shape[1:-1]).numel() for shape in shapes]
    return max([*texts, *others], default=1)
