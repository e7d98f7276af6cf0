"""Everything decided before the first block is opened; whatever cannot work is refused here, in one sentence."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from nearplane.core.activations import TokenGrid
from nearplane.core.errors import SettingError
from nearplane.core.grid import Grid
from nearplane.data.samples import Samples, gather, longest_input, positions
from nearplane.data.text import Calibration
from nearplane.formats import Format, pick_format
from nearplane.formats.base import conv1d_reason
from nearplane.machine.devices import pick_device, pick_dtype
from nearplane.machine.ranks import Ranks
from nearplane.methods import Method, NearPlane
from nearplane.methods.base import Need
from nearplane.models.discover import Block, Site, Stage, discover
from nearplane.models.experts import show_all
from nearplane.models.inputs import MEDIA, reads
from nearplane.models.sketch import Sketch, discover_sketch, open_sketch
from nearplane.models.source import Source, open_source
from nearplane.models.towers import linears_besides
from nearplane.run.mix import (
    ALIKE,
    WIDTHS,
    Mix,
    Override,
    Unit,
    allowed,
    assign,
    check_budget,
    leave_out,
    make_mix,
    refuse_split,
    units,
)
from nearplane.run.notes import about_loading, mostly_dense, no_stream
from nearplane.run.stream import stream
from nearplane.transforms.rotation import make_rotate, promised, rotated

FormatName = Literal["compressed-tensors", "gptq", "gptq_v2"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Plan:
    """Everything decided before the first block is opened."""

    source: Source
    blocks: list[Block]
    samples: Samples | None
    method: Method
    grid: Grid
    calibration: Calibration
    format: Format
    stored: torch.dtype
    compute: torch.dtype
    device: torch.device
    mix: Mix = ALIKE
    """In what linears differ from ``grid``."""
    grids: Mapping[str, Grid] = field(default_factory=dict)
    """The grid of each site by name, as far as it is settled."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Linears left dense, by name on disk, with what left them out."""
    units: Sequence[Unit] = ()
    """With a budget, the linears whose bits it chooses; until it has, ``grids`` has the widest of each."""
    choices: list[dict[str, Any]] | None = None
    """What it has chosen."""
    activations: TokenGrid | None = None
    """How what goes into a quantized linear is rounded."""
    copied: str = ""
    """Hashes of what the checkpoint takes over from the source as it is."""

    @property
    def sites(self) -> list[Site]:
        """All sites, in order."""
        return [site for block in self.blocks for site in block.sites]

    @property
    def undecided(self) -> bool:
        """Whether a budget has yet to choose bits."""
        return self.mix.budget is not None and self.choices is None

    def decided(self, choices: list[dict[str, Any]]) -> "Plan":
        """With the bits that a budget has chosen."""
        bits = {name: row["bits"] for row in choices for name in row["linears"]}
        grids = {n: replace(grid, bits=bits[n]) if n in bits else grid for n, grid in self.grids.items()}
        return replace(self, grids=grids, choices=choices)

    def grid_of(self, site: Site) -> Grid:
        """The grid of one site."""
        return self.grids.get(site.name, self.grid)

    def possible(self, site: Site) -> list[Grid]:
        """The grids that a site may get: one, unless a budget is undecided."""
        widths = next((unit.widths for unit in self.units if site in unit.sites), ()) if self.undecided else ()
        return [replace(self.grid_of(site), bits=bits) for bits in widths] or [self.grid_of(site)]

    def parts(self, stage: Stage) -> list[tuple[Grid, Stage]]:
        """A stage by grids: what can be solved as one weight."""
        found: dict[Grid, Stage] = {}
        for site in stage:
            found.setdefault(self.grid_of(site), []).append(site)
        return list(found.items())

    def nbytes(self, sites: list[Site]) -> int:
        """Bytes that these sites take when they are written, at most where a budget is undecided."""
        total = sum(self.format.nbytes(site.shape, self.grid_of(site)) for site in sites)
        return min(total, allowed(self.sites, self.mix)) if self.undecided else total

    @property
    def mixed(self) -> bool:
        """Whether linears differ in what is stored of their grids."""
        return len({replace(grid, fit=self.grid.fit) for grid in self.grids.values()}) > 1

    def stream(self, offload: Path | None = None, ranks: Ranks | None = None) -> Any:
        """The walk over blocks; ``offload``: a folder for the hidden states; ``ranks``: who shares the samples."""
        reference = bool(self.method.needs & {"D", "R"})
        return stream(
            self.source,
            self.blocks,
            None if self.samples is None else self.samples.arguments,
            device=self.device,
            dtype=self.compute,
            reference=reference,
            offload=offload,
            ranks=ranks,
            activations=self.activations,
        )

    @property
    def windows(self) -> tuple[int, int]:
        """Samples of calibration data and positions of each, known before any is read; (0, 0) where none is."""
        if not self.method.needs:
            return 0, 0
        if self.samples is not None:
            return self.samples.number, positions([block.shape for block in self.blocks], self.samples.arguments)
        seqlen = min(self.calibration.seqlen, longest_input(self.source.model) or self.calibration.seqlen)
        return self.calibration.nsamples, seqlen if self._text_only else max(block.positions for block in self.blocks)

    @property
    def hidden(self) -> int:
        """Numbers of the hidden state for each of these positions."""
        if self._text_only:
            return max(block.shape[-1] for block in self.blocks)
        most = max(prod(block.shape[1:]) for block in self.blocks)
        return -(-most // max(block.positions for block in self.blocks))

    @property
    def _text_only(self) -> bool:
        return not MEDIA & set(reads(self.source.model))

    def disk_name(self, site: str) -> str:
        """A site's name in the checkpoint."""
        return self.source.names[site + ".weight"].removesuffix(".weight")

    def warnings(self) -> list[str]:
        """What this run can do but a user should know before it starts."""
        weights = sorted({(site.shape, self.grid_of(site)) for site in self.sites}, key=lambda pair: pair[0])
        notes = [self.format.warn(grid, shape) for shape, grid in weights]
        missed = "the probe forward did not reach it, stays dense"
        unreached = [f"{name}: {missed}" for block in self.blocks for name in block.unreached]
        notes += [*self.source.notes, *about_loading(self.source, self.sites, self.format, self.grid_of)]
        notes += [self._shortened(), no_stream(self.method, self.sites), *(self.samples.notes if self.samples else [])]
        notes += [] if self.ignored else [mostly_dense(self.source, self.blocks)]
        return list(dict.fromkeys([note for note in notes if note is not None])) + unreached

    def _shortened(self) -> str | None:
        cut = None if self.samples is None or self.calibration.sentences else self.samples.length
        if cut is None or not self._text_only or cut == self.calibration.seqlen:
            return None
        return f"seqlen cut to {cut}, the model's limit of positions"

    @property
    def settings(self) -> dict[str, Any]:
        """For the report."""
        options: dict[str, Any] = (
            asdict(self.method) if is_dataclass(self.method) and not isinstance(self.method, type) else {}
        )
        return {
            "method": {"name": type(self.method).__name__, **options},
            "grid": asdict(self.grid),
            "calibration": asdict(self.calibration) if self.samples is not None else None,
            "format": self.format.name,
            "stored_dtype": str(self.stored).removeprefix("torch."),
            "compute_dtype": str(self.compute).removeprefix("torch."),
            "device": self.device.type,  # which of the GPUs decides nothing
            **({} if self.activations is None else {"activations": asdict(self.activations)}),
            **self.mix.settings,
            **self.source.settings,
            **({} if self.choices is None else {"choices": self.choices}),
        }

    @property
    def data(self) -> dict[str, Any]:
        """For the report."""
        return {"origin": "none: this method reads no calibration data"} if self.samples is None else self.samples.data


def make_plan(
    model: str | Path,
    *,
    method: Method | None = None,
    grid: Grid | None = None,
    calibration: Calibration | None = None,
    override: Mapping[str, Mapping[str, Any]] | Sequence[Override] | None = None,
    ignore: Sequence[str] = (),
    budget: float | None = None,
    widths: Sequence[int] = WIDTHS,
    format: str | Format = "compressed-tensors",
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    rotate: str | Sequence[str] = (),
    rotate_seed: int = 0,
    activations: TokenGrid | None = None,
    towers: str | Sequence[str] = (),
    sketch: bool = False,
) -> Plan:
    """Open the source and settle every choice, as ``quantize`` takes them; refuse, before any compute, what cannot work.

    With ``sketch`` no weight and no token is read, and MODEL may be a lone config.json: good for an estimate, not to be run.
    """
    method, grid, calibration = method or NearPlane(), grid or Grid(), calibration or Calibration()
    mix, turning = make_mix(override, ignore, budget, widths, towers), make_rotate(rotate, rotate_seed)
    where = _choices(method, device)
    chosen = pick_format(format).running(activations, "r4" in turning.kinds)
    source: Source = (open_sketch if sketch else open_source)(model, trust_remote_code=trust_remote_code)
    if calibration.all_experts:
        show_all(source.model, source.folder)
    if turning.kinds and not sketch:
        source = rotated(source, turning, where)
    if isinstance(source, Sketch):
        found = discover_sketch(source)
        promised(source, turning)
    else:
        found = discover(source)
    plan = _settle(source, found, method, grid, calibration, chosen, where, dtype, mix, activations)
    if sketch:
        return plan
    if method.needs:
        plan = replace(plan, samples=gather(source, calibration))
    return replace(plan, copied=source.check({site.name for site in plan.sites}, plan.stored))


def _choices(method: Method, device: str) -> torch.device:
    """What can be refused before the model is opened."""
    where = pick_device(device)
    if isinstance(method, type) or not all(hasattr(method, part) for part in ("needs", "prepare", "solve")):
        raise SettingError(f"method must be an object with needs, prepare and solve, such as GPTQ(); got {method!r}.")
    if not set(method.needs) <= set(get_args(Need)):
        known = ", ".join(get_args(Need))
        raise SettingError(f"a method may need {known}; {type(method).__name__} needs {sorted(method.needs)}.")
    return where


def _settle(
    source: Source,
    blocks: list[Block],
    method: Method,
    grid: Grid,
    calibration: Calibration,
    format: Format,
    where: torch.device,
    dtype: str,
    mix: Mix,
    activations: TokenGrid | None,
) -> Plan:
    """Dtypes and grids; refuse what the format or the method cannot hold."""
    stored = pick_dtype(dtype) or source.dtype
    compute = torch.float32 if where.type == "cpu" else source.dtype
    grid = replace(grid, scale_dtype=format.scale_dtype(stored))
    disk = {site.name: source.names[site.name + ".weight"].removesuffix(".weight") for b in blocks for site in b.sites}
    blocks, ignored = leave_out(blocks, mix, disk.__getitem__, linears_besides(source.model, set(disk)))
    sites = [site for block in blocks for site in block.sites]
    grids, fixed = assign([disk[site.name] for site in sites], grid, mix)
    refuse_split(grids, ignored, mix, fixed)
    for site in sites:
        left = mix.budget is not None and disk[site.name] not in fixed  # then the widths are asked for below
        reason = None if left else format.supports(grids[disk[site.name]], site.shape)
        if site.transposed:
            reason = conv1d_reason(format) or reason
        reason = reason or getattr(method, "refuses", lambda _shape: None)(site.shape)
        if reason is not None:
            raise SettingError(f"{site.name}: {reason}.")
    by_site = {site.name: grids[disk[site.name]] for site in sites}
    plan = Plan(source, blocks, None, method, grid, calibration, format, stored, compute, where, mix, by_site, ignored)
    plan = replace(plan, activations=activations)
    return plan if mix.budget is None else _open_bits(plan, frozenset(s.name for s in sites if disk[s.name] in fixed))


def _open_bits(plan: Plan, fixed: frozenset[str]) -> Plan:
    """The plan with the bits of all linears but the ``fixed`` ones left to its budget."""
    free = units(plan.blocks, plan.disk_name, plan.grids, fixed, plan.mix, plan.format)
    check_budget(free, plan.sites, plan.grids, plan.mix, plan.format)
    widest = {site.name: unit.widths[-1] for unit in free for site in unit.sites}
    grids = {n: replace(grid, bits=widest[n]) if n in widest else grid for n, grid in plan.grids.items()}
    return replace(plan, units=free, grids=grids)
