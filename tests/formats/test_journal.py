"""The lock of a folder and its records, where fcntl is missing too."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Grid, Quantized
from nearplane.formats.journal import LAYOUT, STATE, Journal, holder, unfinished
from nearplane.formats.parts import Writer


def python(code: str, *arguments: str, hidden: bool = False) -> "subprocess.Popen[str]":
    """Start a Python; ``hidden``: as on a system that has no fcntl."""
    hide = "import sys; sys.modules['fcntl'] = None\n" if hidden else ""
    words = [sys.executable, "-c", hide + textwrap.dedent(code), *arguments]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_import_without_fcntl() -> None:
    """Nothing that is imported with the package needs it, nor do the command line and a plan."""
    done = python("import nearplane, nearplane.cli.main, nearplane.run.forecast; print(nearplane.Grid())", hidden=True)
    out, told = done.communicate()
    assert done.returncode == 0 and out.startswith("Grid(bits=4"), told


@pytest.mark.parametrize("hidden", [False, True])
def test_a_folder_is_written_by_one_process(hidden: bool, tmp_path: Path) -> None:
    """Who holds it is told; nothing of the lock is left in a finished folder."""
    code = """
        import sys, torch, warnings
        from pathlib import Path
        from nearplane.formats.parts import Writer
        warnings.simplefilter("ignore")  # that the lock is a file only
        with Writer(Path(sys.argv[1])) as writer:
            writer.put({"a": torch.ones(3)})
            print("writing", flush=True)
            sys.stdin.readline()
            writer.finish()
    """
    out = tmp_path / "out"
    words = [
        sys.executable,
        "-c",
        ("import sys; sys.modules['fcntl'] = None\n" if hidden else "") + textwrap.dedent(code),
    ]
    process = subprocess.Popen(
        [*words, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    if not hidden:
        told = holder(out) or ""
        assert told.startswith(f"process {process.pid} on ") and ", since 20" in told
        assert "is being written by process" in (unfinished(out) or "")
        with pytest.raises(NearplaneError, match=rf"is being written by process {process.pid} on .*; wait for it"):
            Writer(out)
        assert holder(out) == told  # asking leaves the lock as it is
    _, told = process.communicate("\n")
    assert process.returncode == 0, told
    assert sorted(path.name for path in out.iterdir()) == [
        "SHA256SUMS", "model-00001-of-00001.safetensors", "model.safetensors.index.json"]  # fmt: skip


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from nearplane.formats.journal import Journal
        Path(sys.argv[1]).mkdir()
        journal = Journal(Path(sys.argv[1]))
        journal.lock()
        print("locked", flush=True)
        time.sleep(100)
    """
    out = tmp_path / "out"
    process = python(code, str(out))
    assert process.stdout is not None and process.stdout.readline() == "locked\n" and holder(out) is not None
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert holder(out) is None and "no finished block" in (unfinished(out) or "")
    journal = Journal(out)
    journal.lock()
    assert journal.held and str(os.getpid()) in (holder(out) or "")
    journal.release()
    assert not journal.held and holder(out) is None


def test_records_of_another_layout(tmp_path: Path) -> None:
    (tmp_path / STATE).mkdir()
    journal = Journal(tmp_path)
    assert not journal.earlier
    journal.add(0, {"layout": LAYOUT, "shards": {}})
    assert not journal.earlier
    journal.add(1, {"shards": {"part-00002.unfinished": "a hash"}})
    assert journal.earlier and journal.records() == (
        journal.records(check=False)[0][:1],
        "part-00002.unfinished is missing",
    )


@pytest.mark.parametrize("grid", [Grid(3, 16, sym=False, fit="minmax"), Grid("ternary", 32, fit="minmax")])
def test_a_part_is_read_back(tmp_path: Path, rtn, grid: Grid) -> None:
    """By the writer that sealed it and by one that resumes; a block without linears has none."""
    solved: dict[str, Quantized] = {name: rtn(24, 96, grid, seed) for seed, name in enumerate(("b.x", "b.y"))}
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "out", shard_bytes=500) as writer:
        for name, quantized in solved.items():
            writer.put_quantized(name, quantized, grid)
        writer.seal({"block": "b"})
        writer.seal({"block": "empty"})
        raise KeyboardInterrupt
    with Writer(tmp_path / "out", resume=True) as again:
        for some in (writer, again):
            assert [record["block"] for record in some.records] == ["b", "empty"]
            assert some.part(some.records[1]).open() is None
            part = some.part(some.records[0]).open()
            assert part is not None and part.layers.keys() == solved.keys()
            for name, wanted in solved.items():
                assert all(torch.equal(a, b) for a, b in zip(part.quantized(name)[:3], wanted[:3], strict=True))
                assert part.layers[name].grid.storage_bits == grid.storage_bits
