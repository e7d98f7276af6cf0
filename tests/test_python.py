"""The Python surface: keywords of ``Job`` and ``LoadSettings``, and objects that print as text."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import nearplane
from nearplane import Job, LoadSettings, SettingError
from nearplane.models.source import load_tokenizer
from nearplane.run import forecast
from nearplane.run.probe import Products

SETTINGS: dict[str, Any] = {"bits": 3, "group_size": 32, "sym": False, "method": "gptq", "nsamples": 4, "seqlen": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.with_text(tmp_path_factory.mktemp("python"))


@pytest.fixture(scope="module")
def out(model: Path) -> Path:
    nearplane.quantize(model, model.parent / "out", dataset=str(model.parent / "text.txt"), **SETTINGS)
    return model.parent / "out"


def test_keywords_are_fields_of_job(model: Path, out: Path, tmp_path: Path) -> None:
    """A job and keywords give the same bytes."""
    job = Job.of(None, SETTINGS | {"dataset": str(model.parent / "text.txt"), "bits": 8})
    nearplane.quantize(model, tmp_path / "out", job, wbits=3)
    for file in out.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(SettingError, match="did you mean bits"):
        nearplane.quantize(model, tmp_path / "other", bitts=3)
    with pytest.raises(SettingError, match="unknown method 'gptz'"):
        nearplane.quantize(model, tmp_path / "other", method="gptz")
    assert not (tmp_path / "other").exists()


def test_silent_if_asked(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nearplane.quantize(model, tmp_path / "a", method="rtn", group_size=32, progress=False)
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""
    nearplane.quantize(model, tmp_path / "b", method="rtn", group_size=32)
    printed = capsys.readouterr()
    assert printed.out == "" and "block 2/2  weight error" in printed.err


def test_plan(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        forecast, "rates", lambda _plan, _found: forecast.Rates(1e-6, Products(*[1e-6] * 3), *[1e-6] * 9)
    )
    found = nearplane.plan(model, **SETTINGS)
    assert found.plan.grid.bits == 3 and "14 linears in 2 blocks" in repr(found)
    assert type(found).__repr__ is type(found).__str__  # their words hold how much memory is free at the moment
    assert nearplane.plan(model, Job.of(None, SETTINGS), ranks=2, device="cpu").ranks == 2


def test_generate_from_a_folder_and_from_a_model(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from_folder = nearplane.generate(out, "w5 w6", max_new_tokens=4, threads=1, device="cpu")
    loaded = nearplane.load(out, device="cpu")
    before = torch.get_num_threads()
    assert nearplane.generate(loaded, "w5 w6", max_new_tokens=4).text == from_folder.text
    assert nearplane.generate(loaded, "w5 w6", tokenizer=load_tokenizer(out), max_new_tokens=4).text == from_folder.text
    assert repr(from_folder) == f"{from_folder.text}\n{from_folder.summary()}" and from_folder.threads == 1
    assert torch.get_num_threads() == before and capsys.readouterr().out == ""
    with pytest.raises(SettingError, match="this model is loaded already"):
        nearplane.generate(loaded, "w5", dtype="bfloat16")
    with pytest.raises(SettingError, match="give its tokenizer"):
        nearplane.generate(tiny.build("llama"), "w5")
    with pytest.raises(SettingError, match="at most 1024"):
        nearplane.generate(out, "w5", threads=0)


def test_inspect(model: Path, out: Path) -> None:
    found = nearplane.inspect(model, bits=3, group_size=32, sym=False)
    assert (found.kind, found.quantized, found.linears, found.weights) == ("llama", False, 14, 61440)
    assert found.after is not None and found.after < found.before and f"after {found.after:,} (3 bits" in repr(found)
    packed = nearplane.inspect(str(out))
    assert packed.quantized and packed.linears == 14 and packed.after is None
    (line,) = [line for line in str(packed).splitlines() if "q_proj" in line]
    assert " ".join(line.split()) == "model.layers.*.self_attn.q_proj 2 of 64 x 64 3 bits, group 32, asymmetric"
    with pytest.raises(SettingError, match="unknown setting 'bitts'"):
        nearplane.inspect(model, bitts=3)
    with pytest.raises(SettingError, match="inspect takes settings of the grid only"):
        nearplane.inspect(model, bits=3, nsamples=4)


def test_bench_verify_convert_and_evaluate_print_as_text(model: Path, out: Path) -> None:
    table = repr(nearplane.bench(out, prompt_tokens=4, new_tokens=2, rounds=1, against=("fp32",)))
    assert "dense fp32" in table and max(map(len, table.splitlines()[1:])) <= 80
    with pytest.raises(SettingError, match="against takes bf16 and fp32; got 'fp64'"):
        nearplane.bench(out, against=("fp64",))
    checked = nearplane.verify(out)
    assert repr(checked).startswith(f"{out}: no problem found; ") and checked.listing().count("\n") == len(
        checked.files
    )
    assert "codes, scales and zeros" in repr(nearplane.Conversion("a", "b", "gptq", "gptq_v2", 7, 2))
    result = nearplane.evaluate(out, dataset=str(model.parent / "text.txt"), seqlen=32, windows=2, reference=model)
    assert repr(result).startswith("perplexity ") and "protocol: " in repr(result)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dtype": "float64"}, "dtype must be auto, float32, float16 or bfloat16; got 'float64'"),
        ({"arithmetic": "a4"}, "arithmetic must be auto, exact, a16, a8; got 'a4'"),
        ({"packed": 1}, "packed must be True or False; got 1"),
        ({"head_bits": 9}, "bits must be 2 to 8"),
        ({"head_bits": True}, "bits must be 2 to 8"),
        ({"device": "abacus"}, "not usable here"),
        ({"dtyp": "float32"}, "unknown setting 'dtyp'; did you mean dtype?"),
        ({"xyzzy": 1}, "unknown setting 'xyzzy'; the settings are device, dtype, packed"),
    ],
)
def test_load_settings_are_validated_once_for_all(settings: dict[str, Any], says: str, model: Path) -> None:
    for call in (nearplane.load, nearplane.evaluate, lambda path, **words: nearplane.generate(path, "w5", **words)):
        with pytest.raises(SettingError, match=says.replace("?", r"\?")):
            call(model, **settings)
    assert LoadSettings().of_original() == LoadSettings() != LoadSettings(packed=False)
