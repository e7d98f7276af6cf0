"""Damaged files of a checkpoint: whatever bytes they hold, a reader answers or says one sentence, soon and in little memory.

About 1,600 cases by default; ``pytest tests/test_fuzz.py --hypothesis-profile=fuzz --timeout=1800`` runs more than
10,000 others.
"""

import contextlib
import copy
import json
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import templates
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import nearplane
from nearplane import RTN, Grid
from nearplane.checkpoint.files import Findings, check_files
from nearplane.core.errors import NearplaneError
from nearplane.formats import FORMATS
from nearplane.formats.gguf.file import GGUFFile
from nearplane.formats.read import open_checkpoint
from nearplane.formats.store import INDEX, Store, read_json
from nearplane.models.locate import read_config
from nearplane.models.source import build_skeleton, open_source

MANY = settings.default.max_examples * 12  # type: ignore[union-attr]
SOME = MANY // 5  # through transformers, which takes its time
FEW = MANY // 20  # building a model
SECONDS = 10  # of CPU, for one case; the slowest good ones take half a second
MEMORY = 2 << 30  # beyond what the process holds; the files have some kilobytes


class Hang(AssertionError):
    """A case took too long."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Bounds on CPU time and address space; NearplaneError of one line is what a case may end in."""

    def late(*_: Any) -> None:
        raise Hang(f"more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    except NearplaneError as error:
        assert str(error) and "\n" not in str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# --- what is damaged, and how -------------------------------------------------------------------------------------

HUGE = st.sampled_from([0, -1, 1, 2, 10**4, 10**5, 2**31, 10**9, 10**12, 2**63, 10**19, -(2**63), 10**40])
ODD = st.sampled_from(
    [None, True, False, "", "x", "../x", "re:(", "\x00", "é", [], {}, [[]], [0], {"a": 1}, float("inf"), 0.5]
)
VALUES = st.one_of(HUGE, ODD, st.integers(-70, 300), st.text(max_size=6), st.floats())


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON value something can be changed."""
    if path:
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:
        yield from places(part, (*path, key))


@st.composite
def damaged_json(draw: Any, good: Any) -> str:
    """The text of a JSON value of which up to three parts are others, missing or new."""
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(value))
        if not found:
            break
        *way, last = draw(st.sampled_from(found))
        inside = value
        for key in way:
            inside = inside[key]
        act = draw(st.sampled_from(["set", "set", "set", "delete", "rename"]))
        if act == "set":
            inside[last] = copy.deepcopy(draw(VALUES))
        elif act == "delete":
            del inside[last]
        elif isinstance(inside, dict):
            inside[draw(st.text(max_size=4))] = inside.pop(last)
    return json.dumps(value)


@st.composite
def damaged_bytes(draw: Any, good: bytes) -> bytes:
    """Bytes of which some are others, or missing, or too many."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(len(data), 3000) - 1)))
        act = draw(st.sampled_from(["flip", "cut", "drop", "insert"]))
        if act == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif act == "cut":
            del data[draw(st.integers(0, len(data))) :]
        elif act == "drop":
            del data[at : at + draw(st.integers(1, 9))]
        else:
            data[at:at] = draw(st.sampled_from([b"[" * 5000, b"9" * 5000, b"\xff", b'{"a":', b"\x00" * 8, b"1"]))
    return bytes(data)


@st.composite
def damaged_header(draw: Any, good: bytes) -> bytes:
    """A safetensors file whose header is JSON of the length it says, and says something else."""
    length = int.from_bytes(good[:8], "little")
    header = draw(damaged_json(json.loads(good[8 : 8 + length]))).encode()
    return len(header).to_bytes(8, "little") + header + good[8 + length :]


def damaged_file(good: bytes) -> st.SearchStrategy[bytes]:
    return st.one_of(damaged_header(good), damaged_bytes(good))


def read_all(store: Store) -> None:
    """Ask a store everything."""
    for name in sorted(store.names):
        with contextlib.suppress(NearplaneError):
            assert store.get(name).nbytes == store.nbytes(name)
            assert tuple(store.get(name).shape) == store.shape(name)


# --- files alone --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def single() -> bytes:
    from safetensors.torch import save

    return save(
        {"a": torch.arange(15.0).view(3, 5), "b": torch.arange(4), "c": torch.zeros(0, 7), "d": torch.ones(5).bool()},
        {"format": "pt"},
    )


@settings(max_examples=MANY)
@given(content=damaged_file(single()))
def test_a_damaged_safetensors_file(content: bytes, folder: Path) -> None:
    place = folder / "single"
    place.mkdir(exist_ok=True)
    (place / "model.safetensors").write_bytes(content)
    with bounded():
        read_all(Store(place))


INDEXED = {"metadata": {"total_size": 36}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}


@settings(max_examples=MANY)
@given(content=st.one_of(damaged_json(INDEXED).map(str.encode), damaged_bytes(json.dumps(INDEXED).encode())))
def test_a_damaged_index(content: bytes, folder: Path) -> None:
    place = folder / "index"
    if not place.exists():
        place.mkdir()
        save_file({"a": torch.ones(5)}, place / "one.safetensors")
        save_file({"b": torch.ones(4)}, place / "two.safetensors")
    (place / INDEX).write_bytes(content)
    with bounded():
        check_files(place, Findings())
    with bounded():
        read_all(Store(place))


@settings(max_examples=MANY)
@given(content=st.one_of(st.binary(max_size=60), damaged_bytes(b'{"model_type": "llama", "a": [1, 2.5, {"b": null}]}')))
def test_a_damaged_json_file(content: bytes, folder: Path) -> None:
    (folder / "x.json").write_bytes(content)
    with bounded():
        assert isinstance(read_json(folder / "x.json"), dict)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", '{"a": 1', "NaN", "1", ""])
def test_json_that_pythons_parser_balks_at(content: str, folder: Path) -> None:
    (folder / "y.json").write_text(content)
    with (
        bounded(),
        pytest.raises(NearplaneError, match=r"y\.json (is not valid JSON|must hold a JSON object)") as caught,
    ):
        read_json(folder / "y.json")
    assert "\n" not in str(caught.value)


# --- quantized checkpoints ----------------------------------------------------------------------------------------


def quantized(place: Path, format: str) -> Path:
    """Two layers, one of them asymmetric in shape, and a dense tensor."""
    place.mkdir()
    grid = FORMATS[format].solved_on(Grid(4, 32 if format == "mlx" else 16, sym=False, scale_dtype="float16"))
    tensors: dict[str, torch.Tensor] = {"norm.weight": torch.ones(32)}
    for name, shape in (("m", (32, 64)), ("n", (8, 32))):
        weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        tensors |= FORMATS[format].pack(name, RTN().solve(weight, None, grid), grid)
    save_file(tensors, place / "model.safetensors")
    config = FORMATS[format].config(grid, ignore=["lm_head"], settings={"damp_percent": 0.01})
    (place / "config.json").write_text(json.dumps({"model_type": "llama", **FORMATS[format].entries(config)}))
    shutil.copytree(place, place.with_suffix(".good"))
    return place


def decode_all(place: Path) -> None:
    """Every layer, by every way of reading one."""
    checkpoint = open_checkpoint(place)
    assert checkpoint.ordered in (True, False)
    with contextlib.suppress(NearplaneError):
        checkpoint.expects({"m", "x.m"}, "Linear")
    for name in checkpoint.layers:
        for read in (checkpoint.weight, checkpoint.quantized):
            with contextlib.suppress(NearplaneError):
                read(name)
    open_checkpoint(place, {})


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq", "mlx"])
@settings(max_examples=MANY)
@given(data=st.data())
def test_a_damaged_quantized_checkpoint(format: str, data: st.DataObject, folder: Path) -> None:
    place, good = folder / format, folder / f"{format}.good"
    if not good.exists():
        quantized(place, format)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(good / name, place / name)
    name = data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    content = (good / name).read_bytes()
    if name == "config.json":
        (place / name).write_text(data.draw(damaged_json(json.loads(content))))
    else:
        (place / name).write_bytes(data.draw(damaged_file(content)))
    with bounded():
        decode_all(place)


# --- GGUF files ---------------------------------------------------------------------------------------------------


def ask_all(path: Path) -> None:
    """Ask a GGUF file everything."""
    file = GGUFFile(path)
    assert len(file.digest) == 64 and file.length("tokenizer.ggml.tokens") != -1
    for name, info in file.tensors.items():
        rows = info.nbytes // info.row_bytes
        with contextlib.suppress(NearplaneError):
            assert sum(map(len, file.pieces(name))) == info.nbytes
            assert tuple(file.values(name, 0, rows).shape) == (rows, info.columns)


@pytest.fixture(scope="module")
def made_of(folder: Path) -> Path:
    """A GGUF folder, and its good bytes beside it."""
    model = tiny.save(tiny.build("llama", num_hidden_layers=1), folder / "gguf-model")
    template = templates.of_folder(model, folder / "template.gguf", "Q8_0")
    made: dict[str, Any] = {"format": "gguf", "template": template, "method": "rtn", "progress": False}
    nearplane.quantize(model, folder / "gguf", **made)
    shutil.copytree(folder / "gguf", folder / "gguf.good")
    return folder / "gguf"


@settings(max_examples=MANY)
@given(data=st.data())
def test_a_damaged_gguf_file(data: st.DataObject, made_of: Path) -> None:
    good = (made_of.with_suffix(".good") / "gguf-model-Q4_0.gguf").read_bytes()
    (made_of / "x.gguf").write_bytes(data.draw(damaged_bytes(good)))
    with bounded():
        ask_all(made_of / "x.gguf")


@settings(max_examples=MANY)
@given(data=st.data())
def test_a_damaged_gguf_folder(data: st.DataObject, made_of: Path) -> None:
    names = ["config.json", "gguf-model-Q4_0.gguf"]
    for name in names:
        shutil.copy(made_of.with_suffix(".good") / name, made_of / name)
    name = data.draw(st.sampled_from(names))
    content = (made_of / name).read_bytes()
    if name == "config.json":
        config = json.loads(content)
        told = json.loads(data.draw(damaged_json(config["quantization_config"])))
        (made_of / name).write_text(json.dumps({**config, "quantization_config": told}))
    else:
        (made_of / name).write_bytes(data.draw(damaged_bytes(content)))
    with bounded():
        decode_all(made_of)


# --- configurations and models ------------------------------------------------------------------------------------

KINDS = ["llama", "gpt2", "qwen3", "gemma2"]


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Path]:
    found = {kind: tiny.save(tiny.build(kind), folder / "models" / kind) for kind in KINDS}
    for kind in KINDS:
        shutil.copy(found[kind] / "config.json", folder / f"{kind}.json")
    return found


@settings(max_examples=SOME)
@given(data=st.data())
def test_a_damaged_configuration(data: st.DataObject, folder: Path, models: dict[str, Path]) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    good = json.loads((folder / f"{kind}.json").read_text())
    (models[kind] / "config.json").write_text(data.draw(damaged_json(good)))
    with bounded():
        read_config(models[kind])


@pytest.mark.parametrize("read", [open_source, nearplane.load])
@settings(max_examples=FEW)
@given(data=st.data())
def test_a_model_of_a_damaged_folder(read: Any, data: st.DataObject, folder: Path, models: dict[str, Path]) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    good = json.loads((folder / f"{kind}.json").read_text())
    (models[kind] / "config.json").write_text(data.draw(damaged_json(good)))
    with bounded():
        read(models[kind])


ABSURD = [
    ("llama", "num_hidden_layers", 10**9, "asks for num_hidden_layers=1000000000, beyond 1000"),
    ("gemma2", "num_hidden_layers", 1001, "asks for num_hidden_layers=1001, beyond 1000"),
    ("gpt2", "n_layer", 10**9, "asks for n_layer=1000000000, beyond 1000"),
    ("llama", "hidden_size", 10**12, "asks for hidden_size=1000000000000, beyond"),
    ("llama", "hidden_size", 10**400, "asks for hidden_size=10000000000000000000, beyond"),
    ("gpt2", "n_positions", 100_000, "has shape|config.json asks for"),
    ("llama", "vocab_size", 10**9, "no model can be built|has shape|config.json asks for"),
    ("llama", "intermediate_size", 10**8, "no model can be built|has shape|config.json asks for"),
    ("llama", "vocab_size", 10**6, "has shape|config.json asks for"),
]


@pytest.mark.parametrize("read", [open_source, nearplane.load])
@pytest.mark.parametrize(("kind", "key", "value", "sentence"), ABSURD)
def test_absurd_sizes_are_refused_before_anything_is_built(
    read: Any, kind: str, key: str, value: int, sentence: str, folder: Path, models: dict[str, Path]
) -> None:
    config = json.loads((folder / f"{kind}.json").read_text()) | {key: value}
    (models[kind] / "config.json").write_text(json.dumps(config))
    with bounded(), pytest.raises(NearplaneError, match=sentence):
        read(models[kind])


def test_masks_that_would_not_fit_are_refused_before_they_are_made(folder: Path) -> None:
    config = tiny.build("gpt_neo").config
    config.max_position_embeddings = 100_000
    with bounded(), pytest.raises(NearplaneError, match=r"its masks and tables alone would take 20 GB"):
        build_skeleton(config, folder)
