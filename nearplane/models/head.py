"""The output head as one more block, quantized on request; a tied head becomes a tensor of its own first.

The head reads what leaves the last block, through the last norm. A walk runs the head like a block whose only stage is the
head itself. Most checkpoints without an own head reuse the input embedding, which stays dense.
"""

from typing import Any

import torch
from torch import nn

from nearplane.core.errors import SettingError
from nearplane.models.discover import Block, Site, embedding_name, head_name
from nearplane.models.inputs import is_causal
from nearplane.models.source import Source


def head_site(source: Source) -> Site:
    """Return the output head of a language model as a linear to quantize.

    Raises:
        SettingError: the model predicts no tokens, or its head is no ``nn.Linear``.
    """
    name, kind = head_name(source), type(source.model).__name__
    if name is None or not is_causal(source.model):
        raise SettingError(
            f"the output head of {kind} cannot be quantized: that is for decoders, which read a text and predict its next token."
        )
    head = source.model.get_submodule(name)
    if not isinstance(head, nn.Linear):
        raise SettingError(f"the output head of {kind} is a {type(head).__name__}, no nn.Linear, and stays dense.")
    return Site(name, (head.out_features, head.in_features))


def head_block(blocks: list[Block], site: Site) -> Block:
    """Return the head as a block behind the others."""
    return Block(site.name, [[site]], tower=blocks[-1].tower, shape=blocks[-1].shape)


def untie(source: Source, head: str) -> None:
    """Give a tied head a weight of its own, in place: in the skeleton, in the names, in the written configuration.

    Args:
        source: the opened model, in sketch mode or not.
        head: name of the head's module; nothing is done where it has a weight on disk.

    Raises:
        SettingError: the head has no weight on disk, and no input embedding whose weight it shares.
    """
    weight, table = f"{head}.weight", embedding_name(source)
    if weight in source.names:
        return
    if table is None or table not in source.names:
        raise SettingError(f"{source.folder}: the output head {head} has no weight on disk, and none is tied to it.")
    model: Any = source.model
    shape = source.store.shape(source.names[table])
    model.get_submodule(head).weight = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
    if isinstance(getattr(model, "all_tied_weights_keys", None), dict):
        model.all_tied_weights_keys.pop(weight, None)
    for part in (source.config, source.config.get_text_config(), model.config, model.config.get_text_config()):
        part.tie_word_embeddings = False
    source.show_twice(weight, table)
    source.notes.append(
        f"the output head {head} shares the input embedding's weight; it is quantized as a tensor of its own, and the embedding "
        "stays dense"
    )
