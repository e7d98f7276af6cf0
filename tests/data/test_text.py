"""Text to token windows: seeded, hashed, and clear about what is missing."""

import builtins
import hashlib
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nearplane
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.data.text import (
    EMBEDDED,
    EMBEDDED_VERSION,
    Calibration,
    Part,
    consecutive,
    digest,
    read_text,
    tokenize,
)


class Bytes:
    """A tokenizer whose tokens are the text's bytes."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def test_windows_are_seeded_pieces_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(1000)))
    a = Calibration(str(path), nsamples=50, seqlen=30, seed=3).load(Bytes())
    b = Calibration(str(path), nsamples=50, seqlen=30, seed=3).load(Bytes())
    c = Calibration(str(path), nsamples=50, seqlen=30, seed=4).load(Bytes())
    assert a.ids.shape == (50, 30) and a.text_tokens == 1000 and a.origin == str(path)
    assert torch.equal(a.ids, b.ids) and a.sha256 == b.sha256 == digest(a.ids)
    assert not torch.equal(a.ids, c.ids) and a.sha256 != c.sha256
    content = path.read_bytes()
    assert all(bytes(row.tolist()) in content for row in a.ids)
    assert len({tuple(row.tolist()) for row in a.ids}) > 10


def test_a_text_of_exactly_one_window() -> None:
    text = read_text(None, "calibration")
    n = len(text.content.encode())
    assert Calibration(nsamples=3, seqlen=n).load(Bytes()).ids.shape == (3, n)
    with pytest.raises(NearplaneError, match="fewer than one window"):
        Calibration(nsamples=3, seqlen=n + 1).load(Bytes())
    assert Calibration(nsamples=3, seqlen=n + 1).load(Bytes(), longest=64).ids.shape == (3, 64)


# Version -> SHA-256 of both parts. Another text is another version: every figure measured on it says which.
SUMS = {
    1: {
        "calibration": "8c23ab2b5b7d987f5736c86907bf5e8fad05782b9a4770886bcf642db0fc1976",
        "evaluation": "7928918695fece719518628935ac55160ee4aaaccdec33f75b8f22e15ab7c7a5",
    }
}
PARTS: tuple[Part, Part] = ("calibration", "evaluation")


def test_embedded_text_is_that_of_its_version() -> None:
    for part, name in zip(PARTS, ("calibration", "held out"), strict=True):
        text = read_text(None, part)
        found = hashlib.sha256(text.content.encode()).hexdigest()
        assert found == SUMS[EMBEDDED_VERSION][part], "a changed text takes the next EMBEDDED_VERSION"
        assert text.origin == f"embedded text v{EMBEDDED_VERSION} ({name}, sha256 {found[:8]})"
        assert read_text("embedded", part) == text


def test_embedded_parts_share_no_paragraph_and_no_line_of_prose() -> None:
    calibration, held_out = (read_text(None, part).content for part in PARTS)
    assert len(calibration.encode()) > 150_000 and len(held_out.encode()) > 70_000
    paragraphs = [p.strip() for p in held_out.split("\n\n") if p.strip()]
    assert len(paragraphs) > 300 and len(set(paragraphs)) == len(paragraphs)
    known = {p.strip() for p in calibration.split("\n\n")}
    assert not [p for p in paragraphs if p in known or (len(p) > 40 and p in calibration)]
    assert not [line for line in held_out.splitlines() if len(line.strip()) > 50 and line.strip() in calibration]


def test_embedded_parts_are_mixed() -> None:
    """Few windows of the held-out part, which are its first, see all kinds; so does each third of the calibration part."""
    calibration, held_out = (read_text(None, part).content for part in PARTS)
    signs = ("User: ", "```python", "def ", "## ", " the ", " und ", "。", "\n| ")
    assert not [sign for sign in signs if sign not in held_out[: len(held_out) // 4]]
    length = len(calibration) // 3
    for third in (calibration[:length], calibration[length : 2 * length], calibration[2 * length :]):
        assert not [sign for sign in ("User: ", "```", "def ", "## ", " the ", " und ", "。") if sign not in third]


def test_embedded_text_makes_sentences() -> None:
    class Tokenizer(Bytes):
        pad_token_id = 0

        def __call__(self, text: str, max_length: int = 0, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode())[:max_length]}

    made = Calibration(nsamples=512, seqlen=64, sentences=True).load(Tokenizer())
    ids, mask, origin = made.ids, made.mask, made.origin
    assert mask is not None
    assert ids.shape == mask.shape == (512, 64) and int(mask.sum(1).min()) >= 1
    assert float((mask.sum(1) == 64).float().mean()) > 0.5  # most paragraphs are longer than a few words
    assert origin == read_text(None, "calibration").origin


def test_the_wheel_holds_the_embedded_text() -> None:
    root = Path(nearplane.__file__).parents[1]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["nearplane"]
    held = {path for pattern in data for path in (root / "nearplane").glob(pattern)}
    assert {root / "nearplane/data/embedded" / file for file, _ in EMBEDDED.values()} <= held
    assert root / "nearplane/data/embedded/README.md" in held  # its licence


def test_a_package_without_its_text_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EMBEDDED, "evaluation", ("gone.txt", "held out"))
    with pytest.raises(NearplaneError, match=r"embedded/gone\.txt cannot be read .*install nearplane again"):
        read_text(None, "evaluation")


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert read_text(str(path), "calibration").content == "one\n\ntwo"
    path.write_text('{"text": "one"}\n{"texts": "two"}\n')
    with pytest.raises(NearplaneError, match="line 2"):
        read_text(str(path), "calibration")


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NearplaneError, match="does not exist"):
        read_text(str(tmp_path / "no.txt"), "calibration")
    with pytest.raises(NearplaneError, match="is a folder"):
        read_text(str(tmp_path), "calibration")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 \xff")
    with pytest.raises(NearplaneError, match="UTF-8"):
        read_text(str(tmp_path / "latin.txt"), "calibration")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(NearplaneError, match="empty"):
        tokenize(Bytes(), read_text(str(tmp_path / "empty.txt"), "calibration"))
    with pytest.raises(SettingError, match="nsamples"):
        Calibration(nsamples=0)
    real = builtins.__import__

    def without_datasets(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(NearplaneError, match="needs: pip install"):
        read_text("wikitext2", "calibration")


class Marked(Bytes):
    """It opens a text with tokens 200 and 201, and ends it with 202, unless asked not to."""

    bos_token_id, eos_token_id = 200, 202

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids = list(text.encode())
        return {"input_ids": [200, 201, *ids, 202] if add_special_tokens else ids}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [{200: "<b>", 201: "<c>"}[token] for token in ids]


class Always(Bytes):
    """It marks a text whether asked to or not."""

    bos_token_id, eos_token_id = 200, 202

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [200, *text.encode(), 202]}


LETTERS = "".join(chr(97 + i % 26) for i in range(100))


@pytest.mark.parametrize(("tokenizer", "opening"), [(Marked(), [200, 201]), (Always(), [200]), (Bytes(), [])])
def test_each_window_begins_as_the_tokenizer_begins_a_text(tokenizer: Any, opening: list[int], tmp_path: Path) -> None:
    """The opening counts as part of the window, and neither it nor EOS stands in the middle."""
    path = tmp_path / "a.txt"
    path.write_text(LETTERS)
    tokens = Calibration(path, nsamples=60, seqlen=30).load(tokenizer)
    assert tokens.ids.shape == (60, 30) and tokens.text_tokens == 100
    for row in tokens.ids.tolist():
        assert row[: len(opening)] == opening and bytes(row[len(opening) :]) in LETTERS.encode()
    ids, found = consecutive(tokenizer, read_text(path, "evaluation"), 30, None, bos=True)
    assert list(found) == opening and ids.shape == (3, 30)
    assert bytes(ids[:, len(opening) :].flatten().tolist()) == LETTERS.encode()[: 3 * (30 - len(opening))]


def test_without_bos_windows_are_cut_from_the_marked_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(LETTERS)
    whole = [200, 201, *LETTERS.encode(), 202]
    ids, found = consecutive(Marked(), read_text(path, "evaluation"), 30, None, bos=False)
    assert ids.flatten().tolist() == whole[:90] and found == (200, 201)
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, len(whole) - 30 + 1, (5,), generator=generator)
    tokens = Calibration(path, nsamples=5, seqlen=30, bos=False).load(Marked())
    assert tokens.ids.tolist() == [whole[a : a + 30] for a in start.tolist()] and tokens.opening == ""
    assert Calibration(path, nsamples=5, seqlen=30).load(Marked()).record()["opening"] == "<b> <c>"


def test_an_opening_that_the_text_brings_is_not_doubled() -> None:
    rows = ["<b><c>abcd", "efgh"]
    ids, _ = consecutive(Marked(), read_text(rows, "evaluation"), 12, None, bos=True)
    assert ids.tolist() == [[200, 201, *b"abcd\n\nefgh"]]
    one = torch.tensor([200, 201, *LETTERS.encode()])
    ids, _ = consecutive(Marked(), read_text([one, one], "evaluation"), 102, None, bos=True)
    assert ids.tolist() == [one.tolist()] * 2


def test_a_window_must_hold_more_than_its_opening() -> None:
    with pytest.raises(SettingError, match="seqlen=2 leaves no token behind the 2 that each window begins with"):
        Calibration([LETTERS], seqlen=2).load(Marked())
    with pytest.raises(NearplaneError, match="fewer than one window of seqlen=103"):
        Calibration([LETTERS], seqlen=103).load(Marked())
    assert Calibration([LETTERS], nsamples=1, seqlen=102).load(Marked()).ids[0].tolist() == [
        200,
        201,
        *LETTERS.encode(),
    ]


def test_sentences_are_rows_of_a_dataset() -> None:
    class Padding(Marked):
        pad_token_id = 0

    rows = ["ab\n\nc", "d"]
    tokens = Calibration(rows, nsamples=2, sentences=True).load(Padding())
    assert sorted(tokens.ids.tolist()) == [[200, 201, *b"ab\n\nc", 202], [200, 201, *b"d", 202, 0, 0, 0, 0]]
    assert tokens.mask is not None and sorted(tokens.mask.sum(1).tolist()) == [4, 8]
    bare = Calibration(rows, nsamples=2, sentences=True, bos=False).load(Padding())
    assert sorted(bare.ids.tolist()) == [[*b"ab\n\nc", 202], [*b"d", 202, 0, 0, 0, 0]]


def test_settings_of_a_calibration(tmp_path: Path) -> None:
    made = Calibration(tmp_path / "a.txt", nsamples=np.int64(4), seqlen=torch.tensor(8), seed=np.uint8(3), bos=np.True_)
    assert made == Calibration(str(tmp_path / "a.txt"), nsamples=4, seqlen=8, seed=3)
    assert all(type(getattr(made, name)) is int for name in ("nsamples", "seqlen", "seed"))
    for wrong, says in (
        ({"nsamples": 4.5}, "nsamples must be a whole number; got 4.5"),
        ({"nsamples": np.float64(4)}, "nsamples must be a whole number"),
        ({"bos": "no"}, "bos must be True or False"),
        ({"dataset_split": 3}, "dataset_split must be a name"),
        ({"dataset_column": ""}, "dataset_column must be a name"),
    ):
        with pytest.raises(SettingError, match=says):
            Calibration(**wrong)
