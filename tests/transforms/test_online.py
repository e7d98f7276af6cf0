"""Rotations that are applied while the model runs: the same model, calibrated turned, loaded turned, refused elsewhere."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
import transformers
from close import near
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rotate import difference, materialized, perturbed

import nearplane
from nearplane import GPTQ, RTN, Calibration, Grid
from nearplane.checkpoint.load import LoadSettings, load_model
from nearplane.cli.main import main
from nearplane.core.activations import TokenGrid, round_tokens
from nearplane.core.errors import NearplaneError, NumericalError, SettingError
from nearplane.evaluation.cache import RoundedCache
from nearplane.models.source import open_source
from nearplane.run.forecast import forecast
from nearplane.transforms import rotation as proving
from nearplane.transforms.hadamard import online
from nearplane.transforms.hooks import turn_inputs, turned
from nearplane.transforms.rotation import Rotate, rotated

CPU = torch.device("cpu")


def running(source: Any, seed: int) -> Any:
    """The rotated model with its online part, as an ordinary one."""
    model = materialized(source)
    turn_inputs(model, source.online, seed)
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "opt", "gptj", "phi"])
def test_the_same_model(kind: str, tmp_path: Path) -> None:
    """Linears as Conv1D, with and without biases, and blocks whose MLP runs beside attention."""
    model = perturbed(kind)
    source = rotated(open_source(tiny.save(model, tmp_path / "m")), Rotate(("r1", "r2", "r4"), 3), CPU)
    assert len(source.online) == 2  # one a block, and not attention's
    assert difference(model, running(source, 3)) < 1e-5
    assert difference(model, materialized(source)) > 0.01  # what an engine that ignores it would run


@settings(max_examples=6)
@given(
    heads=st.integers(1, 3), share=st.sampled_from([1, 2]), width=st.sampled_from([2, 6, 8]), inner=st.integers(3, 70),
    kinds=st.sampled_from([("r4",), ("r1", "r4"), ("r2", "r4"), ("r1", "r2", "r3", "r4")]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_same_model_at_any_size(
    tmp_path_factory: pytest.TempPathFactory, heads: int, share: int, width: int, inner: int, kinds: Any, seed: int
) -> None:
    """Grouped queries, and MLPs of widths that no Hadamard matrix has."""
    sizes = {"num_attention_heads": heads * share, "num_key_value_heads": heads, "head_dim": width}
    model = perturbed("llama", seed, hidden_size=heads * share * width, intermediate_size=inner, **sizes)
    folder = tiny.save(model, tmp_path_factory.mktemp("any") / "m")
    source = rotated(open_source(folder), Rotate(kinds, seed), CPU)
    assert difference(model, running(source, seed)) < 1e-5


def test_the_formula(tmp_path: Path) -> None:
    model = perturbed("llama")
    source = rotated(open_source(tiny.save(model, tmp_path / "m")), Rotate(("r4",), 3), CPU)
    old, name = dict(model.named_parameters()), "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(source.store.get(name), old[name].double() @ online(96, 3).matrix)
    changed = [n for n in source.original.names if not torch.equal(source.store.get(n), source.original.get(n))]
    assert sorted(changed) == [f"model.layers.{k}.mlp.down_proj.weight" for k in (0, 1)]
    assert source.written_config()["nearplane_rotation"]["online"] == source.online == [n[:-7] for n in sorted(changed)]


def test_the_proof_covers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.save(perturbed("llama"), tmp_path / "m")
    monkeypatch.setattr(proving, "turn_inputs", lambda *_: None)
    with pytest.raises(NumericalError, match="it would be another model"):
        rotated(open_source(folder), Rotate(("r4",)), CPU)


@dataclass(frozen=True)
class Watching:
    """RTN that keeps the Hessians and drifts it is shown."""

    seen: ClassVar[list[Any]] = []
    needs = frozenset({"H", "D"})

    def prepare(self, moments: Any) -> Any:
        self.seen.append((moments.H.clone(), moments.D.clone()))

    def solve(self, weight: torch.Tensor, state: Any, grid: Grid) -> Any:
        return RTN().solve(weight, None, grid)


def test_calibration_sees_turned_inputs_in_both_streams(tmp_path: Path) -> None:
    """Of the first block's MLP, whose input no rounded weight differs in: H becomes RᵀHR, and D alike. With activations
    rounded it is of the turned ones."""
    folder = tiny.with_text(tmp_path)
    draw = Calibration(str(tmp_path / "text.txt"), nsamples=4, seqlen=24)
    found: dict[Any, Any] = {}
    for kinds, bits in (("", 16), ("r4", 16), ("r4", 4)):
        Watching.seen.clear()
        activations = None if bits == 16 else TokenGrid(bits)
        nearplane.quantize(
            folder, tmp_path / f"{kinds}{bits}", method=Watching(), grid=Grid(bits=4, group_size=-1), calibration=draw,
            rotate=kinds, activations=activations, progress=False,
        )  # fmt: skip
        found[kinds, bits] = next(pair for pair in Watching.seen if len(pair[0]) == 96)
    R = online(96, 0).matrix.float()
    for plain, turned_one in zip(found["", 16], found["r4", 16], strict=True):
        torch.testing.assert_close(turned_one, R.T @ plain @ R, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))
        assert float((turned_one - plain).norm()) > 0.1 * float(plain.norm())
    exact, rounded = found["r4", 16][0], found["r4", 4][0]
    assert 1e-4 < float((rounded - exact).norm() / exact.norm()) < 0.3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model in ``m``, quantized to 8 bits with r1, r2, r3 and r4 in ``out``."""
    folder = tmp_path_factory.mktemp("made")
    tiny.save(perturbed("llama", tie_word_embeddings=True).float(), folder / "m")
    (folder / "text.txt").write_text(tiny.text(2000))
    quantized(folder, "out", rotate="r1,r2,r3,r4", rotate_seed=5)
    return folder


def quantized(folder: Path, name: str, **settings: Any) -> Any:
    draw = Calibration(str(folder / "text.txt"), nsamples=8, seqlen=24)
    grid = Grid(bits=8, group_size=settings.pop("group_size", 32))
    return nearplane.quantize(
        folder / "m", folder / name, method=GPTQ(), grid=grid, calibration=draw, progress=False, **settings
    )


def test_there_and_back(made: Path) -> None:
    """Packed and dense, at 8 bits: the original but for rounding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(made / "m", dtype=torch.float32).eval()
    packed, dense = (nearplane.load(made / "out", packed=packed, arithmetic="exact") for packed in (True, False))
    assert difference(packed, dense) < 1e-5
    assert difference(model, dense) < 0.03
    told = json.loads((made / "out" / "config.json").read_text())["nearplane_rotation"]
    assert told["kinds"] == ["r1", "r2", "r3", "r4"] and told["seed"] == 5
    assert told["online"] == [f"model.layers.{k}.mlp.down_proj" for k in (0, 1)]
    assert nearplane.verify(made / "out").ok
    half = load_model(made / "out", LoadSettings(device="cpu", dtype="bfloat16", packed=False))
    assert difference(model, half.float()) < 0.2
    report = json.loads((made / "out" / "report.json").read_text())
    assert any("rotated while the model runs (r4), which only nearplane does" in event for event in report["events"])


def test_rounded_activations_are_turned_first(made: Path) -> None:
    """What a linear multiplies is rounded in the turned basis, packed and dense."""
    quantized(made, "rounded", rotate="r4", activations=TokenGrid(4), group_size=-1)
    packed, dense = (nearplane.load(made / "rounded", packed=packed, arithmetic="exact") for packed in (True, False))
    x, name = torch.randn(1, 3, 96), "model.layers.0.mlp.down_proj"
    linear = dense.get_submodule(name)
    expected = torch.nn.functional.linear(round_tokens(turned(x, 0), TokenGrid(4)), linear.weight)
    for model in (packed, dense):
        near(model.get_submodule(name)(x), expected, sums=96)


def test_others_refuse_to_load_it(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ({}, {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}):
        with pytest.raises(
            ValueError, match="nearplane-online-pack-quantized"
        ):  # pydantic's, of a format it does not know
            transformers.AutoModelForCausalLM.from_pretrained(made / "out", **options)
    for engine in ("vllm", "sglang", "transformers"):
        findings = nearplane.verify(made / "out", engine=engine)
        assert not findings.ok and any("rotated while the model runs" in problem for problem in findings.problems)
    with pytest.raises(NearplaneError, match="rotated while the model runs"):
        nearplane.convert(made / "out", tmp_path / "converted", format="gptq")
    words = [
        "quantize",
        str(made / "m"),
        str(tmp_path / "gptq"),
        "--method",
        "rtn",
        "--rotate",
        "r4",
        "--format",
        "gptq",
    ]
    assert main(words) == 2 and main([*words, "--force"]) == 2
    assert capsys.readouterr().err.count("r4 rotates inputs while the model runs") == 2
    assert not (tmp_path / "gptq").exists()


def test_a_forecast_knows_of_rotations(made: Path) -> None:
    """Its engines, and the tensor that a tied head becomes."""
    settings: dict[str, Any] = {"method": GPTQ(), "grid": Grid(bits=4, group_size=32)}
    plain, fused, live = (forecast(made / "m", rotate=kinds, **settings) for kinds in ("", "r1,r2", "r2,r4"))
    assert fused.estimate.disk["dense"] - plain.estimate.disk["dense"] == 128 * 64 * 4
    assert live.estimate.disk == plain.estimate.disk
    assert fused.engines() == plain.engines()
    assert all("only nearplane does" in str(judged) or judged.foreign for judged in live.engines().values())


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (
            {"kinds": ["r4"], "seed": 0, "online": ["model.layers.9.mlp.down_proj"]},
            "has no model.layers.9.mlp.down_proj",
        ),
        ({"kinds": ["r4"], "seed": 0, "online": "all"}, "must name a seed and a list"),
        ({"kinds": ["r4"], "seed": "0", "online": []}, "must name a seed and a list"),
        (["r4"], "must name a seed and a list"),
    ],
)
def test_a_config_that_makes_no_sense(made: Path, told: Any, sentence: str) -> None:
    with changed_config(made / "out", told), pytest.raises(NearplaneError, match=sentence):
        nearplane.load(made / "out")


@contextmanager
def changed_config(folder: Path, told: Any) -> Iterator[None]:
    path = folder / "config.json"
    original = path.read_text()
    path.write_text(json.dumps(json.loads(original) | {"nearplane_rotation": told}))
    try:
        yield
    finally:
        path.write_text(original)


def test_keys_are_rounded_turned(made: Path) -> None:
    """A cache of few bits with r3: what attention makes of them is what queries and keys turned alike would make."""
    model = nearplane.load(made / "out", packed=False)
    keys, values, queries = torch.randn(3, 1, 2, 5, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    keys[..., 0] *= 20
    held, same = RoundedCache(model.config, 4).update(keys, values, 0)
    plain, _ = RoundedCache(transformers.LlamaConfig(num_hidden_layers=1), 4).update(keys, values, 0)
    scores = turned(queries, 5) @ round_tokens(turned(keys, 5), TokenGrid(4, sym=False)).mT
    near(queries @ held.mT, scores, sums=96)
    torch.testing.assert_close(same, round_tokens(values, TokenGrid(4, sym=False)))
    small = keys[..., 1:] - held[..., 1:], keys[..., 1:] - plain[..., 1:]
    assert float(small[0].norm()) < 0.7 * float(small[1].norm())  # the large coordinate is spread
    text = str(made / "text.txt")
    losses = [
        nearplane.evaluate(made / "out", dataset=text, seqlen=32, windows=4, kv_bits=bits).perplexity
        for bits in (16, 8)
    ]
    assert abs(losses[0] / losses[1] - 1) < 0.02


def test_r4_needs_a_stream_that_can_be_followed(tmp_path: Path) -> None:
    source = open_source(tiny.save(perturbed("gemma2").float(), tmp_path / "m"))
    with pytest.raises(SettingError, match="adds to the stream are not outputs of its linears"):
        rotated(source, Rotate(("r4",)), CPU)
