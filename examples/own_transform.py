"""A transform of your own: an equivalent model whose weights are easier to quantize.

Every channel of a gated MLP is scaled: rows of ``up_proj`` are divided by the root of their norm over that of the matching
column of ``down_proj``, and the column is multiplied by it. The model computes the same; the grids see other weights.

    python examples/own_transform.py MODEL OUT
"""

import sys
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

import nearplane
from nearplane.models.source import Source
from nearplane.transforms.roles import logits
from nearplane.transforms.rotation import prove
from nearplane.transforms.view import Change, changed


@dataclass(frozen=True)
class BalancedMLP:
    """Give the channels between ``up_proj`` and ``down_proj`` equal norms on both sides."""

    strength: float = 1.0
    """0: leave the weights; 1: equal norms."""

    def promise(self, source: Source) -> Source:
        """Say what is known before a weight is read: no size changes."""
        return replace(source, settings={**source.settings, "balanced_mlp": asdict(self)})

    def apply(self, source: Source, device: torch.device) -> Source:
        """Return the view, once its logits are known to be the original's."""
        changes: dict[str, Change] = {}
        for name, disk in source.names.items():
            if name.endswith("mlp.up_proj.weight"):
                down = source.names[name.replace("up_proj", "down_proj")]
                changes[disk] = Change(disk, lambda up=disk, down=down: self._scaled(source, up, down)[0])
                changes[down] = Change(down, lambda up=disk, down=down: self._scaled(source, up, down)[1])
        view = changed(source, "balanced_mlp", changes, asdict(self))
        error = prove(view, logits(source, device), device, "with balanced MLPs", "Run without the transform.")
        view.notes.append(f"MLPs balanced; logits agree to {error:.1e}")
        return view

    def _scaled(self, source: Source, up_name: str, down_name: str) -> tuple[Tensor, Tensor]:
        up, down = source.store.get(up_name).float(), source.store.get(down_name).float()
        scale = (up.norm(dim=1) / down.norm(dim=0)).clamp(1e-3, 1e3).sqrt().pow(self.strength)
        return up / scale[:, None], down * scale


if __name__ == "__main__":
    model, out = sys.argv[1:3]
    print(nearplane.quantize(model, out, bits=3, transforms=[BalancedMLP()]).totals)
