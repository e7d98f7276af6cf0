"""Perplexity, KL and agreement against plain arithmetic."""

import math
from pathlib import Path

import pytest
import tiny
import torch

import nearplane.evaluation.perplexity
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.evaluation.perplexity import Divergence, evaluate
from nearplane.models.source import load_tokenizer


class Words:
    """The tokenizer of tests/tiny.py, without its files."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(tiny.text(210))
    return str(path)


def test_perplexity_is_exp_of_the_mean_loss_with_the_first_token_unscored(text: str) -> None:
    model = tiny.build("llama")
    result = evaluate(model, Words(), dataset=text, seqlen=40)
    ids = torch.tensor(Words()(Path(text).read_text())["input_ids"])
    total, scored = 0.0, 0
    for w in range(5):  # 210 tokens: five windows of 40, ten left over
        window = ids[40 * w : 40 * w + 40]
        with torch.no_grad():
            p = model(input_ids=window[None]).logits[0].double().softmax(1)
        for t in range(1, 40):
            total -= math.log(float(p[t - 1, window[t]]))
            scored += 1
    assert (result.windows, result.tokens) == (5, scored) == (5, 195)
    assert result.perplexity == pytest.approx(math.exp(total / scored), rel=1e-5)
    assert evaluate(model, Words(), dataset=text, seqlen=40, windows=2).tokens == 78
    assert "5 consecutive windows of 40" in result.protocol


class Opening(Words):
    """It puts <s> (1) before a text and </s> (2) behind it."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return ["<s>" for _ in ids]


def losses(model: torch.nn.Module, ids: list[int]) -> tuple[list[float], torch.Tensor]:
    """Of each token but the first its negative log-likelihood; and all log-probabilities."""
    with torch.no_grad():
        p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(1)
    return [-float(p[t - 1, ids[t]]) for t in range(1, len(ids))], p


def test_with_bos_every_token_of_the_text_is_scored(text: str) -> None:
    model, other = tiny.build("llama"), tiny.build("llama", seed=1)
    result = evaluate(model, Opening(), dataset=text, seqlen=40, reference=other)
    ids = Words()(Path(text).read_text())["input_ids"]
    nll, kl = [], []
    for first in range(0, 39 * 5, 39):  # 210 tokens: five times 39, fifteen left over
        window = [1, *ids[first : first + 39]]
        found, q = losses(model, window)
        _, p = losses(other, window)
        nll += found
        kl += [float((p[t].exp() * (p[t] - q[t])).sum()) for t in range(39)]
    assert (result.windows, result.tokens, len(nll)) == (5, 195, 195)
    assert result.perplexity == pytest.approx(math.exp(sum(nll) / 195), rel=1e-5)
    assert result.kl == pytest.approx(sum(kl) / 195, rel=1e-4)
    assert "5 consecutive windows of 40 tokens, each begins with <s>, unscored: 195 tokens scored" in result.protocol
    assert result.as_dict()["bos"] is True and result.as_dict()["opening"] == "<s>"


def test_without_bos_the_marked_text_is_cut(text: str) -> None:
    model = tiny.build("llama")
    result = evaluate(model, Opening(), dataset=text, seqlen=40, bos=False)
    ids = Opening()(Path(text).read_text())["input_ids"]
    nll = [loss for w in range(5) for loss in losses(model, ids[40 * w : 40 * w + 40])[0]]
    assert result.perplexity == pytest.approx(math.exp(sum(nll) / 195), rel=1e-5)
    assert "first token of each unscored, <s> not put before: 195" in result.protocol
    same = evaluate(model, Words(), dataset=text, seqlen=40)
    assert same.perplexity == evaluate(model, Words(), dataset=text, seqlen=40, bos=False).perplexity
    assert "<s>" not in same.protocol and "first token of each unscored: 195" in same.protocol


def test_an_opening_of_several_tokens(text: str) -> None:
    class Two(Opening):
        def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
            ids = Words.__call__(self, text)["input_ids"]
            return {"input_ids": [1, 1, *ids] if add_special_tokens else ids}

    model = tiny.build("llama")
    result = evaluate(model, Two(), dataset=text, seqlen=40, windows=1)
    found, _ = losses(model, [1, 1, *Words()(Path(text).read_text())["input_ids"][:38]])
    assert result.tokens == 38 and result.perplexity == pytest.approx(math.exp(sum(found[1:]) / 38), rel=1e-5)
    assert evaluate(model, Two(), dataset=text, seqlen=40, windows=1, reference=model).kl == pytest.approx(0, abs=1e-6)


def test_texts_in_memory_and_tokens(text: str, tmp_path: Path) -> None:
    model, content = tiny.build("llama"), Path(text).read_text()
    tokenizer = load_tokenizer(tiny.marking(tiny.save(model, tmp_path / "model")))
    expected = evaluate(model, Opening(), dataset=text, seqlen=40).perplexity
    ids = torch.tensor(Words()(content)["input_ids"])
    for dataset in (Path(text), [content], [{"text": content}], ids, ids[None], [ids[:100], ids[100:]]):
        assert evaluate(model, tokenizer, dataset=dataset, seqlen=40).perplexity == expected


def test_divergence_from_itself_is_zero_and_from_another_is_not(text: str) -> None:
    a, b = tiny.build("llama"), tiny.build("llama", seed=1)
    same = evaluate(a, Words(), dataset=text, seqlen=40, reference=a)
    assert same.kl == pytest.approx(0, abs=1e-6) and same.top1 == 1.0
    assert same.reference_perplexity == same.perplexity
    other = evaluate(b, Words(), dataset=text, seqlen=40, reference=a)
    assert other.kl is not None and other.kl > 0.01 and other.top1 is not None and other.top1 < 1


@pytest.mark.parametrize("positions", [1, 7, 39])
def test_logits_are_compared_in_parts_of_any_size(positions: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = tiny.build("llama"), tiny.build("llama", seed=1)
    whole = evaluate(model, Words(), dataset=text, seqlen=40, reference=other)
    sizes: list[int] = []
    add = Divergence.add
    monkeypatch.setattr(Divergence, "add", lambda self, p, q: sizes.append(len(p)) or add(self, p, q))
    monkeypatch.setattr(nearplane.evaluation.perplexity, "CHUNK", positions * model.config.vocab_size + 1)
    parts = evaluate(model, Words(), dataset=text, seqlen=40, reference=other)
    assert max(sizes) == positions and sum(sizes) == parts.tokens == whole.tokens
    assert (parts.perplexity, parts.kl) == pytest.approx((whole.perplexity, whole.kl), rel=1e-5)
    assert parts.top1 == whole.top1


def test_kl_has_the_reference_first() -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.3, 0.6]])
    divergence = Divergence()
    divergence.add(p.log() + 3, q.log() - 1)
    divergence.add(p.log(), p.log())
    expected = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p[0], q[0], strict=True)) / 2
    assert divergence.kl == pytest.approx(expected, rel=1e-5)
    assert divergence.top1 == 0.5


def test_window_longer_than_the_model_is_cut_and_said(text: str) -> None:
    result = evaluate(tiny.build("llama"), Words(), dataset=text, seqlen=2048)
    assert result.seqlen == 64 and "64 tokens" in result.protocol


def test_refusals(text: str) -> None:
    model = tiny.build("llama", max_position_embeddings=4096)
    with pytest.raises(NearplaneError, match="fewer than one window"):
        evaluate(model, Words(), dataset=text, seqlen=500)
    with pytest.raises(SettingError, match="bos must be True or False; got 'no'"):
        evaluate(model, Words(), dataset=text, seqlen=40, bos="no")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"seqlen must be a whole number of at least 2; got 4\.5"):
        evaluate(model, Words(), dataset=text, seqlen=4.5)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="windows"):
        evaluate(model, Words(), dataset=text, seqlen=40, windows=0)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(NearplaneError, match="not finite"):
        evaluate(model, Words(), dataset=text, seqlen=40)
