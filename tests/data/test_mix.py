"""Mixes of calibration sources: words and pairs, exact shares, seeds of their own, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.data.samples import gather
from nearplane.data.shares import Share, counts, shares_of
from nearplane.data.text import Calibration, read_text
from nearplane.data.windows import Tokens, digest
from nearplane.models.source import open_source


class Bytes:
    """A tokenizer whose tokens are the text's bytes."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Texts of one letter each, under names that a mix could be read into."""
    for name, letter in (("a.txt", "a"), ("b.txt", "b"), ("a, b:3.txt", "c"), ("d.txt:2", "d"), ("self", "e")):
        (tmp_path / name).write_text(letter * 300)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def letters(calibration: Calibration) -> dict[str, int]:
    """How many windows of each text are drawn."""
    ids = calibration.load(Bytes()).ids
    assert bool((ids == ids[:, :1]).all())
    return {letter: int((ids[:, 0] == ord(letter)).sum()) for letter in "abcde" if (ids[:, 0] == ord(letter)).any()}


@pytest.mark.parametrize(
    ("dataset", "drawn"),
    [
        ("a.txt:2,b.txt", {"a": 8, "b": 4}),
        ("a.txt,b.txt:0.5", {"a": 8, "b": 4}),
        (" a.txt : 2 , b.txt", {"a": 8, "b": 4}),
        ("a, b:3.txt", {"c": 12}),
        ("a, b:3.txt:2,b.txt:1", {"c": 8, "b": 4}),
        ("b.txt:1,a, b:3.txt:2", {"c": 8, "b": 4}),
        ('"a, b:3.txt":2,"b.txt"', {"c": 8, "b": 4}),
        ("d.txt:2", {"d": 12}),
        ("d.txt:2,a.txt", {"d": 6, "a": 6}),
        ("d.txt:2:3,a.txt", {"d": 9, "a": 3}),
        ("./self:1,a.txt:3", {"e": 3, "a": 9}),
        ('"self":1,a.txt:3', {"e": 3, "a": 9}),
        ("a.txt:7", {"a": 12}),
        ([("a.txt", 2), ("b.txt", 1)], {"a": 8, "b": 4}),
        ([("a.txt", 2), "b.txt"], {"a": 8, "b": 4}),
        ({"a.txt": 2, "b.txt": 1}, {"a": 8, "b": 4}),
        ([("d.txt:2", 1), ("a.txt", 1)], {"d": 6, "a": 6}),
        ([("d.txt:2", 1)], {"d": 12}),
        ([(["b" * 80], 1), ("a.txt", 1)], {"a": 6, "b": 6}),
        ([(torch.full((90,), ord("d")), 1), ("a.txt", 1)], {"a": 6, "d": 6}),
        (Path("a, b:3.txt"), {"c": 12}),
        ([(Path("self"), 1), (Path("a.txt"), 1)], {"e": 6, "a": 6}),
    ],
)
def test_sources_and_weights(files: Path, dataset: Any, drawn: dict[str, int]) -> None:
    assert letters(Calibration(dataset, nsamples=12, seqlen=10)) == drawn


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        ("a.txt:0,b.txt", "a.txt:0: a weight must be a number above 0; got '0'"),
        ("a.txt:-1,b.txt", "above 0; got '-1'"),
        ("a.txt:nan,b.txt", "above 0; got 'nan'"),
        ("a.txt:inf", "above 0; got 'inf'"),
        ("self:x", "above 0; got 'x'"),
        ("a.txt:,b.txt", "above 0; got ''"),
        ("a.txt,,b.txt", "empty place between its commas"),
        ("a.txt:1,", "empty place"),
        ("", "empty word"),
        ('"a.txt', "a quote that is not closed"),
        ('x"a.txt"', "quotes enclose a whole name"),
        ("a.txt:1,a.txt:2", "gives 'a.txt' twice"),
        ("a.txt:100,b.txt", "b.txt has a weight of 1 of 101, less than one of nsamples=12"),
        ([("a.txt", 0), "b.txt"], "a.txt: a weight must be a number above 0; got 0"),
        ([("a.txt", True), "b.txt"], "above 0; got True"),
        ([("a.txt", 1), 7], "a pair .source, weight. or a name; got a int"),
        ([([("a.txt", 1), "b.txt"], 2), "b.txt"], "is a mix itself"),
        ([((row for row in "ab"), 2), "b.txt"], "can be read only once"),
        (["a.txt", "b.txt"], "the words of a list are texts"),
        (["self"], "holds the name 'self'"),
        ("no.txt:2,a.txt", "no.txt does not exist"),
        ("a.txt,b.txt:2.no", "b.txt:2.no"),
        ("self:1,a.txt:1", "written by the model"),
    ],
)
def test_what_is_no_mix_is_refused(files: Path, dataset: Any, says: str) -> None:
    with pytest.raises(NearplaneError, match=says):
        Calibration(dataset, nsamples=12, seqlen=10).load(Bytes())


def test_a_name_that_may_be_a_file_or_a_file_with_a_weight_is_asked_about(files: Path) -> None:
    (files / "d.txt").write_text("d" * 300)
    with pytest.raises(SettingError, match=r'there are files d.txt and d.txt:2; write "d.txt":2 or "d.txt:2"'):
        Calibration("d.txt:2,a.txt", nsamples=4, seqlen=10)
    assert letters(Calibration('"d.txt":2,a.txt', nsamples=6, seqlen=10)) == {"d": 4, "a": 2}


def test_texts_that_are_names_of_nothing_are_texts(files: Path) -> None:
    assert Calibration(["a.txt is a name", "b.txt"], nsamples=1, seqlen=20).load(Bytes()).text_tokens == 22
    (files / "folder").mkdir()
    assert Calibration(["folder"], nsamples=1, seqlen=3).load(Bytes()).text_tokens == 6
    rows = [(5, 7), (8, 9)]  # two rows of two token ids each
    assert Calibration(rows, nsamples=2, seqlen=4).load(Bytes()).ids.tolist() == [[5, 7], [8, 9]]


def test_counts_are_exact() -> None:
    """Largest remainders, against their definition: each within one of its quota, no smaller remainder rounded up alone."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        weights = (torch.rand(4, generator=generator) + 0.05).tolist()
        total = int(torch.randint(80, 300, (), generator=generator))
        found = counts([Share(f"{i}", weight) for i, weight in enumerate(weights)], total)
        quota = [total * weight / sum(weights) for weight in weights]
        assert sum(found) == total and all(abs(n - q) < 1 for n, q in zip(found, quota, strict=True))
        up = [q % 1 for n, q in zip(found, quota, strict=True) if n > q]
        down = [q % 1 for n, q in zip(found, quota, strict=True) if n <= q]
        assert min(up, default=1) >= max(down, default=0)
    assert counts([Share("a", 1), Share("b", 1), Share("c", 1)], 128) == [43, 43, 42]
    assert counts([Share("a", 0.1), Share("b", 0.2)], 30) == [10, 20]
    assert counts([Share("a", 2), Share("b", 1)], 3) == [2, 1]


def test_each_source_is_drawn_by_itself(files: Path) -> None:
    """The first source's windows are those of its own run; another's do not change with the weights of others."""
    long = "".join(chr(97 + i % 26) for i in range(1000))
    made: list[Tokens] = []
    for dataset in ([(long, 1), "a.txt"], [(long, 1), ("a.txt", 1), ("b.txt", 1)]):
        pairs = [([long], 1), *dataset[1:]]
        made.append(Calibration(pairs, nsamples=6 if len(pairs) == 2 else 9, seqlen=20, seed=5).load(Bytes()))
    single = Calibration([long], nsamples=3, seqlen=20, seed=5).load(Bytes())
    for tokens in made:
        rows = torch.tensor(tokens.sources) == 0
        assert torch.equal(tokens.ids[rows], single.ids)
        assert tokens.parts[0]["sha256"] == single.sha256 and tokens.parts[0]["seed"] == 5
        assert tokens.sha256 == digest(tokens.ids) and tokens.record()["sources"] == list(tokens.parts)
    assert made[0].parts[1]["seed"] not in (5, made[1].parts[2]["seed"]) and made[0].parts[1] == made[1].parts[1]
    twice = Calibration([([long], 1), ([long], 1)], nsamples=12, seqlen=20, seed=5).load(Bytes())
    for source, part in enumerate(twice.parts):
        own = Calibration([long], nsamples=6, seqlen=20, seed=part["seed"]).load(Bytes())
        assert torch.equal(twice.ids[torch.tensor(twice.sources) == source], own.ids)
    assert twice.parts[0]["sha256"] != twice.parts[1]["sha256"]
    assert [part["weight"] for part in made[1].parts] == [1, 1, 1]
    assert [part["windows"] for part in made[1].parts] == [3, 3, 3] and made[1].parts[1]["tokens"] == 60


def test_every_stretch_of_windows_holds_all_sources(files: Path) -> None:
    sources = Calibration("a.txt:2,b.txt:1,d.txt:2:1", nsamples=64, seqlen=8).load(Bytes()).sources
    for start in range(0, 64, 16):
        part = sources[start : start + 16]
        assert [part.count(source) for source in range(3)] == [8, 4, 4]


def test_too_few_samples_of_a_source(files: Path) -> None:
    """Never silently fewer: rows and paragraphs that do not suffice end the run, overlapping windows are a note."""
    rows = [{"input_ids": [number] * 8} for number in (3, 4, 5)]
    with pytest.raises(
        SettingError, match=r"rows in memory .list. has 3 samples, fewer than its share of 4 of nsamples=8"
    ):
        Calibration([(rows, 1), "a.txt"], nsamples=8, seqlen=8).load(Bytes())
    found = Calibration([(rows, 1), "a.txt"], nsamples=6, seqlen=10).load(Bytes())
    assert found.mask is not None and int(found.mask.sum()) == 3 * 8 + 3 * 10 == found.record()["tokens"]
    assert sorted(found.ids[torch.tensor(found.sources) == 0][:, 0].tolist()) == [3, 4, 5]
    with pytest.raises(NearplaneError, match=r"a\.txt has 300 tokens, fewer than one window of seqlen=301"):
        Calibration("a.txt,embedded", nsamples=8, seqlen=301).load(Bytes())
    told = Calibration("a.txt,embedded", nsamples=8, seqlen=100).load(Bytes()).notes
    assert told == ("a.txt: its 4 windows overlap: together they have 400 tokens, and the text has 300",)
    lines = Calibration("a.txt", nsamples=8, seqlen=10, sentences=True).load(Sentences())
    assert lines.notes == ("the dataset has 1 samples, fewer than nsamples=8; all are used",)


class Sentences(Bytes):
    def __call__(self, text: str, max_length: int = 10, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())[:max_length]}


def test_columns_and_splits_are_for_the_sources_that_have_them(files: Path) -> None:
    (files / "c.jsonl").write_text('{"body": "%s", "text": "no"}\n' % ("c" * 100))
    mix = Calibration("c.jsonl,a.txt", nsamples=4, seqlen=10, dataset_column="body")
    assert letters(mix) == {"c": 2, "a": 2}
    assert Calibration("c.jsonl,embedded", nsamples=4, seqlen=10, dataset_column="body").load(Bytes()).sources == (
        0,
        1,
        0,
        1,
    )
    (files / "c.json").write_text('{"x": [{"body": "%s"}], "y": [{"body": "no"}]}' % ("c" * 100))
    chosen = Calibration("c.json,a.txt", nsamples=4, seqlen=10, dataset_column="body", dataset_split="x")
    assert letters(chosen) == {"c": 2, "a": 2}
    with pytest.raises(SettingError, match=r"a\.txt is plain text, so there is no column 'body'"):
        Calibration("a.txt,b.txt", nsamples=4, seqlen=10, dataset_column="body").load(Bytes())


def test_a_mix_is_to_calibrate_on(files: Path) -> None:
    for dataset in ("a.txt,b.txt", "self", [("a.txt", 1), "b.txt"]):
        with pytest.raises(SettingError, match="is to calibrate on"):
            read_text(dataset, "evaluation")
    assert read_text("a.txt:3", "evaluation").content == "a" * 300
    assert shares_of("a, b:3.txt") == (Share("a, b:3.txt"),)


def test_models_of_images_read_one_folder(tmp_path: Path) -> None:
    source = open_source(tiny.save(tiny.build("vit"), tmp_path / "vit"))
    with pytest.raises(SettingError, match="from one folder; a mix"):
        gather(source, Calibration("a:2,b", nsamples=4))
