"""The clipping of AWQ against inputs that are kept, range by range."""

import pytest
import torch

from nearplane import AWQ, RTN, Grid
from nearplane.core.errors import NumericalError
from nearplane.core.grid import dequantize
from nearplane.core.moments import Moments
from nearplane.methods.awq import SHRINK_GRAIN, SHRINK_STEPS


def inputs(tokens: int, n: int, seed: int = 0) -> torch.Tensor:
    """Tokens whose features correlate and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return x @ mix * torch.linspace(0.1, 3, n, dtype=torch.float64)


def by_hand(w: torch.Tensor, x: torch.Tensor, bits: int) -> torch.Tensor:
    """One group of one row: clamp at each share of the largest |w|, round all, keep the least error of x · w."""
    tried, top = [], 2**bits - 1
    for i in range(SHRINK_STEPS):
        limit = float(w.abs().max()) * (1 - i / SHRINK_GRAIN)
        low, high = max(min(float(w.min()), 0.0), -limit), min(max(float(w.max()), 0.0), limit)
        scale = float(torch.tensor((high - low) / top, dtype=torch.float32))  # as it is stored
        zero = round(-low / scale)
        q = (torch.clamp(torch.round(w / scale) + zero, 0, top) - zero) * scale
        tried.append((float(((q - w) @ x.T).square().sum()), q))
    return min(tried, key=lambda pair: pair[0])[1]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("n", "size"), [(24, 8), (20, 8), (12, -1)])  # the second has a smaller last group
def test_the_range_of_least_output_error(bits: int, n: int, size: int) -> None:
    """Asymmetric grids, in float64, each group of each row by itself."""
    x = inputs(40, n)
    w = torch.randn(5, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w[:, 3] *= 4  # an outlier that is worth clipping
    grid = Grid(bits=bits, group_size=size, sym=False)
    moments = Moments(x.T @ x / 40, tokens=40)
    method = AWQ()
    found = dequantize(method.solve(w, method.prepare(moments), grid), grid)
    width = grid.group_width(n)
    for row in range(5):
        for first in range(0, n, width):
            part = slice(first, first + width)
            wanted = by_hand(w[row, part], x[:, part], bits)
            errors = [float(((q - w[row, part]) @ x[:, part].T).square().sum()) for q in (found[row, part], wanted)]
            assert errors[0] == pytest.approx(errors[1], rel=1e-6)


def test_clipping_beats_the_whole_range_and_a_fit_that_is_given_clips_nothing() -> None:
    x = inputs(200, 32)
    w = torch.randn(64, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moments = Moments(x.T @ x / 200, tokens=200)
    plain, method = Grid(bits=3, group_size=16, sym=False, fit="minmax"), AWQ()
    clipped = Grid(bits=3, group_size=16, sym=False)
    whole = method.solve(w, method.prepare(moments), plain)
    assert torch.equal(whole.codes, RTN().solve(w, None, plain).codes)

    def error(delta: torch.Tensor) -> float:  # of each group's share
        return sum(float((delta[:, g] @ x[:, g].T).square().sum()) for g in (slice(0, 16), slice(16, 32)))

    found = method.solve(w, method.prepare(moments), clipped)
    assert error(dequantize(found, clipped) - w) < 0.9 * error(dequantize(whole, plain) - w)


GRIDS = [Grid(bits=3, group_size=8), Grid(bits="ternary", group_size=8), *map(Grid.named, ("q4_1", "q4_k", "nf4"))]


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_is_solved(grid: Grid) -> None:
    """Rows by themselves are solved as among others."""
    n = 256
    x = inputs(300, n).float()
    w = torch.randn(6, n, generator=torch.Generator().manual_seed(3))
    method = AWQ()
    state = method.prepare(Moments(x.T @ x / 300, tokens=300))
    whole = method.solve(w, state, grid)
    for part in (slice(0, 2), slice(2, 6)):
        assert torch.equal(method.solve(w[part], state, grid).codes, whole.codes[part])
    assert bool(dequantize(whole, grid).isfinite().all())


def test_moments_are_checked() -> None:
    with pytest.raises(NumericalError, match="is zero"):
        AWQ().prepare(Moments(torch.zeros(4, 4), tokens=3))
