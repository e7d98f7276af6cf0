"""Rotate a model: a view of a source with rotated weights, proved to be the same model.

``roles.py`` finds out whether a model can be rotated; ``view.py`` computes the rotated tensors as they are read. Here both are
put together and the result is measured: the logits of view and original must agree. The rotations are those of SpinQuant
(arXiv 2405.16406) and QuaRot (arXiv 2404.00456), without training.
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
# Largest difference of the rotated model's logits from the original's, relative to the norm of a token's logits.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Rotate:
    """The transform that rotates: which rotations, and the seed of their signs and random cores."""

    kinds: tuple[str, ...] = ()
    seed: int = 0

    def promise(self, source: Source) -> Source:
        """Return the source with the sizes of its rotated view."""
        return promised(source, self)

    def apply(self, source: Source, device: torch.device) -> Source:
        """Return the rotated view of the source, proved."""
        return rotated(source, self, device)


def make_rotate(words: str | Sequence[str], seed: int) -> Rotate:
    """Parse the names of rotations.

    Args:
        words: ``"r1,r2"`` or ``("r1", "r2")``, in any order.
        seed: 0 to 2**32 - 1.

    Raises:
        SettingError: an unknown name, a seed out of range, or a seed without a rotation.
    """
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
    """Return the source with the sizes of its rotated view.

    Whether the model can be rotated is known only when its weights are read.

    Raises:
        SettingError: the model is no language model.
    """
    if not how.kinds:
        return source
    block_names(source)  # or refuse
    settings = {"rotate": {"kinds": list(how.kinds), "seed": how.seed}}
    notes = [*source.notes, "whether the model can be rotated is found out when its weights are read"]
    view = replace(source, settings=settings, notes=notes)
    if "r1" in how.kinds and is_tied(source):
        head, table = f"{head_name(source)}.weight", embedding_name(source)
        view.store = ChangedStore(source.store, {head: Change(source.names[str(table)], torch.Tensor)})
        view.names = {**source.names, head: head}
    return view


def rotated(source: Source, how: Rotate, device: torch.device) -> RotatedSource:
    """Return the rotated view of a source, proved to be the same model.

    Args:
        source: a language model, its weights on disk.
        how: which rotations.
        device: where logits are computed.

    Raises:
        SettingError: a rotation cannot pass through this architecture, with the reason.
        NumericalError: logits of a token differ by more than ``TOLERANCE``.
    """
    kinds = how.kinds
    # r4 rotates the inputs of linears that write to the stream and do not read heads.
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
    settings = {**source.settings, "rotate": {"kinds": list(kinds), "seed": how.seed}}
    parts = (source.name, source.folder, config, store, model, names, source.trust_remote_code, settings)
    view = RotatedSource(*parts, inner=source, untied=untied, online=list(changes.inputs))
    if untied and model.get_output_embeddings().weight is model.get_input_embeddings().weight:  # type: ignore[operator]
        raise NearplaneError(
            f"{source.folder}: its output head cannot be untied from its embedding; rotate by r2 only."
        )
    error = prove(view, expected, device, f"rotated by {', '.join(kinds)}", "Run without --rotate.")
    view.notes = [*source.notes, f"rotated by {changes.words()}; its logits and the original's agree to {error:.1e}"]
    if view.online:
        view.notes.append(
            f"inputs of {len(view.online)} linears are rotated while the model runs (r4), which {ONLINE_ONLY_HERE}"
        )
    return view


def prove(view: Source, expected: Tensor, device: torch.device, what: str, advice: str) -> float:
    """Compare the logits of a view with the original's, on the probe tokens, in float32.

    Args:
        view: the changed model.
        expected: the original's logits (1, tokens, vocabulary), of ``roles.logits``.
        device: where to compute.
        what: words for the change, for the error.
        advice: what to do about a difference, for the error.

    Returns:
        The largest difference of a token's logits, relative to their norm.

    Raises:
        NumericalError: the difference exceeds ``TOLERANCE``, so that the view is another model.
    """
    actual = logits(view, device)
    error = float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    if not error <= TOLERANCE:
        raise NumericalError(
            f"{view.folder}: {what} the model's logits differ from the original's by {error:.2g}, "
            f"relative, and not by {TOLERANCE:g} at most; it would be another model. {advice}"
        )
    return error
