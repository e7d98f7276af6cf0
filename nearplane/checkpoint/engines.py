"""Which engines load a checkpoint, on what condition, and why not: one table of facts, one ``verdict``.

The facts were read from the engines' sources and documentation at the versions below, and not run here but for what
``docs/formats.md`` marks as tested. ``plan``, ``verify``, ``report.json`` and the table in ``docs/formats.md`` ask
``verdict``; what it judges is a plain ``Described``, made from a plan as well as from an opened folder.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from nearplane.core.activations import TokenGrid
from nearplane.core.errors import SettingError
from nearplane.core.grid import Grid
from nearplane.formats.base import ONLINE_ONLY_HERE, ONLY_HERE, tail_reason
from nearplane.formats.read import Checkpoint
from nearplane.models.experts import EXPERT, experts_of
from nearplane.models.experts_disk import converts, merges_experts, names_in_model
from nearplane.models.inputs import is_causal, output_head
from nearplane.models.locate import BAD_CONFIG
from nearplane.transforms.hooks import turned_linears

ENGINES: tuple[str, ...] = ("vllm", "sglang", "transformers")
VLLM, SGLANG, TRANSFORMERS = "vLLM 0.33", "SGLang 0.5.23", "transformers 5.23"
TITLES = dict(zip(ENGINES, (VLLM, SGLANG, TRANSFORMERS), strict=True))
"""The versions whose sources were read."""

COMPRESSED, GPTQS = "compressed-tensors", ("gptq", "gptq_v2")
# Marlin, the fast kernel of vLLM and SGLang, knows these group sizes, 4 and 8 bits symmetric, and 4 bits asymmetric.
MARLIN_GROUPS = (-1, 32, 64, 128)
FAST_BITS = (4, 8)
# Classes whose fused experts vLLM's loaders split, or read one by one, under the names that are written here.
SPLIT_BY_VLLM = ("GraniteMoe", "Llama4")
# Classes without an output head of their own in vLLM 0.32: Gemma 2 was run, and refused; the others were read.
HEADLESS_IN_VLLM = ("Gemma2", "Gemma3n", "Cohere")
# Classes that vLLM loads without finding their experts: what it generates is garbage.
GARBAGE_IN_VLLM = ("GptOss",)


class Weight(NamedTuple):
    """One kind of quantized weight in a checkpoint."""

    grid: Grid
    shape: tuple[int, int]
    """(out, in)."""
    activations: TokenGrid | None = None
    """How the input of the linear is rounded."""


@dataclass(frozen=True)
class Model:
    """What loaders look at of a model whose linears are quantized."""

    name: str
    """Its class."""
    causal: bool = True
    """Whether it predicts the next token."""
    converts: bool = False
    """Whether transformers merges or splits stored weights other than experts' while loading."""
    merges: bool = False
    """Whether transformers makes fused experts of single stored ones."""
    experts: bool = False
    """Whether linears of fused experts are quantized."""
    scaled: bool = False
    """Whether transformers takes these experts apart itself."""
    zeros: bool = False
    """Whether some of these experts are asymmetric."""
    head: bool = False
    """Whether the output head is quantized."""
    initialises: bool = False
    """Whether the class, while it is loaded, initialises weights of linears that are quantized (``initialises_packed``)."""


@dataclass(frozen=True)
class Described:
    """What engines look at of a checkpoint."""

    format: str
    weights: tuple[Weight, ...]
    """Every kind of quantized weight once."""
    model: Model | None = None
    """None: not known, and not judged."""
    online: bool = False
    """Whether inputs of linears are rotated while the model runs."""
    ordered: bool = False
    """Whether groups may lie in activation order (``desc_act``); other tools' checkpoints only."""


@dataclass(frozen=True)
class Verdict:
    """What an engine makes of a checkpoint, in sentences without their full stop."""

    refusals: tuple[str, ...] = ()
    """Why the engine does not load it; empty if nothing is known to hinder it."""
    caveats: tuple[str, ...] = ()
    """On what condition the engine loads it, or what it costs there."""

    def __str__(self) -> str:
        if self.refusals:
            return f"does not load it: {'; '.join(self.refusals)}"
        return f"loads it: {'; '.join(self.caveats)}" if self.caveats else "loads it"

    def as_dict(self) -> dict[str, list[str]]:
        """Give both lists for JSON."""
        return {"refusals": list(self.refusals), "caveats": list(self.caveats)}


def verdict(engine: str, checkpoint: Described) -> Verdict:
    """Judge whether an engine loads a checkpoint.

    Args:
        engine: one of ``ENGINES``.
        checkpoint: as ``described`` gives it of an opened folder.

    Raises:
        SettingError: for an engine that is not known.
    """
    check_engine(engine)
    format, title = checkpoint.format, TITLES[engine]
    if format != COMPRESSED and format not in GPTQS:
        return Verdict((f"{title} does not know the format {format}; only nearplane, given that format, loads it",))
    refusals, caveats = list[str | None](), list[str | None]()
    if checkpoint.online:
        refusals.append(f"inputs of linears are rotated while the model runs (r4), which {ONLINE_ONLY_HERE}")
    shapes: dict[Grid, list[tuple[int, int]]] = {}
    for weight in checkpoint.weights:
        shapes.setdefault(weight.grid, []).append(weight.shape)
    for grid, some in shapes.items():
        reason = _refusal(engine, format, grid, some) or (_order(engine, format, grid) if checkpoint.ordered else None)
        refusals.append(reason)
        if reason is None:
            caveats.append(_transformers(format, grid) if engine == "transformers" else _kernels(engine, format, grid))
    refusals += [_rounding(engine, weight) for weight in checkpoint.weights]
    if len(shapes) > 1:
        caveats.append(_several(engine, format))
    if checkpoint.model is not None:
        refusals.append(_model_refusal(engine, format, checkpoint.model))
        caveats.append(_model_caveat(engine, checkpoint.model) if format == COMPRESSED else None)
        if checkpoint.model.head:
            refusals.append(_headless(engine, checkpoint.model))
            caveats.append(_head(engine, format))
    kept = (tuple(dict.fromkeys(filter(None, sentences))) for sentences in (refusals, caveats))
    return Verdict(*kept)


def verdicts(checkpoint: Described) -> dict[str, Verdict]:
    """Give the verdict of every engine."""
    return {engine: verdict(engine, checkpoint) for engine in ENGINES}


def check_engine(engine: str) -> None:
    """Raise SettingError for an engine that is not known."""
    if engine not in ENGINES:
        raise SettingError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}.")


def described(checkpoint: Checkpoint, model: nn.Module | None) -> Described:
    """Describe an opened, quantized folder; ``model``: its skeleton, None where it cannot be built."""
    layers = checkpoint.layers
    facts = None
    if model is not None:
        names = names_in_model(model, [f"{name}.weight" for name in layers])
        grids = {n.removesuffix(".weight"): layers[d.removesuffix(".weight")].grid for n, d in names.items()}
        facts = model_facts(model, grids)
    weights = [Weight(layer.grid, layer.shape, layer.activations) for layer in layers.values()]
    online = bool(turned_linears(checkpoint.config, checkpoint.store.folder)[0])
    return Described(checkpoint.format or "", tuple(dict.fromkeys(weights)), facts, online, checkpoint.ordered)


def model_facts(model: nn.Module, layers: Mapping[str, Grid]) -> Model:
    """Look up what loaders look at of a model.

    Args:
        model: its skeleton, experts taken apart.
        layers: grid of each quantized linear by its name in the model.
    """
    found = {name: grid for name, grid in layers.items() if EXPERT.fullmatch(name)}
    experts = [
        module for path, module in experts_of(model).items() if any(name.startswith(f"{path}.") for name in found)
    ]
    return Model(
        name=type(model).__name__,
        causal=is_causal(model),
        converts=converts(model),
        merges=merges_experts(model),
        experts=bool(experts),
        scaled=all(module.layout.scaled for module in experts),
        zeros=not all(grid.sym for grid in found.values()),
        head=any(model.get_submodule(name) is output_head(model) for name in layers),
        initialises=initialises_packed(model, layers.keys() - found.keys()),
    )


def initialises_packed(model: nn.Module, quantized: Iterable[str]) -> bool:
    """Tell whether ``_init_weights`` of a model's class reads the weight of a quantized linear.

    transformers calls that for every module after loading, and a packed linear has no ``weight`` there. So the call is made
    here on the skeleton, with these weights taken away: in Mamba, RWKV and T5 it fails.

    Args:
        model: its skeleton; left as it was.
        quantized: names of linears in the model.
    """
    linears = [model.get_submodule(name) for name in quantized]
    weights = [linear._parameters.pop("weight") for linear in linears]
    buffers = [
        (m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None and not b.is_meta
    ]
    try:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer.to("meta")  # computed ones are not to be computed anew
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return any(
                _reads_weight(owner, module) for owner, module in _initialised(model, model, set(map(id, linears)))
            )
    finally:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for linear, weight in zip(linears, weights, strict=True):
            linear._parameters["weight"] = weight


def _initialised(module: nn.Module, owner: nn.Module, linears: set[int]) -> list[tuple[nn.Module, nn.Module]]:
    """List the linears and the modules around them, of each class one, with the part of the model that initialises them."""
    found: dict[tuple[type, type], tuple[nn.Module, nn.Module]] = {}

    def visit(module: nn.Module, owner: nn.Module) -> bool:
        owner = module if hasattr(module, "_init_weights") else owner
        holds = any([visit(child, owner) for child in module.children()]) or id(module) in linears
        if holds:
            found.setdefault((type(owner), type(module)), (owner, module))
        return holds

    visit(module, owner)
    return list(found.values())


def _reads_weight(owner: Any, module: nn.Module) -> bool:
    """Tell whether the initialisation of a module misses a weight; other failures are of tensors without values."""
    try:
        owner._init_weights(module)
    except AttributeError as error:
        return "has no attribute 'weight'" in str(error)
    except (*BAD_CONFIG, RuntimeError):
        pass
    return False


def _refusal(engine: str, format: str, grid: Grid, shapes: Iterable[tuple[int, int]]) -> str | None:
    """Tell why the engine does not load weights of these (out, in) shapes on this grid; None if it does."""
    for shape in sorted(set(shapes)):
        reason = tail_reason(grid, shape[1])
        if reason is not None:
            return f"{reason}; {ONLY_HERE}"
    bits, gptq = grid.storage_bits, format in GPTQS
    if engine == "vllm" and gptq and bits not in FAST_BITS:
        return f"{VLLM} loads GPTQ of 4 or 8 bits, not {bits}; compressed-tensors of {bits} bits it loads"
    if engine == "vllm" and gptq and not grid.sym:
        return f"{VLLM} loads symmetric GPTQ only; asymmetric weights it loads as compressed-tensors"
    if engine == "vllm" and gptq and grid.group_size not in MARLIN_GROUPS:
        size = grid.group_size
        return (
            f"{VLLM} loads GPTQ in groups of {_known_groups()} only, not {size}; as compressed-tensors it loads {size}"
        )
    if engine == "sglang" and not gptq and bits not in FAST_BITS:
        return f"{SGLANG} loads compressed-tensors of 4 or 8 bits, not {bits}"
    return None


def _order(engine: str, format: str, grid: Grid) -> str | None:
    """Tell why the engine does not load groups in activation order; None if it does."""
    if engine != "vllm" or format not in GPTQS or grid.group_size == -1:
        return None
    return f"{VLLM} refuses groups in activation order (desc_act)"


def _rounding(engine: str, weight: Weight) -> str | None:
    """Tell why the engine does not run a weight with its activations rounded; None if it does, or none are."""
    grid, activations = weight.grid, weight.activations
    if activations is None:
        return None
    if activations.clip < 1:
        return f"{TITLES[engine]} knows no clip of activations ({activations.clip:g}); {ONLY_HERE} as it was calibrated"
    plain = (grid.storage_bits, grid.group_size, grid.sym, activations.bits) == (8, -1, True, 8)
    if engine == "transformers" or plain:
        return None
    return (
        f"{TITLES[engine]} rounds activations to 8 bits beside 8-bit symmetric weights of one scale per row (group_size -1) "
        "only; of others it may run the weights and leave activations as they are"
    )


def _several(engine: str, format: str) -> str | None:
    """Tell what to know of several grids in one checkpoint."""
    if format == COMPRESSED:
        return None
    if engine == "transformers":
        return (
            "optimum, by which transformers loads GPTQ, knows one grid for all linears; "
            "load this one, whose dynamic rules name several, with the package gptqmodel itself"
        )
    return f"{TITLES[engine]} takes several grids from GPTQ's dynamic rules, which nothing here has tried"


def _headless(engine: str, model: Model) -> str | None:
    """Tell that the engine has no place for a quantized output head; None where it has one."""
    here = engine == "vllm" and model.name.startswith(HEADLESS_IN_VLLM)
    told = f"vLLM 0.32 has no output head of its own in {model.name}, only the input embedding: leave the head dense"
    return told if here else None


def _head(engine: str, format: str) -> str | None:
    """Tell what to know of a quantized output head. vLLM 0.32 ran one of 4 bits on a CPU, in both formats."""
    if engine == "vllm" or (engine == "transformers" and format == COMPRESSED):
        return None
    return f"whether {TITLES[engine]} loads a quantized output head was not tried"


def _kernels(engine: str, format: str, grid: Grid) -> str | None:
    """Tell what vLLM and SGLang run more slowly than by Marlin."""
    bits, name = grid.storage_bits, TITLES[engine]
    if engine == "sglang" and format in GPTQS and (bits not in FAST_BITS or not grid.sym):
        return f"{SGLANG} runs it without its Marlin kernels, slower"
    if bits not in FAST_BITS:
        return f"{VLLM} runs {bits} bits by a CUDA kernel slower than those of 4 and 8 bits"
    if not grid.sym and bits == 8:
        return f"the Marlin kernels of {name} take 8 bits symmetric only; another kernel must run it, slower"
    if grid.group_size in MARLIN_GROUPS:
        return None
    return (
        f"the Marlin kernels of {name} take group sizes {_known_groups()}; another must run {grid.group_size}, slower"
    )


def _known_groups() -> str:
    return f"{', '.join(map(str, MARLIN_GROUPS[1:]))} and -1"


def _transformers(format: str, grid: Grid) -> str:
    """Tell what transformers needs."""
    if format in GPTQS:
        kernel = "" if grid.storage_bits in FAST_BITS and grid.sym else ", and runs its plain torch kernel"
        return f"{TRANSFORMERS} needs the packages optimum and gptqmodel for it{kernel}"
    if not grid.sym:
        return f"{TRANSFORMERS} loads it with quantization_config=CompressedTensorsConfig(dequantize=True) only"
    return f"{TRANSFORMERS} needs the package compressed-tensors, and makes the weights dense at the first forward"


def _model_refusal(engine: str, format: str, model: Model) -> str | None:
    """Tell why the engine does not load this model with these linears quantized; None if nothing is known."""
    title, own_loader = TITLES[engine], model.name.startswith(SPLIT_BY_VLLM)
    if engine == "transformers" and format == COMPRESSED and model.converts:
        return f"{title} merges or splits weights of {model.name} while loading, not packed ones"
    if not model.experts:
        return None
    if engine == "transformers" and not model.scaled:
        if not model.merges:
            return f"{title} does not find experts one by one in {model.name}, and fills them at random"
        if model.zeros:
            return f"{title} merges experts without their zero points"
    elif engine != "transformers" and not model.merges and not own_loader:
        worse = engine == "vllm" and model.name.startswith(GARBAGE_IN_VLLM)
        garbage = "; it loads the checkpoint all the same, and generates garbage" if worse else ""
        return f"no loader of experts one by one was found for {model.name} in {title}{garbage}"
    return None


def _model_caveat(engine: str, model: Model) -> str | None:
    """Tell on what condition the engine loads such a model as compressed-tensors; None if nothing is known.

    transformers makes experts dense while it merges them: ``runs/engines.py`` found no condition for those.
    """
    if engine != "transformers":
        return None if model.causal else f"whether {TITLES[engine]} has {model.name} was not looked up"
    if model.initialises:
        return (
            f"{TRANSFORMERS} loads {model.name} with quantization_config=CompressedTensorsConfig(dequantize=True) only"
        )
    return None


SQUARE = (128, 1536)  # a shape that every group size below divides
OTHERS = (2, 3, 5, 6, 7)


def _plain(format: str, *grids: Grid) -> list[Described]:
    return [Described(format, (Weight(grid, SQUARE),)) for grid in grids]


def rows() -> dict[str, list[Described]]:
    """Give the kinds of checkpoint in the table of ``docs/formats.md``; of one kind, all have the same answers."""
    several, tokens = (Weight(Grid(4, 64), SQUARE), Weight(Grid(8, 64), SQUARE)), TokenGrid(8)
    tail = Weight(Grid(4, 64), (128, 96))
    return {
        "compressed-tensors, 4 and 8 bits": _plain(COMPRESSED, *(Grid(bits, 64) for bits in FAST_BITS)),
        "compressed-tensors, 2, 3, 5, 6 and 7 bits": _plain(COMPRESSED, *(Grid(bits, 64) for bits in OTHERS)),
        "compressed-tensors, 4 bits asymmetric": _plain(COMPRESSED, Grid(4, 64, sym=False)),
        "compressed-tensors, 8 bits asymmetric": _plain(COMPRESSED, Grid(8, 64, sym=False)),
        "compressed-tensors, 2, 3, 5, 6 and 7 bits asymmetric": _plain(
            COMPRESSED, *(Grid(bits, 64, sym=False) for bits in OTHERS)
        ),
        "compressed-tensors, groups of 96": _plain(COMPRESSED, Grid(4, 96)),
        "compressed-tensors, several grids": [Described(COMPRESSED, several)],
        "compressed-tensors, 8 bits in rows with 8-bit activations": [
            Described(COMPRESSED, (Weight(Grid(8, -1), SQUARE, tokens),))
        ],
        "compressed-tensors, 4 bits with 8-bit activations": [
            Described(COMPRESSED, (Weight(Grid(4, 64), SQUARE, tokens),))
        ],
        "any format, a tail group": [Described(format, (tail,)) for format in (COMPRESSED, *GPTQS)],
        "compressed-tensors, inputs rotated online (r4)": [
            Described(COMPRESSED, (Weight(Grid(4, 64), SQUARE),), online=True)
        ],
        "gptq and gptq_v2, 4 and 8 bits": [
            made for format in GPTQS for made in _plain(format, *(Grid(bits, 64) for bits in FAST_BITS))
        ],
        "gptq and gptq_v2, 2 and 3 bits": [
            made for format in GPTQS for made in _plain(format, Grid(2, 64), Grid(3, 64))
        ],
        "gptq_v2, asymmetric": _plain("gptq_v2", *(Grid(bits, 64, sym=False) for bits in FAST_BITS)),
        "gptq and gptq_v2, groups of 96": [made for format in GPTQS for made in _plain(format, Grid(4, 96))],
        "gptq and gptq_v2, several grids": [Described(format, several) for format in GPTQS],
        "gptq of other tools, activation order (desc_act)": [
            Described("gptq", (Weight(Grid(4, 64), SQUARE),), ordered=True)
        ],
    }


def table() -> str:
    """Write the table of ``docs/formats.md``: rows by engines, with the sentences of the verdicts below."""
    return "\n".join(_table()) + "\n"


def _table() -> Iterator[str]:
    said: dict[str, int] = {}
    yield f"| checkpoint | {' | '.join(TITLES[engine] for engine in ENGINES)} |"
    yield "|---" * (len(ENGINES) + 1) + "|"
    for name, kinds in rows().items():
        cells = []
        for engine in ENGINES:
            found = verdict(engine, kinds[0])
            marks = [said.setdefault(reason, len(said) + 1) for reason in found.refusals or found.caveats]
            cells.append(("no" if found.refusals else "yes") + "".join(f" [{mark}]" for mark in marks))
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    for sentence, mark in said.items():
        yield f"{mark}. {sentence[0].upper() if sentence.startswith(('the', 'inputs')) else sentence[0]}{sentence[1:]}."
