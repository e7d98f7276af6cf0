"""Originals in FP8 and MXFP4 are quantized, planned, resumed, rotated and loaded as the dense models that they stand for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coded
import pytest
import safetensors.torch
import tiny
import torch
import transformers

import nearplane
from nearplane import GPTQ, RTN, Calibration, Grid
from nearplane.cli.main import main
from nearplane.core.errors import SettingError
from nearplane.formats.store import Store
from nearplane.models.source import open_source
from nearplane.run.plan import make_plan

SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "head_dim": 40}
GRID = Grid(bits=4, group_size=8)
FP8 = coded.FP8_CONFIG
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
GROUP = {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8, "strategy": "channel", "symmetric": True}}
ROWS = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": GROUP}}
NVFP4 = {
    **ROWS, "format": "nvfp4-pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 4, "group_size": 16}}},
}  # fmt: skip


def experts(name: str) -> bool:
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


# By name: model type, its settings, quantization_config, coder, which weights.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], coded.Coder, Callable[[str], bool]]] = {
    "qwen3": ("qwen3", {"intermediate_size": 256, "head_dim": 32}, FP8, coded.by_blocks(), coded.linears),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 32}, FP8, coded.by_blocks(), coded.linears),
    "deepseek_v3": ("deepseek_v3", {"num_key_value_heads": 4, "head_dim": 8}, FP8, coded.by_blocks(), coded.linears),
    "gpt_oss": ("gpt_oss", {"intermediate_size": 96}, MXFP4, coded.mxfp4, experts),
    "fused": ("gpt_oss", {"intermediate_size": 96}, FP8, coded.by_blocks(), experts),
    "ct": ("qwen3", {"intermediate_size": 192}, {**ROWS, "ignore": ["lm_head"]}, coded.by_rows, coded.linears),
    "nvfp4": ("qwen3", {"intermediate_size": 192}, NVFP4, coded.nvfp4, coded.linears),
    "192": ("qwen3", {"intermediate_size": 192}, FP8, coded.by_blocks(), coded.linears),
}
MIXED = ("qwen3_moe", "deepseek_v3", "gpt_oss", "fused")
BY_TRANSFORMERS = {
    "qwen3": transformers.FineGrainedFP8Config, "qwen3_moe": transformers.FineGrainedFP8Config,
    "deepseek_v3": transformers.FineGrainedFP8Config, "gpt_oss": transformers.Mxfp4Config,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each kind's original, beside it the same model in float32 (``KIND-dense``) and ``text.txt``."""
    root = tmp_path_factory.mktemp("originals")
    (root / "text.txt").write_text(tiny.text(2000))

    def make(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            name, settings, quantization, code, which = KINDS[kind]
            build = tiny.build_mixture if kind in MIXED else tiny.build
            tiny.save(build(name, **{**SIZES, **settings}).bfloat16(), folder)
            shutil.copytree(folder, root / f"{kind}-dense")
            meant = coded.rewrite(folder, quantization, code, which)
            state = {name: value.float().contiguous() for name, value in meant.items()}
            safetensors.torch.save_file(state, root / f"{kind}-dense" / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def dense_of(folder: Path) -> Path:
    return folder.parent / f"{folder.name}-dense"


def run(folder: Path, out: Path, **options: Any) -> nearplane.Report:
    calibration = Calibration(dataset=str(folder.parent / "text.txt"), nsamples=4, seqlen=32)
    settings: dict[str, Any] = {
        "method": GPTQ(), "grid": GRID, "calibration": calibration, "dtype": "bfloat16", "progress": False, **options,
    }  # fmt: skip
    return nearplane.quantize(folder, out, **settings)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tiny.tokens(2, 20, seed=5), use_cache=False).logits
    return result


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    store = Store(folder)
    return {name: store.get(name) for name in store.names}


@pytest.mark.parametrize("kind", KINDS)
def test_an_original_loads_as_the_model_it_stands_for(
    kind: str, made: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made(kind)
    model = nearplane.load(folder)
    assert "read as dense" in capsys.readouterr().err
    state, right = model.state_dict(), nearplane.load(dense_of(folder)).state_dict()
    assert state.keys() == right.keys() and all(torch.equal(state[name], right[name]) for name in right)
    assert not hasattr(model.config, "quantization_config")
    found = nearplane.verify(folder)
    assert found.ok, found
    assert any("read as dense" in note for note in found.notes)


@pytest.mark.parametrize("kind", BY_TRANSFORMERS)
def test_an_original_is_what_transformers_dequantizes(kind: str, made: Callable[[str], Path]) -> None:
    """Weights in bfloat16, bit for bit, in sizes that a block divides; transformers 5.23 runs FP8 in no other dtype."""
    folder, config = made(kind), BY_TRANSFORMERS[kind](dequantize=True)
    by_transformers = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config
    )
    state = nearplane.load(folder, dtype="bfloat16").state_dict()
    right = by_transformers.state_dict()
    assert state.keys() == right.keys()
    assert [name for name in right if not torch.equal(state[name], right[name].to(state[name].dtype))] == []


@pytest.mark.parametrize("kind", KINDS)
def test_quantizing_an_original_is_quantizing_its_dense_model(
    kind: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """The same bytes; a configuration of ours alone; what stays dense is bfloat16, without 8-bit floats or their scales."""
    folder, ignore = made(kind), ["layers.1.*o_proj"]
    report = run(folder, tmp_path / "out", ignore=ignore)
    run(dense_of(folder), tmp_path / "right", ignore=ignore)
    written, right = tensors(tmp_path / "out"), tensors(tmp_path / "right")
    assert written.keys() == right.keys() and all(torch.equal(written[name], right[name]) for name in right)
    assert {value.dtype for value in written.values()} == {torch.int32, torch.int64, torch.bfloat16}
    assert written["model.layers.1.self_attn.o_proj.weight"].dtype == torch.bfloat16
    config, plain = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "right"))
    assert config == plain and config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "model.layers.1.self_attn.o_proj" in config["quantization_config"]["ignore"]
    assert report.bytes["before"] == Store(folder).total
    assert any("read as dense" in event for event in report.events)
    found = nearplane.verify(tmp_path / "out")
    assert found.ok and not any("read as dense" in note for note in found.notes), found
    packed = nearplane.load(tmp_path / "out", arithmetic="exact")
    torch.testing.assert_close(
        logits(packed), logits(nearplane.load(tmp_path / "out", packed=False)), rtol=1e-4, atol=1e-4
    )


def test_a_configuration_elsewhere_is_read_and_not_written(made: Callable[[str], Path], tmp_path: Path) -> None:
    """``compression_config``, before 2025: left in place it would contradict the new one."""
    folder = Path(shutil.copytree(made("ct"), tmp_path / "m"))
    (tmp_path / "text.txt").write_text(tiny.text(2000))
    coded.configure(folder, quantization_config=None, compression_config=ROWS)
    run(folder, tmp_path / "out", method=RTN())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "compression_config" not in config and config["quantization_config"]["format"] == "pack-quantized"
    assert nearplane.verify(tmp_path / "out").ok


@pytest.mark.parametrize("kind", ["gpt_oss", "fused"])
def test_fused_experts_that_stay_dense_are_written_dense(
    kind: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = made(kind)
    run(folder, tmp_path / "out", method=RTN(), ignore=["layers.1.*experts"])
    run(dense_of(folder), tmp_path / "right", method=RTN(), ignore=["layers.1.*experts"])
    written, right = tensors(tmp_path / "out"), tensors(tmp_path / "right")
    assert written.keys() == right.keys() and all(torch.equal(written[name], right[name]) for name in right)
    assert written["model.layers.1.mlp.experts.gate_up_proj"].dtype == torch.bfloat16
    assert nearplane.verify(tmp_path / "out").ok


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_an_original_is_resumed_and_its_scales_are_watched(
    kind: str, made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(made(kind), tmp_path / kind))
    (tmp_path / "text.txt").write_text(tiny.text(2000))
    run(folder, tmp_path / "whole")

    def stopped(out: Path) -> None:
        done, write = [0], nearplane.formats.parts.Writer.seal

        def seal(self: Any, record: Any) -> None:
            write(self, record)
            done[0] += 1
            if done[0] == 1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("nearplane.formats.parts.Writer.seal", seal)
            run(folder, out)

    stopped(tmp_path / "out")
    assert run(folder, tmp_path / "out", resume=True).resumed
    assert (tmp_path / "out" / "SHA256SUMS").read_text() == (tmp_path / "whole" / "SHA256SUMS").read_text()
    stopped(tmp_path / "other")
    state = safetensors.torch.load_file(folder / "model.safetensors")
    first = next(name for name in sorted(state) if "layers.0." in name and name.endswith(("_scale_inv", "_scales")))
    state[first] = state[first].clone()
    state[first].flatten()[0] += 1
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingError, match="differ from those"):
        run(folder, tmp_path / "other", resume=True)


@pytest.mark.parametrize("kind", ["qwen3", "gpt_oss"])
def test_an_original_is_planned_with_and_without_its_weights(
    kind: str, made: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same linears and bytes; a folder with config.json alone; more memory to read a weight than its dense bytes."""
    folder = made(kind)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    plans = [make_plan(place, sketch=True, grid=GRID, method=RTN()) for place in (folder, tmp_path, dense_of(folder))]
    sites = [[(site.name, site.shape) for site in plan.sites] for plan in plans]
    assert sites[0] == sites[1] == sites[2] and plans[0].stored == plans[1].stored == torch.bfloat16
    assert plans[0].nbytes(plans[0].sites) == plans[1].nbytes(plans[1].sites)
    store, name = plans[0].source.store, plans[0].source.names[f"{plans[0].sites[0].name}.weight"]
    if kind == "qwen3":
        rows, columns = plans[0].sites[0].shape
        assert store.reading(name) == 5 * rows * columns + 4  # codes, float32, a scale
        assert plans[1].source.store.reading(name) >= store.reading(name)
    assert main(["plan", str(tmp_path), "--nsamples", "4", "--seqlen", "32", "--group-size", "8"]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_an_original_is_rotated(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("192")
    run(folder, tmp_path / "out", rotate="r1,r2", method=RTN())
    run(dense_of(folder), tmp_path / "right", rotate="r1,r2", method=RTN())
    written, right = tensors(tmp_path / "out"), tensors(tmp_path / "right")
    assert written.keys() == right.keys() and all(torch.equal(written[name], right[name]) for name in right)
    assert nearplane.verify(tmp_path / "out").ok


def test_inspect_and_convert_speak_of_an_original(
    made: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made("192")
    found = nearplane.inspect(folder)
    assert found.before == Store(folder).total and "stored as FP8 (fp8) and read as dense" in str(found)
    assert not found.quantized and found.after is not None and found.after < found.before
    assert main(["convert", str(folder), str(tmp_path / "out"), "--format", "gptq"]) == 2
    assert "is an original" in capsys.readouterr().err


COMMANDS = [
    ["quantize", "MODEL", "OUT", "--method", "rtn"], ["plan", "MODEL"], ["eval", "MODEL"],
    ["generate", "MODEL", "--prompt", "w1"],
    ["bench", "MODEL"], ["inspect", "MODEL"], ["convert", "MODEL", "OUT", "--format", "gptq"],
]  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=[words[0] for words in COMMANDS])
def test_quantized_weights_without_their_configuration_are_refused(
    words: list[str], made: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence that names the first such tensor, from every verb, and nothing is written."""
    folder = Path(shutil.copytree(made("192"), tmp_path / "m"))
    coded.configure(folder, quantization_config=None)
    given = [{"MODEL": str(folder), "OUT": str(tmp_path / "out")}.get(word, word) for word in words]
    assert main(given) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("nearplane: ") and "no quantization_config" in said
    assert "model.layers.0.mlp.down_proj.weight (float8_e4m3fn)" in said and not (tmp_path / "out").exists()


def test_verify_lists_quantized_weights_without_their_configuration(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made("192"), tmp_path / "m"))
    coded.configure(folder, quantization_config=None)
    (problem,) = nearplane.verify(folder).problems
    assert "tensor model.layers.0.mlp.down_proj.weight (float8_e4m3fn) is part of a quantized weight" in problem


@pytest.mark.parametrize("method", ["fp8", "gptq", "mxfp4", "compressed-tensors"])
def test_a_configuration_that_promises_quantized_weights_where_there_are_none(
    method: str, made: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain weights beside a quantization_config: refused, for nobody knows which of the two is wrong."""
    folder = Path(shutil.copytree(dense_of(made("192")), tmp_path / "m"))
    stated = {"bits": 4, "group_size": 8, "quant_method": method}
    coded.configure(folder, quantization_config=ROWS if method == "compressed-tensors" else stated)
    for words in (["quantize", str(folder), str(tmp_path / "out")], ["eval", str(folder)], ["inspect", str(folder)]):
        assert main(words) == 2
        assert "holds no quantized tensor; if its weights are those of the original" in capsys.readouterr().err
    assert any("holds no quantized tensor" in problem for problem in nearplane.verify(folder).problems)


def test_a_stray_tensor_in_a_checkpoint_of_ours_is_never_ignored(made: Callable[[str], Path], tmp_path: Path) -> None:
    run(dense_of(made("192")), tmp_path / "out", method=RTN())
    path = tiny.one_shard(tmp_path / "out") / "model-00001-of-00001.safetensors"
    state, name = safetensors.torch.load_file(path), "model.layers.0.self_attn.extra.weight"
    state[name] = torch.ones(2, 2).to(torch.float8_e4m3fn)
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, path.name)}))
    with pytest.raises(nearplane.NearplaneError, match=f"tensor {name} .*compressed-tensors.* does not explain"):
        nearplane.load(tmp_path / "out")
    assert any(f"tensor {name}" in problem for problem in nearplane.verify(tmp_path / "out").problems)


def test_integers_in_place_of_a_weight_are_refused(made: Callable[[str], Path], tmp_path: Path) -> None:
    """A parameter of whatever name: here a norm's."""
    folder = Path(shutil.copytree(dense_of(made("gpt_oss")), tmp_path / "m"))
    state = safetensors.torch.load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.sinks"
    state[name] = state[name].to(torch.int16)
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for act in (nearplane.load, open_source):
        with pytest.raises(nearplane.NearplaneError, match=f"tensor {name} .int16. is part of a quantized weight"):
            act(folder)


def test_an_index_shows_quantized_weights_before_they_are_fetched(made: Callable[[str], Path], tmp_path: Path) -> None:
    """plan of a folder, or of a hub id, whose small files are there alone."""
    (tmp_path / "config.json").write_text((dense_of(made("192")) / "config.json").read_text())
    index = {"weight_map": {"model.layers.0.mlp.up_proj.weight_scale_inv": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(nearplane.NearplaneError, match=r"up_proj\.weight_scale_inv is part of a quantized weight"):
        make_plan(tmp_path, sketch=True, grid=GRID, method=RTN())


def test_other_quantized_models_are_refused_with_what_to_do(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made("192"), tmp_path / "m"))
    coded.configure(folder, quantization_config={"quant_method": "hqq", "bits": 4})
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: org/original\n---\n")
    for act in (lambda: run(folder, tmp_path / "out"), lambda: make_plan(folder, sketch=True, grid=GRID)):
        with pytest.raises(SettingError, match=r"quantized already \(hqq, 4 bits\); give .*org/original"):
            act()
    with pytest.raises(nearplane.NearplaneError, match=r"is quantized with hqq; .*org/original"):
        nearplane.load(folder)
