"""What makes a checkpoint of quantized blocks a model: everything else, the configuration, the tokenizer, the report."""

from nearplane.formats.parts import Writer
from nearplane.models.experts import routers
from nearplane.models.experts_disk import copied
from nearplane.models.inputs import bare_linears, is_causal
from nearplane.models.towers import linears_besides
from nearplane.run.plan import Plan
from nearplane.run.report import Report


def write_the_rest(plan: Plan, writer: Writer, report: Report) -> None:
    """Everything that was not quantized, the configuration, the tokenizer and the report; the index comes last."""
    source = plan.source
    sites = {source.names[site.name + ".weight"]: site.name for block in plan.blocks for site in block.sites}
    report.bytes["before"] = sum(source.original.nbytes(name) for name in source.original.names)
    routing = {source.names.get(f"{name}.weight") for name in routers(source.model)}
    for name in sorted(copied(source.store, set(sites))):
        value = source.store.get(name)
        value = value.to(plan.stored) if value.is_floating_point() else value
        report.bytes["dense"] += value.nbytes
        if value.dim() >= 2:
            missed = any(name == source.names.get(linear + ".weight") for b in plan.blocks for linear in b.unreached)
            reason = "the probe forward did not reach it" if missed else "not a linear of a block"
            left = plan.ignored.get(name.removesuffix(".weight"))
            reason = "routes tokens to experts" if name in routing else reason
            reason = reason if left is None else f"left out by {left}"
            report.dense.append({"name": name, "bytes": value.nbytes, "reason": reason})
        writer.put({name: value})
    report.bytes["after"] = report.bytes["dense"] + report.bytes["quantized"]
    quantized = set(sites.values())
    ignore = linears_besides(source.model, quantized)
    if not is_causal(
        source.model
    ):  # of which the part below the head is often loaded by itself, and names are shorter then
        prefix = f"{getattr(source.model, 'base_model_prefix', '')}."
        ignore += [name.removeprefix(prefix) for name in ignore if name.startswith(prefix)]
        ignore += [name for name in bare_linears(source.config) if not {name, prefix + name} & {*quantized, *ignore}]
    # Routers that are no linears here are linears in engines, by their names on disk.
    named = {name for name in routing if name is not None}
    ignore += sorted({name.removesuffix(".weight") for name in named} - set(ignore))
    settings = {
        "static_groups": getattr(plan.method, "static_groups", True),
        "true_sequential": True,
        "version": report.versions["nearplane"],
    }
    if hasattr(plan.method, "damp_percent"):
        settings["damp_percent"] = plan.method.damp_percent
    quantization = plan.quantization(ignore=ignore, settings=settings)
    config = {key: value for key, value in source.written_config().items() if key != "torch_dtype"}
    dtype = {"dtype": str(plan.stored).removeprefix("torch.")}
    writer.json("config.json", config | dtype | {"quantization_config": quantization})
    for name, content in plan.format.extra_files(quantization).items():
        writer.json(name, content)
    writer.companions(source.folder, code=source.trust_remote_code)
    writer.json("report.json", report.as_dict())
    writer.finish()
