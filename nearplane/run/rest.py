"""What makes a checkpoint of quantized blocks a model: everything else, the configuration, the tokenizer, the report."""

from dataclasses import replace
from math import prod

from nearplane.checkpoint.engines import Described, Weight, model_facts, verdicts
from nearplane.checkpoint.export import export, rest_of, routing
from nearplane.formats.parts import Writer
from nearplane.run.plan import Plan
from nearplane.run.report import Report


def write_the_rest(plan: Plan, writer: Writer, report: Report) -> None:
    """Write everything that was not quantized, the configuration, the tokenizer and the report; the index comes last."""
    source = plan.source
    settings = {
        "static_groups": getattr(plan.method, "static_groups", True),
        "true_sequential": True,
        "version": report.versions["nearplane"],
    }
    if hasattr(plan.method, "damp_percent"):
        settings["damp_percent"] = plan.method.damp_percent
    grids = {site.name: plan.grid_of(site) for site in plan.sites}
    rest = rest_of(source, plan.grid, grids, plan.format, plan.stored, settings)
    report.bytes["before"] = sum(source.original.nbytes(name) for name in source.original.names)
    unreached = {source.names.get(f"{linear}.weight") for block in plan.blocks for linear in block.unreached}
    routes = routing(source)
    for name in rest.dense:
        shape, dtype = source.store.shape(name), source.store.dtype(name)
        size = prod(shape) * (plan.stored if dtype.is_floating_point else dtype).itemsize
        report.bytes["dense"] += size
        if len(shape) >= 2:
            reason = "the probe forward did not reach it" if name in unreached else "not a linear of a block"
            left = plan.ignored.get(name.removesuffix(".weight"))
            reason = "routes tokens to experts" if name in routes else reason
            reason = reason if left is None else f"left out by {left}"
            report.dense.append({"name": name, "bytes": size, "reason": reason})
    report.bytes["after"] = report.bytes["dense"] + report.bytes["quantized"]
    engines = {engine: judged.as_dict() for engine, judged in verdicts(described(plan)).items()}
    export(writer, plan.format, rest, {**report.as_dict(), "engines": engines})


def described(plan: Plan) -> Described:
    """Describe the checkpoint that a plan leads to, for the engines' verdicts."""
    weights = [
        Weight(replace(grid, fit=plan.grid.fit), site.shape, plan.activations)
        for site in plan.sites
        for grid in plan.possible(site)
    ]
    facts = model_facts(plan.source.model, {site.name: plan.grid_of(site) for site in plan.sites})
    return Described(plan.format.name, tuple(dict.fromkeys(weights)), facts, getattr(plan.format, "online", False))
