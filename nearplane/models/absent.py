"""Parameters that a checkpoint need not hold: tied ones, stored once for several, and ones that transformers computes.

Tied parameters are known by transformers' own keys (``all_tied_weights_keys``), and by the identity of parameters in a draft of
the model, as code that comes with a model shares them. A computed parameter is one that transformers lets a checkpoint lack and
initialises alike whatever the seed, such as Marian's sinusoidal positions.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Numbers of a parameter that is computed at most: a table of positions, no tower that a checkpoint happens to lack.
MOST_COMPUTED = 1 << 26


def tied(model: nn.Module) -> dict[str, str]:
    """Map each tied parameter of a model to the parameter that it is tied to."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def note_shared(model: nn.Module, draft: nn.Module) -> None:
    """Add to the tied parameters of a skeleton those that are one parameter in a ``draft`` of the model.

    Args:
        model: the skeleton, in which each parameter has been replaced by one of its own.
        draft: the same model, as its class builds it.
    """
    known, first = tied(model), dict[int, str]()
    for name, value in draft.named_parameters(remove_duplicate=False):
        origin = first.setdefault(id(value), known.get(name, name))
        if origin != name:
            known.setdefault(name, origin)
    if known:
        own: Any = model
        own.all_tied_weights_keys = known


def size(model: nn.Module) -> int:
    """Count the numbers in the parameters of a model, tied ones once."""
    again = tied(model)
    return sum(value.numel() for name, value in model.named_parameters() if name not in again)


def stored_as(model: nn.Module, on_disk: Mapping[str, str]) -> dict[str, str]:
    """Find parameters that are stored under the name of one that is tied to them.

    Args:
        model: the skeleton.
        on_disk: names on disk by names in the model.

    Returns:
        Name on disk by name of each such parameter.
    """
    found: dict[str, str] = {}
    for name, origin in tied(model).items():
        if name in on_disk and origin not in on_disk:
            found.setdefault(origin, on_disk[name])
    return found


def lacking(model: nn.Module, on_disk: Mapping[str, str]) -> list[str]:
    """List the parameters that must be stored and are not: neither tied to a stored one, nor computed.

    Computed ones are put into the skeleton.
    """
    again, elsewhere = tied(model), stored_as(model, on_disk)
    missing = [
        name
        for name, value in [*model.named_parameters(), *model.named_buffers()]
        if value.is_meta and not {name, again.get(name, name)} & (on_disk.keys() | elsewhere.keys())
    ]
    done = set(compute(model, missing))
    return [name for name in missing if name not in done and again.get(name) not in missing]


def compute(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Put parameters that transformers computes into a skeleton.

    Args:
        model: the skeleton.
        names: parameters that no checkpoint gives.

    Returns:
        Those of ``names`` that were computed.
    """
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    done = []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        place = module._parameters.get(leaf)
        if place is None or place.numel() > MOST_COMPUTED or not any(re.search(p, name) for p in patterns):
            continue
        values = [_initialised(model, module, leaf, place, seed) for seed in (0, 1)]
        if torch.equal(*values):
            module._parameters[leaf] = nn.Parameter(values[0], requires_grad=False)
            done.append(name)
    return done


def _initialised(model: nn.Module, module: nn.Module, leaf: str, place: nn.Parameter, seed: int) -> Tensor:
    """Return what transformers initialises a parameter to; where it leaves memory as it is, a value that depends on the seed."""
    value = torch.full(place.shape, seed + 0.5, dtype=place.dtype)
    module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    own: Any = model
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        own._init_weights(module)
    found = module._parameters[leaf]
    module._parameters[leaf] = place
    assert found is not None
    return found.detach()
