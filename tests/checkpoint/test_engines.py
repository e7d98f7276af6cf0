"""The verdicts of engines, row by row as docs/formats.md prints them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from close import near

import nearplane
from nearplane import RTN
from nearplane.checkpoint.engines import (
    COMPRESSED,
    ENGINES,
    GPTQS,
    Described,
    Model,
    Verdict,
    Weight,
    initialises_packed,
    rows,
    table,
    verdict,
    verdicts,
)
from nearplane.core.activations import TokenGrid
from nearplane.core.errors import SettingError
from nearplane.core.grid import Grid
from nearplane.formats import FORMATS
from nearplane.models.source import open_source
from nearplane.run.plan import make_plan

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"
SHAPES = [(64, 128), (256, 128)]
CT = "compressed-tensors"


def judged(engine: str, format: str, grid: Grid, shapes=SHAPES, **more) -> Verdict:
    return verdict(engine, Described(format, tuple(Weight(grid, shape) for shape in shapes), **more))


def refusal(engine: str, format: str, grid: Grid, shapes=SHAPES) -> str | None:
    return "; ".join(judged(engine, format, grid, shapes).refusals) or None


def loads(engine: str, format: str, bits: int, sym: bool = True) -> bool:
    return refusal(engine, format, Grid(bits, 64, sym)) is None


def test_the_formats_are_those_that_can_be_written() -> None:
    assert {COMPRESSED, *GPTQS} == set(FORMATS) - {"awq", "mlx"}


def test_the_table_of_the_docs_is_fresh() -> None:
    """Write it again: python -c "from nearplane.checkpoint.engines import table; print(table(), end='')"."""
    text = DOCS.read_text("utf-8")
    assert text.count("<!-- engines -->") == 2 and text.split("<!-- engines -->")[1].strip() == table().strip()


@pytest.mark.parametrize("kind", rows())
def test_of_a_row_of_the_table_all_have_the_same_answers(kind: str) -> None:
    found = [[(bool(v.refusals), len(v.caveats)) for v in verdicts(made).values()] for made in rows()[kind]]
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors(bits: int, sym: bool) -> None:
    assert loads("vllm", CT, bits, sym)
    assert loads("sglang", CT, bits, sym) == (bits in (4, 8))
    assert loads("transformers", CT, bits, sym)


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(format: str, bits: int) -> None:
    assert loads("vllm", format, bits) == (bits in (4, 8))
    assert not loads("vllm", format, bits, sym=False)
    for engine in ("sglang", "transformers"):
        assert loads(engine, format, bits) and loads(engine, format, bits, sym=False)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("format", [COMPRESSED, *GPTQS])
def test_a_tail_group_loads_nowhere(engine: str, format: str) -> None:
    """Whichever of the shapes has it."""
    grid = Grid(4, 64)
    assert refusal(engine, format, grid, [(64, 128)]) is None
    reason = refusal(engine, format, grid, [(64, 128), (64, 96)]) or ""
    assert reason.startswith("group_size 64 does not divide the 96 input columns")
    assert "only nearplane" in reason and not reason.endswith(".")
    assert judged(engine, format, grid, [(64, 96)]).caveats == ()
    assert refusal(engine, format, Grid(4, -1), [(64, 96)]) is None


def test_groups_in_activation_order() -> None:
    def ordered(engine: str, grid: Grid, format: str = "gptq") -> str:
        return str(judged(engine, format, grid, ordered=True))

    assert "desc_act" in ordered("vllm", Grid(4, 64)) and "does not load" in ordered("vllm", Grid(4, 64))
    assert (
        ordered("vllm", Grid(4, -1)) == ordered("sglang", Grid(4, 64)) == ordered("vllm", Grid(4, 64), CT) == "loads it"
    )
    assert "desc_act" not in ordered("transformers", Grid(4, 64))


def test_caveats() -> None:
    def said(engine: str, format: str, grid: Grid) -> str:
        return "; ".join(judged(engine, format, grid).caveats)

    assert said("vllm", CT, Grid(4, 64)) == said("vllm", CT, Grid(4, 64, sym=False)) == ""
    assert said("sglang", CT, Grid(8, -1)) == said("vllm", "gptq", Grid(4, 128)) == ""
    assert "take group sizes 32, 64, 128 and -1; another must run 16" in said("vllm", CT, Grid(4, 16))
    assert "3 bits by a CUDA kernel" in said("vllm", CT, Grid(3, 64))
    assert "2 bits by a CUDA kernel" in said("vllm", CT, Grid("ternary", 64))
    assert "8 bits symmetric only" in said("vllm", CT, Grid(8, 64, sym=False))
    assert "without its Marlin kernels" in said("sglang", "gptq", Grid(3, 64))
    assert "without its Marlin kernels" in said("sglang", "gptq_v2", Grid(4, 64, sym=False))
    assert said("sglang", CT, Grid(3, 64)) == said("vllm", "gptq", Grid(3, 64)) == ""  # refused: no condition helps
    assert "dequantize=True" in said("transformers", CT, Grid(4, 64, sym=False))
    assert "needs the package compressed-tensors" in said("transformers", CT, Grid(4, 64))
    assert said("transformers", "gptq", Grid(4, 64)).endswith("optimum and gptqmodel for it")
    assert "plain torch kernel" in said("transformers", "gptq", Grid(3, 64))


@pytest.mark.parametrize("size", [16, 96, 192])
def test_gptq_in_other_groups_than_marlins(size: int) -> None:
    """vLLM, run, refuses GPTQ where it has no Marlin kernel, and loads the same groups as compressed-tensors."""
    shapes = [(64, 1536)]
    for format in GPTQS:
        told = refusal("vllm", format, Grid(4, size), shapes) or ""
        assert f"groups of 32, 64, 128 and -1 only, not {size}; as compressed-tensors it loads {size}" in told
        assert refusal("sglang", format, Grid(4, size), shapes) is None
        assert all(refusal("vllm", format, Grid(4, known), shapes) is None for known in (32, 64, 128, -1))
    assert refusal("vllm", CT, Grid(4, size), shapes) is None


def test_activations_and_rotations() -> None:
    def rounded(engine: str, grid: Grid, tokens: TokenGrid) -> str:
        return str(verdict(engine, Described(CT, (Weight(grid, SHAPES[0], tokens),))))

    for engine in ENGINES:
        assert "does not" not in rounded(engine, Grid(8, -1), TokenGrid(8))
        assert "knows no clip of activations (0.9)" in rounded(engine, Grid(8, -1), TokenGrid(8, clip=0.9))
        w4a8 = rounded(engine, Grid(4, 64), TokenGrid(8))
        assert ("leave activations as they are" in w4a8) == (engine != "transformers")
        turned = judged(engine, CT, Grid(4, 64), online=True)
        assert "rotated while the model runs (r4), which only nearplane does" in turned.refusals[0]


def test_of_several_grids_each_is_judged() -> None:
    two = tuple(Weight(Grid(bits, 64), SHAPES[0]) for bits in (4, 3))
    assert str(verdict("vllm", Described("gptq", two))) == (
        "does not load it: vLLM 0.33 loads GPTQ of 4 or 8 bits, not 3; compressed-tensors of 3 bits it loads"
    )
    assert "dynamic rules" in str(verdict("sglang", Described("gptq", two)))
    assert "gptqmodel itself" in str(verdict("transformers", Described("gptq", two)))


def test_models() -> None:
    def told(engine: str, format: str = CT, **facts) -> str:
        return str(judged(engine, format, Grid(4, 64), model=Model("MixtralForCausalLM", **facts)))

    for engine in ("vllm", "sglang"):
        assert told(engine, experts=True, merges=True) == told(engine) == told(engine, converts=True) == "loads it"
        assert "no loader of experts one by one was found" in told(engine, experts=True)
        assert "was not looked up" in told(engine, causal=False) and told(engine, "gptq", causal=False) == "loads it"
    assert "merges or splits weights of Mixtral" in told("transformers", converts=True)
    assert "fills them at random" in told("transformers", experts=True)
    assert "without their zero points" in told("transformers", experts=True, merges=True, zeros=True)
    assert told("transformers", experts=True, merges=True) == told("transformers", experts=True, scaled=True)
    assert "dequantize=True" in told("transformers", initialises=True)
    oss = judged("vllm", CT, Grid(4, 64), model=Model("GptOssForCausalLM", experts=True)).refusals
    assert len(oss) == 1 and oss[0].endswith("it loads the checkpoint all the same, and generates garbage")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SettingError, match="engine must be one of vllm, sglang, transformers; got 'tgi'"):
        judged("tgi", CT, Grid())
    for engine in ENGINES:
        found = judged(engine, "hqq", Grid())
        assert "does not know the format hqq; only nearplane" in str(found) and found.caveats == ()
        assert found.as_dict()["refusals"] == list(found.refusals)


MAMBA2 = {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 8, "expand": 2}
LOADED = {"llama": {}, "bert": {}, "mixtral": {}}
DENSE_ONLY = {"t5": {}, "mamba": {"intermediate_size": 128}, "mamba2": MAMBA2, "rwkv": {"attention_hidden_size": 64}}


def logits(model: Any) -> torch.Tensor:
    ids = tiny.tokens(1, 9)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, **more).logits
    return found


@pytest.mark.parametrize("kind", [*LOADED, *DENSE_ONLY])
def test_whether_transformers_loads_packed_weights_is_found_by_trying(kind: str, tmp_path: Path) -> None:
    """What is said of a plan and of the finished folder, against what transformers does with compressed-tensors."""
    model = tiny.build_mixture(kind) if kind in tiny.MIXTURES else tiny.build(kind, **{**LOADED, **DENSE_ONLY}[kind])
    folder, out = tiny.save(model, tmp_path / "model"), tmp_path / "out"
    settings: dict[str, Any] = {"method": RTN(), "bits": 4, "group_size": 16}
    said = verdict("transformers", make_plan(folder, sketch=True, **settings).described())
    nearplane.quantize(folder, out, progress=False, **settings)
    assert said.as_dict() == json.loads((out / "report.json").read_text())["engines"]["transformers"]
    checked = nearplane.verify(out, "transformers")
    assert checked.ok and not said.refusals
    dense_only = any("dequantize=True" in caveat for caveat in said.caveats)
    assert dense_only == any("dequantize=True" in note for note in checked.notes) == (kind in DENSE_ONLY)
    load: Any = partial(type(model).from_pretrained, out, dtype=torch.float32)
    wanted = logits(nearplane.load(out, packed=False))
    near(logits(load(quantization_config=transformers.CompressedTensorsConfig(dequantize=True))), wanted, sums=96)
    if dense_only:
        with pytest.raises(AttributeError, match="no attribute 'weight'"):
            load()
    else:
        near(logits(load()), wanted, sums=96)


def test_trying_the_initialisation_leaves_the_skeleton_as_it_was(tmp_path: Path) -> None:
    source = open_source(tiny.save(tiny.build("mamba", intermediate_size=128), tmp_path / "model"))
    quantized = [name for name, module in source.model.named_modules() if name.endswith(("in_proj", "out_proj"))]
    before = {**dict(source.model.named_parameters()), **dict(source.model.named_buffers())}
    values = {name: value.clone() for name, value in before.items() if not value.is_meta}
    state = torch.get_rng_state()
    assert initialises_packed(source.model, quantized) and not initialises_packed(source.model, [])
    after = {**dict(source.model.named_parameters()), **dict(source.model.named_buffers())}
    assert all(after[name] is value for name, value in before.items()) and after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in values.items())
    assert torch.equal(torch.get_rng_state(), state)
