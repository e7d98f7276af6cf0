"""What a run can do but a user should know before it starts."""

from collections.abc import Callable

from torch import nn

from nearplane.core.grid import Grid
from nearplane.formats.base import Format
from nearplane.methods import Method
from nearplane.models.discover import Block, Site
from nearplane.models.experts import EXPERT
from nearplane.models.experts_disk import converts, loading_notes
from nearplane.models.source import Source


def about_loading(source: Source, sites: list[Site], format: Format, grid_of: Callable[[Site], Grid]) -> list[str]:
    """Who will not load what is written, and what is stored beyond the model."""
    found = []
    if format.name == "compressed-tensors":
        kinds = {type(source.model.get_submodule(site.name)) for site in sites if not site.transposed}
        own = ", ".join(sorted(kind.__name__ for kind in kinds if kind is not nn.Linear))
        if own:
            found.append(
                f"this model computes with {own}, not nn.Linear: nearplane loads the checkpoint, transformers may not"
            )
        if converts(source.model):
            found.append(
                "transformers merges or splits weights of this model while loading, not packed ones: only nearplane loads it"
            )
    unused = sorted(source.store.names - set(source.names.values()))
    if unused:
        found.append(f"{len(unused)} stored tensors belong to no parameter and are copied, the first: {unused[0]}")
    written = {site.name: source.names[f"{site.name}.weight"].removesuffix(".weight") for site in sites}
    asymmetric = any(not grid_of(site).sym for site in sites if EXPERT.fullmatch(site.name))
    return found + loading_notes(source.model, source.store, written, asymmetric)


def mostly_dense(source: Source, blocks: list[Block]) -> str | None:
    """What to know where most of the blocks' weights are in no linear that could be found."""
    sites = {f"{site.name}.weight" for block in blocks for site in block.sites}
    inside = [(f"{b.name}.{n}", p) for b in blocks for n, p in source.model.get_submodule(b.name).named_parameters()]
    sizes = {name: value.numel() for name, value in inside if value.dim() > 1}
    dense = {name: size for name, size in sizes.items() if name not in sites}
    if 2 * sum(dense.values()) <= sum(sizes.values()):
        return None
    largest = max(dense, key=lambda name: dense[name])
    share = 100 * sum(dense.values()) / sum(sizes.values())
    return f"{share:.0f}% of the blocks' weights are in no linear that was found and stay dense, the largest {largest}"


def no_stream(method: Method, sites: list[Site]) -> str | None:
    """Why the residual stream's drift will not be repaired; None where it will, or was not meant to."""
    if "R" not in method.needs or any(site.adds_to for site in sites):
        return None
    return "no linear's output joins the residual stream as it is, so none can repair the stream's drift (residual)"
