"""The store on good folders, and the one sentence for each bad one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nearplane.core.errors import NearplaneError
from nearplane.formats.store import Store

INDEX = "model.safetensors.index.json"
A, B = torch.arange(15, dtype=torch.bfloat16).view(3, 5), torch.arange(4, dtype=torch.int32)


def sharded(folder: Path) -> None:
    save_file({"a": A}, folder / "one.safetensors")
    save_file({"b": B}, folder / "two.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))


def single(folder: Path) -> None:
    save_file({"a": A, "b": B}, folder / "model.safetensors")


def other_name(folder: Path) -> None:
    save_file({"a": A, "b": B}, folder / "gptq_model-4bit-128g.safetensors")


@pytest.mark.parametrize("layout", [single, sharded, other_name])
def test_reads(tmp_path: Path, layout: Callable[[Path], None]) -> None:
    layout(tmp_path)
    store = Store(tmp_path)
    assert store.folder == tmp_path and store.names == {"a", "b"}
    assert torch.equal(store.get("a"), A) and torch.equal(store.get("b"), B)
    assert store.shape("a") == (3, 5) and store.dtype("a") == torch.bfloat16 and store.nbytes("a") == 30
    assert store.dtype("b") == torch.int32 and store.nbytes("b") == 16
    with pytest.raises(NearplaneError, match="no tensor named c"):
        store.get("c")


def test_links_may_leave_the_folder(tmp_path: Path) -> None:
    """The Hugging Face cache stores every file elsewhere and links to it."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    single(blobs)
    (folder / "model.safetensors").symlink_to(Path("..") / "blobs" / "model.safetensors")
    assert Store(folder).names == {"a", "b"}


def test_a_file_cut_short_while_it_is_open_is_a_sentence(tmp_path: Path) -> None:
    """No mapped page, no bus error; and what was read before stays whole."""
    sharded(tmp_path)
    store = Store(tmp_path)
    a = store.get("a")
    with (tmp_path / "one.safetensors").open("r+b") as file:
        file.truncate(90)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(
        NearplaneError, match=r"tensor a cannot be read from .*one\.safetensors: the file ends .* too early"
    ):
        store.get("a")
    assert torch.equal(a, A) and torch.equal(store.get("b"), B)


def missing_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "two.safetensors").unlink()


def broken_index(folder: Path) -> None:
    sharded(folder)
    (folder / INDEX).write_text('{"weight_map": ')


def index_is_a_list(folder: Path) -> None:
    (folder / INDEX).write_text("[]")


def index_without_map(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def index_not_text(folder: Path) -> None:
    (folder / INDEX).write_bytes(b"\xff\xfe\x00")


def lacking_shard(folder: Path) -> None:
    sharded(folder)
    save_file({"c": B}, folder / "two.safetensors")


def truncated(folder: Path) -> None:
    single(folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-3])


def truncated_second_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "two.safetensors").write_bytes((folder / "two.safetensors").read_bytes()[:20])


def empty_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def pickled(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"")


def nothing(folder: Path) -> None:
    pass


def no_index(folder: Path) -> None:
    sharded(folder)
    (folder / INDEX).unlink()


def unfinished(folder: Path) -> None:
    (folder / "part-00001.unfinished").write_bytes(b"")


def shard_is_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").mkdir()


@pytest.mark.parametrize(
    ("spoil", "file", "sentence"),
    [
        (missing_shard, "two.safetensors", "is missing"),
        (broken_index, INDEX, "not valid JSON"),
        (index_is_a_list, INDEX, "must hold a JSON object"),
        (index_without_map, INDEX, "no weight_map"),
        (index_not_text, INDEX, "cannot be read"),
        (lacking_shard, "two.safetensors", "promises tensor b .* lacks it"),
        (truncated, "model.safetensors", "truncated or corrupt"),
        (truncated_second_shard, "two.safetensors", "truncated or corrupt"),
        (empty_file, "model.safetensors", "truncated or corrupt"),
        (pickled, "pytorch_model.bin", "pickle .* can run any code .* save_pretrained"),
        (nothing, "", "holds no weights"),
        (no_index, INDEX, "2 safetensors files and no"),
        (unfinished, "part-00001.unfinished", "not written to its end"),
        (shard_is_a_folder, "model.safetensors", "cannot be read|corrupt"),
    ],
)
def test_bad_folders(tmp_path: Path, spoil: Callable[[Path], None], file: str, sentence: str) -> None:
    spoil(tmp_path)
    with pytest.raises(NearplaneError, match=sentence) as caught:
        Store(tmp_path)
    assert file in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "..\\x", "C:\\x", "", 3]
)
def test_an_index_may_not_climb_out(tmp_path: Path, file: object) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(NearplaneError, match="outside of the folder; refused"):
        Store(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(NearplaneError, match="does not exist"):
        Store(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(NearplaneError, match="is not a folder"):
        Store(tmp_path / "file")


def test_a_header_with_line_breaks_is_one_sentence(tmp_path: Path) -> None:
    """A dtype that is a line break; found by tests/test_fuzz.py."""
    header = b'{"w": {"dtype": "\\n", "shape": [1], "data_offsets": [0, 4]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(NearplaneError, match="is truncated or corrupt") as caught:
        Store(tmp_path)
    assert "\n" not in str(caught.value)
