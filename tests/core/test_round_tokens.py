"""Rounding of activations against a plain reference, vLLM's formula, and the library that has the asymmetric one."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given
from hypothesis import strategies as st

from nearplane.core.activations import TokenGrid, round_tokens
from nearplane.core.errors import SettingError


def plain(token: list[float], grid: TokenGrid) -> list[float]:
    """One token in float64, number by number."""
    levels = 2**grid.bits
    low, high = grid.clip * min(0.0, *token), grid.clip * max(0.0, *token)
    if grid.sym:
        scale, zero = max(-low, high) / (levels // 2 - 1), 0
    else:
        scale = (high - low) / (levels - 1)
        zero = round(min(max(-levels // 2 - low / scale, -levels // 2), levels // 2 - 1)) if scale else 0
    if scale == 0:
        return [0.0] * len(token)
    return [(min(max(round(v / scale) + zero, -levels // 2), levels // 2 - 1) - zero) * scale for v in token]


@given(
    bits=st.integers(2, 8), sym=st.booleans(), clip=st.sampled_from([1.0, 0.9, 0.5]), seed=st.integers(0, 999),
    offset=st.sampled_from([0.0, 3.0, -5.0]),
)  # fmt: skip
def test_is_the_plain_formula(bits, sym, clip, seed, offset):
    grid = TokenGrid(bits, sym, clip)
    x = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    x[0, 0] = 0
    expected = torch.tensor([[plain(token, grid) for token in row] for row in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(round_tokens(x, grid), expected, rtol=0, atol=1e-12)


@given(bits=st.sampled_from([4, 8]), seed=st.integers(0, 999))
def test_asymmetric_is_what_the_library_runs(bits, seed):
    args = QuantizationArgs(num_bits=bits, symmetric=False, strategy="token", dynamic=True)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed)) * 3
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
    assert torch.equal(round_tokens(x, TokenGrid(bits, False)), fake_quantize(x, scale, zero, args))


def test_symmetric_is_what_engines_run():
    """vLLM's and SGLang's kernels divide by 127, so that the greatest number keeps its value; the library by 127.5."""
    x = torch.tensor([[12.7, -0.1, 0.16, 3.0]])
    expected = torch.tensor([[127, -1, 2, 30]]) * (torch.tensor(12.7) / 127)
    assert torch.equal(round_tokens(x, TokenGrid(8)), expected)
    args = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)
    scale, _ = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
    torch.testing.assert_close(scale.flatten() * 127.5, torch.tensor([12.7]))


def test_keeps_the_dtype_and_marks_what_is_not_finite():
    x = torch.randn(4, 8).half()
    x[1, 3] = torch.inf
    y = round_tokens(x, TokenGrid(8))
    assert y.dtype == torch.float16 and bool(y[1].isnan().any()) and bool(y[[0, 2, 3]].isfinite().all())


@pytest.mark.parametrize("wrong", [{"bits": 1}, {"bits": 9}, {"clip": 0.0}, {"clip": 1.5}])
def test_refuses(wrong):
    with pytest.raises(SettingError):
        TokenGrid(**wrong)
