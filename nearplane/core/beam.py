"""The K-best sweep: GPTQ keeps one answer per row from column to column, the beam keeps the K cheapest.

The loss of a sweep is additive over columns, ``Σ_j d_j (v_j - q_j)²`` (``core/certificate.py``). So partial answers can be
compared while they grow: Babai's nearest plane (arXiv 2507.18553) with a beam. K = 1 is the sweep; with K as large as the
number of all answers the beam finds the exhaustive optimum. The memory is K times that of the sweep. The time is several
times K, because every column gathers the pasts of the answers that stay.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.factor import Factor
from nearplane.core.grid import Certificate, Grid, Quantized, group_index

# Columns between two look-backs at all earlier error.
PANEL = 64


def beam_sweep(
    target: Float[Tensor, "out in"],
    factor: Factor,
    grid: Grid,
    scales: tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]],
    beam: int,
) -> Quantized:
    """Round ``target`` column by column in ``factor.order``, keeping ``beam`` answers per row.

    Args:
        target: The weight to round towards.
        factor: The factored Hessian.
        grid: The levels.
        scales: Scale and zero of every group, fixed beforehand.
        beam: Answers per row, K.

    Returns:
        The cheapest answer. The bound of its certificate holds where the cheapest answer so far was never clipped, so
        ``clipped`` counts those columns, too.
    """
    out, n = target.shape
    w, levels, group = target.T.index_select(0, factor.order), grid.levels, group_index(factor.order, grid)
    scale, zero = (part.T.to(target.dtype).index_select(0, group) for part in scales)
    codes = torch.zeros(n, out, beam, dtype=torch.uint8, device=target.device)
    error = target.new_zeros(n, out, beam)
    cost = target.new_full((out, beam), torch.inf)
    cost[:, 0] = 0  # the empty answer
    clipped = torch.zeros(out, beam, dtype=torch.long, device=target.device)
    shut = torch.zeros(out, dtype=torch.long, device=target.device)  # columns that clipped the cheapest answer so far
    for a in range(0, n, PANEL):
        b = min(a + PANEL, n)
        received = factor.feedback[:a, a:b].T @ error[:a].reshape(a, out * beam)
        value = w[a:b, :, None] + received.reshape(b - a, out, beam)
        history = torch.arange(beam, device=target.device).expand(out, beam)  # the place of each answer at column a
        for j in range(a, b):
            v, s, z = value[j - a], scale[j, :, None, None], zero[j, :, None, None]
            wanted, (low, high) = v[:, :, None] / s, levels.reach(z)
            outside = levels.clipped(wanted, low, high)[:, :, 0]
            shut += outside[:, 0]
            choice = levels.nearest(wanted, low, high, min(beam, levels.count))
            missed = v[:, :, None] - choice * s
            total = (cost[:, :, None] + factor.pivots[j] * missed.square()).reshape(out, -1)
            cost, kept = total.topk(beam, dim=1, largest=False, sorted=True)
            parent = kept // choice.shape[2]
            # Every answer takes the past of the one it grew from.
            value = value.gather(2, parent.expand_as(value))
            error[a:j] = error[a:j].gather(2, parent.expand(j - a, out, beam))
            codes[a:j] = codes[a:j].gather(2, parent.expand(j - a, out, beam))
            history, clipped = history.gather(1, parent), (clipped + outside).gather(1, parent)
            step = choice.reshape(out, -1).gather(1, kept)
            error[j] = w[j, :, None] - step * s[:, :, 0]
            codes[j] = levels.encode_(step, z[:, :, 0])
            value[j - a + 1 :] += factor.feedback[j, j + 1 : b, None, None] * error[j]
        error[:a] = error[:a].gather(2, history.expand(a, out, beam))
        codes[:a] = codes[:a].gather(2, history.expand(a, out, beam))
    best = torch.empty(n, out, dtype=torch.uint8, device=target.device)
    best[factor.order] = codes[:, :, 0]
    bound = (factor.pivots[:, None] * scale.square()).sum(0) * levels.half_gap**2
    certificate = Certificate(cost[:, 0], bound, torch.maximum(clipped[:, 0], shut))
    return Quantized(best.T.contiguous(), scales[0], grid.stored_zero(scales[1]), certificate)
