"""Attention by blocks of queries: the formula in float64, and only where torch's own would compute the same."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nearplane.core import attention as ours

CPU = torch.device("cpu")
SHAPES = [  # batch, heads, groups, queries, keys, features, outputs
    (2, 4, 4, 300, 300, 8, 8),
    (3, 6, 2, 257, 257, 16, 16),
    (1, 8, 1, 130, 130, 4, 12),
    (2, 2, 2, 64, 200, 8, 8),
    (2, 2, 1, 300, 140, 8, 8),
    (1, 1, 1, 1, 7, 4, 4),
    (40, 5, 5, 70, 70, 4, 4),
]


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def operands(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """As a model has them: heads behind positions in memory."""
    batch, heads, groups, queries, keys, features, outputs = shape
    query, key = numbers(batch, queries, heads, features), numbers(batch, keys, groups, features)
    return query.transpose(1, 2), key.transpose(1, 2), numbers(batch, keys, groups, outputs).transpose(1, 2)


def formula(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Tensor:
    """By loops, in float64."""
    result = query.new_empty(*query.shape[:3], value.shape[3], dtype=torch.float64)
    each = query.shape[1] // key.shape[1]
    for batch in range(query.shape[0]):
        for head in range(query.shape[1]):
            scores = scale * query[batch, head].double() @ key[batch, head // each].double().T
            if causal:
                later = torch.arange(key.shape[2])[None] > torch.arange(query.shape[2])[:, None]
                scores = scores.masked_fill(later, -torch.inf)
            result[batch, head] = scores.softmax(-1) @ value[batch, head // each].double()
    return result


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula(shape: tuple[int, ...], causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands(shape)
    wanted = formula(*given, causal, shape[5] ** -0.5)
    torch.testing.assert_close(ours.attention(*given, causal).double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ours.attention(*given, causal, 0.3).double(), formula(*given, causal, 0.3), rtol=1e-5, atol=1e-5
    )
    monkeypatch.setattr(ours, "AT_ONCE", 1)  # head by head
    monkeypatch.setattr(ours, "QUERIES", 48)
    torch.testing.assert_close(ours.attention(*given, causal).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The calls that blocks computed, on a processor that gains by them."""
    calls: list[Any] = []
    real = ours.attention
    monkeypatch.setattr(ours, "exact", lambda: True)
    monkeypatch.setattr(ours, "LEAST_SCORES", 100)
    monkeypatch.setattr(ours, "attention", lambda *given: calls.append(given) or real(*given))
    yield calls


@pytest.mark.parametrize("causal", [False, True])
def test_calls_of_torch_are_taken(taken: list[Any], causal: bool) -> None:
    given = operands((2, 6, 2, 33, 33, 8, 8))
    wanted = scaled_dot_product_attention(*given, is_causal=causal, enable_gqa=True, scale=0.2)
    with ours.fast_forwards(CPU), torch.no_grad():
        found = scaled_dot_product_attention(*given, is_causal=causal, enable_gqa=True, scale=0.2)
        query, key, value = given
        named = scaled_dot_product_attention(
            query=query, key=key, value=value, is_causal=causal, enable_gqa=True, scale=0.2
        )
        placed = scaled_dot_product_attention(query[:, :2], key, value, None, 0.0, causal, scale=0.2)
    assert len(taken) == 3 and torch.equal(found, named) and torch.equal(found[:, :1], placed[:, :1])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    scaled_dot_product_attention(*given, is_causal=causal, enable_gqa=True)
    assert len(taken) == 3  # only while the context lasts


def test_other_calls_stay_torchs(taken: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = operands((2, 2, 2, 33, 33, 8, 8))
    mask = torch.ones(33, 33, dtype=torch.bool).tril(2)
    calls: list[tuple[list[Tensor], dict[str, Any]]] = [
        ([query, key, value], {"attn_mask": mask}),
        ([query, key, value, mask.float()], {}),
        ([query, key, value], {"dropout_p": 0.5}),
        ([query.double(), key.double(), value.double()], {}),
        ([query.bfloat16(), key.bfloat16(), value.bfloat16()], {"is_causal": True}),
        ([query[0], key[0], value[0]], {"is_causal": True}),
        ([query, key[:1], value[:1]], {}),
        ([query[:, :, :1], key[:, :, :1], value[:, :, :1]], {}),
    ]
    for given, options in calls:
        torch.manual_seed(0)
        wanted = scaled_dot_product_attention(*given, **options)
        torch.manual_seed(0)
        with ours.fast_forwards(CPU):
            found = scaled_dot_product_attention(*given, **options)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with ours.fast_forwards(CPU):
        scaled_dot_product_attention(query.clone().requires_grad_(), key, value).sum().backward()
        with pytest.raises(RuntimeError):  # without enable_gqa torch refuses fewer keys than heads
            scaled_dot_product_attention(query.repeat(1, 2, 1, 1), key, value)
    assert not taken
    monkeypatch.setattr(ours, "exact", lambda: False)
    with ours.fast_forwards(CPU):
        scaled_dot_product_attention(query, key, value)
    monkeypatch.setattr(ours, "exact", lambda: True)
    with ours.fast_forwards(torch.device("meta")):
        scaled_dot_product_attention(query, key, value)
    assert not taken
