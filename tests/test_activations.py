"""Activations rounded while calibrating, on disk, and when the checkpoint runs: here and in transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from close import near
from compressed_tensors.quantization.utils import helpers
from safetensors.torch import load_file

import nearplane
from nearplane import GPTAQ, GPTQ, RTN, Calibration, Grid, NearPlane
from nearplane.cli.main import main
from nearplane.core.activations import TokenGrid, round_tokens
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.evaluation.cache import RoundedCache
from nearplane.models.discover import discover
from nearplane.models.source import open_source
from nearplane.run.forward import Forward
from nearplane.run.stream import Place, stream


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("activations")
    (folder / "text.txt").write_text(tiny.text(2000))
    return tiny.save(tiny.build("llama"), folder / "model")


def run(model: Path, out: Path, **options: Any) -> nearplane.Report:
    calibration = Calibration(dataset=str(model.parent / "text.txt"), nsamples=8, seqlen=24)
    settings = {"method": GPTQ(), "grid": Grid(bits=8, group_size=-1), "calibration": calibration, "progress": False}
    return nearplane.quantize(model, out, **settings | options)


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: m for name, m in model.named_modules() if name.endswith("_proj")}


@pytest.mark.parametrize("sym", [True, False])
def test_what_the_solver_sees_is_rounded_and_the_reference_is_not(model, sym):
    source, grid = open_source(model), TokenGrid(4, sym)
    blocks, tokens = discover(source), tiny.tokens(4, 16)
    original = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    rounded = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    for module in linears(rounded).values():
        module.register_forward_pre_hook(lambda _m, args: (round_tokens(args[0], grid),))
    seen: dict[str, list[torch.Tensor]] = {}
    for which in (rounded, original):
        for name, module in linears(which).items():
            module.register_forward_hook(lambda _m, args, _y, name=name: seen.setdefault(name, []).append(args[0]))
        with torch.no_grad():
            which(tokens)
    walk = stream(
        source, blocks, tokens, place=Place(torch.device("cpu"), torch.float32), reference=True, activations=grid
    )
    for block in walk:
        for stage in block.stages:
            moments = block.observe(stage, frozenset({"H", "D"}))
            for site in stage:
                xhat, x = (value.reshape(-1, value.shape[-1]) for value in seen[site.name])
                near(moments.H, xhat.T @ xhat / len(xhat), sums=96)
                near(moments.D, (x - xhat).T @ xhat / len(xhat), sums=96)


@pytest.mark.parametrize(
    ("grid", "activations"),
    [
        (Grid(bits=8, group_size=-1), TokenGrid(8)),
        (Grid(bits=4, group_size=16), TokenGrid(8)),
        (Grid(bits=4, group_size=16, sym=False), TokenGrid(8, sym=False)),
        (Grid(bits=4, group_size=-1), TokenGrid(4)),
        (Grid(bits=2, group_size=32, sym=False), TokenGrid(4, sym=False)),
    ],
    ids=str,
)
def test_transformers_and_we_compute_alike(model, tmp_path, grid, activations, monkeypatch):
    """Decompressed by the library, which then rounds every linear's input as it says in config.json.

    Its symmetric scale alone is another, max over half of the range; here it is made the engines', max over the last code.
    """

    def engines(low, high, args, **more):
        scale, zero = helpers.plain_qparams(low, high, args, **more)
        last = (1 << (args.num_bits - 1)) - 1
        return (scale * (last + 0.5) / last if args.symmetric else scale), zero

    monkeypatch.setattr(helpers, "plain_qparams", helpers.calculate_qparams, raising=False)
    monkeypatch.setattr(helpers, "calculate_qparams", engines)
    run(model, tmp_path / "out", grid=grid, activations=activations)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    assert config["config_groups"]["group_0"]["input_activations"]["num_bits"] == activations.bits
    ids = tiny.tokens(2, 12)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    dense = nearplane.load(tmp_path / "out", packed=False)
    packed = nearplane.load(tmp_path / "out", arithmetic="exact")
    with torch.no_grad():
        near(dense(ids).logits, theirs(ids).logits, sums=96)
        # One by one: of a whole model, a number in the middle of two goes either way by the last digit of a sum.
        for name, layer in linears(packed).items():
            x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
            near(layer(x), dense.get_submodule(name)(x), sums=96)


def test_sixteen_bits_change_no_code(model, tmp_path):
    run(model, tmp_path / "a", method=NearPlane())
    words = [
        "--bits",
        "8",
        "--group-size",
        "-1",
        "--dataset",
        str(model.parent / "text.txt"),
        "--nsamples",
        "8",
        "--seqlen",
        "24",
    ]
    assert main(["quantize", str(model), str(tmp_path / "b"), *words, "--act-bits", "16"]) == 0
    for path in sorted((tmp_path / "a").glob("*.safetensors")):
        a, b = load_file(path), load_file(tmp_path / "b" / path.name)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_compensation_sees_the_rounding(model, tmp_path):
    """GPTAQ answers the drift that rounding makes: in the first stage there is no other."""
    codes = []
    for name, method in (("gptq", GPTQ()), ("gptaq", GPTAQ())):
        run(model, tmp_path / name, method=method, grid=Grid(bits=4, group_size=16), activations=TokenGrid(3))
        path = sorted((tmp_path / name).glob("*.safetensors"))
        found = {k: v for p in path for k, v in load_file(p).items()}
        codes.append(found["model.layers.0.self_attn.q_proj.weight"])
    assert not torch.equal(*codes)


def test_a_resumed_run_is_the_same_and_a_changed_rounding_is_refused(model, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(model, whole, activations=TokenGrid(8))
    until = Forward.until

    def stops(self: Forward, module: str | None, behind: bool = False) -> Any:
        if self.k == 1:
            raise KeyboardInterrupt
        return until(self, module, behind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Forward, "until", stops)
        with pytest.raises(KeyboardInterrupt):
            run(model, parts, activations=TokenGrid(8))
    with pytest.raises(SettingError, match=r"activations\.bits"):
        run(model, parts, activations=TokenGrid(4), resume=True)
    run(model, parts, activations=TokenGrid(8), resume=True)
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (parts / path.name).read_bytes()


def test_what_formats_and_engines_cannot_say(model, tmp_path, capsys):
    with pytest.raises(SettingError, match="gptq cannot say that activations are rounded"):
        run(model, tmp_path / "a", format="gptq", activations=TokenGrid(8))
    report = run(model, tmp_path / "clip", method=RTN(), activations=TokenGrid(8, clip=0.9))
    assert any("without the clip of 0.9" in event for event in report.events)
    assert nearplane.load(tmp_path / "clip").model.layers[0].mlp.up_proj.activations == TokenGrid(8, clip=0.9)
    assert not nearplane.verify(tmp_path / "clip", "transformers").ok
    run(model, tmp_path / "w8a8", method=RTN(), activations=TokenGrid(8))
    assert nearplane.verify(tmp_path / "w8a8", "vllm").ok
    run(model, tmp_path / "w4a8", method=RTN(), grid=Grid(bits=4, group_size=16), activations=TokenGrid(8))
    checked = nearplane.verify(tmp_path / "w4a8", "vllm")
    assert checked.ok and "another rule" in str(checked)
    run(model, tmp_path / "groups", method=RTN(), grid=Grid(bits=8, group_size=16), activations=TokenGrid(8))
    assert "one scale per row" in str(nearplane.verify(tmp_path / "groups", "vllm").problems)
    with pytest.raises(NearplaneError, match="input_activations"):
        nearplane.convert(tmp_path / "w8a8", tmp_path / "c", "gptq")
    assert main(["quantize", str(model), str(tmp_path / "d"), "--act-clip", "0.9"]) == 2
    assert main(["quantize", str(model), str(tmp_path / "d"), "--act-bits", "1"]) == 2
    assert "act_bits" in capsys.readouterr().err


def test_rounded_keys_and_values(model):
    original = nearplane.load(model)
    text = str(model.parent / "text.txt")
    exact = nearplane.evaluate(model, dataset=text, seqlen=32, reference=model)
    losses = [nearplane.evaluate(model, dataset=text, seqlen=32, reference=model, kv_bits=bits) for bits in (8, 4, 2)]
    assert exact.kl == pytest.approx(0, abs=1e-6)
    assert 0 < losses[0].kl < losses[1].kl < losses[2].kl
    assert "which no checkpoint carries" in losses[0].protocol
    cache = RoundedCache(original.config, 4)
    original(tiny.tokens(1, 6), past_key_values=cache, use_cache=True)
    keys = cache.layers[0].keys
    assert keys.shape[2] == 6 and all(len(row.unique()) <= 16 for row in keys.reshape(-1, keys.shape[-1]))
