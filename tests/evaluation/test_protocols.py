"""Named protocols of perplexity: the loops of other tools, restated, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from nearplane.cli.main import main
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.evaluation.perplexity import evaluate

WORDS = 2300
Marked = Any


class Words:
    """The tokenizer of tests/tiny.py; one that marks puts <s> (1) before a text. A newline is a token of its own."""

    def __init__(self, marks: bool) -> None:
        self.marks, self.bos_token_id = marks, 1 if marks else None

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        ids = [2 if word == "|" else int(word[1:]) for word in text.replace("\n", " | ").split()]
        return {"input_ids": [1, *ids] if add_special_tokens and self.marks else ids}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return ["<s>" for _ in ids]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny.build("llama", max_position_embeddings=4096, num_hidden_layers=1)


@pytest.fixture(scope="module")
def other() -> torch.nn.Module:
    return tiny.build("llama", seed=1, max_position_embeddings=4096, num_hidden_layers=1)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(tiny.text(WORDS) + "\n")
    return str(path)


def gptq(model: Any, ids: torch.Tensor, seqlen: int = 2048) -> float:
    """The loop of GPTQ's llama.py: nll of a window is its mean loss times seqlen, and perplexity divides by all tokens."""
    nlls, nsamples = [], ids.shape[1] // seqlen
    for i in range(nsamples):
        batch = ids[:, i * seqlen : (i + 1) * seqlen]
        logits = model(batch).logits
        loss = torch.nn.CrossEntropyLoss()(logits[:, :-1].reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))
        nlls.append(loss.float() * seqlen)
    return float(torch.exp(torch.stack(nlls).sum() / (nsamples * seqlen)))


def hf_stride(model: Any, ids: torch.Tensor, max_length: int, stride: int = 512) -> float:
    """The loop of transformers' documentation, with the loss that the model computes."""
    nll_sum, n_tokens, prev_end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + max_length, ids.shape[1])
        trg_len = end - prev_end
        input_ids = ids[:, begin:end]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        loss = model(input_ids, labels=target_ids).loss
        valid = int((target_ids != -100).sum()) - 1
        nll_sum, n_tokens, prev_end = nll_sum + float(loss) * valid, n_tokens + valid, end
        if end == ids.shape[1]:
            break
    return math.exp(nll_sum / n_tokens)


def llama_cpp(model: Any, ids: list[int], bos: int | None, n_ctx: int = 512) -> tuple[float, int]:
    """As llama-perplexity goes: BOS in place of a chunk's first token, and tokens behind the middle one are scored."""
    total, count, first = 0.0, 0, n_ctx // 2
    for chunk in range(len(ids) // n_ctx):
        window = ids[chunk * n_ctx : (chunk + 1) * n_ctx]
        window = [bos, *window[1:]] if bos is not None else window
        p = model(torch.tensor([window])).logits[0].double().log_softmax(1)
        for j in range(first, n_ctx - 1):
            total, count = total - float(p[j, window[j + 1]]), count + 1
    return math.exp(total / count), count


@pytest.mark.parametrize("marks", [False, True])
def test_gptq(marks: bool, text: str, model: Any) -> None:
    tokenizer = Words(marks)
    result = evaluate(model, tokenizer, dataset=text, protocol="gptq")
    ids = torch.tensor([tokenizer(Path(text).read_text())["input_ids"]])
    with torch.inference_mode():
        assert result.perplexity == pytest.approx(gptq(model, ids), rel=1e-5)
    assert (result.windows, result.seqlen, result.tokens) == (1, 2048, 2047)
    assert "protocol gptq: tokenized once, 1 consecutive windows of 2048 tokens, first token" in result.protocol
    assert ("<s> before the first of them alone" in result.protocol) == marks
    assert evaluate(model, tokenizer, dataset=text, protocol="gptq", seqlen=2048).perplexity == result.perplexity


def test_gptq_joins_rows_and_keeps_to_the_models_limit() -> None:
    """As opt.py, whose seqlen is the model's number of positions; empty rows of a dataset are joined, too."""
    small = tiny.build("llama")
    rows = [tiny.text(100), "", tiny.text(90, seed=1), tiny.text(40, seed=2)]
    result = evaluate(small, Words(False), dataset=rows, protocol="gptq")
    ids = torch.tensor([Words(False)("\n\n".join(rows))["input_ids"]])
    with torch.inference_mode():
        assert result.perplexity == pytest.approx(gptq(small, ids, 64), rel=1e-5)
    assert "rows joined by empty lines" in result.protocol
    assert "windows of 64 tokens (the model's limit; the protocol has 2048)" in result.protocol


@pytest.mark.parametrize("marks", [False, True])
def test_llama_cpp(marks: bool, text: str, model: Any) -> None:
    tokenizer = Words(marks)
    result = evaluate(model, tokenizer, dataset=text, protocol="llama.cpp")
    ids = tokenizer(Path(text).read_text().removesuffix("\n"))["input_ids"]
    with torch.inference_mode():
        expected, count = llama_cpp(model, ids, 1 if marks else None)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert (result.windows, result.tokens) == (4, count) == (4, 4 * 255)
    assert (
        "4 consecutive windows of 512 tokens" in result.protocol
        and "tokens 258 to 512 of each scored" in result.protocol
    )
    assert ("replaced by <s>" in result.protocol) == marks and ("no BOS" in result.protocol) != marks


def test_llama_cpp_drops_the_last_newline(tmp_path: Path, model: Any) -> None:
    exact = tmp_path / "exact.txt"
    exact.write_text(tiny.text(1535) + "\n")  # 1536 tokens with the newline, which would make a third window
    assert evaluate(model, Words(False), dataset=str(exact), protocol="llama.cpp").windows == 2


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("size", [512, 600, 1000, 2200, 4096])
def test_hf_stride(marks: bool, size: int, text: str, model: Any) -> None:
    tokenizer = Words(marks)
    result = evaluate(model, tokenizer, dataset=text, protocol="hf-stride", seqlen=size)
    ids = torch.tensor([tokenizer(Path(text).read_text())["input_ids"]])
    with torch.inference_mode():
        assert result.perplexity == pytest.approx(hf_stride(model, ids, size), rel=1e-5)
    assert f"windows of up to {size} tokens, each 512 further on" in result.protocol
    assert (
        size == 512 or result.tokens == ids.shape[1] - 1
    )  # each once; without overlap, none at the beginning of a window


def test_divergence_is_of_the_scored_tokens(text: str, model: Any, other: Any) -> None:
    """And a model is as far from itself as it should be, with the perplexity of its own protocol."""
    for name in ("gptq", "llama.cpp", "hf-stride"):
        result = evaluate(model, Words(True), dataset=text, protocol=name, reference=other)
        alone = evaluate(other, Words(True), dataset=text, protocol=name)
        assert result.reference_perplexity == alone.perplexity and result.kl is not None and result.kl > 0.01
        same = evaluate(model, Words(True), dataset=text, protocol=name, reference=model)
        assert same.kl == pytest.approx(0, abs=1e-6) and same.reference_perplexity == same.perplexity
    ids = [1, *Words(False)(Path(text).read_text())["input_ids"]]
    total, count = 0.0, 0
    with torch.inference_mode():
        for chunk in range(4):
            window = torch.tensor([[1, *ids[512 * chunk + 1 : 512 * chunk + 512]]])
            p, q = (some(window).logits[0, 256:511].double().log_softmax(1) for some in (other, model))
            total, count = total + float((p.exp() * (p - q)).sum()), count + 255
    result = evaluate(model, Words(True), dataset=text, protocol="llama.cpp", reference=other)
    assert result.kl == pytest.approx(total / count, rel=1e-4)


def test_fewer_windows_are_said(text: str, model: Any) -> None:
    result = evaluate(model, Words(False), dataset=text, protocol="llama.cpp", windows=2)
    assert result.windows == 2 and "the first 2 of 4 consecutive windows" in result.protocol
    assert "the first" not in evaluate(model, Words(False), dataset=text, protocol="llama.cpp", windows=9).protocol
    assert result.as_dict()["scheme"] == "llama.cpp" and result.as_dict()["protocol"] == result.protocol


def test_refusals(text: str, model: Any) -> None:
    small, words = tiny.build("llama"), Words(False)
    for error, match, chosen, settings in (
        (SettingError, "protocol must be one of gptq, llama.cpp, hf-stride; got 'c4'", model, {"protocol": "c4"}),
        (SettingError, "gptq has windows of 2048 tokens, and seqlen=512 is given", model, {"protocol": "gptq", "seqlen": 512}),
        (SettingError, "llama.cpp has windows of 512 tokens, and seqlen=2048", model, {"protocol": "llama.cpp", "seqlen": 2048}),
        (SettingError, "decides about BOS", model, {"protocol": "gptq", "bos": False}),
        (SettingError, "windows of 512 tokens, and the model a limit of 64", small, {"protocol": "llama.cpp"}),
        (SettingError, "steps by 512 tokens, and a window has 64", small, {"protocol": "hf-stride"}),
        (SettingError, "the model's limit is 131072 tokens: give --seqlen",
         tiny.build("llama", max_position_embeddings=131072, num_hidden_layers=1), {"protocol": "hf-stride"}),
        (NearplaneError, "fewer than one window of 2048", model, {"protocol": "gptq", "dataset": ["w1 w2"]}),
        (NearplaneError, "needs at least 1024", model, {"protocol": "llama.cpp", "dataset": [tiny.text(1000)]}),
        (NearplaneError, "at least 2 are needed", model, {"protocol": "hf-stride", "dataset": ["w1"]}),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            evaluate(chosen, words, **{"dataset": text, **settings})  # type: ignore[arg-type]


def test_the_command_line(text: str, tmp_path: Path, model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save(model, tmp_path / "model")
    assert main(["eval", str(folder), "--dataset", text, "--protocol", "llama.cpp", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scheme"] == "llama.cpp" and found["seqlen"] == 512 and "protocol llama.cpp" in found["protocol"]
    assert main(["eval", str(folder), "--dataset", text, "--protocol", "gptq", "--seqlen", "100"]) == 2
    assert "gptq has windows of 2048" in capsys.readouterr().err
    assert main(["eval", str(folder), "--dataset", text, "--protocol", "llamacpp"]) == 2
    assert "did you mean llama.cpp?" in capsys.readouterr().err
    vit = tiny.save(tiny.build("bert"), tmp_path / "bert")
    assert main(["eval", str(vit), "--reference", str(vit), "--protocol", "gptq"]) == 2
    assert "are for language models" in capsys.readouterr().err
