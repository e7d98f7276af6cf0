"""The command line: what it says, and that bad input is one clear sentence, exit status 2 and nothing written."""

import json
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch

from nearplane.cli.main import main
from nearplane.runtime import cpu

GRID = ["--group-size", "32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.with_text(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def data(model: Path) -> list[str]:
    return ["--dataset", str(model.parent / "text.txt"), "--nsamples", "4", "--seqlen", "32", *GRID]


def copy(model: Path, folder: Path) -> Path:
    """The model, to be broken."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def edit(folder: Path, **tensors: Any) -> Path:
    """Change some weights of a copied model."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    for name, change in tensors.items():
        key = name.replace("__", ".")
        state[key] = change(state[key].clone())
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def configure(folder: Path, **settings: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def refused(words: list[str], capsys: pytest.CaptureFixture[str], out: Path | None = None) -> str:
    """Run, and check the manner of the refusal; returns its sentence."""
    status, message = main(words), capsys.readouterr().err
    assert status == 2
    assert message.splitlines()[-1].startswith("nearplane: ") and "Traceback" not in message
    if out is not None:
        assert not out.exists()
    return " ".join(message.split())


def test_quantize_eval_inspect(
    model: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(model), str(out), "--bits", "3", "--no-sym", "--method", "gptq", *data]) == 0
    printed = capsys.readouterr()
    assert "14 linears" in printed.out and "MB ->" in printed.out
    assert "block 2/2  error 0." in printed.err and "(rtn" in printed.err and "worst " in printed.err
    words = ["--dataset", str(model.parent / "text.txt"), "--seqlen", "64", "--windows", "4"]
    assert main(["eval", str(out), "--reference", str(model), "--json", *words]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["windows"] == 4 and result["kl"] > 0 and 0 < result["top1"] <= 1 and "protocol" in result
    assert main(["eval", str(model), *words]) == 0
    assert "protocol: " in capsys.readouterr().out
    assert main(["inspect", str(model)]) == 0
    printed = capsys.readouterr()
    assert "stage 4, 96 inputs" in printed.out and "mlp.down_proj" in printed.out and "14 linears" in printed.out
    assert main(["inspect", str(out)]) == 0
    check, told = json.loads((out / "report.json").read_text())["check"], capsys.readouterr().out
    assert "3 bits, group 32, asymmetric" in told
    assert f"error {check['error']:.4f} (rtn " in told and f"KL to the original {check['kl']:.4g} nats" in told


def test_inspect_predicts_the_size(
    model: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    grid = ["--bits", "3", "--no-sym", "--group-size", "32"]
    assert main(["inspect", str(model), *grid]) == 0
    printed = capsys.readouterr().out
    assert main(["quantize", str(model), str(out), "--method", "rtn", *grid]) == 0
    after = json.loads((out / "report.json").read_text())["bytes"]["after"]
    assert f"after {after:,}" in printed


def test_aliases_reach_the_one_name(model: Path, data: list[str], tmp_path: Path) -> None:
    words = [
        "--wbits",
        "3",
        "--groupsize",
        "32",
        "--percdamp=0.02",
        "--act-order",
        "--true-sequential",
        "--method=gptq",
    ]
    rest = data[: -len(GRID)]
    assert main(["quantize", str(model), str(tmp_path / "out"), *words, *rest]) == 0
    settings = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]
    assert settings["grid"]["bits"] == 3 and settings["grid"]["group_size"] == 32
    assert settings["method"]["damp_percent"] == 0.02 and settings["method"]["order"] == "activation"


@pytest.mark.parametrize("method", ["rtn", "obq", "gptq", "gptaq", "rescomp", "nearplane"])
@pytest.mark.parametrize("bits", ["2", "ternary"])
def test_every_method_from_the_command_line(
    method: str, bits: str, model: Path, data: list[str], tmp_path: Path
) -> None:
    data = GRID if method == "rtn" else data
    assert main(["quantize", str(model), str(tmp_path / "out"), "--method", method, "--bits", bits, *data]) == 0


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0 and main(["--help"]) == 0 and main(["--version"]) == 0
    assert main(["quantize", "--help", "--method", "rescomp"]) == 0
    text = capsys.readouterr().out
    for flag in ("--alpha2", "--variant", "--damp-percent", "--bits", "--fit", "--nsamples", "--seed", "--dtype"):
        assert flag in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "gptz"], "unknown method 'gptz'"),
        (["--method", "no.such:Thing"], "cannot be imported"),
        (["--method", ":x"], "unknown method"),
        (["--method", "rtn", "--method", "gptq"], "given 2 times"),
        (["--scale-dtype", "float16"], "there is no flag"),
        (["--bits", "three"], "--bits takes a whole number or ternary; got 'three'."),
        (["--order", "random"], "--order takes natural, activation or pivot; got 'random'."),
        (["--alfa", "1"], "unknown option --alfa"),
        (
            ["--method", "gptq", "--rounds", "2"],
            "--rounds is an option of --method nearplane, not of gptq; nearplane quantize",
        ),
        (["--method", "gptaq", "--alpha", "nan"], "alpha is a share"),
        (["--seed", "99999999999999999999999"], "seed must be"),
        (["--device", "meta"], "not usable here"),
        (["--method", "json:JSONDecoder"], "is not a class with needs, prepare and solve"),
        (["--bits", "9"], "bits must be 2 to 8"),
        (["--bits", "three"], "--bits"),
        (["--bits", "ternary", "--no-sym"], "symmetric by definition"),
        (["--group-size", "0"], "group_size must be positive"),
        (["--order", "sideways"], "--order"),
        (["--method", "gptq", "--no-static-groups"], "groups must be static"),
        (["--damp-percent", "7"], "damp_percent is a fraction"),
        (["--format", "exl2"], "format must be one of"),
        (["--device", "abacus"], "not usable here"),
        (["--nsamples", "0"], "nsamples must be at least 1"),
        (["--alpha2", "0.5"], "--alpha2 is an option of --method rescomp, not of nearplane"),
        (["--dataset", "missing.txt"], "does not exist"),
        (["--format", "gptq", "--bits", "3", "--no-sym"], "gptq_v2"),
        (["--format", "gptq", "--group-size", "40"], "32"),
        (["--method", "rtn", "--fit", "hessian"], "reads no calibration data"),
    ],
)
def test_settings_that_cannot_work(
    words: list[str], says: str, model: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = set(words[::2])
    defaults = [w for a, b in zip(data[::2], data[1::2], strict=True) if a not in given for w in (a, b)]
    defaults = GRID if "rtn" in words else defaults
    assert says in refused(["quantize", str(model), str(out), *words, *defaults], capsys, out)


def test_models_that_cannot_be_opened(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"

    def says(folder: Path | str) -> str:
        return refused(["quantize", str(folder), str(out), "--method", "rtn", *GRID], capsys, out)

    assert "no such folder" in says("./nowhere")
    (tmp_path / "file").write_text("x")
    assert "is a file" in says(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "empty" in says(tmp_path / "empty")
    truncated = copy(model, tmp_path / "truncated")
    whole = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in says(truncated)
    (truncated / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    assert "model.safetensors" in says(truncated)
    pickled = copy(model, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"PK")
    assert "pickle" in says(pickled)
    remote = configure(copy(model, tmp_path / "remote"), model_type="own", auto_map={"AutoConfig": "own.Config"})
    assert "trust_remote_code" in says(remote)
    unknown = configure(copy(model, tmp_path / "unknown"), model_type="llamma")
    assert "does not know model_type 'llamma'" in says(unknown)
    for number, absurd in enumerate(({"num_attention_heads": 0}, {"hidden_size": "many"}, {"model_type": ["llama"]})):
        says(configure(copy(model, tmp_path / f"absurd{number}"), **absurd))
    garbled = copy(model, tmp_path / "garbled")
    (garbled / "config.json").write_text("{")
    assert "config.json" in says(garbled)
    wider = configure(copy(model, tmp_path / "wider"), hidden_size=128)
    assert "shape" in says(wider)
    deeper = configure(copy(model, tmp_path / "deeper"), num_hidden_layers=3)
    assert "lacks" in says(deeper)
    encoder = configure(copy(model, tmp_path / "encoder"), model_type="vit")
    assert "weights that config.json asks for" in says(encoder)
    quantized = configure(copy(model, tmp_path / "quantized"), quantization_config={"quant_method": "gptq"})
    assert "holds no quantized tensor" in says(quantized)


def test_an_offline_hub_id(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    assert "hub cannot be reached" in refused(["quantize", "nobody/no-such-model", str(out)], capsys, out)
    assert "hub cannot be reached" in refused(["eval", "nobody/no-such-model"], capsys)


def test_out_must_be_empty(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    assert "not empty" in refused(["quantize", str(model), str(tmp_path / "out"), "--method", "rtn"], capsys)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious.txt"]
    (tmp_path / "file").write_text("x")
    assert "file" in refused(["quantize", str(model), str(tmp_path / "file"), "--method", "rtn"], capsys)


def poison(value: torch.Tensor) -> torch.Tensor:
    value[0, 0] = torch.nan
    return value


def test_a_nan_weight_is_named_and_nothing_stays(
    model: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    broken = edit(copy(model, tmp_path / "broken"), **{name.replace(".", "__"): poison})
    for method, extra in (("rtn", GRID), ("gptaq", data)):
        out = tmp_path / "out"
        message = refused(["quantize", str(broken), str(out), "--method", method, *extra], capsys, out)
        assert name in message and "NaN or Inf" in message
    assert name in refused(["eval", str(broken), *data[:2], "--seqlen", "32"], capsys)


def test_non_finite_activations_name_the_layer(
    model: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = {
        "model__layers__0__mlp__gate_proj__weight": lambda w: w * 1e15,
        "model__layers__0__mlp__up_proj__weight": lambda w: w * 1e15,
    }
    broken = edit(copy(model, tmp_path / "huge"), **huge)
    out = tmp_path / "out"
    message = refused(["quantize", str(broken), str(out), "--method", "gptq", *data], capsys, out)
    assert "model.layers.0.mlp.down_proj" in message and ("NaN or Inf" in message or "overflow" in message)


def test_calibration_text_too_short(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for content, says in (("w3 w4 w5", "fewer than one window"), ("", "is empty")):
        (tmp_path / "short.txt").write_text(content)
        words = ["quantize", str(model), str(out), "--dataset", str(tmp_path / "short.txt"), "--seqlen", "32", *GRID]
        assert says in refused(words, capsys, out)


def test_an_interrupt_before_a_block_is_done_leaves_nothing(
    model: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nearplane.methods import GPTQ

    solved: list[int] = []
    solve = GPTQ.solve

    def interrupt(self: GPTQ, *args: Any) -> Any:
        solved.append(1)
        if len(solved) == 3:  # of the four stages of the first block
            raise KeyboardInterrupt
        return solve(self, *args)

    monkeypatch.setattr(GPTQ, "solve", interrupt)
    out = tmp_path / "out"
    assert main(["quantize", str(model), str(out), "--method", "gptq", *data]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert not out.exists()


def test_a_hessian_that_stays_indefinite(
    model: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nearplane.methods import GPTQ

    prepare = GPTQ.prepare

    def indefinite(self: GPTQ, moments: Any) -> Any:
        moments.H[0, 1] = moments.H[1, 0] = 1e6 * moments.H.diagonal().max()
        return prepare(self, moments)

    monkeypatch.setattr(GPTQ, "prepare", indefinite)
    out = tmp_path / "out"
    message = refused(["quantize", str(model), str(out), "--method", "gptq", *data], capsys, out)
    assert (
        "model.layers.0.self_attn.q_proj" in message
        and "not positive definite" in message
        and "Likely causes" in message
    )


def test_what_is_copied_is_checked_before_any_compute(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A head that no block reads, and a dense weight that its new dtype cannot hold."""
    out = tmp_path / "out"
    head = edit(copy(model, tmp_path / "head"), lm_head__weight=poison)
    message = refused(["quantize", str(head), str(out), "--method", "rtn", *GRID], capsys, out)
    assert "lm_head.weight" in message and "quantize " not in message.split("nearplane:")[0]
    large = edit(copy(model, tmp_path / "large"), model__norm__weight=lambda w: w * 1e6)
    words = ["quantize", str(large), str(out), "--method", "rtn", "--dtype", "float16", *GRID]
    assert "model.norm.weight does not fit the range of float16" in refused(words, capsys, out)


def test_our_own_output_is_recognised(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for format in ("compressed-tensors", "gptq"):
        done, again = tmp_path / format, tmp_path / f"{format}-again"
        assert main(["quantize", str(model), str(done), "--method", "rtn", "--format", format, *GRID]) == 0
        assert "quantized already" in refused(["quantize", str(done), str(again)], capsys, again)


def test_experts_of_an_unknown_layout_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LongCat's have experts that do nothing among them."""
    sizes = {"n_routed_experts": 2, "expert_ffn_hidden_size": 48, "q_lora_rank": 16, "kv_lora_rank": 16}
    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, **tiny.LATENT}
    folder = tiny.save(tiny.build("longcat_flash", **sizes, **heads), tmp_path / "moe")
    assert "merges weights" in refused(["quantize", str(folder), str(tmp_path / "out")], capsys, tmp_path / "out")


def test_a_tokenizer_of_another_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tiny.save(tiny.build("llama", vocab_size=64), tmp_path / "small")
    text = ["--dataset", str(model.parent / "text.txt"), "--seqlen", "32"]
    assert "do not belong together" in refused(["eval", str(small), *text], capsys)
    words = ["quantize", str(small), str(tmp_path / "out"), "--nsamples", "2", *GRID, *text]
    assert "do not belong together" in refused(words, capsys, tmp_path / "out")
    assert "do not belong together" in refused(["eval", str(model), "--reference", str(small), *text], capsys)


def test_a_folder_that_cannot_be_written_says_so_first(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    (tmp_path / "out").mkdir()
    message = refused(["quantize", str(model), str(tmp_path / "out"), "--method", "rtn", *GRID], capsys)
    assert "cannot be written to" in message and "q_proj" not in message


def test_obq_refuses_a_large_layer_before_it_starts(
    model: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nearplane.methods.obq.MOST_WORK", 64 * 64**3)
    out = tmp_path / "out"
    message = refused(["quantize", str(model), str(out), "--method", "obq", *data], capsys, out)
    assert "gate_proj" in message and "out·in³" in message and "tokens" not in message


def test_unused_tensors_and_a_cut_window_are_noted(
    model: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shallow = configure(copy(model, tmp_path / "shallow"), num_hidden_layers=1)
    words = [*data[:2], "--nsamples", "2", "--seqlen", "500", *GRID]
    assert main(["quantize", str(shallow), str(tmp_path / "out"), "--method", "gptq", *words]) == 0
    printed = capsys.readouterr().out
    assert "9 stored tensors belong to no parameter" in printed and "seqlen cut to 64" in printed
    assert main(["eval", str(shallow), *data[:2], "--seqlen", "32"]) == 0
    assert "9 tensors that its model does not use" in capsys.readouterr().err


def test_the_certificate_and_the_python_surface_refuse_nonsense(model: Path, tmp_path: Path) -> None:
    from nearplane import GPTAQ, RTN, Calibration, Grid, NearplaneError, Quantized, quantize

    class Wrong(RTN):
        def solve(self, weight: torch.Tensor, state: None, grid: Grid) -> Quantized:
            return super().solve(weight[:, :32], state, grid)

    class Greedy(RTN):
        needs = frozenset({"X"})  # type: ignore[assignment]

    for method, says in (
        (3, "must be an object"),
        ("gptz", "unknown method"),
        (RTN, "must be an object"),
        (Greedy(), "may need"),
        (Wrong(), "shape"),
    ):
        with pytest.raises(NearplaneError, match=says):
            quantize(model, tmp_path / "out", method=method, grid=Grid(group_size=32), progress=False)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()
    with pytest.raises(NearplaneError, match="alpha is a share"):
        GPTAQ(alpha=float("nan"))
    with pytest.raises(NearplaneError, match="seed"):
        Calibration(seed=2**80)


@pytest.fixture(scope="module")
def checkpoint(model: Path) -> Path:
    out = model.parent / "packed"
    assert main(["quantize", str(model), str(out), "--method", "rtn", "--bits", "3", *GRID]) == 0
    return out


def test_generate_streams_text_and_says_what_it_cost(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    words = ["generate", str(checkpoint), "--prompt", "w5 w6", "--max-new-tokens", "6"]
    assert main(words) == 0
    plain = capsys.readouterr()
    assert 1 <= len(plain.out.split()) <= 6 and all(word.startswith("w") for word in plain.out.split())
    assert "tokens/s" in plain.err and "peak memory" in plain.err and "2 prompt tokens" in plain.err
    assert main([*words, "--arithmetic", "exact", "--head-bits", "8", "--threads", "1", "--dtype", "bfloat16"]) == 0
    assert "(1 threads)" in capsys.readouterr().err
    for wrong, sentence in (
        (["--chat"], "no chat template"), (["--max-new-tokens", "0"], "at least 1"), (["--threads", "0"], "at least 1"),
        (["--head-bits", "9"], "bits must be 2 to 8"), (["--threads", "100000"], "at most 1024"),
        (["--seed", str(2**64)], "seed must be"), (["--temperature", "nan"], "from 0.01 to 100"),
    ):  # fmt: skip
        assert sentence in refused([*words, *wrong], capsys)


def test_bench_prints_a_table_or_json(checkpoint: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    words = ["bench", str(checkpoint), "--prompt-tokens", "4", "--new-tokens", "2", "--rounds", "1"]
    assert main([*words, "--json", "--against", "fp32"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["rows"]][-1] == "dense fp32" and result["rounds"] == 1
    assert main(words) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "dense bf16" in printed and "batch 1, 2 tokens decoded after a prompt of 4" in printed
    assert "is not quantized" in refused(["bench", str(model)], capsys)
    assert "64 positions" in refused(["bench", str(checkpoint), "--prompt-tokens", "80"], capsys)


def test_eval_measures_the_packed_model(checkpoint: Path, data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    words = ["eval", str(checkpoint), "--dataset", data[1], "--seqlen", "32", "--windows", "8", "--json"]
    found = []
    for more in ([], ["--no-packed"], ["--arithmetic", "exact"], ["--arithmetic", "a8"]):
        assert main([*words, *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert found[0] == pytest.approx(found[1], rel=1e-3) and found[2] == pytest.approx(found[1], rel=1e-5)
    assert (found[3] == found[1]) == (cpu.best() is None) and found[3] == pytest.approx(found[1], rel=0.1)
