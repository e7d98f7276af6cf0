"""The C++ kernel: every instruction set, arithmetic, width, group and shape against float64.

The AVX-512 kernel runs as it is where the machine has it, and compiled over plain arrays everywhere (avx512.h).
Without any library these tests are skipped, and test_linear.py shows what runs instead.
"""

import ctypes
import os
import platform
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import SCALES, Problem, compiler, emulated, problem
from torch import Tensor

from nearplane.core import compiled
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.runtime import cpu, reference

pytestmark = pytest.mark.skipif(cpu.best() is None, reason="no C++ kernel was built (no compiler)")
# Relative error of an output, in norm, on normal inputs.
BOUNDS = {"exact": 1e-5, "a16": 5e-5, "a8": 1e-2}
# Largest error of one activation, relative to the largest of its run, and the length of a run.
STEPS = {"exact": (0.0, 128), "a16": (1 / 65024, 128), "a8": (1 / 254, 32)}
DTYPES = {torch.float32: 0.0, torch.float16: 1e-3, torch.bfloat16: 8e-3}

Run = Callable[..., Tensor]


@pytest.fixture(scope="module", params=["portable", "avx2", "avx512", "emulated"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """(x, problem, bias, arithmetic, threads) -> y by one instruction set."""
    isa: Any = request.param if request.param != "emulated" else "avx512"
    if request.param == "emulated" and compiler() is None:
        pytest.skip("no compiler")
    library = emulated(tmp_path_factory.mktemp("emulated")) if request.param == "emulated" else cpu.library(isa)
    if library is None:
        pytest.skip(f"this machine has no {isa}, or the compiler did not know it")

    def by(
        x: Tensor, given: Problem, bias: Tensor | None = None, arithmetic: Any = "exact", threads: int = 1
    ) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "library", lambda _: library)
            return cpu.linear(x, cpu.prepare(given.tiles), bias, arithmetic, isa, threads)

    return by


def normal(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(y: Tensor, x: Tensor, given: Problem, bias: Tensor | None) -> float:
    expected = x.double() @ given.dense.T + (0 if bias is None else bias.double())
    return float((y.double() - expected).norm() / expected.norm())


SHAPES = [(48, 256, 64, False), (16, 2304, 1024, False), (16, 128, 32, False), (50, 224, 128, False), (33, 200, -1, False),
          (40, 1160, -1, False), (20, 144, 48, False), (24, 256, 64, True)]  # fmt: skip


@pytest.mark.parametrize("free", [False, True], ids=["bytes", "offsets"])
@pytest.mark.parametrize("arithmetic", BOUNDS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_against_float64(run: Run, arithmetic: str, bits: int, free: bool) -> None:
    for i, (out, columns, group, shuffled) in enumerate(SHAPES):
        sym = i % 2 == 1 and not free
        given = problem(out, columns, bits, group, sym, SCALES[i % 3], shuffled, free=free)
        bias = normal(1, out, 2)[0] if i % 3 else None
        for rows in (1, 3, 8, 13):
            for dtype, rounding in DTYPES.items():
                x = normal(rows, columns).to(dtype)
                y = run(x, given, bias, arithmetic)
                assert y.dtype == dtype and y.shape == (rows, out)
                where = (out, columns, group, rows, dtype)
                # One output has no average over outputs, and a short row few inputs: twice the bound there. Offsets far
                # from 0 multiply the sum of all inputs, whose error every output of a row shares.
                slack = 2 if rows == 1 and (columns < 256 or free) else 1
                assert error(y, x, given, bias) <= slack * BOUNDS[arithmetic] + rounding, where


@pytest.mark.parametrize("free", [False, True], ids=["bytes", "offsets"])
@pytest.mark.parametrize("arithmetic", BOUNDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_outlier_channel_costs_its_own_run_only(run: Run, arithmetic: str, bits: int, free: bool) -> None:
    """One channel 1000 times larger: the error of every output within the stated bound, input by input."""
    step, length = STEPS[arithmetic]
    given = problem(48, 512, bits, 256, free=free)
    x = normal(3, 512)
    x[:, 77] *= 1000
    runs = x.double().abs().unflatten(1, (-1, length)).amax(2, keepdim=True).expand(-1, -1, length).flatten(1)
    weights = given.dense.abs().T
    allowed = step * runs @ weights + 3e-6 * (x.double().abs() @ weights) + 1e-6
    for rows in (1, 3):
        y = run(x[:rows], given, None, arithmetic)
        worst = ((y.double() - x[:rows].double() @ given.dense.T).abs() / allowed[:rows]).max()
        assert worst <= 1
    if arithmetic != "exact":  # the bound is not an empty one
        assert float(worst) > 1e-3


def test_extreme_codes_and_activations_do_not_overflow(run: Run) -> None:
    """All codes greatest, all activations at full scale: the largest sums there can be."""
    for bits in range(2, 9):
        for columns in (128, 4096):
            given = problem(16, columns, bits, -1, seed=3)
            full = given.tiles.codes.fill_(255)
            assert int(full.min()) == 255
            zero = float(given.tiles.zeros[0, 0, 0]) if given.tiles.zeros.numel() else float(given.tiles.shape.zero)
            scale = given.tiles.scales.view(torch.float16)[0, 0, 0].double()
            for sign in (1.0, -1.0):
                x = torch.full((5, columns), sign)
                expected = sign * columns * (2**bits - 1 - zero) * scale
                for arithmetic in BOUNDS:
                    for rows in (1, 5):
                        found = run(x[:rows], given, None, arithmetic)[:, 0].double()
                        assert ((found - expected).abs() <= 1e-5 * columns * 2**bits * scale).all(), (bits, arithmetic)


@pytest.mark.parametrize("arithmetic", BOUNDS)
def test_numbers_that_are_none_and_numbers_at_the_edge(run: Run, arithmetic: str) -> None:
    given, bias = problem(40, 256, 4, 64), normal(1, 40, 2)[0]
    x = normal(4, 256)
    clean = run(x, given, bias, arithmetic)
    for bad in (torch.nan, torch.inf):
        broken = x.clone()
        broken[2, 100] = bad
        y = run(broken, given, bias, arithmetic)
        assert not y[2].isfinite().any(), "a broken token must be seen"
        assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]]), "and spoil no other"
    assert torch.equal(run(torch.zeros(3, 256), given, bias, arithmetic), bias.expand(3, -1))
    for size in (1e-38, 1e-31, 1e-20, 1e20, 1e30):
        y = run(x * size, given, None, arithmetic)
        assert ((y.double() - x.double() @ given.dense.T * size).abs() <= 0.1 * size * 256 + 1e-29).all()


def test_halves_are_rounded_as_torch_rounds_them(run: Run) -> None:
    """Outputs from subnormal to overflowing."""
    codes = torch.full((16, 32), 1, dtype=torch.uint8)
    from nearplane.runtime.layout import tile

    given = Problem(tile(codes, torch.ones(16, 1), torch.zeros(16, 1, dtype=torch.uint8), 2, 32), codes.double(), 0)
    generator = torch.Generator().manual_seed(0)
    values = torch.exp2(torch.rand(500, generator=generator) * 50 - 30) * torch.randn(500, generator=generator).sign()
    values = torch.cat(
        [values, torch.tensor([65504.0, 65519.9, 65520.0, 1e6, 2.0**-24, 2.0**-25, 1.5 * 2.0**-24, 0.0])]
    )
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.zeros(len(values), 32, dtype=dtype)
        x[:, :3] = values[:, None].to(dtype) * torch.tensor([1.0, 0.5, 0.0009765625]).to(dtype)
        y = run(x, given, None, "exact")[:, 0]
        expected = x.float().sum(1).to(dtype)
        assert torch.equal(y.view(torch.int16), expected.view(torch.int16)), dtype


@pytest.mark.parametrize("arithmetic", BOUNDS)
def test_any_number_of_threads_gives_the_same_bits(run: Run, arithmetic: str) -> None:
    given = problem(400, 512, 4, 128)
    for rows in (1, 5, 140, 600):
        x = normal(rows, 512)
        alone = run(x, given, None, arithmetic, 1)
        for threads in (2, 3, 20):  # 20: more than there are parts
            assert torch.equal(run(x, given, None, arithmetic, threads), alone)


def test_instruction_sets_agree(run: Run) -> None:
    """Integer sums are exact, so only the order of a few float operations differs."""
    given, x = problem(64, 512, 3, 128), normal(3, 512)
    for arithmetic in ("a16", "a8"):
        portable = cpu.linear(x, cpu.prepare(given.tiles), None, arithmetic, "portable")  # type: ignore[arg-type]
        assert (run(x, given, None, arithmetic) - portable).abs().max() <= 1e-5 * portable.abs().max()


def test_inputs_of_any_layout(run: Run) -> None:
    given = problem(48, 128, 4, 64)
    x = normal(6, 256)
    for view in (x[:, ::2], x[:, :128], x.T[:128, :6].T, x[:0, :128], x[:6, :128].unflatten(0, (2, 3)), x[0, :128]):
        y = run(view, given)
        assert y.shape == (*view.shape[:-1], 48)
        assert torch.equal(y, run(view.contiguous(), given))


def test_callers_in_many_threads_and_a_fork_between() -> None:
    """Eight callers at once on a pool of four, before and after a fork, and in the child."""
    given, x = problem(4200, 1024, 4, 128), normal(8, 1024)  # enough for other threads to be woken
    handle = cpu.prepare(given.tiles)
    expected = [cpu.linear(x[i : i + 1], handle, threads=1) for i in range(8)]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(40):
            if not torch.equal(cpu.linear(x[i : i + 1], handle, threads=4), expected[i]):
                wrong.append(i)

    def all_at_once() -> None:
        callers = [threading.Thread(target=call, args=(i,)) for i in range(8)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
            assert not caller.is_alive()

    all_at_once()
    child = os.fork()
    if child == 0:  # its pool has no threads left; it must start its own
        call(0)
        os._exit(1 if wrong else 0)
    assert os.waitpid(child, 0)[1] == 0
    all_at_once()
    assert not wrong
    library = cpu.library(cpu.best() or "portable")
    assert library is not None
    library.nearplane_shut_down()
    library.nearplane_shut_down()  # twice is once
    all_at_once()
    assert not wrong


def test_the_best_instruction_set_is_chosen_and_auto_means_a16_on_vectors() -> None:
    best = cpu.best()
    assert best is not None and cpu.library(best) is not None
    better = list(compiled.ISAS)[: list(compiled.ISAS).index(best)]
    assert all(cpu.library(isa) is None for isa in better)
    assert [cpu.resolve("auto", isa) for isa in compiled.ISAS] == ["a16", "a16", "exact"]
    with pytest.raises(SettingError, match="a17"):
        cpu.resolve("a17", best)  # type: ignore[arg-type]


@pytest.mark.skipif(compiler() is None or platform.machine() != "x86_64", reason="no compiler, or not x86-64")
def test_the_build_left_nothing_out() -> None:
    """A library that does not compile is left out of the install without an error: it must be noticed here."""
    assert [isa for isa in compiled.ISAS if compiled.library_path(isa) is None] == []


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = compiled.library_path("portable")
    assert path is not None
    monkeypatch.setattr(compiled, "ABI", compiled.ABI + 1)
    with pytest.raises(NearplaneError, match="another version"):
        compiled.open_library(path)


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda _: None)
    with pytest.raises(SettingError, match="no C\\+\\+ kernel for avx512"):
        cpu.linear(normal(1, 256), cpu.prepare(problem().tiles), None, "exact", "avx512")


def test_reading_memory_is_timed() -> None:
    assert 0.05 < cpu.read_rate(8) < 5000
    best = cpu.library(cpu.best() or "portable")
    assert best is not None
    memory = torch.zeros(512, dtype=torch.uint8)
    memory[3] = 5
    assert best.nearplane_read(memory.data_ptr(), 512) == 5


def test_the_plain_path_is_as_exact() -> None:
    for bits in (2, 3, 8):
        given, bias = problem(50, 200, bits, 64, shuffled=bits == 3, free=bits != 8), normal(1, 50, 2)[0]
        x = normal(5, 200)
        assert error(reference.linear(x, given.tiles, bias), x, given, bias) < 1e-6
        assert error(reference.linear(x.double(), given.tiles, bias), x, given, bias) < 1e-7


def test_the_struct_is_the_kernels() -> None:
    """Same size as in C: ten words and three half words, padded."""
    assert ctypes.sizeof(cpu._Weight) == 4 * 8 + 5 * 8 + 3 * 4 + 4
