"""What the judges of engines share: collected sentences, and questions that several ask of a checkpoint."""

from collections.abc import Iterator

from nearplane.checkpoint.engines.describe import Described
from nearplane.core.grid import Grid
from nearplane.formats.base import ONLINE_ONLY_HERE, ONLY_HERE, tail_reason

COMPRESSED, GPTQS, AWQ = "compressed-tensors", ("gptq", "gptq_v2"), "awq"


class Findings:
    """Sentences without their full stop, each once, in the order of their finding."""

    def __init__(self) -> None:
        self._refusals: dict[str, None] = {}
        self._caveats: dict[str, None] = {}

    def refuse(self, reason: str | None) -> bool:
        """Add a reason why an engine does not load the checkpoint; None is no reason. Tells whether one was added."""
        self._refusals |= {} if reason is None else {reason: None}
        return reason is not None

    def note(self, caveat: str | None) -> None:
        """Add a condition on which an engine loads it; None is none."""
        self._caveats |= {} if caveat is None else {caveat: None}

    @property
    def refusals(self) -> tuple[str, ...]:
        """All reasons."""
        return tuple(self._refusals)

    @property
    def caveats(self) -> tuple[str, ...]:
        """All conditions."""
        return tuple(self._caveats)


def grids_of(checkpoint: Described) -> Iterator[tuple[Grid, list[tuple[int, int]]]]:
    """Give each grid of a checkpoint with the (out, in) shapes of its weights."""
    shapes: dict[Grid, list[tuple[int, int]]] = {}
    for weight in checkpoint.weights:
        shapes.setdefault(weight.grid, []).append(weight.shape)
    return iter(shapes.items())


def tail(grid: Grid, shapes: list[tuple[int, int]]) -> str | None:
    """Tell that a group size does not divide the inputs of some weight, which only nearplane loads."""
    reasons = (tail_reason(grid, shape[1]) for shape in sorted(set(shapes)))
    return next((f"{reason}; {ONLY_HERE}" for reason in reasons if reason is not None), None)


def online(checkpoint: Described) -> str | None:
    """Tell that inputs are rotated while the model runs."""
    if not checkpoint.online:
        return None
    return f"inputs of linears are rotated while the model runs (r4), which {ONLINE_ONLY_HERE}"


def clipped(title: str, checkpoint: Described) -> str | None:
    """Tell that activations are clipped, of which no engine knows."""
    clips = (w.activations.clip for w in checkpoint.weights if w.activations is not None and w.activations.clip < 1)
    return next(
        (f"{title} knows no clip of activations ({clip:g}); {ONLY_HERE} as it was calibrated" for clip in clips), None
    )
