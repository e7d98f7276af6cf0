"""Jobs of several steps that threads share out (threads.cpp), with chunks that are Python functions."""

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise

import pytest

from nearplane.runtime import cpu

pytestmark = pytest.mark.skipif(cpu.best() is None, reason="no C++ kernel was built (no compiler)")
WORK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
MANY = 1 << 22  # products of a job for which threads are woken


def steps(chunks: list[int], work: Callable[[int, int], int], threads: int, products: int = MANY) -> int:
    library = cpu.library(cpu.best() or "portable")
    assert library is not None
    call = WORK(lambda _, step, chunk: work(step, chunk))
    counts = (ctypes.c_int64 * len(chunks))(*chunks)
    number = ctypes.c_int64
    library.nearplane_steps.argtypes = [WORK, ctypes.c_void_p, ctypes.c_void_p, number, number, ctypes.c_int]
    code: int = library.nearplane_steps(call, None, counts, len(chunks), products, threads)
    return code


@pytest.mark.parametrize("threads", [1, 2, 3, 20])
def test_every_chunk_is_done_once_and_steps_follow_each_other(threads: int) -> None:
    chunks, done = [5, 1, 0, 7, 40, 2, 1, 1, 33], list[tuple[int, int]]()
    early, lock = list[tuple[int, int]](), threading.Lock()

    def work(step: int, chunk: int) -> int:
        with lock:
            before = sum(1 for other, _ in done if other < step)
            if before != sum(chunks[:step]):
                early.append((step, chunk))
        time.sleep(1e-4 if chunk % 5 else 0)  # others run
        with lock:
            done.append((step, chunk))
        return 0

    for _ in range(5):
        done.clear()
        assert steps(chunks, work, threads) == 0
        assert sorted(done) == [(s, c) for s, count in enumerate(chunks) for c in range(count)]
    assert not early


def by_whom(chunks: list[int], threads: int, wanted: int, products: int = MANY) -> list[list[int]]:
    """Which thread does each chunk of each step; asked again where a busy machine does not run so many threads in time."""
    for _ in range(50):
        by = [[0] * count for count in chunks]

        def work(step: int, chunk: int, by: list[list[int]] = by) -> int:
            by[step][chunk] = threading.get_ident()
            time.sleep(2e-3)
            return 0

        assert steps(chunks, work, threads, products) == 0
        if len(set(by[-1])) == wanted:
            break
    return by


@pytest.mark.parametrize("threads", [2, 3])
def test_helpers_stay_for_all_steps_and_each_has_a_part_of_its_own(threads: int) -> None:
    """Neighbouring chunks are done by the same thread."""
    by = by_whom([12] * 6, threads, threads)
    assert len({thread for order in by for thread in order}) == threads and threading.get_ident() in by[-1]
    changes = [sum(a != b for a, b in pairwise(order)) for order in by]
    assert sorted(changes)[2] <= threads + 1  # of most: a thread that was put aside has its part done by others


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_after_an_error_nothing_more_is_begun_and_nobody_waits(threads: int) -> None:
    caller, begun = threading.get_ident(), list[int]()

    def work(step: int, _: int) -> int:
        begun.append(step)
        time.sleep(1e-3)
        failing = step == 2 and (threads == 1 or threading.get_ident() != caller)  # in a helper, where there is one
        return 7 if failing else 0

    for _ in range(50):  # a busy machine may not run a helper in time
        begun.clear()
        if code := steps([8, 8, 8, 8, 8], work, threads):
            break
    assert code == 7
    assert set(begun) == {0, 1, 2}
    assert steps([8, 8], lambda *_: 0, threads) == 0  # and the helpers are there for the next job


def test_a_thread_that_takes_long_is_waited_for_asleep() -> None:
    """Processor time of the others stays far below the time that they wait."""
    for slow in (0, 7):  # of the caller, of a helper
        start, used = time.perf_counter(), time.process_time()
        assert steps([8, 8], lambda step, chunk, slow=slow: time.sleep(0.2 * (not step and chunk == slow)) or 0, 2) == 0
        assert time.perf_counter() - start > 0.19
        assert time.process_time() - used < 0.1


def test_small_jobs_wake_nobody() -> None:
    time.sleep(0.1)  # nobody is awake
    assert len(set(by_whom([8], 2, 1, 1 << 10)[0])) == len(set(by_whom([8], 2, 1, 1 << 20)[0])) == 1
    assert len(set(by_whom([8], 2, 2)[0])) == 2


def test_callers_at_once_with_other_numbers_of_threads() -> None:
    """Each gets what it asked for, whatever another caller asks for."""
    sums = [0] * 6

    def call(i: int) -> None:
        for _ in range(20):
            done = list[int]()
            assert steps([9, 1, 9], lambda step, chunk: done.append(step) or 0, 1 + i % 4) == 0  # noqa: B023
            sums[i] += len(done)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert sums == [20 * 19] * 6


def test_a_fork_and_the_end_of_a_process() -> None:
    """A child has helpers of its own; and no helper keeps a process from its end."""
    assert steps([8, 8], lambda *_: 0, 3) == 0
    child = os.fork()
    if child == 0:
        os._exit(0 if len(set(by_whom([8, 8], 3, 3)[1])) == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0
    script = "import sys; sys.path[:0] = sys.argv[1:]; import test_threads as t; assert t.steps([8, 8], lambda *_: 0, 4) == 0"
    subprocess.run([sys.executable, "-c", script, os.path.dirname(__file__)], check=True, timeout=60)
