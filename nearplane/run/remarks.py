"""What a person should read before a run starts: who will load the checkpoint, what is left out, what is unusual.

Each remark is one sentence of ``Plan.warnings``, printed, and kept among the report's events.
"""

from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import nn

from nearplane.checkpoint.gguf import takes_template
from nearplane.core.errors import SettingError
from nearplane.core.grid import spoiled_groups
from nearplane.data.samples import longest_input
from nearplane.formats.companions import companions
from nearplane.models.discover import point_of
from nearplane.models.experts import EXPERT
from nearplane.models.experts_disk import converts, loading_notes
from nearplane.models.inputs import MEDIA, reads
from nearplane.models.locate import code_left_out
from nearplane.models.source import Source
from nearplane.models.values import AT_ONCE
from nearplane.run.check import goes_on

if TYPE_CHECKING:
    from nearplane.run.plan import Plan

# Of a linear's sum of squares, the share in groups whose scale float16 cannot hold, from which a run is refused.
SPOILED = 0.5


def remarks(plan: "Plan") -> list[str]:
    """List sentences about a plan that a user should read before the run starts."""
    weights = sorted({(site.shape, plan.grid_of(site)) for site in plan.sites}, key=lambda pair: pair[0])
    notes = [_groups(plan), *(plan.format.warn(grid, shape) for shape, grid in weights)]
    missed = "the probe forward did not reach it, stays dense"
    unreached = [f"{name}: {missed}" for block in plan.blocks for name in block.unreached] + _strange(plan)
    notes += [*plan.source.notes, *plan.notes, *_about_loading(plan), *_about_files(plan.source)]
    notes += [_shortened(plan), _not_run(plan), _no_stream(plan), *(plan.samples.notes if plan.samples else [])]
    notes += [_about_check(plan), *([] if plan.fresh is None else plan.fresh.notes)]
    notes += [] if plan.ignored else [_mostly_dense(plan)]
    return list(dict.fromkeys([note for note in notes if note is not None])) + unreached


def check_scales(plan: "Plan", source: Source) -> list[str]:
    """Read every weight whose scales are stored in float16, and refuse a linear that such scales would spoil.

    Returns:
        Sentences about linears of which a smaller part is spoiled.

    Raises:
        SettingError: names the linear.
    """
    notes = []
    for site in plan.sites:
        grid = min(plan.possible(site), key=lambda grid: grid.storage_bits)
        if grid.scale_dtype != "float16":
            continue
        weight = source.store.get(source.names[f"{site.name}.weight"])
        rows = torch.split(weight.T if site.transposed else weight, max(1, AT_ONCE // max(1, site.shape[1])))
        found = [spoiled_groups(part.float(), grid) for part in rows]
        bad, energy = (torch.cat(parts) for parts in zip(*found, strict=True))
        lost, total = float(energy[bad].sum()), float(energy.sum())
        if not bool(bad.any()) or not isfinite(total):  # weights that are not finite are named where they are read
            continue
        largest = float(weight.abs().max())
        told = f"{int(bad.sum())} of {bad.numel()} scales leave the range of float16 (weights up to {largest:.2g})"
        if lost >= SPOILED * total:
            other = (
                "--dtype bfloat16" if plan.format.casts_scales else "--format compressed-tensors with --dtype bfloat16"
            )
            raise SettingError(f"{site.name}: {told}, in which {plan.format.name} would store them; use {other}.")
        notes.append(f"{site.name}: {told}, with {lost / total:.2g} of its weights' squares; these groups are coarse")
    return notes


def _strange(plan: "Plan") -> list[str]:
    """Name linears that compute otherwise than by one matrix product, and stay dense."""
    names = [name for block in plan.blocks for name in block.strange]
    kinds = ", ".join(sorted({type(plan.source.model.get_submodule(name)).__name__ for name in names}))
    told = f"{len(names)} linears of class {kinds}, which compute otherwise than nn.Linear, stay dense, the first: "
    return [told + names[0]] if names else []


def _groups(plan: "Plan") -> str | None:
    """Return a sentence where no group size was given and the default divides not every linear's inputs, else None."""
    usual, chosen = plan.job.grid.group_size, plan.grid.group_size
    if chosen == usual:
        return None
    widths = sorted({site.shape[1] for site in plan.sites if site.shape[1] % usual})
    return (
        f"group_size {chosen}: it divides the inputs of every linear, and {usual} does not divide "
        f"{', '.join(map(str, widths))}; --group-size {usual} takes {usual} all the same"
    )


def _shortened(plan: "Plan") -> str | None:
    """Return a sentence where windows are shorter than was asked for, else None."""
    limit, seqlen = longest_input(plan.source.model), plan.calibration.seqlen
    if plan.samples is None or plan.samples.length is None or plan.calibration.sentences:
        return None
    if MEDIA & set(reads(plan.source.model)) or limit is None or limit >= seqlen:
        return None
    return f"seqlen cut to {limit}, the model's limit of positions"


def _not_run(plan: "Plan") -> str | None:
    """Return a sentence on blocks behind the last one with anything to quantize, else None."""
    walked, left = plan.walked, len(plan.blocks) - len(plan.walked)
    if not left or not walked:
        return None
    checked = ", but for the windows of the check at the end" if plan.job.check and goes_on(plan) else ""
    return f"{left} blocks after {walked[-1].name} hold nothing to quantize and are not run{checked}"


def _about_check(plan: "Plan") -> str | None:
    """Return why a run is not checked, or not on held-out windows, or what its check does not see; else None."""
    if plan.unchecked is not None or plan.checked is None or not takes_template(plan.format):
        return plan.unchecked
    return "the check reads embedding and output head as in MODEL, and not as this file rounds them"


def _about_loading(plan: "Plan") -> list[str]:
    """Name who will not load the checkpoint, and what is stored beyond the model."""
    source, sites = plan.source, plan.sites
    found = []
    if plan.format.name == "compressed-tensors":
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
    exact = _exact(plan)
    if exact:
        found.append(
            f"{len(exact)} tensors keep their own dtype, because transformers keeps them in float32, the first: {exact[0]}"
        )
    written = {site.name: source.names[f"{site.name}.weight"].removesuffix(".weight") for site in sites}
    asymmetric = any(not plan.grid_of(site).sym for site in sites if EXPERT.fullmatch(site.name))
    return found + loading_notes(source.model, source.store, written, asymmetric)


def _exact(plan: "Plan") -> list[str]:
    """List dense tensors that keep their dtype although another was asked for."""
    source, asked = plan.source, plan.dense
    dense = source.store.names - {source.names[f"{site.name}.weight"] for site in plan.sites}
    floats = sorted(name for name in dense if source.store.dtype(name).is_floating_point)
    return [name for name in floats if asked is not None and source.written(name, asked) != asked]


def _about_files(source: Source) -> list[str]:
    """Name what of the model's folder is not in the checkpoint."""
    left = code_left_out(source.raw_config(), trust_remote_code=source.trust_remote_code)
    code = f"auto_map of config.json is written without {', '.join(left)}: transformers' own class is quantized, not that code"
    return [note for note in (companions(source.folder).note(), code if left else None) if note is not None]


def _mostly_dense(plan: "Plan") -> str | None:
    """Return a sentence where most of the blocks' weights are outside the linears that were found, else None."""
    source, blocks = plan.source, plan.blocks
    sites = {f"{site.name}.weight" for block in blocks for site in block.sites}
    inside = [(f"{b.name}.{n}", p) for b in blocks for n, p in source.model.get_submodule(b.name).named_parameters()]
    sizes = {name: value.numel() for name, value in inside if value.dim() > 1}
    dense = {name: size for name, size in sizes.items() if name not in sites}
    if 2 * sum(dense.values()) <= sum(sizes.values()):
        return None
    largest = max(dense, key=lambda name: dense[name])
    share = 100 * sum(dense.values()) / sum(sizes.values())
    return f"{share:.0f}% of the blocks' weights are in no linear that was found and stay dense, the largest {largest}"


def _no_stream(plan: "Plan") -> str | None:
    """Return the reason why no linear can repair the residual stream's drift, else None."""
    needs = plan.method.needs
    if "R" not in needs or any(point_of(stage, needs) for block in plan.blocks for stage in block.stages):
        return None
    return "no linear's output joins the residual stream as it is, so none can repair the stream's drift (residual)"
