"""The settings of generation_config.json reach ``load`` and ``generate``, as transformers' own loading has them."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

import nearplane
from nearplane import RTN, NearplaneError
from nearplane.cli.main import main
from nearplane.runtime import cpu, fused

PROMPT, GREEDY = "w7 w8 w9", 8


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    tiny.save(tiny.build("llama"), folder / "model")
    nearplane.quantize(folder / "model", folder / "out", method=RTN(), bits=4, group_size=32, progress=False)
    return folder / "out"


def settings(folder: Path, content: Any) -> None:
    """Write generation_config.json; None: there is none."""
    path = folder / "generation_config.json"
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def said(folder: Path, **options: Any) -> list[int]:
    """The tokens that nearplane generates."""
    text = nearplane.generate(folder, PROMPT, max_new_tokens=GREEDY, packed=False, **options).text
    return [int(word[1:]) for word in text.split()]


def wanted(folder: Path) -> list[int]:
    """The tokens that transformers generates greedily from the same folder."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=GREEDY, do_sample=False)
    return list(made[0, 3:].tolist())


def test_every_end_token_stops(out: Path) -> None:
    settings(out, {"eos_token_id": 127, "pad_token_id": 0})
    free = said(out)
    assert len(free) == GREEDY and free[1] != free[0]
    for ends, length in (([127, free[1]], 2), (free[1], 2), ([free[0]], 1), ([127], GREEDY)):
        settings(out, {"eos_token_id": ends})
        assert nearplane.generate(out, PROMPT, max_new_tokens=GREEDY).new_tokens == length
        assert said(out) == wanted(out) == free[:length]


@pytest.mark.parametrize(
    "content",
    [
        {"repetition_penalty": 3.0}, {"suppress_tokens": [5, 6]}, {"pad_token_id": 11, "eos_token_id": [2, 3]}, {}, None,
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2]}, {"min_new_tokens": 4},
    ],
)  # fmt: skip
def test_a_loaded_model_has_the_settings_that_transformers_reads(out: Path, content: Any) -> None:
    """Of a folder without the file, too: those of config.json then."""
    settings(out, content)
    found: Any = nearplane.load(out, packed=False)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert found.generation_config.to_dict() == model.generation_config.to_dict()
    assert said(out) == wanted(out)


def test_without_the_file_the_end_tokens_are_config_jsons(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("llama"), tmp_path / "model")
    settings(folder, None)
    free = said(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [99, free[1]]}))
    assert said(folder) == wanted(folder) == free[:2]


def test_search_and_shape_of_outputs_are_generates_own(out: Path) -> None:
    settings(out, {})
    free = said(out)
    settings(out, {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "penalty_alpha": 0.6})
    assert said(out) == free
    settings(out, {"do_sample": True, "top_k": 1})  # sampling among one token
    assert said(out, temperature=5.0) == free


@pytest.mark.parametrize(
    "content",
    ["{broken", "[]", {"eos_token_id": "</s>"}, {"eos_token_id": [[2]]}, {"early_stopping": 5}, {"max_new_tokens": -1}],
)
def test_broken_settings_are_a_sentence(out: Path, content: Any, capsys: pytest.CaptureFixture[str]) -> None:
    settings(out, content)
    with pytest.raises(NearplaneError, match=r"generation_config\.json"):
        nearplane.load(out)
    assert main(["generate", str(out), "--prompt", PROMPT]) == 2
    heard = capsys.readouterr().err
    assert "generation_config.json" in heard and "Traceback" not in heard


@pytest.mark.parametrize("content", [{"repetition_penalty": "x"}, {"exponential_decay_length_penalty": [1, 1.1]}])
def test_settings_that_fail_while_generating_are_a_sentence(out: Path, content: Any) -> None:
    settings(out, content)
    with pytest.raises(NearplaneError, match="transformers cannot generate"):
        said(out)


def test_bench_decodes_all_of_its_tokens(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever token ends a text."""
    settings(out, {"eos_token_id": list(range(tiny.VOCABULARY))})
    calls: list[int] = []
    kind = type(nearplane.load(out))
    true = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda *a, **k: (calls.append(1), true(*a, **k))[1])
    nearplane.bench(out, prompt_tokens=4, new_tokens=5, rounds=1, against=("fp32",))
    assert len(calls) == 2 * 4 * (1 + 5)  # two rounds of four ways: a prompt, and five tokens


@pytest.mark.skipif(cpu.best() is None, reason="no C++ kernel was built (no compiler)")
def test_text_is_that_of_the_plain_path_and_the_summary_names_the_path(out: Path, tmp_path: Path) -> None:
    """Through ``generate``, ``bench``, and transformers' own loading and pipeline; a model of another kind says why."""
    settings(out, {"eos_token_id": 127})
    for more in ({}, {"temperature": 0.8}, {"head_bits": 8}, {"arithmetic": "exact"}):
        auto, plain = (
            nearplane.generate(out, PROMPT, max_new_tokens=30, decode=way, **more) for way in ("auto", "plain")
        )
        assert auto.text == plain.text and auto.new_tokens > 20
        assert "), fused decode; " in auto.summary() and "), plain decode: asked for; " in plain.summary()
    speed = nearplane.bench(out, prompt_tokens=4, new_tokens=5, rounds=1, against=())
    assert speed.kernel.endswith(", fused decode") and all(0 < row.head_share < 1 for row in speed.rows)
    texts = []
    for way in ("auto", "plain"):
        with nearplane.enable(decode=way):
            model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        ids = torch.tensor([[7, 8, 9]])
        texts.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=GREEDY, do_sample=False))
        assert fused._of(model).tokens == (GREEDY - 1 if way == "auto" else 0)  # type: ignore[union-attr]
    assert torch.equal(*texts)
    tiny.save(tiny.build("gemma2"), tmp_path / "model")
    nearplane.quantize(tmp_path / "model", tmp_path / "out", method=RTN(), bits=4, group_size=32, progress=False)
    told = nearplane.generate(tmp_path / "out", PROMPT, max_new_tokens=2).summary()
    assert "), plain decode: Gemma2DecoderLayer has other modules than a standard block; " in told


def test_another_word_for_decode_is_a_sentence(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for call in (lambda: nearplane.load(out, decode="fast"), lambda: nearplane.enable(decode="fast")):  # type: ignore[arg-type]
        with pytest.raises(nearplane.SettingError, match="decode must be auto or plain; got 'fast'"):
            call()
    assert main(["generate", str(out), "--prompt", PROMPT, "--decode", "fast"]) == 2
    assert "decode" in capsys.readouterr().err
