"""A method in one file: GPTQ with heavier damping for inputs that few tokens reached.

nearplane quantize MODEL OUT --method examples.own_method:Cautious --caution 2
"""

from dataclasses import dataclass

from nearplane import GPTQ, Moments
from nearplane.core.factor import column_cost, factorize
from nearplane.methods.base import Prepared


@dataclass(frozen=True)
class Cautious(GPTQ):
    """GPTQ whose damping grows as tokens become few."""

    caution: float = 1.0
    """Damping is multiplied by 1 + caution * inputs / tokens."""

    def prepare(self, moments: Moments) -> Prepared:
        """As GPTQ, with its own damping."""
        moments.check()
        scarcity = self.caution * len(moments.H) / max(1, moments.tokens)
        damp_percent = min(1.0, self.damp_percent * (1 + scarcity))
        factor = factorize(moments.H, order=self.order, damp_percent=damp_percent)
        return Prepared(factor, column_cost(moments.H, factor))
