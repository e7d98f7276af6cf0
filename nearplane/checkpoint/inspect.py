"""The anatomy of a model, or the grids of a quantized checkpoint, in a text for people."""

from dataclasses import replace
from pathlib import Path

from nearplane.core.grid import Grid
from nearplane.formats import FORMATS
from nearplane.formats.read import Checkpoint, open_checkpoint
from nearplane.models.discover import Block, Site, Stage, discover
from nearplane.models.experts import EXPERT, routers
from nearplane.models.locate import locate
from nearplane.models.source import open_source
from nearplane.transforms.hooks import KEY


def inspect(model: str | Path, grid: Grid, *, trust_remote_code: bool = False) -> str:
    """Describe blocks, stages, shapes, which linears are quantized and which are not, bytes before and after."""
    folder = locate(model)
    checkpoint = open_checkpoint(folder)
    if checkpoint.quantization is not None:
        return _quantized(model, checkpoint)
    source = open_source(model, trust_remote_code=trust_remote_code)
    blocks = discover(source)
    lines = [f"{model}: {source.config.model_type}, {len(blocks)} blocks, stored in {str(source.dtype)[6:]}"]
    for first, last, block in _runs(blocks):
        lines.append(f"\n{block.name if first == last else f'blocks {first} to {last}, each like {block.name}'}")
        for number, stage in enumerate(block.stages, 1):
            match = EXPERT.fullmatch(stage[0].name)
            if match is not None and match[2] != "0":  # like the first, whose stages stand for all
                continue
            if match is not None and not stage[0].name.endswith("down_proj"):
                count = len({m[2] for s in block.sites if (m := EXPERT.fullmatch(s.name)) and m[1] == match[1]})
                lines.append(
                    f"  {match[1].removeprefix(block.name + '.')}: {count} experts, with the stages of the first:"
                )
            lines.append(f"  stage {number}, {stage[0].shape[1]} inputs")
            for site in stage:
                name = site.name.removeprefix(block.name + ".")
                line = f"    {name:<32} {site.shape[0]} x {site.shape[1]}" + "  (transposed)" * site.transposed
                lines.append(line + "  adds to the residual stream" * _repairs(site, stage))
        if not any(_repairs(site, stage) for stage in block.stages for site in stage):
            lines.append(
                "  no output is added to the residual stream as it is: NearPlane's residual target goes without"
            )
        for name in routers(source.model.get_submodule(block.name)):
            lines.append(f"  routes tokens to experts, stays dense: {name}")
        for name in block.unreached:
            lines.append(f"  not reached by the probe, stays dense: {name.removeprefix(block.name + '.')}")
    sites = {source.names[s.name + ".weight"]: s for b in blocks for s in b.sites}
    before = sum(source.store.nbytes(n) for n in source.store.names)
    inside = sum(source.store.nbytes(n) for n in sites)
    weights = sum(s.shape[0] * s.shape[1] for s in sites.values())
    width = source.dtype.itemsize
    packing = FORMATS["compressed-tensors"]
    grid = replace(grid, scale_dtype=packing.scale_dtype(source.dtype))
    after = before - inside + sum(packing.nbytes(s.shape, grid) for s in sites.values())
    lines.append(f"\nquantized: {weights:,} weights in {len(sites)} linears")
    lines.append(f"left dense: {(before - inside) // width:,} parameters, the largest:")
    dense = sorted((n for n in source.store.names if n not in sites), key=source.store.nbytes, reverse=True)
    lines += [f"    {n:<48} {list(source.store.shape(n))}" for n in dense[:3]]
    lines.append(f"bytes before {before:,}, after {after:,} ({grid.bits} bits, group_size {grid.group_size})")
    return "\n".join(lines)


def _runs(blocks: list[Block]) -> list[tuple[int, int, Block]]:
    """Group consecutive blocks with equal stages, as (first, last, the first block)."""
    runs: list[tuple[int, int, Block]] = []
    for number, block in enumerate(blocks):
        if runs and runs[-1][2].tower == block.tower and _anatomy(runs[-1][2]) == _anatomy(block):
            runs[-1] = (runs[-1][0], number, runs[-1][2])
        else:
            runs.append((number, number, block))
    return runs


def _anatomy(block: Block) -> list[list[tuple[str, tuple[int, int], bool]]]:
    return [
        [(site.name.removeprefix(block.name), site.shape, _repairs(site, stage)) for site in stage]
        for stage in block.stages
    ]


def _repairs(site: Site, stage: Stage) -> bool:
    """Tell whether NearPlane's target of this linear answers the residual stream's drift: it adds to it, alone."""
    return site.adds_to is not None and len(stage) == 1


def _quantized(model: str | Path, checkpoint: Checkpoint) -> str:
    lines = [
        f"{model}: quantized, {checkpoint.format}, {len(checkpoint.layers)} linears, {len(checkpoint.dense)} dense tensors"
    ]
    for name, layer in checkpoint.layers.items():
        grid = layer.grid
        kind, tokens = "symmetric" if grid.sym else "asymmetric", layer.activations
        inputs = (
            ""
            if tokens is None
            else f"; inputs {tokens.bits} bits{'' if tokens.sym else ', asymmetric'}, clip {tokens.clip:g}"
        )
        lines.append(
            f"  {name:<48} {layer.shape[0]} x {layer.shape[1]}  {grid.bits} bits, group {grid.group_size}, {kind}{inputs}"
        )
    told = checkpoint.config.get(KEY)
    if isinstance(told, dict):
        lines.append(f"rotated: {', '.join(told.get('kinds', []))}")
    total = sum(checkpoint.store.nbytes(n) for n in checkpoint.store.names)
    lines.append(f"bytes {total:,}")
    return "\n".join(lines)
