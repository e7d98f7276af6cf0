"""What ``inspect`` finds: the anatomy of a model, or the grids of a quantized checkpoint."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from nearplane.core.grid import Grid
from nearplane.formats import FORMATS
from nearplane.formats.read import Checkpoint, open_checkpoint
from nearplane.models.discover import Block, Site, Stage, discover
from nearplane.models.experts import EXPERT, routers
from nearplane.models.locate import locate
from nearplane.models.source import Source, open_source
from nearplane.transforms.hooks import KEY
from nearplane.transforms.scaling import KEY as SCALED

# A number in a linear's name: of its block, or of its expert. Lines that differ in these only are one.
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Anatomy:
    """What is in a folder. Printed, it is the text for people."""

    model: str
    kind: str
    """The model's type; of a quantized checkpoint its format."""
    quantized: bool
    linears: int
    """Linears that are quantized, or would be."""
    weights: int
    """Weights in them."""
    before: int
    """Bytes of all tensors as they are."""
    after: int | None
    """Bytes after quantization; None for a checkpoint that is quantized."""
    lines: tuple[str, ...] = field(repr=False)

    def __str__(self) -> str:
        return "\n".join(self.lines)

    __repr__ = __str__


def inspect(model: str | Path, grid: Grid, *, revision: str | None = None, trust_remote_code: bool = False) -> Anatomy:
    """Look into a folder: blocks, stages, shapes, what is quantized and what is not, bytes before and after.

    Args:
        model: a transformers folder, a hub id, or "demo".
        grid: for which sizes after quantization are computed.
        revision: of a hub id, the branch, tag or commit.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        NearplaneError: a folder that cannot be read, in one sentence.
    """
    folder = locate(model, revision=revision)
    checkpoint = open_checkpoint(folder)
    if checkpoint.quantization is not None:
        return _quantized(model, checkpoint)
    source = open_source(model, trust_remote_code=trust_remote_code, revision=revision)
    blocks = discover(source)
    lines = [f"{model}: {source.config.model_type}, {len(blocks)} blocks, stored in {str(source.dtype)[6:]}"]
    if checkpoint.original is not None:
        lines = [f"{model}: {source.config.model_type}, {len(blocks)} blocks, of {str(source.dtype)[6:]}"]
        lines.append(checkpoint.original)
    for first, last, block in _runs(blocks):
        lines.append(f"\n{block.name if first == last else f'blocks {first} to {last}, each like {block.name}'}")
        lines += _block(block, source)
    sites = {source.names[s.name + ".weight"]: s for b in blocks for s in b.sites}
    dense_before, before = sum(source.store.nbytes(n) for n in source.store.names), source.store.total
    inside = sum(source.store.nbytes(n) for n in sites)
    weights = sum(s.shape[0] * s.shape[1] for s in sites.values())
    width = source.dtype.itemsize
    packing = FORMATS["compressed-tensors"]
    grid = replace(grid, scale_dtype=packing.scale_dtype(source.dtype))
    after = dense_before - inside + sum(packing.nbytes(s.shape, grid) for s in sites.values())
    lines.append(f"\nquantized: {weights:,} weights in {len(sites)} linears")
    lines.append(f"left dense: {(dense_before - inside) // width:,} parameters, the largest:")
    dense = sorted((n for n in source.store.names if n not in sites), key=source.store.nbytes, reverse=True)
    lines += [f"    {n:<48} {list(source.store.shape(n))}" for n in dense[:3]]
    lines.append(f"bytes before {before:,}, after {after:,} ({grid.bits} bits, group_size {grid.group_size})")
    kind = str(source.config.model_type)
    return Anatomy(str(model), kind, False, len(sites), weights, before, after, tuple(lines))


def _block(block: Block, source: Source) -> list[str]:
    """The stages of a block and what stays dense, in lines; of a layer's experts the first stands for all."""
    lines = []
    for number, stage in enumerate(block.stages, 1):
        match = EXPERT.fullmatch(stage[0].name)
        if match is not None and match[2] != "0":  # like the first, whose stages stand for all
            continue
        if match is not None and not stage[0].name.endswith("down_proj"):
            count = len({m[2] for s in block.sites if (m := EXPERT.fullmatch(s.name)) and m[1] == match[1]})
            lines.append(f"  {match[1].removeprefix(block.name + '.')}: {count} experts, with the stages of the first:")
        lines.append(f"  stage {number}, {stage[0].shape[1]} inputs")
        for site in stage:
            name = site.name.removeprefix(block.name + ".")
            line = f"    {name:<32} {site.shape[0]} x {site.shape[1]}" + "  (transposed)" * site.transposed
            norm = "" if site.passage is None else f" behind {site.passage.norm.removeprefix(block.name + '.')}"
            lines.append(line + f"  adds to the residual stream{norm}" * _repairs(site, stage))
    if not any(_repairs(site, stage) for stage in block.stages for site in stage):
        lines.append("  no output is added to the residual stream as it is: NearPlane's residual target goes without")
    for name in routers(source.model.get_submodule(block.name)):
        lines.append(f"  routes tokens to experts, stays dense: {name}")
    for name in block.strange:
        lines.append(f"  computes otherwise than nn.Linear, stays dense: {name.removeprefix(block.name + '.')}")
    for name in block.unreached:
        lines.append(f"  not reached by the probe, stays dense: {name.removeprefix(block.name + '.')}")
    return lines


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
    return (site.adds_to is not None or site.passage is not None) and len(stage) == 1


def _quantized(model: str | Path, checkpoint: Checkpoint) -> Anatomy:
    count = f"{len(checkpoint.layers)} linears, {len(checkpoint.dense)} dense tensors"
    lines = [f"{model}: quantized, {checkpoint.format}, {count}"]
    alike: dict[tuple[str, str], list[str]] = {}
    for name, layer in checkpoint.layers.items():
        grid, tokens = layer.grid, layer.activations
        what = f"{layer.shape[0]} x {layer.shape[1]}  {grid.bits} bits, group {grid.group_size}, "
        what += "symmetric" if grid.sym else "asymmetric"
        if tokens is not None:
            what += f"; inputs {tokens.bits} bits{'' if tokens.sym else ', asymmetric'}, clip {tokens.clip:g}"
        alike.setdefault((NUMBER.sub("*", name), what), []).append(name)
    shown = [(names[0] if len(names) == 1 else pattern, len(names), what) for (pattern, what), names in alike.items()]
    wide = max((len(name) for name, _, _ in shown), default=0)
    lines += [f"  {name:<{wide}}  {f'{number} of' if number > 1 else '':>6}  {what}" for name, number, what in shown]
    told = checkpoint.config.get(KEY)
    if isinstance(told, dict):
        lines.append(f"rotated: {', '.join(told.get('kinds', []))}")
    if isinstance(checkpoint.config.get(SCALED), dict):
        lines.append(f"channels scaled: {checkpoint.config[SCALED].get('search')}")
    total = sum(checkpoint.store.nbytes(n) for n in checkpoint.store.names)
    lines.append(f"bytes {total:,}")
    weights = sum(layer.shape[0] * layer.shape[1] for layer in checkpoint.layers.values())
    kind = str(checkpoint.format)
    return Anatomy(str(model), kind, True, len(checkpoint.layers), weights, total, None, tuple(lines))
