"""The layout for a GPU against its own description, and back, as a module moves; what is chosen and counted there."""

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import SCALES, problem

from nearplane.core.errors import NearplaneError
from nearplane.runtime import triton, tuned
from nearplane.runtime.layout import PLANES, Tiles, codes_of
from nearplane.runtime.linear import TENSORS, QuantizedLinear
from nearplane.runtime.tuned import DENSE, Choice, candidates
from nearplane.runtime.words import Words, words

CASES = [(48, 256, 64, False), (20, 100, 32, False), (33, 300, 128, False), (5, 70, -1, False), (40, 144, 48, False),
         (24, 256, 64, True), (17, 90, 40, True)]  # fmt: skip


def code_at(codes: torch.Tensor, bits: int, channel: int, position: int) -> int:
    """One code, as the description in words.py has it."""
    block, p = codes[position // 32, :, channel].long() & 0xFFFFFFFF, position % 32
    value, first, done = 0, 0, 0
    for plane in PLANES[bits]:
        share = 32 // plane  # inputs of a word
        word, shift = (first, 2 * (p % 16) + p // 16) if plane == 1 else (first + p // share, p % share * plane)
        value |= (int(block[word]) >> shift & 2**plane - 1) << done
        first, done = first + plane, done + plane
    return value


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_lies_where_the_description_says(bits: int) -> None:
    tiles = problem(20, 70, bits, 70).tiles
    packed = words(tiles)
    assert packed.codes.shape == (3, bits, 32)
    found = [[code_at(packed.codes, bits, channel, position) for position in range(96)] for channel in range(32)]
    assert torch.equal(torch.tensor(found, dtype=torch.uint8), codes_of(tiles))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("out", "columns", "group", "shuffled"), CASES)
def test_there_and_back_is_exact(bits: int, out: int, columns: int, group: int, shuffled: bool) -> None:
    for dtype in SCALES:
        for free in (False, True):
            tiles = problem(out, columns, bits, group, bits % 2 == 0, dtype, shuffled, free=free).tiles
            packed = words(tiles)
            packed.check()
            assert packed.nbytes == tiles.nbytes
            for part in (packed.codes, packed.scales, packed.zeros):
                assert part.is_contiguous() and part.shape[-1] % 16 == 0  # 16 bytes of words, or none, from any start
            for name in TENSORS:
                assert torch.equal(getattr(packed.tiles, name), getattr(tiles, name)), name


def test_parts_of_a_large_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = problem(70, 96, 3, 32, shuffled=True).tiles
    whole = words(tiles)
    monkeypatch.setattr("nearplane.runtime.words.PART", 96 * 32)  # two tiles at a time
    assert torch.equal(words(tiles).codes, whole.codes) and torch.equal(whole.tiles.codes, tiles.codes)


def test_malformed_words_are_refused() -> None:
    good = words(problem(40, 96, 3, 32).tiles)
    for change in (
        {"codes": good.codes[:1]},
        {"codes": good.codes.short()},
        {"scales": good.scales.float()},
        {"zeros": good.zeros[:, :16]},
        {"order": torch.zeros(5, dtype=torch.int32)},
    ):
        with pytest.raises(ValueError, match=f"a packed weight's {next(iter(change))} on a GPU"):
            replace(good, **change).check()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take this device for one where the Triton kernel runs."""
    monkeypatch.setattr(triton, "supports", lambda shape, device, dtype: None)


def test_a_module_lies_as_its_device_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    made = lambda seed: QuantizedLinear(problem(40, 96, 3, 32, seed=seed).tiles, torch.arange(40.0))  # noqa: E731
    layer, other, want = made(0), made(1), made(0).tiles
    here = {name: getattr(layer, name) for name in TENSORS}
    with monkeypatch.context() as patch:
        patch.setattr(triton, "supports", lambda *_: None)
        layer.to("cpu")
        assert isinstance(layer.packed, Words) and layer.packed.nbytes == want.nbytes
        for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.half()):
            assert isinstance(twin.packed, Words) and torch.equal(twin.dequantized(), made(0).dequantized())
        state = layer.state_dict()
        assert list(state)[:4] == ["bias", *TENSORS][:4]
        assert all(torch.equal(state[name], here[name]) for name in TENSORS)  # tiles, as on a CPU
        address = layer.codes.data_ptr()
        for assign in (False, True):
            layer.load_state_dict(other.state_dict(), assign=assign)
            assert isinstance(layer.packed, Words) and layer.codes.data_ptr() == address  # recorded graphs go on
            assert torch.equal(layer.dequantized(), other.dequantized())
            layer.load_state_dict(made(0).state_dict(), assign=assign)
        fresh = QuantizedLinear(problem(40, 96, 4, 32, sym=True).tiles)
        with pytest.raises(RuntimeError, match="size mismatch for codes"):
            layer.load_state_dict({**fresh.state_dict(), "bias": torch.zeros(40)})
        layer.to("meta")
        assert layer.codes.is_meta and isinstance(layer.packed, Words)
    layer = made(0)
    with monkeypatch.context() as patch:
        patch.setattr(triton, "supports", lambda *_: None)
        layer.to("cpu")
    x = torch.randn(3, 96)
    assert isinstance(layer.packed, Words)
    assert torch.equal(layer(x), made(0)(x)), "words on a CPU, as a pickle that is mapped there has them"
    layer.to("cpu")
    assert type(layer.packed) is Tiles and all(torch.equal(getattr(layer, name), here[name]) for name in TENSORS)


@pytest.mark.usefixtures("gpu")
def test_gradients_through_words() -> None:
    given = problem(40, 96, 3, 32)
    x = torch.randn(3, 96, requires_grad=True)
    QuantizedLinear(given.tiles).to("cpu")(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad.double(), given.dense.sum(0).expand(3, -1), atol=1e-5)


def test_every_number_of_rows_has_choices() -> None:
    shape = problem(40, 96, 3, 32).tiles.shape
    by_name: dict[str, set[Choice]] = {}
    for rows in (*range(1, 40), 64, 65, 128, 200, 256, 1000, 1024, 5000):
        found = candidates(rows)
        assert found and (rows >= 16 or found[0].kernel == "few") and len(found) == len(set(found))
        assert rows < 16 or all(choice.kernel != "few" for choice in found)
        name = tuned.key(shape, rows, torch.float16)
        assert by_name.setdefault(name, set(found)) == set(found), "one name, one set of choices"
        for choice in found:
            blocks = 37
            share, shares = tuned.split(choice, blocks, 3, torch.device("cpu"))
            assert share % choice.blocks == 0 and (shares - 1) * share < blocks <= shares * share
    assert candidates(5000) == [DENSE]


def test_choices_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cuda, measured = tmp_path / "kernels" / "a.json", torch.device("cuda"), list[int]()

    def fastest(found: list[Choice], run: object) -> Choice:
        measured.append(1)
        return found[-1]

    monkeypatch.setattr(tuned, "_file", lambda device: path)
    monkeypatch.setattr(tuned, "_fastest", fastest)
    for content in (None, "", "[]", '{"version": 0, "choices": {}}', '{"version": 1, "choices": {"a": 3}}'):
        monkeypatch.setattr(tuned, "_tables", {})
        monkeypatch.setattr(tuned, "_ran", set())
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        assert not tuned.known("a", cuda)
        choice = tuned.choose("a", cuda, 1, lambda c: None)
        assert choice == candidates(1)[-1] == tuned.choose("a", cuda, 1, lambda c: None) and tuned.known("a", cuda)
    assert len(measured) == 5, "once for each damaged file"
    assert json.loads(path.read_text())["choices"]["a"]["kernel"] == "few"
    monkeypatch.setattr(tuned, "_tables", {})  # another process
    assert tuned.choose("a", cuda, 1, lambda c: None) == choice and len(measured) == 5
    assert tuned.choose("b", cuda, 2000, lambda c: None) == DENSE and len(measured) == 5
    assert tuned.choose("a", torch.device("cpu"), 1, lambda c: None) == candidates(1)[0]


def test_recorded_launches_have_counters_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_arenas", {})
    monkeypatch.setattr(triton, "_streams", {})
    monkeypatch.setattr(triton, "ARENA", 100)
    here = torch.device("cpu")
    assert triton._counters(here, 5, True).tolist() == [0] * 5  # no arena yet: zeros of its own
    held = triton._counters(here, 5, False)
    assert triton._counters(here, 5, False).data_ptr() == held.data_ptr()  # a stream's, one launch after the other
    for _ in range(2):
        taken = [triton._counters(here, 30, True) for _ in range(4)]  # the fourth finds no room
        spans = {(part.data_ptr(), part.numel()) for part in taken}
        assert len(spans) == 4 and all(part.sum() == 0 for part in taken)
        triton._counters(here, 5, False)  # between two graphs: room for the next
    assert len(triton._arenas[here].counters) == 3


def test_a_graph_is_not_recorded_before_a_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU whose stream is recording: a kernel would be compiled and measured inside of the graph."""

    class Recording(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: triton.nullcontext())
    x = torch.randn(3, 96).as_subclass(Recording)
    with pytest.raises(NearplaneError, match="no product of 3 rows with a packed weight of 40 x 96 has run yet"):
        triton.linear(x, words(problem(40, 96, 3, 32).tiles), None)
