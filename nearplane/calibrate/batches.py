"""Samples in batches: arguments of the model's forward, and which of their positions are real."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nearplane.core.errors import NearplaneError

Batch = dict[str, Tensor]
"""Keyword arguments of the model's forward; the rows of each are samples."""


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
