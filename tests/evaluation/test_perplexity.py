"""Perplexity, KL and agreement against plain arithmetic."""

import math
from pathlib import Path

import pytest
import tiny
import torch

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.evaluation.perplexity import Divergence, evaluate


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


def test_divergence_from_itself_is_zero_and_from_another_is_not(text: str) -> None:
    a, b = tiny.build("llama"), tiny.build("llama", seed=1)
    same = evaluate(a, Words(), dataset=text, seqlen=40, reference=a)
    assert same.kl == pytest.approx(0, abs=1e-6) and same.top1 == 1.0
    assert same.reference_perplexity == same.perplexity
    other = evaluate(b, Words(), dataset=text, seqlen=40, reference=a)
    assert other.kl is not None and other.kl > 0.01 and other.top1 is not None and other.top1 < 1


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
    with pytest.raises(SettingError, match="windows"):
        evaluate(model, Words(), dataset=text, seqlen=40, windows=0)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(NearplaneError, match="not finite"):
        evaluate(model, Words(), dataset=text, seqlen=40)
