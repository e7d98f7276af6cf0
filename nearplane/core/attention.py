"""Attention of a forward that calibrates or evaluates, by products at the rate of ``full_width``.

torch's kernel for float32 on a CPU multiplies small blocks by MKL, which uses half of the vectors of AMD's processors with
AVX-512, and computes what a causal mask hides. Here blocks of queries are multiplied by all keys that they may see: 1.1 to
2.1 times as fast on a Zen 5.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from nearplane.core.dense import exact, full_width

# Queries of a block, and numbers of scores that are formed at a time: 4 MB, which stay in cache.
QUERIES, AT_ONCE = 128, 2**20
# Scores from which blocks are faster.
LEAST_SCORES = 2**17
# Arguments of torch's attention that may come without a name.
NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@contextmanager
def fast_forwards(device: torch.device) -> Iterator[None]:
    """Run forwards under ``full_width`` while the context lasts, and their attention by ``attention`` where that is faster.

    Args:
        device: where the model runs; nothing changes unless it is a CPU.
    """
    with full_width(device):
        if device.type == "cpu" and exact():
            with _Attention():
                yield
        else:
            yield


def attention(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None = None) -> Tensor:
    """Return ``softmax(scale q kᵀ) v``, where a causal query sees the keys up to its own number.

    Args:
        query: (batch, heads, queries, features).
        key: (batch, groups, keys, features); each group of heads shares keys and values.
        value: (batch, groups, keys, outputs).
        causal: whether keys behind a query are hidden.
        scale: of the scores; None: one over the root of the features.
    """
    (batch, heads, queries, features), (groups, keys, outputs) = query.shape, value.shape[1:]
    each = heads // groups
    query = query * (features**-0.5 if scale is None else scale)
    query = query.reshape(batch * groups, each, queries, features)
    key, value = key.reshape(-1, keys, features), value.reshape(-1, keys, outputs)
    result = query.new_empty(batch * groups, each, queries, outputs)
    rows = min(QUERIES, queries)
    hidden = torch.ones(rows, rows, dtype=torch.bool).triu_(1)
    step = max(1, AT_ONCE // (each * rows * keys))
    for first in range(0, batch * groups, step):
        some = slice(first, first + step)
        for a in range(0, queries, rows):
            b = min(a + rows, queries)
            seen = min(b, keys) if causal else keys
            scores = query[some, :, a:b].flatten(1, 2) @ key[some, :seen].transpose(1, 2)
            if causal and a < seen:
                late = scores.view(-1, each, b - a, seen)[..., a:]
                late.masked_fill_(hidden[: b - a, : seen - a], -torch.inf)
            result[some, :, a:b] = (scores.softmax(-1) @ value[some, :seen]).view(-1, each, b - a, outputs)
    return result.view(batch, heads, queries, outputs)


class _Attention(TorchFunctionMode):
    """Takes calls of torch's attention for ``attention``, where that is faster and computes the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            call = dict(zip(NAMES, args, strict=False)) | kwargs
            if _plain(**call):
                causal, scale = call.get("is_causal", False), call.get("scale")
                return attention(call["query"], call["key"], call["value"], causal, scale)
        return func(*args, **kwargs)


def _plain(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> bool:
    """Tell whether a call of torch's attention is large, in float32, and without mask, dropout and gradients."""
    given = (query, key, value)
    if any(x.dim() != 4 or x.dtype != torch.float32 or x.device.type != "cpu" for x in given):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return False
    if (
        options.get("attn_mask") is not None
        or options.get("dropout_p")
        or options.keys() - set(NAMES) - {"scale", "enable_gqa"}
    ):
        return False
    alike = query.shape[0] == key.shape[0] == value.shape[0] and key.shape[1:3] == value.shape[1:3]
    heads, groups = query.shape[1], key.shape[1]
    shared = heads == groups or (options.get("enable_gqa", False) and heads % groups == 0)
    return (
        alike and shared and query.shape[3] == key.shape[3] and query.shape[:3].numel() * key.shape[2] >= LEAST_SCORES
    )
