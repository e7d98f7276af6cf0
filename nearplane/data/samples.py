"""Prepare the samples that a model reads, and split samples into batches.

A model's forward decides the inputs (``models/inputs.py``): text, images, sound, or several of these. Text is cut into full
windows, or into padded sentences. Images and audio go through the model's own processor. A decoder behind an encoder reads
its start token and the first half of a window. Half a window keeps its positions apart from the encoder's. With
padding, masks decide which positions are calibrated on.
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
from nearplane.data.rows import Rows, check
from nearplane.data.shares import shares_of
from nearplane.data.text import Calibration, consecutive, read_text, spelled
from nearplane.data.windows import Tokens
from nearplane.models import inputs
from nearplane.models.inputs import AUDIO, DECODER, IMAGES, MEDIA, TEXT, WAVES
from nearplane.models.source import Source, load_tokenizer

Batch = dict[str, Tensor]
"""Keyword arguments of a model's forward; the first dimension of each counts samples."""


class Samples(NamedTuple):
    """Arguments of a model's forward, and the record that identifies them."""

    arguments: Batch
    data: dict[str, Any]  # for the report
    notes: tuple[str, ...] = ()  # remarks for the user
    sources: tuple[int, ...] = ()  # of a mix, the number of each sample's source

    @property
    def number(self) -> int:
        """Number of samples."""
        return len(next(iter(self.arguments.values())))

    @property
    def length(self) -> int | None:
        """Tokens of a text window; None if the model reads no text."""
        ids = self.arguments.get(TEXT, self.arguments.get(DECODER))
        return None if ids is None else ids.shape[1]


def gather(source: Source, calibration: Calibration, own: Tokens | None = None) -> Samples:
    """Gather the samples that a model is calibrated on.

    Args:
        source: the model.
        calibration: dataset, number, length and seed.
        own: what the model has written, where the dataset asks for that (``data/own.py``).

    Returns:
        Arguments of the forward on the CPU, their record for the report, and remarks for the user.

    Raises:
        SettingError: a setting does not apply to such a model.
        NearplaneError: the dataset cannot be read or is too short.
    """
    model, wanted = source.model, inputs.reads(source.model)
    if calibration.sentences and wanted != (TEXT,):
        raise SettingError(f"sentences are for models that read text only; this one reads {', '.join(wanted)}.")
    if MEDIA & set(wanted):
        refuse_of_text(calibration.dataset, calibration.dataset_split, calibration.dataset_column)
    batch: Batch = {}
    data: dict[str, Any] = {}
    notes: list[str] = []
    sources: tuple[int, ...] = ()
    media = {IMAGES: images, AUDIO: mels, WAVES: waves}
    for name in (name for name in wanted if name in media):
        values, origin, remarks = media[name](source, calibration)
        batch[name] = values
        data |= {"windows": len(values), "origin": origin, name: list(values.shape), "media_sha256": _hash(values)}
        notes += remarks
    if TEXT in wanted or DECODER in wanted:
        count = len(next(iter(batch.values()))) if batch else calibration.nsamples
        adapted = replace(calibration, nsamples=count, dataset=None if batch else calibration.dataset)
        text = _text(source, adapted, own)
        sources = text.sources
        data = {**data, "text": text.data} if batch else text.data
        notes += text.notes
        batch = text.arguments | batch
        if DECODER in wanted:
            batch = _decoded(model, batch, keep=TEXT in wanted)
    return Samples(batch, data, tuple(notes), sources)


def held_out(
    owner: Owner,
    model: nn.Module,
    dataset: str | Path | Rows | None,
    seqlen: int,
    windows: int | None,
    *,
    dataset_split: str | None = None,
    dataset_column: str | None = None,
    bos: bool = True,
) -> tuple[Batch, str]:
    """Gather the samples that an encoder or a vision model is measured on.

    Args:
        owner: the model folder, whose tokenizer or processor is used.
        model: the model, whose forward decides the inputs.
        dataset: a folder of images or recordings, all of which are used in order; or a text. None: the embedded text.
        seqlen: tokens per window of text, at most the model's positions.
        windows: the most windows of text, or files; None: all.
        dataset_split: split of a text dataset.
        dataset_column: column of a text dataset.
        bos: begin each window with the tokens that the tokenizer puts before a text.

    Returns:
        Arguments of the forward on the CPU, and their origin in words.

    Raises:
        SettingError: the model reads files, and no folder is given.
        NearplaneError: the dataset cannot be read or is too short.
    """
    wanted = inputs.reads(model)
    batch, origin = _media(owner, wanted, dataset, windows)
    if batch:
        refuse_of_text(dataset, dataset_split, dataset_column)
        windows = len(next(iter(batch.values())))
    if {TEXT, DECODER} & set(wanted):
        tokenizer = load_tokenizer(owner.folder, trust_remote_code=owner.trust_remote_code)
        given = None if batch else dataset
        text = read_text(given, "evaluation", tokenizer, split=dataset_split, column=dataset_column)
        ids, opening = consecutive(tokenizer, text, min(seqlen, longest_input(model) or seqlen), windows, bos=bos)
        check_vocabulary(ids, model, tokenized=bool(text.ids))
        batch = {name: value[: len(ids)] for name, value in batch.items()} | {TEXT: ids}
        begun = f", each window begins with {spelled(tokenizer, opening)}" if bos and opening else ""
        origin = f"{origin} and {text.origin}{begun}".removeprefix(" and ")
        if DECODER in wanted:
            batch = _decoded(model, batch, keep=TEXT in wanted)
    return batch, origin


def _media(
    owner: Owner, wanted: tuple[str, ...], dataset: str | Path | Rows | None, most: int | None
) -> tuple[Batch, str]:
    """Read the images and recordings of a folder, at most ``most``, for a model that reads such; else nothing."""
    readers: dict[str, tuple[tuple[str, ...], str, Any]] = {
        IMAGES: (IMAGE_FILES, "images", pixel_values), AUDIO: (AUDIO_FILES, RECORDINGS, features),
        WAVES: (WAVE_FILES, "recordings", waveforms),
    }  # fmt: skip
    if MEDIA & set(wanted) and not isinstance(dataset, str | Path):
        raise SettingError("this model reads images or recordings; give --dataset FOLDER to measure it on.")
    batch: Batch = {}
    for name in (name for name in readers if name in wanted):
        endings, what, read = readers[name]
        batch[name] = read(owner, files_below(Path(str(dataset)).expanduser(), endings, what)[:most])[0]
    return batch, str(dataset) if batch else ""


def refuse_of_text(dataset: str | Path | Rows | None, split: str | None, column: str | None) -> None:
    """Raise SettingError for settings of a text dataset, given for a model that reads files of a folder."""
    if len(shares_of(check(dataset))) > 1:
        raise SettingError(
            f"this model reads images or recordings from one folder; a mix, such as {dataset!r}, is of texts."
        )
    if dataset is not None and not isinstance(dataset, str | Path):
        raise SettingError(
            f"this model reads images or recordings from a folder; dataset is a {type(dataset).__name__}."
        )
    for name, value in (("dataset_split", split), ("dataset_column", column)):
        if value is not None:
            raise SettingError(f"{name} is for texts; this model reads images or recordings from a folder.")


def longest_input(model: nn.Module) -> int | None:
    """Return the number of text positions that a model has; None if the configuration names none."""
    config: Any = inputs.text_config(model.config)
    limits = (getattr(config, key, None) for key in ("max_position_embeddings", "max_target_positions"))
    limit = next((n for n in limits if isinstance(n, int) and n > 1), None)
    if limit is None:
        return None
    for module in model.modules():  # RoBERTa counts positions from behind the padding token's
        if isinstance(module, nn.Embedding) and module.num_embeddings == limit and module.padding_idx is not None:
            return limit - module.padding_idx - 1
    return limit


def check_vocabulary(ids: Tensor, model: nn.Module, *, tokenized: bool = False) -> None:
    """Raise NearplaneError if token ids exceed the model's vocabulary; ``tokenized``: a dataset held them."""
    size = inputs.vocabulary(model.config)
    if size is not None and tokenized and int(ids.max()) >= size:
        raise NearplaneError(
            f"the dataset holds token id {int(ids.max())}, the model's vocabulary has {size}; tokenize it with the model's own "
            "tokenizer, or give texts."
        )
    if size is not None and int(ids.max()) >= size:
        raise NearplaneError(
            f"the tokenizer makes token {int(ids.max())}, the model's vocabulary has {size}: they do not belong together."
        )


def as_batch(samples: Tensor | Mapping[str, Tensor] | Samples) -> Batch:
    """Name the arguments of a forward: a bare tensor of token ids becomes ``input_ids``."""
    if isinstance(samples, Samples):
        return samples.arguments
    return {"input_ids": samples} if isinstance(samples, Tensor) else dict(samples)


def masks(batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the attention masks in a batch, (samples, positions), 1 for real positions and 0 for padding."""
    return [value for name, value in batch.items() if name.endswith("attention_mask") and value.dim() == 2]


def cut(samples: Mapping[str, Tensor], first: int, last: int, device: torch.device) -> Batch:
    """Slice samples into a batch, and trim columns at the end that are padding in the whole batch.

    Args:
        samples: arguments of the forward for all samples.
        first: number of the first sample.
        last: number behind the last sample.
        device: device of the batch.
    """
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
    """Find the rows of a linear's input that are no padding.

    Args:
        batch: arguments of the forward.
        leading: shape of the input without its last dimension, (samples, positions) or (tokens,).
        where: name of the input, for errors.

    Returns:
        A mask (tokens,), or None if all rows are real.

    Raises:
        NearplaneError: no attention mask matches the input's shape, or several do.
    """
    if all(bool(mask.all()) for mask in masks(batch)):
        return None
    prefixes = {name.removesuffix("attention_mask").removesuffix("input_ids"): None for name in batch}
    read = [(batch.get(f"{p}input_ids"), batch.get(f"{p}attention_mask")) for p in prefixes]
    known = [mask if mask is not None else torch.ones_like(ids) for ids, mask in read if ids is not None]
    known += [mask for ids, mask in read if ids is None and mask is not None]
    matching = [m for m in known if m.shape == leading or (len(leading) == 1 and m.numel() == leading[0])]
    if len(matching) != 1:
        raise NearplaneError(
            f"{where}: its input of shape {list(leading)} does not show which of its tokens are padding; calibrate on full "
            "windows of text."
        )
    return None if bool(matching[0].all()) else matching[0].bool().flatten()


def positions(shapes: list[tuple[int, ...]], samples: Mapping[str, Tensor]) -> int:
    """Return the most positions that one sample has: tokens of a text, patches of an image.

    Args:
        shapes: shape of each block's hidden state, for inputs that are no text.
        samples: arguments of the forward.
    """
    texts = [value.shape[1] for value in samples.values() if value.dim() == 2 and not value.is_floating_point()]
    others = [] if len(texts) == len(samples) else [torch.Size(shape[1:-1]).numel() for shape in shapes]
    return max([*texts, *others], default=1)


def _text(source: Source, calibration: Calibration, own: Tokens | None) -> Samples:
    """Gather windows of text, or sentences."""
    tokens = calibration.load(source.tokenizer, longest_input(source.model), own)
    check_vocabulary(tokens.ids, source.model, tokenized=tokens.tokenized)
    batch = {TEXT: tokens.ids}
    if tokens.mask is not None:
        wanted = inputs.reads(source.model)
        if wanted != (TEXT,):
            raise SettingError(
                f"rows of token ids of different lengths are for models that read text only; this one reads {', '.join(wanted)}."
            )
        batch["attention_mask"] = tokens.mask
    return Samples(batch, tokens.record(), tokens.notes, tokens.sources)


def _decoded(model: nn.Module, batch: Batch, *, keep: bool) -> Batch:
    """Add the decoder's input: its start token and the first half of the window. ``keep``: keep the window too."""
    config: Any = model.config
    ids = batch[TEXT]
    start = next((s for s in (getattr(config, key, None) for key in
                  ("decoder_start_token_id", "bos_token_id", "pad_token_id")) if isinstance(s, int)), 0)  # fmt: skip
    half = max(1, ids.shape[1] // 2)
    if bool((ids[:, 0] == start).all()):  # the tokenizer puts the start token there itself
        ids = ids[:, 1:]
    decoder = torch.cat([torch.full((len(ids), 1), start), ids[:, : half - 1]], 1)
    rest = batch if keep else {name: value for name, value in batch.items() if name != TEXT}
    return rest | {DECODER: decoder}


def _hash(values: Tensor) -> str:
    """Return SHA-256 of a tensor's bytes."""
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
