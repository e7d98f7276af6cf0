"""The writer: everything or nothing."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.formats import parts as write
from nearplane.formats.parts import Writer
from nearplane.formats.store import INDEX, SUMS, Store

TENSORS = {f"t{i}": torch.randn(10, 10) for i in range(5)}


@pytest.mark.parametrize(("shard_bytes", "shards"), [(1, 5), (800, 3), (10**9, 1)])
def test_round_trip(tmp_path: Path, shard_bytes: int, shards: int) -> None:
    out = tmp_path / "deep" / "out"
    (tmp_path / "tokenizer.json").write_text("é")
    with Writer(out, shard_bytes=shard_bytes) as writer:
        for name, tensor in TENSORS.items():
            writer.put({name: tensor})
        writer.json("config.json", {"a": 1})
        writer.text("note.txt", "ü")
        writer.copy(tmp_path / "tokenizer.json")
        writer.finish()
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)}
    assert {path.name for path in out.iterdir()} == files | {INDEX, SUMS, "config.json", "note.txt", "tokenizer.json"}
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == 5 * 400 and set(index["weight_map"]) == set(TENSORS)
    store = Store(out)
    assert all(torch.equal(store.get(name), tensor) for name, tensor in TENSORS.items())
    assert json.loads((out / "config.json").read_text()) == {"a": 1}
    assert (out / "note.txt").read_text("utf-8") == "ü" and (out / "tokenizer.json").read_text("utf-8") == "é"


def test_sums_and_modes(tmp_path: Path) -> None:
    """The sums of all files but the report, whose times are others each run; every file as the umask has it."""
    (tmp_path / "tokenizer.json").write_text("é")
    (tmp_path / "tokenizer.json").chmod(0o600)
    before = os.umask(0o026)
    try:
        with Writer(tmp_path / "out", shard_bytes=800) as writer:
            writer.put(TENSORS)
            writer.json("report.json", {"seconds": 1.5})
            writer.text("config.json", "{}")
            writer.text("config.json", '{"a": 1}')
            writer.copy(tmp_path / "tokenizer.json")
            writer.finish()
    finally:
        os.umask(before)
    out = tmp_path / "out"
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}
    found = dict(reversed(line.split("  ")) for line in (out / SUMS).read_text().splitlines())
    files = [path for path in out.iterdir() if path.name not in ("report.json", SUMS)]
    assert found == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_memory_is_bounded_and_shards_are_hidden_until_the_end(tmp_path: Path) -> None:
    with Writer(tmp_path / "out", shard_bytes=800) as writer:
        writer.put(TENSORS)
        assert len(list(writer.out.glob("*.unfinished"))) == 2 and not list(writer.out.glob("*.safetensors"))
        with pytest.raises(NearplaneError, match="is being written by process"):
            Store(writer.out)
        writer.finish()


def test_shared_strided_and_reused_memory(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    reused = torch.ones(3)
    with Writer(tmp_path / "out") as writer:
        writer.put({"whole": base, "again": base, "column": base[:, 1], "turned": base.T, "reused": reused})
        reused.zero_()
        writer.put({"parameter": torch.nn.Parameter(base[:1]), "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.0)})
        writer.finish()
    store = Store(tmp_path / "out")
    assert torch.equal(store.get("again"), base) and torch.equal(store.get("column"), base[:, 1])
    assert torch.equal(store.get("turned"), base.T) and torch.equal(store.get("reused"), torch.ones(3))
    assert store.shape("empty") == (0, 3) and store.get("scalar") == 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("there", [False, True])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException], there: bool) -> None:
    out = tmp_path / "deep" / "out"
    if there:
        out.mkdir(parents=True)
    with pytest.raises(error), Writer(out, shard_bytes=1) as writer:
        writer.put(TENSORS)
        writer.json("config.json", {})
        raise error
    assert not any(out.iterdir()) if there else not any(tmp_path.iterdir())


def test_without_finish_nothing_stays(tmp_path: Path) -> None:
    with Writer(tmp_path / "out", shard_bytes=1) as writer:
        writer.put(TENSORS)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("failing", ["rename", "replace"])
def test_an_interrupt_inside_finish_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """The second rename of a shard, or the index's, is interrupted."""
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "out", shard_bytes=1) as writer:
        writer.put(TENSORS)
        true, calls = getattr(Path, failing), []

        def interrupted(self: Path, target: Path) -> Path:
            calls.append(target)
            if failing == "replace" or len(calls) == 2:
                raise KeyboardInterrupt
            return true(self, target)

        monkeypatch.setattr(Path, failing, interrupted)
        writer.finish()
    assert not any(tmp_path.iterdir())


def test_strangers_files_stay(tmp_path: Path) -> None:
    with pytest.raises(ValueError), Writer(tmp_path / "out") as writer:
        writer.text("config.json", "{}")
        (writer.out / "notes").write_text("mine")
        raise ValueError
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes"]


def test_an_occupied_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SettingError, match=f"{tmp_path} is not empty"):
        Writer(tmp_path)
    with pytest.raises(SettingError, match="is a file"):
        Writer(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SettingError, match="leads nowhere"):
        Writer(tmp_path / "link")
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NearplaneError, match=r"cannot be (written to|read)"), Writer(tmp_path / "file" / "out"):
        pass


def test_duplicates_and_bad_names(tmp_path: Path) -> None:
    with Writer(tmp_path / "out", shard_bytes=1) as writer:
        writer.put({"a": torch.zeros(3)})
        with pytest.raises(NearplaneError, match="tensor a is written twice"):
            writer.put({"a": torch.zeros(3)})
        for name in ("../x", "a/b", "", INDEX, SUMS):
            with pytest.raises(SettingError, match="not a file name"):
                writer.text(name, "")
        with pytest.raises(NearplaneError, match="is not a file and cannot be copied"):
            writer.copy(tmp_path / "absent")
        writer.finish()
        for late in (writer.finish, lambda: writer.put({}), lambda: writer.text("a", "")):
            with pytest.raises(NearplaneError, match="is finished"):
                late()
    with pytest.raises(NearplaneError, match="no tensor was written"), Writer(tmp_path / "none") as writer:
        writer.finish()


@pytest.mark.parametrize("what", ["shard", "text"])
def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(
            NearplaneError, match=r"out/.* cannot be written .*No space left.* needs .* GB and .* GB are free"
        ),
        Writer(tmp_path / "out") as writer,
    ):
        writer.put(TENSORS)
        if what == "shard":
            monkeypatch.setattr(write, "save_file", full)
            writer.finish()
        monkeypatch.setattr(Path, "write_bytes", full)
        writer.text("a", "b")
    assert not any(tmp_path.iterdir())
