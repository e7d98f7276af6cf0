"""Find the blocks and stages of any transformer by one probe forward, without a table of models.

A tower (``towers.py``) is a list of blocks. The linears of a block that read the same tensor (address, shape, strides)
form a stage and share one Hessian. Stages are in the order of their first calls. Blocks of equal structure are probed
once, so that only one block of each kind is read from disk. The same forward shows what adds to the residual stream:
tensors of a block are compared by value (``record.py``).

Blocks that are given a dictionary or the like may write what others read (``handed.py``), so that all of them are run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from inspect import signature
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nearplane.core.errors import NearplaneError
from nearplane.models import handed, inputs
from nearplane.models.experts import EXPERT, probing, routers
from nearplane.models.handed import Watch, hidden_of, output_hidden, output_rest, with_rest
from nearplane.models.inputs import ForwardFailed, is_causal, output_head
from nearplane.models.record import SAME, Call, gain_of, patched, recorded, rows_of, same, scales_of
from nearplane.models.sketch import Unsketchable
from nearplane.models.source import Source
from nearplane.models.towers import NotBlocks, find_towers, is_linear, refuse_shared


class Passage(NamedTuple):
    """What a linear's output passes before it is added to the residual stream."""

    norm: str  # a module that multiplies each token by a factor, and each feature by another: an RMSNorm, or a scale
    adds_to: str  # the module whose input is the stream that the norm's output is added to


@dataclass(frozen=True)
class Site:
    """A weight to quantize. Its module stores the weight as (out, in), or transposed as GPT-2's Conv1D does."""

    name: str
    shape: tuple[int, int]  # (out, in)
    transposed: bool = False
    adds_to: str | None = None  # the module whose input is the residual stream that the output is added to
    passage: Passage | None = None  # where the output is added to the stream behind a norm

    def weight(self, model: nn.Module) -> Tensor:
        """Return the live weight in ``model``, a view of shape (out, in)."""
        weight = model.get_submodule(self.name).weight
        assert isinstance(weight, Tensor)
        return weight.T if self.transposed else weight


Stage = list[Site]


def passage_of(stage: Stage, needs: frozenset[str]) -> Passage | None:
    """Return what the output of a stage passes, where a method that ``needs`` this takes it into account: of a lone linear."""
    return stage[0].passage if "norm" in needs and len(stage) == 1 else None


def point_of(stage: Stage, needs: frozenset[str]) -> str | None:
    """Return the module whose input is the stream that a stage repairs; None where it repairs none, or ``needs`` lacks R."""
    passage = passage_of(stage, needs)
    if "R" not in needs or len(stage) != 1:
        return None
    return stage[0].adds_to if passage is None else passage.adds_to


@dataclass(frozen=True)
class Block:
    """A transformer block: its stages in call order, and the linears that the probe did not reach.

    ALBERT runs one block many times. Such a block is solved once, on the inputs of all its calls.
    """

    name: str
    stages: list[Stage]
    unreached: list[str] = field(default_factory=list)
    tower: str = ""  # name of the list that holds the block
    shape: tuple[int, ...] = ()  # of the hidden state in the probe: (1, positions, ..., width)
    handed: int = 0  # numbers that blocks have handed on by then beside the hidden state, in the probe
    strange: list[str] = field(default_factory=list)  # linears by class that compute something else, and stay dense
    calls: int = 1  # how often the forward runs the block, one call after another

    @property
    def sites(self) -> list[Site]:
        """Sites of all stages, in call order."""
        return [site for stage in self.stages for site in stage]

    @property
    def positions(self) -> int:
        """Positions of the probe's sample."""
        return prod(self.shape[1:-1])


class Stop(Exception):
    """Raised by a hook to end a forward early."""


def discover(source: Source) -> list[Block]:
    """Find the blocks of a model and their stages by one forward over a small sample.

    One block of each kind is read from disk; in sketch mode, none.

    Args:
        source: the opened model.

    Returns:
        Blocks in the order of their calls. Names of sites begin at the model.

    Raises:
        NearplaneError: no list of blocks is found, blocks share weights, or the forward fails on the sample.
        Unsketchable: in sketch mode, the forward fails because the model reads a weight by itself.
    """
    refused: dict[str, str] = {}
    while True:
        towers = find_towers(source, refused)
        try:
            blocks = _probe(source, towers)
        except NotBlocks as refusal:
            refused[refusal.tower] = refusal.reason
            continue
        except ForwardFailed as error:
            _refuse_sharing(source, towers, error)
            if not source.sketch:
                raise
            word = (str(error.__cause__).strip().splitlines() or ["no word"])[0][:100]
            raise Unsketchable(
                f"{source.folder}: a model of type {source.config.model_type} cannot be probed without its weights "
                f"({word}); nearplane inspect reads one block of it."
            ) from error
        if blocks:
            refuse_shared(source, [block.name for block in blocks])
            return blocks
        refused |= dict.fromkeys(towers, "the model's forward does not run it")


def _refuse_sharing(source: Source, towers: dict[str, list[str]], error: ForwardFailed) -> None:
    """Raise NearplaneError where the forward fails only because some blocks did not run."""
    try:
        _probe(source, towers, every=True)
    except (ForwardFailed, NotBlocks):
        return
    raise NearplaneError(
        f"{source.folder}: blocks of {type(source.model).__name__} share values beside the hidden state in a way that nearplane "
        f"does not follow ({error.__cause__}); only values in dictionaries, lists and objects among a block's arguments go along."
    ) from error


def _refuse_attributes(block: str, before: dict[str, list[Tensor]], after: dict[str, list[Tensor]]) -> None:
    """Raise NearplaneError where a block has left a tensor in an attribute of a module outside of all blocks."""
    for name, values in after.items():
        if [id(value) for value in values] != [id(value) for value in before.get(name, ())]:
            raise NearplaneError(
                f"{block} leaves a tensor in {name}, where other blocks may read it; nearplane runs blocks one by one, and "
                "follows only what they share in dictionaries, lists and objects among their arguments."
            )


def load_outside(
    source: Source, blocks: list[str], device: torch.device, dtype: torch.dtype, samples: Sequence[Mapping[str, Tensor]]
) -> None:
    """Load everything that runs before or between blocks: all parameters outside of the blocks and the output head.

    Args:
        source: the model.
        blocks: names of the blocks.
        device: device of the loaded tensors.
        dtype: dtype of the loaded floats.
        samples: arguments of forwards. Only the rows of their tokens are read from a decoder's input embedding.
    """
    head, embedding = head_name(source), embedding_name(source)
    inside = [*blocks] if head is None else [*blocks, head]
    ids = [sample["input_ids"].flatten() for sample in samples if "input_ids" in sample]
    known = embedding is not None and len(ids) == len(samples)
    rows = {embedding: torch.unique(torch.cat([torch.empty(0, dtype=torch.long), *ids]))} if known and embedding else {}
    source.load("", device, dtype, skip=inside, rows=rows)


def embedding_name(source: Source) -> str | None:
    """Return the name of the weight of a decoder's input embedding; None unless that is an ``nn.Embedding``."""
    if not is_causal(source.model):
        return None
    module = source.model.get_input_embeddings()  # type: ignore[operator]
    name = next((name for name, other in source.model.named_modules() if other is module), None)
    return f"{name}.weight" if name and isinstance(module, nn.Embedding) else None


def head_name(source: Source) -> str | None:
    """Return the name of the output head's module; None for a model without one."""
    head = output_head(source.model)
    return next((name for name, module in source.model.named_modules() if module is head), None)


def _probe(source: Source, towers: dict[str, list[str]], every: bool = False) -> list[Block]:
    """Run one forward and load the first block of each kind in it, or ``every`` block.

    Returns no block if the forward runs none. Raises NotBlocks for a list that is no tower.
    """
    names = [name for blocks in towers.values() for name in blocks]
    tower_of = {name: tower for tower, blocks in towers.items() for name in blocks}
    kinds: dict[Any, tuple[Found, Any]] = {}
    blocks: dict[str, Block] = {}
    left: dict[int, int] = {}  # numbers in each container that a block has written into
    last: dict[str, Any] = {}  # what is returned for each block
    outside = _outside(source.model, names)
    cpu, dtype = torch.device("cpu"), torch.float32

    def probe(k: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        module, name = source.model.get_submodule(names[k]), names[k]
        tower = tower_of[name]
        hidden = hidden_of(args, kwargs)
        if hidden is None:
            raise NotBlocks(tower, f"{name} is given no hidden state")
        if name in blocks:
            if name != next(reversed(blocks)):
                raise NotBlocks(tower, f"{name} runs again after others")
            blocks[name] = _again(blocks[name])
            return last[name]
        containers = handed.containers(args, kwargs)
        own = handed.settings_of(module, towers[tower].index(name)) if containers else None
        kind, watch = (structure(module), own), Watch(containers)
        # Blocks that are given a container may write what others read, and others than those of their kind.
        again = every or bool(left) or (bool(containers) and source.sketch)
        if kind not in kinds or again:
            before = handed.attributes(outside)
            source.load(name, cpu, dtype)
            try:
                with _record(module) as recording, probing(module):
                    output = original(*args, **kwargs)
                after = output_hidden(output)
                if after is None or after.shape != hidden.shape:
                    raise NotBlocks(tower, f"{name} does not return a hidden state like the one that it is given")
                kinds[kind] = _found(module, recording, after), output_rest(output)
            finally:
                source.unload(name)
            _refuse_attributes(name, before, handed.attributes(outside))
            left.update({id(containers[path]): handed.numbers(value) for path, value in watch.written(name).items()})
        found, rest = kinds[kind]
        blocks[name] = found.block(name, tower, tuple(hidden.shape), sum(left.values()))
        last[name] = with_rest(hidden, rest)
        return last[name]  # the forward goes on to its end, to see whether a block runs again

    try:
        _run(source, names, probe)
    except ForwardFailed as error:  # behind all blocks, MobileBERT reads the weight of its head, which is not loaded
        if len(blocks) < len(names) or "meta" not in str(error.__cause__):
            raise
    for tower, members in towers.items():
        reached = sum(name in blocks for name in members)
        if 0 < reached < len(members):
            raise NotBlocks(tower, f"the model's forward ran {reached} of its {len(members)} blocks")
    return list(blocks.values())


def _run(source: Source, names: list[str], probe: Callable[..., Any]) -> None:
    """Run the model on a small sample, ``probe`` in place of each of its blocks, up to the output head."""
    with inputs.blamed(source.model, source.folder):
        sample = inputs.probe(source.model, source.folder)
    load_outside(source, names, torch.device("cpu"), torch.float32, [sample])
    with (
        patched(source.model, names, probe),
        _stopping(output_head(source.model)),
        suppress(Stop),
        inputs.blamed(source.model, source.folder),
    ):
        source.model(**sample, **inputs.options(source.model))


class Found(NamedTuple):
    """What is found in a block, with names inside of the block."""

    stages: list[Stage]
    unreached: list[str]
    strange: list[str]

    def block(self, name: str, tower: str, shape: tuple[int, ...], handed: int) -> Block:
        """Make a block of a name, with names that begin at the model."""
        stages = [[_below(name, site) for site in stage] for stage in self.stages]
        unreached, strange = ([f"{name}.{n}" for n in names] for names in (self.unreached, self.strange))
        return Block(name, stages, unreached, tower, shape, handed, strange)


def _found(module: nn.Module, recording: list[Call], after: Tensor) -> Found:
    """Find a block's stages and the linears that stay dense; ``after``: the block's output."""
    strange = dict.fromkeys(call.name for call in recording if is_linear(call.module) and not _multiplies(call))
    dense = {*routers(module), *strange}
    calls = [call for call in recording if call.input is not None and call.name not in dense]
    reached = {call.name for call in calls} | dense
    unreached = [n for n, m in module.named_modules() if is_linear(m) and n not in reached]
    return Found(_stages(calls, after), unreached, [name for name in strange if name not in routers(module)])


def _multiplies(call: Call) -> bool:
    """Tell whether a linear, in this call, has multiplied its input by its weight and added its bias.

    A class of its own may do something else, as DeepSeek V4's grouped linear does.
    """
    if type(call.module).forward in (nn.Linear.forward, Conv1D.forward) or call.input is None:
        return True
    weight, bias = call.module.weight, call.module.bias
    assert isinstance(weight, Tensor)
    if (
        isinstance(call.module, Conv1D)
        or call.output is None
        or weight.is_meta
        or call.input.shape[-1] != weight.shape[1]
    ):
        return False
    wanted = nn.functional.linear(call.input, weight, bias if isinstance(bias, Tensor) else None)
    return wanted.shape == call.output.shape and same(rows_of(call.output), rows_of(wanted))


def _again(block: Block) -> Block:
    """Count one more call of a block. What its linears add to the stream differs from call to call."""
    stages = [[replace(site, adds_to=None, passage=None) for site in stage] for stage in block.stages]
    return replace(block, stages=stages, calls=block.calls + 1)


@contextmanager
def _stopping(head: nn.Module | None) -> Iterator[None]:
    """Raise ``Stop`` at the output head while inside, because its weights are not loaded."""

    def stop(*_: Any) -> None:
        raise Stop

    handle = None if head is None else head.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _record(module: nn.Module) -> AbstractContextManager[list[Call]]:
    """Record the calls inside a block, with what identifies stages.

    Inputs are kept alive: their addresses identify them. Outputs of modules with no other inside, linears and norms, are
    copied: a model may add to them in place.
    """

    def copied(m: nn.Module, output: Any) -> Tensor | None:  # a router may return several
        return output.clone() if not any(m.children()) and isinstance(output, Tensor) else None

    return recorded(module, hidden_of, copied)


def _stages(calls: list[Call], hidden: Tensor) -> list[Stage]:
    """Group calls of linears by input tensor, in the order of first calls. ``hidden``: the block's output."""
    stages: dict[Any, Stage] = {}
    seen: set[str] = set()
    outside = [call for call in calls if EXPERT.fullmatch(call.name) is None]  # experts add to a sum of their own
    for number, (name, module, x, y) in enumerate(calls):
        if name in seen or x is None or not is_linear(module):
            continue
        seen.add(name)
        key = (x.data_ptr(), x.shape, x.stride())
        weight = module.weight
        assert isinstance(weight, Tensor)
        transposed = isinstance(module, Conv1D)
        out, width = (weight.shape[1], weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1])
        point = passage = None
        if EXPERT.fullmatch(name) is None and y is not None:
            passage = _passage(y, calls[:number], calls[number + 1 :], hidden)
            point = None if passage else _stream_point(y, outside, outside, hidden)
        stages.setdefault(key, []).append(Site(name, (out, width), transposed, point, passage))
    return list(stages.values())


def _stream_point(y: Tensor, sooner: Sequence[Call], calls: Sequence[Call], hidden: Tensor) -> str | None:
    """Find the module whose input, in one of the calls ``sooner``, is the residual stream that ``y`` is added to.

    Another module's input in ``calls``, or the block's output ``hidden``, must equal that input plus y. No tensors fit where a
    model scales or normalizes y before adding it: None.
    """
    if y.numel() != hidden.numel():
        return None

    def inputs_of(some: Sequence[Call]) -> dict[str, Tensor]:  # the first call of a module wins
        like = ((call.name, call.input) for call in reversed(some))
        return {name: x.reshape(y.shape) for name, x in like if x is not None and x.numel() == y.numel()}

    size = float(y.norm())
    afters = [*inputs_of(calls).values(), hidden.reshape(y.shape)]
    for name, before in inputs_of(sooner).items():
        for after in afters:
            rounding = SAME * float(after.norm())
            if float((after - before - y).norm()) <= rounding + SAME * size < size:
                return name
    return None


def _passage(y: Tensor, sooner: list[Call], later: list[Call], hidden: Tensor) -> Passage | None:
    """Find a module that a linear's output ``y`` passes on its way to the residual stream, and that only scales it.

    It must be given y, answer factor x gain x y in every token, with gains that are the same for all tokens, and its answer must
    join the stream. So does an RMSNorm or a LayerScale; a LayerNorm, which subtracts a mean, does not. A module that answers y
    itself counts if it has parameters: they may be others in other blocks.
    """
    rows = rows_of(y)
    for name, module, given, output in later:
        if is_linear(module) or given is None or output is None or output.shape != y.shape:
            continue
        passed = rows_of(output)
        if not same(rows_of(given), rows) or (torch.equal(passed, rows) and next(module.parameters(), None) is None):
            continue
        if not takes_one(module):
            continue
        gain = gain_of(module, y)
        if not same(passed, scales_of(rows, passed, gain)[:, None] * gain * rows):
            continue
        outside = [call for call in sooner if EXPERT.fullmatch(call.name) is None]
        point = _stream_point(output, outside, [*outside, *later], hidden)
        if point is not None:
            return Passage(name, point)
    return None


def takes_one(module: nn.Module) -> bool:
    """Tell whether a module can be called with one tensor alone."""
    kinds = [p.kind for p in signature(module.forward).parameters.values() if p.default is p.empty]
    return sum(kind in (kind.POSITIONAL_ONLY, kind.POSITIONAL_OR_KEYWORD) for kind in kinds) == 1 and all(
        kind is not kind.KEYWORD_ONLY for kind in kinds
    )


def _outside(model: nn.Module, blocks: list[str]) -> dict[str, nn.Module]:
    """Return the modules that are in no block, by name."""
    inside = {name for block in blocks for name, _ in model.get_submodule(block).named_modules(prefix=block)}
    return {name: module for name, module in model.named_modules() if name not in inside}


def _below(block: str, site: Site) -> Site:
    """Rename a site of a block's kind for one block of that kind."""
    point = None if site.adds_to is None else f"{block}.{site.adds_to}".rstrip(".")
    names = None if site.passage is None else Passage(*(f"{block}.{name}".rstrip(".") for name in site.passage))
    return replace(site, name=f"{block}.{site.name}", adds_to=point, passage=names)


def structure(module: nn.Module) -> Any:
    """Return a key that equal blocks share: classes, names and shapes of all modules inside."""
    return tuple(
        (name, type(m), tuple((n, tuple(p.shape)) for n, p in m.named_parameters(recurse=False)))
        for name, m in module.named_modules()
    )
