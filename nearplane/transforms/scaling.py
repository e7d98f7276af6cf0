"""Scale the input channels of linears before they are quantized, as AWQ does (Lin et al. 2023, arXiv 2306.00978).

``W x = (W diag(s)) (x / s)``: the weight is multiplied, and what makes the input is divided (``folds.py``). Channels with large
activations get large factors, ``s = m ** alpha`` with m the mean of |x|. The search takes the alpha at which rounding the
scaled weight to nearest changes the linears' outputs least: tr((Q(W s)/s - W) H (...)ᵀ). Moments are enough for that.

Of a norm, the divided weight is rounded to its stored dtype first, and the factors are what this rounding makes of them.
So rounding makes no other model; where a linear is divided that stays dense, or a bias, it rounds as storing does.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from nearplane.core.grid import Grid, dequantize, fit_groups, round_to_nearest
from nearplane.core.moments import Moments
from nearplane.models.source import Source
from nearplane.transforms.folds import Fold
from nearplane.transforms.view import Change, ChangedSource, ChangedStore

# Of config.json: the checkpoint's norms are not its original's.
KEY = "nearplane_scale"
# The exponents that are tried: 0, 0.05, ... 1.
STEPS = 20
# Rows of a linear that the search judges by, evenly spaced; numbers of a weight that are worked on at a time.
JUDGED_ROWS, AT_ONCE = 1024, 1 << 21


@dataclass(frozen=True)
class Scaled:
    """A fold with its factors."""

    fold: Fold
    alpha: float
    factors: Float[Tensor, "in"]
    """What columns of the readers are multiplied by, float64."""
    share: float
    """The error of rounding to nearest over the error without factors."""

    @property
    def divisors(self) -> Float[Tensor, "outputs"]:
        """What outputs of the source are divided by; 1 for those that make no channel."""
        divisors = torch.ones(int(self.fold.rows.max()) + 1, dtype=torch.float64)
        divisors[self.fold.rows] = self.factors
        return divisors


def factors_of(magnitude: Float[Tensor, "in"], rows: Tensor, alpha: float) -> Float[Tensor, "in"]:
    """Return ``m ** alpha`` over the root of its largest times its least, float64; 1 for a channel of zeros.

    Args:
        magnitude: The mean of |x|.
        rows: The output that makes each channel: channels of one output share their mean, and so the factor.
        alpha: 0 gives ones.
    """
    m = magnitude.double()
    count = int(rows.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64, device=m.device).index_add_(0, rows, m)
    m = (sums / torch.bincount(rows, minlength=count).clamp_min(1))[rows]
    s, live = m.pow(alpha), m > 0
    if not bool(live.any()):
        return torch.ones_like(m)
    return torch.where(live, s / (s[live].max() * s[live].min()).sqrt(), 1.0)


def rounding_error(
    weight: Float[Tensor, "out in"], factors: Float[Tensor, "in"], grid: Grid, H: Float[Tensor, "in in"]
) -> float:
    """Return tr(Δ H Δᵀ) with Δ = Q(W s)/s - W, the squared error of the outputs where W s is rounded to nearest."""
    s, total = factors.to(weight), 0.0
    importance = H.diagonal() / s.square() if grid.fit == "hessian" else None
    for rows in torch.split(weight, max(1, AT_ONCE // weight.shape[1])):
        scaled = rows * s
        rounded = round_to_nearest(scaled, *fit_groups(scaled, grid, importance), grid)
        delta = dequantize(rounded, grid).to(rows.dtype).div_(s).sub_(rows)
        total += float(((delta @ H) * delta).sum(dtype=torch.float64))
    return total


def search(fold: Fold, weights: Sequence[tuple[Tensor, Grid]], moments: Moments) -> Scaled:
    """Choose alpha on a grid from 0 to 1, the least where several are best; factors come in eight digits of base two.

    Args:
        fold: The input that is scaled.
        weights: The linears that are quantized, (out, in) each, with their grids.
        moments: H and the magnitude of the input.
    """
    assert moments.magnitude is not None
    rows = fold.rows.to(moments.H.device)
    judged = [(weight[:: -(-len(weight) // JUDGED_ROWS)], grid) for weight, grid in weights]
    errors = []
    for i in range(STEPS + 1):
        factors = factors_of(moments.magnitude, rows, i / STEPS)
        errors.append(sum(rounding_error(weight, factors, grid, moments.H) for weight, grid in judged))
    best = min(range(len(errors)), key=errors.__getitem__)
    # The last digits of a sum depend on threads and ranks; those of factors do not, but by rare chance.
    factors = factors_of(moments.magnitude, rows, best / STEPS).cpu().bfloat16().double()
    return Scaled(fold, best / STEPS, factors, errors[best] / errors[0] if errors[0] > 0 else 1.0)


def stored_exactly(scaled: Scaled, source: Source, dtype: Callable[[str], torch.dtype]) -> Scaled:
    """Return factors with which a norm's divided weight is a number of its stored dtype; those of a linear as they are.

    Args:
        scaled: A fold with its factors.
        source: The model.
        dtype: Gives the dtype in which a tensor is stored, by its name on disk.
    """
    norm = scaled.fold.norm
    if norm is None:
        return scaled
    disk = source.names[f"{norm.name}.weight"]
    weight, shift = source.store.get(disk).double(), 1 - norm.unit
    full, divisors = weight + shift, torch.ones_like(weight)
    divisors[: len(scaled.divisors)] = scaled.divisors
    stored = (full / divisors - shift).to(dtype(disk)).double() + shift
    exact = full / stored
    usable = exact.isfinite() & (exact > 0) & (divisors != 1)
    exact = torch.where(usable, exact, 1.0)
    return replace(scaled, factors=exact[scaled.fold.rows])


@dataclass
class ScaledSource(ChangedSource):
    """A source with scaled channels."""

    def written_config(self) -> dict[str, Any]:
        """Return config.json, with a word that norms are not the original's."""
        return {**super().written_config(), KEY: self.settings["scale"]}


def scaled_source(source: Source, found: Sequence[Scaled]) -> ScaledSource:
    """View a source with all found factors put into its weights; each changed tensor is computed when it is read."""
    columns: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    norms: dict[str, float] = {}
    for scaled in found:
        outputs[scaled.fold.source] = scaled.divisors
        columns |= dict.fromkeys(scaled.fold.readers, scaled.factors)
        if scaled.fold.norm is not None:
            norms[scaled.fold.source] = 1 - scaled.fold.norm.unit
    changes: dict[str, Change] = {}
    for name in dict.fromkeys([*columns, *outputs]):
        disk, transposed = source.names[f"{name}.weight"], isinstance(source.model.get_submodule(name), Conv1D)
        s, d = columns.get(name), outputs.get(name)
        make = (
            partial(_divided, source, disk, outputs[name], norms[name])
            if name in norms
            else partial(_multiplied, source, disk, s, d, transposed)
        )
        changes[disk] = Change(disk, make)
        bias = source.names.get(f"{name}.bias")
        if bias is not None and d is not None:
            changes[bias] = Change(bias, partial(_divided, source, bias, d, 0.0))
    parts = (source.name, source.folder, source.config, ChangedStore(source.store, changes), source.model, source.names)
    settings = {**source.settings, "scale": {"search": "awq", "sum": digest(found)}}
    view = ScaledSource(*parts, source.trust_remote_code, settings, list(source.notes), inner=source)
    view.twice, view.revision, view.commit = source.twice, source.revision, source.commit
    return view


def digest(found: Sequence[Scaled]) -> str:
    """Hash all factors, which a resumed run must have again."""
    parts = hashlib.sha256()
    for scaled in found:
        parts.update(repr((scaled.fold.source, scaled.fold.readers, scaled.alpha)).encode())
        parts.update(scaled.factors.double().numpy().tobytes())
    return parts.hexdigest()


def describe(scaled: Scaled) -> dict[str, Any]:
    """Return what is known of a fold besides its tensors, for JSON."""
    fold = scaled.fold
    norm = None if fold.norm is None else asdict(fold.norm)
    return {
        "source": fold.source, "norm": norm, "readers": list(fold.readers), "alpha": scaled.alpha, "share": scaled.share
    }  # fmt: skip


def _divided(source: Source, disk: str, divisors: Tensor, shift: float) -> Tensor:
    """Divide a vector, shift included, by the divisors of its first numbers."""
    stored = source.store.get(disk)
    full = stored.double() + shift
    full[: len(divisors)] /= divisors
    return (full - shift).to(torch.promote_types(stored.dtype, torch.float32))


def _multiplied(source: Source, disk: str, columns: Tensor | None, outputs: Tensor | None, transposed: bool) -> Tensor:
    """Multiply the columns of a stored weight, and divide its rows, in float64, some rows at a time."""
    stored = source.store.get(disk)
    weight = stored.T if transposed else stored
    result = torch.empty(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
    divisors = torch.ones(len(weight), dtype=torch.float64)
    if outputs is not None:
        divisors[: len(outputs)] = outputs
    step = max(1, AT_ONCE // weight.shape[1])
    for first in range(0, len(weight), step):
        part = slice(first, first + step)
        rows = weight[part].double() / divisors[part, None]
        result[part] = rows if columns is None else rows * columns
    return (result.T if transposed else result).contiguous()
