"""The exact choice of one candidate per item under a budget: least total error, total cost within the budget.

A multiple-choice knapsack. States are the pairs (cost, error) that no other one beats in both, extended item by item; a
state whose error, plus the Lagrangian bound on what the items to come must add, is above the error of a choice already
known cannot lead to the best one and is dropped. Costs are never rounded, so that the choice is the best up to the
rounding of the sums of errors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# The price is found up to this share of it; any price gives a bound, so that no answer depends on it.
NEAR = 1e-9
# Where errors are all equal it has no end at which to stop, and must stay a number that can be multiplied without loss.
HALVINGS = 100
# Of the largest number in a bound: what rounding may add to it.
SLACK = 1e-9


def allocate(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The candidate of each item. ValueError where even the cheapest together cost more than the budget."""
    cost = [torch.tensor(some, dtype=torch.int64) for some in costs]
    error = [torch.tensor(some, dtype=torch.float64) for some in errors]
    cheapest = [int(some.min()) for some in cost]
    if sum(cheapest) > budget:
        raise ValueError(f"the cheapest choice costs {sum(cheapest)}, more than {budget}.")
    price, known = _price(cost, error, budget)
    # What the items from number i on cost at least, and what they add at least to error + price * cost.
    least, bound = [0], [0.0]
    for c, e, low in zip(reversed(cost), reversed(error), reversed(cheapest), strict=True):
        least.insert(0, least[0] + low)
        bound.insert(0, bound[0] + float((e + price * c.double()).min()))
    limit = known + SLACK * (abs(known) + price * budget)
    total, wrong = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    path: list[tuple[Tensor, Tensor]] = []  # per item: the state before, and the candidate, of every state
    for i, (c, e) in enumerate(zip(cost, error, strict=True)):
        before, which = (
            part.flatten() for part in torch.meshgrid(torch.arange(len(total)), torch.arange(len(c)), indexing="ij")
        )
        new, off = total[before] + c[which], wrong[before] + e[which]
        hope = off + price * (new - budget).double() + bound[i + 1]
        keep = ((new + least[i + 1] <= budget) & (hope <= limit)).nonzero().flatten()
        keep = keep[_undominated(new[keep], off[keep])]
        total, wrong = new[keep], off[keep]
        path.append((before[keep], which[keep]))
    state, chosen = int(wrong.argmin()), []
    for before, which in reversed(path):
        chosen.append(int(which[state]))
        state = int(before[state])
    return chosen[::-1]


def _price(cost: list[Tensor], error: list[Tensor], budget: int) -> tuple[float, float]:
    """A price per unit of cost at which each item's best candidate fits the budget together, and their error.

    The least such price, nearly: there the bound that it gives is closest to the best choice.
    """

    most = max((len(c) for c in cost), default=1)
    pad = [torch.arange(most).clamp(max=len(c) - 1) for c in cost]  # the last candidate again
    costs = (
        torch.stack([c[k] for c, k in zip(cost, pad, strict=True)]) if cost else torch.zeros(0, 1, dtype=torch.int64)
    )
    errors = (
        torch.stack([e[k] for e, k in zip(error, pad, strict=True)])
        if error
        else torch.zeros(0, 1, dtype=torch.float64)
    )

    def best(price: float) -> tuple[int, float]:
        picks = (errors + price * costs.double()).argmin(1, keepdim=True)
        return int(costs.gather(1, picks).sum()), float(errors.gather(1, picks).sum())

    spent, wrong = best(0.0)
    if spent <= budget:
        return 0.0, wrong
    # At this price no candidate dearer than the cheapest pays: costs are whole numbers.
    low, high = 0.0, 1.0 + float((errors.amax(1) - errors.amin(1)).max())
    known = float(errors.gather(1, costs.argmin(1, keepdim=True)).sum())
    for _ in range(HALVINGS):
        if high - low <= NEAR * high:
            break
        middle = (low + high) / 2
        spent, wrong = best(middle)
        if spent <= budget:
            high, known = middle, min(known, wrong)
        else:
            low = middle
    return high, known


def _undominated(cost: Tensor, error: Tensor) -> Tensor:
    """Which states no other one beats in both, by rising cost; the first of equal ones."""
    order = error.argsort(stable=True)
    order = order[cost[order].argsort(stable=True)]
    ranked = error[order]
    before = torch.cat([ranked.new_full((1,), torch.inf), ranked.cummin(0).values[:-1]]) if len(ranked) else ranked
    return order[ranked < before]
