"""The container: a copy is the same file, what is damaged is said."""

import struct
from pathlib import Path

import gguf
import pytest
import templates
import tiny
import torch

from nearplane.core.errors import NearplaneError
from nearplane.formats.gguf.file import GGUFFile, scalar, write


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.build("llama", tie_word_embeddings=False)
    return templates.write(tmp_path_factory.mktemp("gguf") / "t.gguf", model.config, templates.tensors(model), "Q4_1")


def test_a_header_is_read_as_the_package_reads_it(good: Path) -> None:
    file, theirs = GGUFFile(good), gguf.GGUFReader(good)
    assert file.value("general.architecture") == "llama" and file.length("tokenizer.ggml.tokens") == tiny.VOCABULARY
    assert file.value("nothing", 3) == 3 and file.length("general.architecture") is None
    assert list(file.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = file.tensors[tensor.name]
        assert (info.type, info.nbytes) == (tensor.tensor_type.name, tensor.n_bytes)
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        data = b"".join(file.pieces(tensor.name, most=100))
        assert data == tensor.data.tobytes()
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, info.columns)
        assert torch.equal(file.values(tensor.name, 1, len(values) - 1), torch.from_numpy(values[1:]))


def test_a_file_written_like_another_is_the_same_bytes(good: Path, tmp_path: Path) -> None:
    file = GGUFFile(good)
    write(tmp_path / "copy.gguf", file, {}, {}, file.pieces)
    assert (tmp_path / "copy.gguf").read_bytes() == good.read_bytes()


def test_changed_types_and_metadata_are_read_by_the_package(good: Path, tmp_path: Path) -> None:
    file, changed = GGUFFile(good), "blk.0.ffn_up.weight"
    values = file.values(changed, 0, 96)
    keys = {
        "general.file_type": scalar("general.file_type", 4, 0),
        "general.quantized_by": scalar("general.quantized_by", 8, "ö"),
    }
    data = lambda name: iter([values.numpy().tobytes()]) if name == changed else file.pieces(name)  # noqa: E731
    write(tmp_path / "new.gguf", file, {changed: "F32"}, keys, data)
    reader = gguf.GGUFReader(tmp_path / "new.gguf")
    assert (
        reader.fields["general.file_type"].contents() == 0 and reader.fields["general.quantized_by"].contents() == "ö"
    )
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert torch.equal(torch.tensor(found[changed].data), values)
    assert found["output.weight"].data.tobytes() == b"".join(file.pieces("output.weight"))


def test_a_type_of_the_packages_own_is_decoded_by_it(tmp_path: Path) -> None:
    model = tiny.build("llama", hidden_size=256, intermediate_size=256, head_dim=64)
    path = templates.write(tmp_path / "t.gguf", model.config, templates.tensors(model), "TQ2_0")
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["blk.0.ffn_up.weight"]
    values = torch.from_numpy(gguf.quants.dequantize(read.data, read.tensor_type))
    assert torch.equal(GGUFFile(path).values("blk.0.ffn_up.weight", 0, 256), values)


def damaged(good: Path, to: Path, *patches: tuple[int, bytes]) -> Path:
    data = bytearray(good.read_bytes())
    for at, new in patches:
        data[at : at + len(new)] = new
    to.write_bytes(data)
    return to


def test_files_that_are_none_or_damaged_are_one_sentence(good: Path, tmp_path: Path) -> None:
    path, data = tmp_path / "x.gguf", good.read_bytes()
    name = data.index(b"token_embd.weight")
    dims, kind = name + 17, name + 17 + 4 + 16
    cases = [
        ((0, b"XXXX"), "is not a GGUF file"), ((4, struct.pack("<I", 1)), "has version 1; nearplane reads"),
        ((4, struct.pack(">I", 3)), "is big-endian; nearplane reads"), ((8, b"\xff" * 8), "is damaged: its header promises"),
        ((24, b"\xff" * 8), "is truncated: its header"), ((dims, struct.pack("<I", 9)), "has 9 dimensions"),
        ((kind, struct.pack("<I", 77)), "has type 77, which is none of those"), ((dims + 4, b"\x07"), "is damaged: tensor"),
        ((kind + 4, b"\x03"), "begins at 3"), ((name, b"\xff"), "is not UTF-8"),
    ]  # fmt: skip
    for patch, sentence in cases:
        with pytest.raises(NearplaneError, match=sentence):
            GGUFFile(damaged(good, path, patch))
    for length in (0, 3, 20, 100, 3000):
        path.write_bytes(data[:length])
        with pytest.raises(NearplaneError, match=r"is not a GGUF file|is truncated"):
            GGUFFile(path)
    path.write_bytes(data[:-200])
    with pytest.raises(NearplaneError, match=r"is truncated: tensor \S+ ends at byte"):
        GGUFFile(path)
    with pytest.raises(NearplaneError, match="does not exist"):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(NearplaneError, match="cannot be read"):
        GGUFFile(tmp_path)


def test_a_file_that_is_cut_while_it_is_open(good: Path, tmp_path: Path) -> None:
    path = damaged(good, tmp_path / "x.gguf")
    file = GGUFFile(path)
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 5000)
    with pytest.raises(NearplaneError, match="ends inside tensor"):
        list(file.pieces(list(file.tensors)[-1]))
