"""Text to token windows: seeded, hashed, and clear about what is missing."""

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.data.text import Calibration, digest, read_text, tokenize


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


def test_embedded_parts_are_disjoint_and_large() -> None:
    calibration, held_out = read_text(None, "calibration"), read_text(None, "evaluation")
    assert len(calibration.content) > 200_000 and len(held_out.content) > 100_000
    paragraphs = {p for p in held_out.content.split("\n\n") if len(p) > 200}
    # Topics of the language reference quote each other: those paragraphs belong to calibration only.
    assert len(paragraphs) > 50 and not [p for p in paragraphs if p in calibration.content]
    assert "embedded" in calibration.origin and "embedded" in held_out.origin


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
