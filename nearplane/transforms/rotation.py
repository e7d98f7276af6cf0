"""The rotated view of a source: the same model, its weights turned as they are read from disk, known to be the same.

That a model can be rotated is found by ``anatomy.py``, what becomes of its tensors is in ``rotated.py``, and that all of it
came out right is measured here, before anything is made of it: the logits of both are compared.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nearplane.core.errors import NearplaneError, NumericalError, SettingError
from nearplane.formats.base import ONLINE_ONLY_HERE
from nearplane.models.discover import embedding_name, head_name
from nearplane.models.source import Source, build_skeleton
from nearplane.transforms.hooks import turn_inputs
from nearplane.transforms.roles import block_names, examine, is_tied, logits
from nearplane.transforms.view import Change, ChangedStore, Changes, RotatedSource

KINDS = ("r1", "r2", "r3", "r4")
MOST_SEED = 1 << 32
# How far the rotated model's logits may be from the original's, relative to a token's logits.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Rotate:
    """Which rotations, and the seed of their signs and random parts."""

    kinds: tuple[str, ...] = ()
    seed: int = 0

    def promise(self, source: Source) -> Source:
        """Return the source with the sizes of its rotated view."""
        return promised(source, self)

    def apply(self, source: Source, device: torch.device) -> Source:
        """Return the rotated view, proved."""
        return rotated(source, self, device)


def make_rotate(words: str | Sequence[str], seed: int) -> Rotate:
    """Of ``r1,r2`` or ("r1", "r2"), in any order. SettingError for anything else."""
    given = words.split(",") if isinstance(words, str) else list(words)
    kinds = [word.strip().lower() for word in given if word.strip()]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise SettingError(f"rotate knows {', '.join(KINDS)}, given as r1,r2; got {unknown[0]!r}.")
    if not 0 <= seed < MOST_SEED:
        raise SettingError(f"rotate-seed must be from 0 to {MOST_SEED - 1}; got {seed}.")
    if seed and not kinds:
        raise SettingError("rotate-seed is given and nothing is rotated; give --rotate r1,r2 as well.")
    return Rotate(tuple(kind for kind in KINDS if kind in kinds), seed)


def promised(source: Source, how: Rotate) -> Source:
    """Return the source with the sizes that its rotated view will have; its blocks are known.

    Whether the model can be rotated takes weights to tell. SettingError where its class cannot.
    """
    if not how.kinds:
        return source
    block_names(source)  # or refuse
    settings = {"rotate": {"kinds": list(how.kinds), "seed": how.seed}}
    notes = [*source.notes, "whether the model can be rotated is found out when its weights are read"]
    view = replace(source, settings=settings, notes=notes, promise_of=source)
    if "r1" in how.kinds and is_tied(source):
        head, table = f"{head_name(source)}.weight", embedding_name(source)
        view.store = ChangedStore(source.store, {head: Change(source.names[str(table)], torch.Tensor)})
        view.names = {**source.names, head: head}
    return view


def rotated(source: Source, how: Rotate, device: torch.device) -> RotatedSource:
    """The rotated view of a source, once it is known to be the same model.

    SettingError, with the reason, where the architecture is not one that a rotation passes through; NumericalError where
    the logits of some tokens, float32, differ by more than ``TOLERANCE``.
    """
    kinds = how.kinds
    # r4 takes what writes to the stream and does not read heads.
    wants_stream, wants_heads = bool({"r1", "r4"} & set(kinds)), bool({"r2", "r4"} & set(kinds))
    anatomy, expected = examine(source, device, stream=wants_stream, heads=wants_heads)
    changes = Changes(source, anatomy, kinds, how.seed)
    store = ChangedStore(source.store, changes.all())
    untied = "r1" in kinds and is_tied(source)
    config = copy.deepcopy(source.config)
    names = dict(source.names)
    if untied:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
        head = f"{head_name(source)}.weight"
        names[head] = head
    model = build_skeleton(copy.deepcopy(config), source.folder, trust_remote_code=source.trust_remote_code)
    turn_inputs(model, changes.inputs, how.seed)
    settings = {"rotate": {"kinds": list(kinds), "seed": how.seed}}
    parts = (source.name, source.folder, config, store, model, names, source.trust_remote_code, settings)
    view = RotatedSource(*parts, untied=untied, online=list(changes.inputs))
    if untied and model.get_output_embeddings().weight is model.get_input_embeddings().weight:  # type: ignore[operator]
        raise NearplaneError(
            f"{source.folder}: its output head cannot be untied from its embedding; rotate by r2 only."
        )
    error = prove(view, expected, device, f"rotated by {', '.join(kinds)}", "Run without --rotate.")
    view.notes = [f"rotated by {changes.words()}; its logits and the original's agree to {error:.1e}"]
    if view.online:
        view.notes.append(
            f"inputs of {len(view.online)} linears are rotated while the model runs (r4), which {ONLINE_ONLY_HERE}"
        )
    return view


def prove(view: Source, expected: Tensor, device: torch.device, what: str, advice: str) -> float:
    """Compare the logits of a view with those of the model that it is to equal, on the probe tokens, in float32.

    Args:
        expected: (tokens, vocabulary), the original's (``roles.logits``).
        what: was done to the model, for the error.
        advice: what to do about it.

    Returns:
        The largest difference of a token's logits, relative to their norm.

    Raises:
        NumericalError: the difference exceeds ``TOLERANCE``; it would be another model.
    """
    found = logits(view, device)
    error = float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    if not error <= TOLERANCE:
        raise NumericalError(
            f"{view.folder}: {what} the model's logits differ from the original's by {error:.2g}, "
            f"relative, and not by {TOLERANCE:g} at most; it would be another model. {advice}"
        )
    return error
