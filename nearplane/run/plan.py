"""Everything decided before the first block is opened; whatever cannot work is refused here, in one sentence.

``draft`` opens the model in sketch mode and settles every choice: no weight is read, and the memory that a run needs can be
told from it. ``complete`` reads what must be read before the walk: the proof of a rotation, the calibration text, the
tensors that are copied.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from nearplane.checkpoint.engines import Described, Weight, model_facts
from nearplane.checkpoint.gguf import Placed, place_source, takes_template, template_for
from nearplane.checkpoint.load import generation_settings
from nearplane.core.activations import TokenGrid
from nearplane.core.errors import SettingError
from nearplane.core.grid import Grid
from nearplane.data.fresh import Checked, Fresh, set_aside, to_check
from nearplane.data.own import Counting, own_samples, refuse_own
from nearplane.data.samples import Samples, gather, longest_input, positions
from nearplane.data.shares import is_mix
from nearplane.data.text import Calibration
from nearplane.data.windows import Tokens
from nearplane.formats import Format
from nearplane.formats.base import conv1d_reason
from nearplane.formats.gguf.file import GGUFFile
from nearplane.formats.gguf.format import GGUF
from nearplane.machine.devices import pick_device, pick_dtype
from nearplane.machine.ranks import ALONE, Ranks
from nearplane.methods import Method
from nearplane.methods.base import Need
from nearplane.models.discover import Block, Site, Stage, discover, head_name
from nearplane.models.experts import show_all
from nearplane.models.head import head_block, head_site, untie
from nearplane.models.inputs import MEDIA, reads
from nearplane.models.sketch import Unsketchable
from nearplane.models.source import Source, open_source
from nearplane.models.towers import linears_besides
from nearplane.run import mix
from nearplane.run.job import Job, Override
from nearplane.run.observe import needed
from nearplane.run.remarks import check_scales, remarks
from nearplane.run.report import recordable
from nearplane.run.stream import OpenBlock, Place, stream, up_to_last
from nearplane.run.student import fresh_windows, refuse_tuning


@dataclass(frozen=True)
class Plan:
    """A model, opened, with every choice settled."""

    source: Source
    blocks: list[Block]
    job: Job
    grid: Grid
    """The job's grid, with the dtype that scales are stored in."""
    format: Format
    stored: torch.dtype
    """The dtype of dense tensors on disk."""
    compute: torch.dtype
    device: torch.device
    grids: Mapping[str, Grid] = field(default_factory=dict)
    """The grid of each site by name."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Linears left dense, by name on disk, with the setting that left them out."""
    units: Sequence[mix.Unit] = ()
    """With a budget, the linears whose bits it chooses; until then ``grids`` holds the widest grid of each."""
    choices: list[dict[str, Any]] | None = None
    """The bits that a budget has chosen."""
    samples: Samples | None = None
    fresh: Fresh | None = None
    """With a tuning, windows that calibration does not use."""
    checked: Checked | None = None
    """Windows that the run is checked on; None: it is not."""
    unchecked: str | None = None
    """Why the run is not checked, or not on held-out windows."""
    notes: Sequence[str] = ()
    """Remarks on weights, for the user."""
    template: GGUFFile | None = None
    """The file of which a GGUF checkpoint is made."""
    placed: Placed | None = None
    """Which of its tensors are ours; known once weights were read."""
    copied: str = ""
    """Hashes of the tensors that the checkpoint takes over from the source as they are."""

    @property
    def method(self) -> Method:
        """The method that solves weights."""
        return self.job.method

    @property
    def calibration(self) -> Calibration:
        """The calibration data's settings."""
        return self.job.calibration

    @property
    def activations(self) -> TokenGrid | None:
        """The rounding of a quantized linear's input."""
        return self.job.activations

    @property
    def dense(self) -> torch.dtype | None:
        """The dtype that was asked for dense tensors; None: each keeps its own."""
        return pick_dtype(self.job.dtype)

    def changed(self, **settings: Any) -> "Plan":
        """Return the plan with some fields of its job changed; nothing is read again."""
        return replace(self, job=replace(self.job, **settings))

    @cached_property
    def needs(self) -> frozenset[Need]:
        """What is measured for the method."""
        return needed(self.method, min((self.grid_of(site).levels.bits for site in self.sites), default=0))

    @property
    def sites(self) -> list[Site]:
        """All sites, in the order in which they are solved."""
        return [site for block in self.blocks for site in block.sites]

    @property
    def walked(self) -> list[Block]:
        """The blocks that are run: up to the last one with anything to quantize."""
        return up_to_last(self.blocks)

    @property
    def counted(self) -> list[Site]:
        """The sites that a budget counts."""
        return mix.counted(self.blocks, self.units)

    @property
    def undecided(self) -> bool:
        """True while a budget has yet to choose bits."""
        return self.job.budget is not None and self.choices is None

    def decided(self, choices: list[dict[str, Any]]) -> "Plan":
        """Return the plan with the bits that a budget has chosen."""
        bits = {name: row["bits"] for row in choices for name in row["linears"]}
        grids = {n: replace(grid, bits=bits[n]) if n in bits else grid for n, grid in self.grids.items()}
        return replace(self, grids=grids, choices=choices)

    def grid_of(self, site: Site) -> Grid:
        """Return the grid of one site."""
        return self.grids.get(site.name, self.grid)

    def possible(self, site: Site) -> list[Grid]:
        """List the grids that a site may get: one, unless a budget is undecided."""
        widths = next((unit.widths for unit in self.units if site in unit.sites), ()) if self.undecided else ()
        return [replace(self.grid_of(site), bits=bits) for bits in widths] or [self.grid_of(site)]

    def parts(self, stage: Stage) -> list[tuple[Grid, Stage]]:
        """Split a stage by grids into sites that are solved as one weight."""
        found: dict[Grid, Stage] = {}
        for site in stage:
            found.setdefault(self.grid_of(site), []).append(site)
        return list(found.items())

    def nbytes(self, sites: list[Site]) -> int:
        """Count the bytes that sites take on disk; an upper bound where a budget is undecided."""
        total = sum(self.format.nbytes(site.shape, self.grid_of(site)) for site in sites)
        if not self.undecided:
            return total
        known = set(self.counted)
        beside = sum(self.format.nbytes(s.shape, self.grid_of(s)) for s in self.sites if s not in known)
        return min(total, mix.allowed(self.counted, self.job) + beside)

    @property
    def mixed(self) -> bool:
        """True where the stored grids of linears differ."""
        return len({replace(grid, fit=self.grid.fit) for grid in self.grids.values()}) > 1

    def stream(self, ranks: Ranks = ALONE) -> Iterator[OpenBlock]:
        """Open the blocks in turn; ``ranks`` share the samples."""
        return stream(
            self.source,
            self.blocks,
            self.samples if self.method.needs else None,
            reference=bool(self.needs & {"D", "R"}) and ("coarse" if "coarse" in self.needs else True),
            activations=self.activations,
            also=None if self.checked is None else self.checked.batch,
            place=Place(self.device, self.compute, self.job.offload, ranks),
        )

    @property
    def windows(self) -> tuple[int, int]:
        """(samples, positions of a sample) of the calibration data, known before it is read; (0, 0) without data."""
        if not self.job.reads_data:
            return 0, 0
        if self.samples is not None:
            return self.samples.number, positions([block.shape for block in self.blocks], self.samples.arguments)
        seqlen = min(self.calibration.seqlen, longest_input(self.source.model) or self.calibration.seqlen)
        return self.calibration.nsamples, seqlen if self._text_only else max(block.positions for block in self.blocks)

    @property
    def hidden(self) -> int:
        """Width of the hidden state: numbers for each position."""
        if self._text_only:  # one hidden state, or several of which the first dimension counts (Gemma 3n)
            return max(block.shape[0] * block.shape[-1] for block in self.blocks)
        most = max(prod(block.shape[1:]) for block in self.blocks)
        return -(-most // max(block.positions for block in self.blocks))

    @property
    def handed(self) -> int:
        """Numbers for each position that blocks hand to later ones beside the hidden state."""
        return max(-(-block.handed // block.positions) for block in self.blocks)

    @property
    def _text_only(self) -> bool:
        return not MEDIA & set(reads(self.source.model))

    def disk_name(self, site: str) -> str:
        """Return a site's name on disk."""
        return self.source.names[site + ".weight"].removesuffix(".weight")

    def warnings(self) -> list[str]:
        """List sentences that a user should read before the run starts."""
        return remarks(self)

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting that decides the result, for the report and the identity of a resumed run."""
        options: dict[str, Any] = (
            asdict(self.method) if is_dataclass(self.method) and not isinstance(self.method, type) else {}
        )
        found = {
            "method": {"name": type(self.method).__name__, **options},
            "grid": asdict(self.grid),
            "calibration": self._calibrated,
            "format": self.format.name,
            "stored_dtype": str(self.stored).removeprefix("torch."),
            "dense_dtype": "as stored" if self.dense is None else str(self.dense).removeprefix("torch."),
            "compute_dtype": str(self.compute).removeprefix("torch."),
            "device": self.device.type,  # which of the GPUs decides nothing
            **({} if self.activations is None else {"activations": asdict(self.activations)}),
            **self._mixed,
            **({"scale": {"search": "awq"}} if self.job.scales_channels else {}),
            **self.source.settings,
            **self._made_of,
            **({"choices": self.choices} if self.choices is not None else {}),
            **({"tune": self.job.tune} if self.job.tune else {}),
        }
        return {name: recordable(value, name) for name, value in found.items()}

    @property
    def _calibrated(self) -> dict[str, Any] | None:
        """Settings of the calibration data; a dataset in memory by its kind, number of rows and hash."""
        if self.samples is None:
            return None
        dataset = self.calibration.dataset
        if is_mix(dataset):
            rows = self.samples.data["sources"]
            pairs = [{"source": row.get("dataset", row["source"]), "weight": row["weight"]} for row in rows]
            return {**asdict(replace(self.calibration, dataset=None)), "dataset": pairs}
        held = self.samples.data.get("dataset", self.samples.data["origin"])
        named = dataset if dataset is None or isinstance(dataset, str) else held
        return {**asdict(replace(self.calibration, dataset=None)), "dataset": named}

    def described(self) -> Described:
        """Describe the checkpoint that the plan leads to, for the engines' verdicts."""
        weights = [
            Weight(replace(grid, fit=self.grid.fit), site.shape, self.activations)
            for site in self.sites
            for grid in self.possible(site)
        ]
        facts = model_facts(self.source.model, {site.name: self.grid_of(site) for site in self.sites})
        return Described(self.format.name, tuple(dict.fromkeys(weights)), facts, getattr(self.format, "online", False))

    @property
    def _made_of(self) -> dict[str, Any]:
        """Settings of a GGUF file."""
        if self.template is None or not isinstance(self.format, GGUF):
            return {}
        template = {"file": self.template.path.name, "header": self.template.digest}
        return {"gguf": {"template": template, "dense": self.format.dense or "as in the template"}}

    @property
    def _mixed(self) -> dict[str, Any]:
        """Settings by which linears differ from one grid, as far as given."""
        job = self.job
        override = [{"pattern": some.pattern, **some.fields} for some in job.override]
        found: dict[str, Any] = {"override": override, "ignore": list(job.ignore), "towers": list(job.towers)}
        if job.budget is not None:
            found |= {"budget": job.budget, "widths": sorted(set(job.widths))}
        return {key: value for key, value in found.items() if value != []}

    @property
    def data(self) -> dict[str, Any]:
        """Origin, size and hash of the calibration data, for the report."""
        return {"origin": "none: this method reads no calibration data"} if self.samples is None else self.samples.data


def make_plan(model: str | Path, job: Job | None = None, *, sketch: bool = False, **settings: Any) -> Plan:
    """Open a model and settle every choice of a job, ready to be walked.

    Args:
        model: a transformers folder, a hub id, or "demo".
        sketch: read no weight; such a plan can be estimated, not walked.
        settings: as ``Job.of`` takes them.

    Raises:
        NearplaneError: whatever cannot work; SettingError where a setting is the reason.
    """
    job = Job.of(job, settings)
    return draft(model, job) if sketch else complete(draft(model, job, reads=True))


def draft(model: str | Path, job: Job, *, reads: bool = False) -> Plan:
    """Open a model in sketch mode and settle every choice; MODEL may be a folder with nothing but a config.json.

    Args:
        reads: whether weights may be read where the model cannot be probed without them.

    Raises:
        Unsketchable: the model cannot be probed without its weights, and ``reads`` is False.
        NearplaneError: whatever else cannot work.
    """
    device = pick_device(job.device)
    format = job.checkpoint_format.running(job.activations, "r4" in job.rotation.kinds)
    source = open_source(model, sketch=True, trust_remote_code=job.trust_remote_code, revision=job.revision)
    generation_settings(source.model, source.folder)  # a broken file would end in a folder that nobody loads
    if job.calibration.all_experts:
        show_all(source.model, source.folder)
    if job.reads_data or job.tune:
        refuse_own(source.model, job.calibration)
    try:
        blocks = discover(source)
    except Unsketchable:
        if not reads:
            raise
        source.read_weights()
        blocks = discover(source)
    linears = [source.names[f"{site.name}.weight"].removesuffix(".weight") for b in blocks for site in b.sites]
    head = head_name(source) or "lm_head"
    if mix.wants_head(job, head, linears):
        site = head_site(source)
        untie(source, site.name)
        blocks = [*blocks, head_block(blocks, site)]
        if job.head_bits is not None:
            own = Override(
                f"^{re.escape(source.names[f'{site.name}.weight'].removesuffix('.weight'))}$", bits=job.head_bits
            )
            job = replace(job, override=(*job.override, own))
    for transform in job.equivalences:
        source = replace(transform.promise(source), promise_of=source.promise_of or source)
    return _settle(source, blocks, job, format, device)


def own_text(plan: Plan, out: Path | None = None, counting: Counting | None = None) -> Tokens | None:
    """Let the model write the windows that its calibration asks of it, as ``own_samples`` does; None where it asks for none."""
    if not plan.job.reads_data:
        return None
    source = plan.source.promise_of or plan.source
    return own_samples(source, plan.calibration, plan.device, plan.compute, out, counting)


def complete(plan: Plan, own: Tokens | None = None) -> Plan:
    """Read weights and data: prove the transforms, gather the samples, check the tensors that are copied.

    Args:
        own: what ``own_text`` has returned, if that was called before.
    """
    source, job = plan.source.promise_of or plan.source, plan.job
    write = partial(own_samples, source, device=plan.device, dtype=plan.compute)
    source.read_weights()
    own = own_text(plan) if own is None else own
    for transform in job.equivalences:
        source = transform.apply(source, plan.device)
        if job.calibration.all_experts:
            show_all(source.model, source.folder)
    plan = replace(plan, source=source, notes=check_scales(plan, source))
    if plan.template is not None and isinstance(plan.format, GGUF):
        sites = [(site, plan.grid_of(site)) for site in plan.sites]
        plan = replace(plan, placed=place_source(source, sites, plan.format, plan.template))
    if job.reads_data:
        plan = replace(plan, samples=gather(source, job.calibration, own))
    if job.tune:
        more = fresh_windows(job.tune, plan.windows[1] or job.calibration.seqlen)
        samples, fresh = set_aside(source, job.calibration, plan.samples, more, write)
        plan = replace(plan, samples=samples, fresh=fresh)
    if job.check:
        checked, why = to_check(source, job.calibration, plan.samples, plan.fresh)
        plan = replace(plan, checked=checked, unchecked=why)
    return replace(plan, copied=source.check({site.name for site in plan.sites}, plan.dense))


def _settle(source: Source, blocks: list[Block], job: Job, format: Format, device: torch.device) -> Plan:
    """Settle dtypes and grids; refuse what the format or the method cannot hold."""
    stored = pick_dtype(job.dtype) or source.dtype
    disk = {site.name: source.names[site.name + ".weight"].removesuffix(".weight") for b in blocks for site in b.sites}
    rest = {name.removesuffix(".weight") for pair in source.names.items() for name in pair} - {*disk, *disk.values()}
    blocks, ignored = mix.leave_out(
        blocks, job, disk.__getitem__, linears_besides(source.model, set(disk)), sorted(rest)
    )
    sites = [site for block in blocks for site in block.sites]
    grid = mix.fitting(job, {disk[site.name]: site.shape[1] for site in sites})
    grid = format.solved_on(replace(grid, scale_dtype=format.scale_dtype(stored)))
    grids, fixed = mix.assign({disk[site.name]: site.name for site in sites}, grid, job, ignored)
    if not takes_template(format):  # llama.cpp fuses no linears that a file holds apart
        mix.refuse_split(grids, ignored, job, fixed)
    open_bits = set() if job.budget is None else {site.name for site in sites if disk[site.name] not in fixed}
    _refuse(job, format, {disk[site.name]: (site, grids[disk[site.name]]) for site in sites}, open_bits)
    if (together := format.together(grids, str(getattr(source.config, "model_type", "")))) is not None:
        raise SettingError(f"{together}.")
    shapes = {disk[site.name]: site.shape for site in sites}
    template = template_for(format, source, shapes, rotated=bool(job.equivalences) or job.scales_channels)
    compute = torch.float32 if device.type == "cpu" else source.dtype
    by_site = {site.name: grids[disk[site.name]] for site in sites}
    plan = Plan(source, blocks, job, grid, format, stored, compute, device, by_site, ignored, template=template)
    if job.tune:
        refuse_tuning(plan)
    return plan if job.budget is None else _open_bits(plan, frozenset(s.name for s in sites if disk[s.name] in fixed))


def _refuse(job: Job, format: Format, sites: Mapping[str, tuple[Site, Grid]], left: set[str]) -> None:
    """Refuse linears that the format or the method cannot hold.

    Args:
        job: gives the method.
        format: that of the checkpoint.
        sites: with their grids, by name on disk.
        left: names in the model of those whose widths are asked for later.
    """
    refused: dict[str, tuple[Grid, tuple[int, int]]] = {}
    first = ""
    for name, (site, grid) in sites.items():
        reason = None if site.name in left else format.supports(grid, site.shape)
        if reason is not None:
            refused[name] = grid, site.shape
        if site.transposed:
            reason = conv1d_reason(format) or reason
        reason = reason or getattr(job.method, "refuses", lambda _shape: None)(site.shape)
        first = first or (f"{site.name}: {reason}" if reason is not None else "")
    if first:
        raise SettingError(f"{first}{format.help(refused) if refused else ''}.")


def _open_bits(plan: Plan, fixed: frozenset[str]) -> Plan:
    """Leave the bits of all linears but the ``fixed`` ones to the budget."""
    free = mix.units(plan.blocks, plan.disk_name, plan.grids, fixed, plan.job, plan.format)
    mix.check_budget(free, mix.counted(plan.blocks, free), plan.grids, plan.job, plan.format)
    widest = {site.name: unit.widths[-1] for unit in free for site in unit.sites}
    grids = {n: replace(grid, bits=widest[n]) if n in widest else grid for n, grid in plan.grids.items()}
    return replace(plan, units=free, grids=grids)
