"""End to end on a real model, SmolLM2-135M-Instruct: quantize, load with transformers, evaluate."""

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers

import nearplane
from nearplane import GPTQ, RTN, Calibration, Grid, Quantized
from nearplane.cli.terminal import Terminal
from nearplane.models.discover import discover
from nearplane.models.source import open_source
from nearplane.run.events import Event, Solved

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 bits, group 64, symmetric, by rounding: the form that every engine loads."""
    out = tmp_path_factory.mktemp("demo") / "rtn"
    nearplane.quantize("demo", out, method=RTN(), grid=Grid(bits=4, group_size=64, fit="minmax"), progress=False)
    return out


def test_transformers_loads_it_with_our_logits(checkpoint: Path) -> None:
    ours = nearplane.load(checkpoint, packed=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("Weights of large models must shrink.", return_tensors="pt").input_ids
    with torch.no_grad():
        a, b = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
    assert float((a - b).abs().max()) == 0.0


def test_perplexity_of_original_and_rounded(checkpoint: Path) -> None:
    result = nearplane.evaluate(checkpoint, seqlen=512, windows=2, reference="demo")
    assert result.reference_perplexity is not None and result.kl is not None and result.top1 is not None
    # The embedded text is the same on every machine, so this figure is, too.
    assert result.reference_perplexity == pytest.approx(25.39, rel=0.01)
    assert result.reference_perplexity < result.perplexity < 3 * result.reference_perplexity
    assert 0 < result.kl < 1 and 0.5 < result.top1 < 1


def test_gptq_on_its_first_blocks_is_far_below_rounding(tmp_path: Path) -> None:
    """Real activations: the first two blocks solved, the rest rounded to save the suite's time."""

    @dataclasses.dataclass(frozen=True)
    class Brief(GPTQ):
        def solve(self, weight: torch.Tensor, state: object, grid: Grid) -> Quantized:
            if len(solved) >= 8:  # stages
                raise Enough
            solved.append(1)
            return super().solve(weight, state, grid)  # type: ignore[arg-type]

    class Enough(Exception):
        pass

    solved: list[int] = []
    rows = []

    class Keeps(Terminal):
        def take(self, event: Event) -> None:
            rows.extend([event.row] if isinstance(event, Solved) else [])

    grid, few = Grid(bits=3, group_size=64, sym=False, fit="minmax"), Calibration(nsamples=4, seqlen=256)
    with pytest.raises(Enough):
        show = Keeps(silent=True)
        nearplane.quantize("demo", tmp_path / "out", method=Brief(), grid=grid, calibration=few, show=show)
    assert len(rows) == 14 and len(list((tmp_path / "out").glob("part-*"))) == 2  # two blocks are done, and kept
    for row in rows:
        assert row.error is not None and row.rtn_error is not None and row.error < 0.6 * row.rtn_error, row


def test_anatomy() -> None:
    blocks = discover(open_source("demo"))
    assert len(blocks) == 30 and sum(len(block.sites) for block in blocks) == 210
