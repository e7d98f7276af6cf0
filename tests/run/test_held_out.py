"""What is held out of a mix: a quarter of each source, whatever its share, in every stage that sees all tokens."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from nearplane import Calibration
from nearplane.data.samples import Samples
from nearplane.models.discover import discover
from nearplane.models.source import open_source
from nearplane.run import observe
from nearplane.run.plan import make_plan
from nearplane.run.stream import Place, stream


def held(sources: list[int], length: int, lengths: list[int] | None = None, size: int = 2) -> torch.Tensor:
    """The held-out positions (sequences, length), batch by batch as a walk asks."""
    quarters = observe.Quarters(sources, lengths)
    firsts = range(0, len(sources), size)
    masks = [quarters.of(torch.Size((min(size, len(sources) - first), length)), first) for first in firsts]
    return torch.cat(masks).view(len(sources), length)


@pytest.mark.parametrize("counts", [(8, 4), (5, 7), (1, 9), (2, 3), (1, 1, 1), (4, 1, 2, 3), (64, 43, 21)])
def test_a_quarter_of_each_source(counts: tuple[int, ...]) -> None:
    """Sources of one to three windows too; to within a run of 32 tokens, which is nothing where fours make up a source."""
    sources = [source for place in range(max(counts)) for source, count in enumerate(counts) if place < count]
    length = 128
    mask = held(sources, length)
    for source, count in enumerate(counts):
        own = mask[torch.tensor(sources) == source]
        assert abs(int(own.sum()) - count * length / 4) < (32 if count % 4 else 1)
        whole, fours = own.all(1), count - count % 4
        assert whole.nonzero().flatten().tolist() == list(range(3, fours, 4))
        assert not bool(own[:fours][~whole[:fours]].any())
        tail = own[fours:].flatten()
        assert torch.equal(tail, torch.arange(len(tail)) // 32 % 4 == 3)


def test_one_source_is_held_out_as_without_a_mix() -> None:
    """With fours or with fewer than four sequences; batches of any size agree."""
    for sequences, length in ((8, 16), (1, 160), (3, 144), (2, 100), (3, 20)):
        tokens = torch.randn(sequences * length, 3, dtype=torch.float64)
        measuring = observe.Measuring(frozenset({"H", "held_out"}), 3, None, tokens, sequences)
        batch = torch.Size((sequences, length))
        expected = measuring._apart(batch, 0, len(tokens)).view(sequences, length)
        for size in (1, 2, 3):
            assert torch.equal(held([0] * sequences, length, size=size), expected)


def test_padding_is_no_part_of_a_quarter() -> None:
    """A source of two short sequences: runs are counted over real tokens."""
    lengths = [64, 20, 64, 12, 64, 64]
    mask = held([0, 1, 0, 1, 0, 0], 64, lengths)
    assert mask.nonzero().tolist() == [[1, n] for n in range(64) if n // 8 % 4 == 3] + [
        [3, n] for n in range(64) if (n + 20) // 8 % 4 == 3
    ] + [[5, n] for n in range(64)]
    real = torch.arange(64) < torch.tensor(lengths)[:, None]
    assert int((mask & real)[[1, 3]].sum()) == 8 == 32 // 4


@pytest.mark.parametrize("mixture", [False, True])
def test_a_walk_holds_out_a_quarter_of_each_source(mixture: bool, tmp_path: Path) -> None:
    """Two texts of other tokens each: the held-out inputs of the first stage are the embeddings of a quarter of each."""
    folder = tiny.save(tiny.build_mixture("mixtral") if mixture else tiny.build("llama"), tmp_path / "model")
    ids = torch.cat([torch.full((4, 16), 5), torch.full((12, 16), 9)])
    sources = [0, 1, 1, 1] * 4
    order = torch.tensor(sources).argsort(stable=True).argsort(stable=True)
    samples = Samples({"input_ids": ids[order]}, {}, sources=tuple(sources))
    found = []
    for given in (samples, samples.arguments):
        source = open_source(folder)
        walk = stream(source, discover(source), given, place=Place(), reference=False)
        block = next(walk)
        found.append(block.observe(block.stages[0], frozenset({"H", "held_out"})))
        walk.close()
    mixed, plain = found
    assert mixed.tokens == 256 and mixed.held is not None and mixed.held.tokens == 64
    torch.testing.assert_close(mixed.held.H, mixed.H)  # the same two inputs, at the same shares: one to three
    assert plain.held is not None and (plain.held.H - plain.H).abs().max() > 1e-3  # every fourth of all: other shares


def test_samples_of_a_mix_carry_their_sources(tmp_path: Path) -> None:
    folder = tiny.with_text(tmp_path)
    (tmp_path / "b.txt").write_text(tiny.text(500, seed=1))
    settings: dict[str, Any] = {"method": "gptq", "bits": 3, "group_size": 32}
    mix = Calibration(f"{tmp_path / 'text.txt'}:3,{tmp_path / 'b.txt'}", nsamples=16, seqlen=16)
    plan = make_plan(folder, calibration=mix, **settings)
    assert plan.samples is not None and Counter(plan.samples.sources) == {0: 12, 1: 4}
    walk = next(plan.stream()).walk
    assert walk.quarters is not None and sum(walk.quarters.whole) == 4


def test_held_out_tokens_of_each_source_come_apart(tmp_path: Path) -> None:
    """Of two texts of one token each, the first stage's moments of a source are that token's."""
    folder = tiny.save(tiny.build("llama"), tmp_path / "model")
    sources = [0, 1, 1, 1] * 4
    ids = torch.tensor([5 if source == 0 else 9 for source in sources])[:, None].expand(-1, 16).contiguous()
    source = open_source(folder)
    samples = Samples({"input_ids": ids}, {}, sources=tuple(sources))
    walk = stream(source, discover(source), samples, place=Place(), reference=False)
    block = next(walk)
    mixed = block.observe(block.stages[0], frozenset({"H", "held_out"}))
    alone = []
    for token in (5, 9):
        other = open_source(folder)
        single = stream(
            other, discover(other), {"input_ids": torch.full((4, 16), token)}, place=Place(), reference=False
        )
        first = next(single)
        alone.append(first.observe(first.stages[0], frozenset({"H"})))
        single.close()
    walk.close()
    assert [part.tokens for part in mixed.sources] == [16, 48]
    for part, expected in zip(mixed.sources, alone, strict=True):
        torch.testing.assert_close(part.H, expected.H)
    assert mixed.held is not None and mixed.held.tokens == 64
    torch.testing.assert_close(mixed.held.H, (alone[0].H + 3 * alone[1].H) / 4)


def test_a_module_that_sees_some_tokens_has_one_judge() -> None:
    """An expert's rows do not show which text they are of: their held-out tokens judge together."""
    measuring = observe.Measuring(frozenset({"H", "held_out"}), 3, None, torch.zeros(1, 3, dtype=torch.float64), 8)
    measuring.split(observe.Quarters([0, 1] * 4))
    rows = torch.randn(100, 3, dtype=torch.float64)
    measuring.add(torch.Size((8, 16)), 0, rows, None, None)
    found = measuring.result()
    assert (
        found.tokens == 100
        and found.held is not None
        and [part.tokens for part in found.sources] == [found.held.tokens, 0]
    )
