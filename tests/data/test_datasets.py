"""Datasets of rows, in files and in memory: the texts and token ids taken out of them, and each refusal with its place."""

import bz2
import gzip
import json
import lzma
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.data.samples import check_vocabulary
from nearplane.data.text import Calibration, Text, read_text
from nearplane.models.source import load_tokenizer

ROWS = [{"text": "w5 w6", "label": 1}, {"text": "w7", "label": 2}]
TALK = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
SHARED = [{"from": "human", "value": "w5"}, {"from": "gpt", "value": "w6"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('who?') }}{% endif %}"
    "{{ ' w9 ' if m.role == 'user' else ' w10 ' }}{{ m.content }}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """It puts <s> (1) before a text and </s> (2) behind it, and has a chat template that writes <s>, too."""
    folder = tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("marks") / "model")
    return load_tokenizer(tiny.marking(folder, template=TEMPLATE))


@pytest.fixture
def read(tokenizer: Any, tmp_path: Path) -> Any:
    """Write a file and read it as a dataset."""

    def reading(name: str, content: Any, **choice: str) -> Text:
        data = content if isinstance(content, str | bytes) else json.dumps(content)
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return read_text(tmp_path / name, "calibration", tokenizer, **choice)

    return reading


def lines(rows: list[Any]) -> str:
    return "\n".join(map(json.dumps, rows)) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", ROWS),
        ("pretty.json", json.dumps(ROWS, indent=2)),
        ("wrapped.json", {"version": "1", "data": ROWS}),
        ("columns.json", {"text": ["w5 w6", "w7"], "label": [1, 2]}),
        ("pandas.json", {"text": {"0": "w5 w6", "1": "w7"}, "label": {"0": 1, "1": 2}}),
        ("texts.JSON", ["w5 w6", "w7"]),
        ("lines.json", lines(ROWS)),
        ("lines.jsonl", lines(ROWS)),
        ("lines.JSONL", lines(ROWS).replace("\n", "\r\n")),
        ("lines.ndjson", "\ufeff\n" + lines(ROWS)),
        ("strings.jsonl", lines(["w5 w6", "w7"])),
        ("table.csv", 'text,label\n"w5 w6",1\nw7,2\n'),
        ("table.tsv", "\ufefflabel\ttext\n1\tw5 w6\n2\tw7\n"),
        ("lines.jsonl.gz", gzip.compress(lines(ROWS).encode(), mtime=0)),
        ("table.csv.bz2", bz2.compress(b"text\nw5 w6\nw7\n")),
        ("rows.json.xz", lzma.compress(json.dumps(ROWS).encode())),
    ],
)
def test_files_of_rows(name: str, content: Any, read: Any, tmp_path: Path) -> None:
    text = read(name, content)
    assert text.content == "w5 w6\n\nw7" and text.rows == ("w5 w6", "w7")
    assert text.origin == f"{tmp_path / name}, 2 rows of text"


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.raw", "a.tokens", "a.py", "a", "a.odd", "a.txt.gz"])
def test_other_files_are_raw_text(name: str, read: Any) -> None:
    content = "[w5] {w6}\n\nw7"
    packed = gzip.compress(content.encode(), mtime=0) if name.endswith(".gz") else "\ufeff" + content
    assert read(name, packed) == Text(content, read(name, packed).origin)


def test_only_a_newline_ends_a_json_line(read: Any) -> None:
    text = "w5\u2028w6\u2029w7\x85w8\x0bw9"
    assert read("a.jsonl", json.dumps({"text": text}, ensure_ascii=False)).content == text


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", lines([{"text": "w5"}, {"text": None}]), r"a\.jsonl, line 2: text is null, not a text"),
        ("a.jsonl", '{"text": "w5"}\n\n{"text": 3}', "line 3: text is the number 3"),
        ("a.JSONL", lines([{"text": True}]), "line 1: text is true"),
        ("a.json", [{"text": "w5"}, {"text": {}}], "row 2: text is an object"),
        ("a.json", {"text": ["w5", None]}, "row 2: text is null"),
        ("a.json", ["w5", ["w6"]], "row 2 is a list, not a text"),
        ("a.json", [{"text": "w5"}, {"txt": "w6"}], "row 2: there is no column 'text'; the columns are txt"),
        ("a.json", [{"body": "w5", "id": 1}], "no column text, messages or input_ids; the columns are body, id; choose"),
        ("a.jsonl", '{"text": "\\ud83d w5"}', "half a character"),
        ("a.jsonl", '{"text": "w5"}\n{"text": ', "line 2: not valid JSON"),
        ("a.json", '[{"text": "w5"},\n}]', "not valid JSON .line 2"),
        ("a.json", "[" * 100_000, "not usable JSON"),
        ("a.json", {"train": ROWS, "test": ROWS}, "several lists of rows, train, test; choose one with --dataset-split"),
        ("a.json", {"a": 1, "b": 2}, "an object with the keys a, b"),
        ("a.json", {"text": ["w5"], "b": []}, "different lengths: text has 1, b has 0"),
        ("a.json", "3", "holds the number 3"),
        ("a.json", "", "is empty"),
        ("a.json", [], "holds no rows"),
        ("a.jsonl", "\n", "holds no rows"),
        ("a.csv", "", "holds no rows"),
        ("a.csv", "text,b\nw5,1\nw6\n", "line 3: the row has 1 fields, the header 2"),
        ("a.csv", 'text\n"w5\nw6\n', "line 3: unexpected end"),
        ("a.csv", "text,text\nw5,w6\n", "names a column twice"),
        ("a.csv", "messages\n[{}]\n", "messages is a text, not a conversation"),
        ("a.dat", lines(ROWS), "looks like JSON; give it the ending"),
        ("noending", json.dumps(ROWS, indent=1), "looks like JSON"),
        ("a.zip", b"PK\x03\x04...", "is a zip archive"),
        ("a.txt", b"PAR1....PAR1", "is a Parquet file; give it the ending .parquet"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "give it the ending .gz"),
        ("a.jsonl.gz", b"{}", "cannot be unpacked"),
        ("a.txt.gz", gzip.compress(b"w5" * 99, mtime=0)[:-9], "cannot be unpacked"),
        ("a.txt", "w5".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("a.jsonl", '{"text": "w5"}'.encode("utf-16-le"), "zero bytes"),
    ],
)  # fmt: skip
def test_refusals_name_the_file_and_the_place(name: str, content: Any, says: str, read: Any) -> None:
    with pytest.raises(NearplaneError, match=says) as caught:
        read(name, content)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_splits_and_columns(read: Any) -> None:
    two = {"train": ROWS, "test": [{"text": "w8", "body": "w9"}]}
    assert read("a.json", two, split="test").rows == ("w8",)
    assert read("a.json", two, split="test", column="body").rows == ("w9",)
    assert read("a.csv", "body,text\nw5,w6\n", column="body").rows == ("w5",)
    for name, content, choice, says in (
        ("a.json", two, {"split": "dev"}, "no split 'dev'; the splits are train, test"),
        ("a.json", ROWS, {"split": "dev"}, "no split 'dev'; it has no splits"),
        ("a.jsonl", lines(ROWS), {"split": "train"}, "has no splits"),
        ("a.json", lines(ROWS), {"split": "train"}, "has no splits"),
        ("a.json", ROWS, {"column": "body"}, "no column 'body'; the columns are text, label"),
        ("a.txt", "w5", {"column": "text"}, "is plain text, so there is no column 'text'"),
        ("a.txt", "w5", {"split": "train"}, "has no splits"),
    ):
        with pytest.raises(SettingError, match=says):
            read(name, content, **choice)
    for choice in ({"split": "train"}, {"column": "text"}):
        with pytest.raises(SettingError, match="the embedded text has no"):
            read_text(None, "calibration", **choice)


def test_names_of_missing_files(tmp_path: Path) -> None:
    for name in ("no.csv", "no.JSONL", "no.parquet", "./no", "../no", "a/b/no", "~/no", str(tmp_path / "no")):
        with pytest.raises(NearplaneError, match="does not exist"):
            read_text(name, "calibration")
    with pytest.raises(NearplaneError, match="is no regular file"):
        read_text("/dev/null", "calibration")


@pytest.mark.parametrize("rows", [[{"messages": TALK}] * 2, [{"conversations": SHARED}] * 2, [TALK, SHARED]])
def test_conversations_go_through_the_chat_template(rows: list[Any], tokenizer: Any) -> None:
    text = read_text(rows, "calibration", tokenizer)
    assert text.rows == ("<s> w9 w5 w10 w6",) * 2
    # The opening that the template writes is not doubled, and none stands in the middle.
    tokens = Calibration(rows, nsamples=20, seqlen=6).load(tokenizer)
    assert set(map(tuple, tokens.ids.tolist())) <= {(1, *([9, 5, 10, 6] * 3)[k : k + 5]) for k in range(4)}
    alone = Calibration(rows, nsamples=2, sentences=True).load(tokenizer)
    assert alone.ids.tolist() == [[1, 9, 5, 10, 6, 2]] * 2


def test_conversations_that_cannot_be_written(tokenizer: Any, tmp_path: Path) -> None:
    for messages, says in (
        ([], "messages is an empty list"),
        (["w5"], "messages is a list, not a conversation"),
        ([{"content": "w5"}], "message 1 has no role"),
        ([{"from": "nobody", "value": "w5"}], "message 1 has no role"),
        ([*TALK, {"role": "user", "content": None}], "message 3: content is null"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1: content is a list"),
        ([{"role": "judge", "content": "w5"}], r"template refuses that conversation \(who\?\)"),
    ):
        with pytest.raises(NearplaneError, match=says):
            read_text([{"messages": messages}], "calibration", tokenizer)
    parts = [{"role": "user", "content": [{"type": "text", "text": "w5"}]}]
    assert read_text([{"messages": parts}], "calibration", tokenizer).content == "<s> w9 w5"
    bare = load_tokenizer(tiny.with_text(tmp_path))
    with pytest.raises(NearplaneError, match="tokenizer has no chat template"):
        read_text([{"messages": TALK}], "calibration", bare)


class Dataset:
    """A stand-in for ``datasets.Dataset``: rows by number, columns by name, read from elsewhere."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.column_names = rows, list(rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return [row[index] for row in self.rows] if isinstance(index, str) else self.rows[index]


@pytest.mark.parametrize(
    "dataset",
    [
        ["w5 w6", "w7"], ("w5 w6", "w7"), deque(["w5 w6", "w7"]), np.array(["w5 w6", "w7"]), ROWS, Dataset(ROWS),
        {"text": ["w5 w6", "w7"]}, {"train": Dataset(ROWS)}, [{"messages": TALK, "text": "w5 w6"}, {"text": "w7"}],
    ],
    ids=lambda dataset: type(dataset).__name__,
)  # fmt: skip
def test_texts_in_memory(dataset: Any) -> None:
    text = read_text(dataset, "calibration")
    assert text.rows == ("w5 w6", "w7") and text.held is not None
    assert (text.held["kind"], text.held["rows"]) == (type(dataset).__name__, 2)
    assert text.held["sha256"] == read_text(["w5 w6", "w7"], "calibration").held["sha256"]  # type: ignore[index]
    assert text.held["sha256"] != read_text(["w5", "w6 w7"], "calibration").held["sha256"]  # type: ignore[index]


def test_splits_in_memory() -> None:
    both = {"train": Dataset(ROWS), "test": Dataset([{"text": "w8"}])}
    assert read_text(both, "calibration", split="test").rows == ("w8",)
    with pytest.raises(SettingError, match="several lists of rows, train, test"):
        read_text(both, "calibration")
    with pytest.raises(SettingError, match="no split 'train'; it has no splits"):
        read_text(Dataset(ROWS), "calibration", split="train")


@pytest.mark.parametrize(
    "dataset",
    [
        [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 10]}],
        [{"input_ids": torch.tensor([[5, 6, 7]])}, {"input_ids": np.array([8, 9, 10])}],
        [{"input_ids": [0, 5, 6, 7], "attention_mask": [0, 1, 1, 1]}, {"input_ids": [8, 9, 10]}],
        [[5, 6, 7], [8, 9, 10]], torch.tensor([[5, 6, 7], [8, 9, 10]]), np.array([[5, 6, 7], [8, 9, 10]]),
        torch.tensor([[[5, 6, 7]], [[8, 9, 10]]]), {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])},
        Dataset([{"input_ids": [5, 6, 7], "text": "w3"}, {"input_ids": [8, 9, 10], "text": "w4"}]),
    ],
)  # fmt: skip
def test_rows_of_token_ids_are_samples(dataset: Any, tokenizer: Any) -> None:
    """As they are: nothing is put before them, and the tokenizer is not asked."""
    tokens = Calibration(dataset, nsamples=2, seqlen=3).load(tokenizer)
    assert tokens.ids.tolist() == [[5, 6, 7], [8, 9, 10]] and tokens.mask is None and tokens.opening == ""
    assert tokens.notes == ()


def test_rows_of_token_ids_are_cut_padded_and_drawn(tokenizer: Any) -> None:
    rows = [[5, 6, 7, 8], [9], [10, 11]]
    tokens = Calibration(rows, seqlen=3).load(tokenizer)
    assert tokens.ids.tolist() == [[5, 6, 7], [9, 0, 0], [10, 11, 0]]
    assert tokens.mask is not None and tokens.mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert tokens.record()["tokens"] == 6 and "fewer than nsamples=128" in tokens.notes[0]
    assert "1 of 3 rows of token ids are cut to 3 tokens" in tokens.notes[1]
    drawn = {Calibration(rows, nsamples=1, seqlen=4, seed=seed).load(tokenizer).ids[0, 0].item() for seed in range(20)}
    assert drawn == {5, 9, 10}


@pytest.mark.parametrize(
    "stream", [torch.arange(3, 90), torch.arange(3, 90)[None], list(range(3, 90)), np.arange(3, 90)]
)
def test_one_long_row_of_token_ids_is_a_text(stream: Any, tokenizer: Any) -> None:
    tokens = Calibration(stream, nsamples=9, seqlen=6).load(tokenizer)
    assert tokens.ids.shape == (9, 6) and (tokens.ids[:, 0] == 1).all()
    assert ((tokens.ids[:, 2:] - tokens.ids[:, 1:-1]) == 1).all()


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        ((text for text in ("w5",)), "is a generator, which can be read only once; give a list"),
        (map(str, [5]), "is a map, which can be read only once"),
        ({"w5"}, "is a set; give a file"), (b"w5", "is a bytes; give a file"), (5, "is a int; give a file"),
        ([], "is a list without rows"), (torch.tensor(5), "give a file"), (torch.zeros(0), "without rows"),
        ([None], "row 1 is null"), (["w5", 5], "row 2 is the number 5"), ([Path("a.txt")], "row 1 is a PosixPath"),
        (["w5", [5]], "some rows are texts, others are token ids"), ([1.5, 2.5], "row 1 is the number 1.5"),
        (torch.rand(2, 3), "row 1 is a Tensor, not a text and not a vector of token ids"),
        ([{"input_ids": [5, -1]}], "not a vector of token ids"), ([{"input_ids": [True]}], "not a vector of token ids"),
        ([{"input_ids": []}], "holds no token ids"), ([{"input_ids": None}], "input_ids is null"),
        ([{"input_ids": "5 6"}], "input_ids is a text, not a list of token ids"),
        ([{"input_ids": [5, 6], "attention_mask": [1]}], "has 2 token ids, its attention_mask 1"),
        ([{"input_ids": [5], "attention_mask": [0]}], "no token ids that its attention_mask keeps"),
    ],
)  # fmt: skip
def test_what_is_no_dataset(dataset: Any, says: str, tokenizer: Any) -> None:
    with pytest.raises(NearplaneError, match=says):
        Calibration(dataset, seqlen=4).load(tokenizer)


def test_the_first_rows_of_a_large_dataset_are_read_and_said(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("rows", "text"):
        monkeypatch.setattr(f"nearplane.data.{module}.MOST_ROWS", 2)
    text = read_text(Dataset([*ROWS, {"text": "w8", "label": 3}]), "calibration")
    assert text.rows == ("w5 w6", "w7") and text.origin.endswith("2 rows of text, the first of 3")
    assert len(read_text(["w5"] * 3, "calibration").rows) == 3  # of a list, all


def test_parquet_and_the_datasets_library(tokenizer: Any, tmp_path: Path) -> None:
    """With the extra; without it the sentence that names it."""
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    try:
        import datasets
    except ImportError:
        with pytest.raises(NearplaneError, match=r"pip install 'nearplane\[datasets\]'"):
            read_text(path, "calibration")
        return
    made = datasets.Dataset.from_list([{**row, "messages": TALK} for row in ROWS])
    with pytest.raises(NearplaneError, match="not a readable Parquet file"):
        read_text(path, "calibration")
    made.to_parquet(path)
    assert read_text(path, "calibration").rows == read_text(made, "calibration").rows == ("w5 w6", "w7")
    for dataset in (path, made, datasets.DatasetDict(train=made), made.with_format("numpy")):
        assert read_text(dataset, "calibration", tokenizer, column="messages").rows == ("<s> w9 w5 w10 w6",) * 2
    for dataset, says in ((path, "the columns are text, label, messages"), (made.to_iterable_dataset(), "only once")):
        with pytest.raises(NearplaneError, match=says):
            read_text(dataset, "calibration", column="body")


def test_names_on_the_hub(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which dataset, split and column are asked for, with a stand-in for the library; its refusals are one sentence."""
    asked: list[Any] = []

    class Streamed(list[Any]):
        def take(self, count: int) -> list[Any]:
            return self[:count]

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Streamed:
        asked.append((name, config, split, streaming))
        if split == "dev":
            raise ValueError("Bad split: dev. Available splits: ['train']")
        return Streamed([{"sentence": "w5", "body": "w6", "messages": TALK}] * 3)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_text("ptb", "calibration").content == "w5\n\nw5\n\nw5"
    assert read_text("some/one", "evaluation", column="body").rows == ("w6",) * 3
    text = read_text("some/one", "calibration", tokenizer, split="part")
    assert text.rows[0] == "<s> w9 w5 w10 w6" and text.origin == "some/one (part), 3 rows of messages"
    assert asked == [
        ("ptb-text-only/ptb_text_only", "penn_treebank", "train", True),
        ("some/one", None, "test", True),
        ("some/one", None, "part", True),
    ]
    for choice, says in (
        ({"split": "dev"}, "Bad split: dev"),
        ({"column": "text"}, "no column 'text'; the columns are sentence, body, messages"),
    ):
        with pytest.raises(NearplaneError, match=says):
            read_text("some/one", "calibration", **choice)


@pytest.mark.parametrize("flat", [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3]), torch.tensor([1, 2, 3])], ids=str)
def test_one_short_list_of_token_ids_is_refused(flat: Any, tokenizer: Any) -> None:
    """It is one stream; rows in a list, and a long stream, are samples as before."""
    with pytest.raises(
        SettingError, match=r"one list of 3 token ids, fewer than one window of seqlen=8; .* \[\[1, 2, 3\]\]"
    ):
        Calibration(dataset=flat, nsamples=2, seqlen=8).load(tokenizer, None)
    assert Calibration(dataset=[list(flat)], nsamples=2, seqlen=8).load(tokenizer, None).ids.tolist() == [[1, 2, 3]]
    assert Calibration(dataset=[3] * 20, nsamples=2, seqlen=8).load(tokenizer, None).ids.shape == (2, 8)


@pytest.mark.parametrize("words", ["hello w1 w2", "one sentence. And more", "why?"])
def test_a_text_in_place_of_a_name_is_refused(words: str, tokenizer: Any) -> None:
    with pytest.raises(
        SettingError, match="is no file, and no name of a dataset on the hub; give texts as a list of them"
    ):
        read_text(words, "calibration", tokenizer)


def test_token_ids_beyond_the_vocabulary_are_the_datasets() -> None:
    """And the tokenizer's, where it made them."""
    model = tiny.build("llama")
    large = torch.full((1, 4), model.config.vocab_size)
    with pytest.raises(NearplaneError, match=f"the dataset holds token id {model.config.vocab_size}, the model's"):
        check_vocabulary(large, model, tokenized=True)
    with pytest.raises(NearplaneError, match="the tokenizer makes token"):
        check_vocabulary(large, model)


def test_windows_know_whether_a_tokenizer_made_them(tokenizer: Any) -> None:
    def tokenized(dataset: Any) -> bool:
        return Calibration(dataset=dataset, nsamples=2, seqlen=4).load(tokenizer, None).tokenized

    ids, texts = [[5000, 3, 4]] * 4, ["w5 w6 w7 w8 w9 w10"] * 4
    assert tokenized(ids) and tokenized([3] * 20) and tokenized([{"input_ids": ids[0]}]) and not tokenized(texts)
    assert tokenized([(ids, 1), (texts, 1)]) and not tokenized([(texts, 1), (texts[:3], 1)])
