"""Runs with scaled channels: every method behind them, resumed, planned, refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import nearplane
from nearplane import AWQ, GPTQ, RTN, Calibration, Grid, Job, NearPlane
from nearplane.checkpoint.convert import convert
from nearplane.cli.summary import summary
from nearplane.core.errors import NearplaneError, NumericalError, SettingError
from nearplane.formats.journal import STATE
from nearplane.run import scale as scaling
from nearplane.run.scale import KEPT, kept
from nearplane.transforms import rotation
from nearplane.transforms.scaling import KEY

GRID = Grid(bits=3, group_size=16, sym=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama some channels of whose norms are large, as those of trained models are."""
    folder = tmp_path_factory.mktemp("scaled")
    (folder / "text.txt").write_text(tiny.text(2000))
    made = tiny.build("llama", num_hidden_layers=3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "layernorm" in name:
                parameter[::13] *= 12
    return tiny.save(made, folder / "model")


def run(model: Path, out: Path, **options: Any) -> nearplane.Report:
    calibration = Calibration(dataset=str(model.parent / "text.txt"), nsamples=8, seqlen=24)
    settings = {"method": AWQ(), "grid": GRID, "calibration": calibration, "progress": False, **options}
    return nearplane.quantize(model, out, **settings)


def contents(folder: Path) -> dict[str, Any]:
    """Every file's bytes; the report without times and memory, and without its page, which has both."""
    found: dict[str, Any] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    report = json.loads(found.pop("report.json"))
    assert b"<h1>" in found.pop("report.html")
    for key in ("seconds", "resumed", "out", "totals", "memory"):
        report.pop(key)
    for row in report["linears"]:
        row.pop("seconds")
    return {**found, "report.json": report}


@pytest.mark.parametrize("method", [RTN(), GPTQ(), NearPlane(), AWQ()], ids=lambda m: type(m).__name__)
def test_every_method_follows(method: Any, model: Path, tmp_path: Path) -> None:
    """The checkpoint holds the divided norms, loads like any other, and is near to the original."""
    plain = run(model, tmp_path / "plain", method=method, scale="none")
    report = run(model, tmp_path / "out", method=method, scale="awq")
    assert report.settings["scale"]["search"] == "awq" and "scale" not in plain.settings
    told = [event for event in report.events if "scaled:" in event]
    assert len(told) == 3 and all("alpha 0." in event and "through input_layernorm" in event for event in told)
    assert "scale" in report.seconds and not (tmp_path / "out" / STATE).exists()
    assert KEY in json.loads((tmp_path / "out" / "config.json").read_text())
    loaded, before = nearplane.load(tmp_path / "out"), nearplane.load(model)
    norms = [dict(some.named_parameters())["model.layers.0.input_layernorm.weight"] for some in (before, loaded)]
    assert not torch.equal(*norms)
    assert report.check is not None and plain.check is not None
    # Rounding gains; methods that compensate errors need the scales less (docs/LOG.md).
    assert report.check["kl"] < (0.9 if type(method) in (RTN, AWQ) else 1.25) * plain.check["kl"]
    ids = tiny.tokens(2, 15, seed=5)
    a, b = (torch.log_softmax(some(input_ids=ids).logits.detach().float(), -1) for some in (before, loaded))
    assert float((a.exp() * (a - b)).sum(-1).mean()) < 4 * report.check["kl"]


def test_awq_asks_for_scales_itself(model: Path, tmp_path: Path) -> None:
    assert Job(method=AWQ()).scales_channels and not Job(method=AWQ(), scale="none").scales_channels
    assert not Job(method=GPTQ()).scales_channels and Job(method=RTN(), scale="awq").reads_data
    with pytest.raises(SettingError, match="scale must be auto, none or awq"):
        Job.of(scale="smooth")
    by_default, asked = run(model, tmp_path / "a"), run(model, tmp_path / "b", scale="awq")
    assert by_default.settings == asked.settings
    assert [row.weight_error for row in by_default.linears] == [row.weight_error for row in asked.linears]


class Ended(Exception):
    """The end of a session."""


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("options", [{"method": NearPlane(), "scale": "awq"}, {"method": RTN(), "scale": "awq"}])
def test_a_resumed_run_ends_in_the_same_bytes(
    lost: bool, options: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors are kept while a run is not finished; where they are lost, they are searched for again."""
    whole = tmp_path / "whole"
    run(model, whole, **options)
    out = tmp_path / "out"

    class Ending:
        silent = True

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __init__(self) -> None:
            from nearplane.cli.terminal import Terminal

            self.inner = Terminal(silent=True)

        def __enter__(self) -> "Ending":
            self.inner.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.inner.__exit__(*error)

        def take(self, event: Any) -> None:
            if isinstance(event, nearplane.BlockDone) and event.number == 1:
                raise Ended

    with pytest.raises(Ended):
        run(model, out, show=Ending(), **options)
    assert kept(out) is not None
    searched: list[int] = []
    if lost:
        (out / STATE / KEPT).write_bytes(b"damaged")
    measure = scaling.measure
    monkeypatch.setattr(scaling, "measure", lambda *args: searched.append(1) or measure(*args))
    with pytest.raises(SettingError, match="scale"):
        run(model, out, **{**options, "scale": "none"}, resume=True)
    run(model, out, **options, resume=True)
    assert bool(searched) == lost
    assert contents(out) == contents(whole)


def test_a_session_that_ended_before_the_first_block_searches_again(model: Path, tmp_path: Path) -> None:
    """Other settings may have been meant by then."""
    out = tmp_path / "out"
    run(model, tmp_path / "whole")
    (out / STATE).mkdir(parents=True)
    run(model, tmp_path / "other", grid=dataclasses.replace(GRID, bits=2))
    shutil.copy(tmp_path / "whole" / "config.json", out / STATE / KEPT)
    run(model, out, resume=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_model_without_anything_to_fold_is_refused(tmp_path: Path) -> None:
    """BLOOM with only the linears behind GELU left: nothing makes their inputs channel by channel."""
    (tmp_path / "text.txt").write_text(tiny.text(2000))
    model = tiny.save(tiny.build("bloom"), tmp_path / "model")
    with pytest.raises(SettingError, match=r"no input of .* can be scaled \(.*not scaled: .*use --scale none"):
        run(model, tmp_path / "out", ignore="query_key_value|attention.dense|h_to_4h$")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_an_encoder_says_that_its_output_was_not_compared(tmp_path: Path) -> None:
    """Also in the summary and on the page; a decoder says how near its logits are."""
    (tmp_path / "text.txt").write_text(tiny.text(2000))
    model = tiny.save(tiny.build("bert"), tmp_path / "model")
    tiny.marking(model)
    report = run(model, tmp_path / "out")
    told = "no output of the whole model was compared"
    assert sum(told in event for event in report.events) == 1
    assert told in (tmp_path / "out" / "report.html").read_text() and told in summary(report)


def test_another_model_would_be_noticed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof by logits: with factors that the norm is not divided by, the run ends with a sentence."""
    real = scaling.scaled_source

    def wrong(source: Any, found: Any) -> Any:
        doubled = [dataclasses.replace(each, factors=each.factors * 2) for each in found]
        view = real(source, doubled)
        norm = source.names["model.layers.1.input_layernorm.weight"]
        view.store.changes.pop(norm)
        return view

    monkeypatch.setattr(scaling, "scaled_source", wrong)
    with pytest.raises(NumericalError, match=r"with scaled channels the model's logits differ.*Use --scale none"):
        run(model, tmp_path / "out")
    assert rotation.TOLERANCE == 1e-4


def test_the_plan_counts_the_search(model: Path) -> None:
    """Time, memory, and data: rounding to nearest reads none but for the scales."""
    settings: dict[str, Any] = {"nsamples": 8, "seqlen": 24, "dataset": str(model.parent / "text.txt"), "check": False}
    plain, scaled = (nearplane.plan(model, method="rtn", scale=some, **settings) for some in ("none", "awq"))
    assert scaled.seconds["scale"] > 0 and "scale" not in plain.seconds
    assert scaled.estimate.windows == (8, 24) and plain.estimate.windows == (0, 0)
    need = [sum(memory.need for memory in some.estimate.memory) for some in (plain, scaled)]
    assert need[1] > need[0]
    assert scaled.as_dict()["scale"] == {"search": "awq"} and "one stream" not in str(plain)


def test_a_budget_and_other_grids(model: Path, tmp_path: Path) -> None:
    report = run(model, tmp_path / "budget", method=GPTQ(), scale="awq", budget=5.0)
    assert report.settings["choices"] and report.settings["scale"]["sum"]
    report = run(model, tmp_path / "override", override=["down_proj=bits=8,group_size=32"])
    assert any("mlp.down_proj by alpha" in event for event in report.events)


def test_what_takes_its_norms_from_elsewhere_refuses(model: Path, tmp_path: Path) -> None:
    """A GGUF file takes norms from its template: scaled ones would be another model."""
    with pytest.raises(SettingError, match="--scale none"):
        run(model, tmp_path / "gguf", format="gguf", grid=Grid.named("q4_0"))
    run(model, tmp_path / "out", grid=Grid(bits=4, group_size=32))
    with pytest.raises(NearplaneError, match=r"channels of .* are scaled"):
        convert(tmp_path / "out", tmp_path / "new", "gguf", template=tmp_path / "none.gguf")
    convert(tmp_path / "out", tmp_path / "mlx", "mlx")
    a, b = (nearplane.load(tmp_path / name)(input_ids=tiny.tokens(1, 9)).logits for name in ("out", "mlx"))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert "channels scaled: awq" in str(nearplane.inspect(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text"])
def test_experts_that_stay_dense_stay_fused(kind: str, tmp_path: Path) -> None:
    """The same tensors as without scales, under the same names."""
    (tmp_path / "text.txt").write_text(tiny.text(2000))
    model = tiny.save(tiny.build_mixture(kind), tmp_path / "model")
    names = []
    for scale in ("none", "awq"):
        report = run(model, tmp_path / scale, method=RTN(), scale=scale, ignore="experts", check=False)
        names.append(set(json.loads((tmp_path / scale / "model.safetensors.index.json").read_text())["weight_map"]))
    assert names[0] == names[1] and any(name.endswith("experts.gate_up_proj") for name in names[0])
    assert any("scaled: self_attn.q_proj" in event for event in report.events)


def test_a_head_is_quantized_beside_scaled_blocks(tmp_path: Path) -> None:
    """Tied, so that the head becomes a tensor of its own; nothing in its block makes its input."""
    (tmp_path / "text.txt").write_text(tiny.text(2000))
    model = tiny.save(tiny.build("llama", tie_word_embeddings=True), tmp_path / "model")
    report = run(model, tmp_path / "out", method=GPTQ(), scale="awq", head_bits=4)
    assert any(event.startswith("lm_head: not scaled: lm_head") for event in report.events)
    assert report.check is not None and report.check["kl"] < 0.5
    assert nearplane.load(tmp_path / "out")(input_ids=tiny.tokens(1, 5)).logits.isfinite().all()
