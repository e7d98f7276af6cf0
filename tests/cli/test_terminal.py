"""What a run shows: a line per block of at most 78 columns, the head, the summary with advice, quiet and verbose."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
import tiny

import nearplane
from nearplane import RTN, Report
from nearplane.cli.main import main
from nearplane.cli.summary import summary
from nearplane.cli.terminal import COLUMNS, Terminal, block_line, head
from nearplane.machine import progress
from nearplane.models.discover import Block
from nearplane.page.words import clock, grouped, number_of, rough
from nearplane.run.events import BlockDone
from nearplane.run.measure import BlockRow
from nearplane.run.report import LinearRow

LONG = (
    "model.language_model.decoder.layers.119.feed_forward.shared_expert_block.experts.255.intermediate_down_projection"
)


def row(name: str, error: float | None = 0.0041, **values: Any) -> LinearRow:
    empty = dict.fromkeys(("loss", "bound", "bound_ratio", "clipped", "damp_percent", "alpha", "rounds", "rejected"))
    rtn = None if error is None else 2 * error
    given: dict[str, Any] = {
        "name": name, "shape": (4, 8), "error": error, "rtn_error": rtn, "weight_error": 0.02, "damp_raised": 0,
        "residual": False, "tokens": 64, "dropped": 0, "seconds": 1.0, "bits": 3, **empty, **values,
    }  # fmt: skip
    return LinearRow(**given)


def line_of(
    name: str, number: int, total: int, rows: list[LinearRow], seconds: float, left: float, mixed: bool = False,
    behind: BlockRow | None = None,
) -> str:  # fmt: skip
    """The line of a block, counted from 1."""
    done = BlockDone(Block(name, []), number - 1, behind=behind)
    return block_line(done, total, rows, seconds, left, mixed)


def test_what_was_not_scaled_is_named_with_its_reason() -> None:
    """The kinds that most blocks have come first; where there is none, a line says so."""
    why = "no norm and no linear of its block makes it channel by channel"
    some = [
        f"h.{k}: scaled: mlp.fc1 by alpha 0.2 through ln (error x 0.9); not scaled: mlp.fc2, out ({why})"
        for k in range(3)
    ]
    assert grouped(some) == [
        f"3 blocks have scaled input channels (h.0, ...): left out: mlp.fc2, out ({why}) in 3 blocks"
    ]
    more = [f"{some[0]}; not scaled: {name} (best as it is)" for name in "abc"]
    assert grouped([*some, *more])[0].endswith(
        "in 6 blocks; a (best as it is) in 1 block; b (best as it is) in 1 block; and 1 more, listed in report.json"
    )
    whole = [line.partition("; not")[0] for line in some]
    assert grouped(whole) == ["3 blocks have scaled input channels (h.0, ...): nothing was left out"]
    assert grouped(whole[:1]) == [f"{whole[0]}: nothing was left out"] and grouped(some[:1]) == some[:1]
    none = [f"h.{k}: not scaled: q, k ({why})" for k in range(2)]
    assert grouped(none[:1]) == none[:1]  # which says what and why
    assert grouped(none) == [f"2 blocks have no scaled input channels (h.0, ...): left out: q, k ({why}) in 2 blocks"]


def test_a_block_line_has_its_mean_and_its_worst_linear() -> None:
    rows = [row("model.layers.3.self_attn.q_proj", 0.002), row("model.layers.3.mlp.down_proj", 0.006)]
    line = line_of("model.layers.3", 4, 30, rows, 6.1, 124.0)
    assert line == "block  4/30  linears 0.0040 (rtn 0.0080)  down_proj 0.0060  6.1s  eta 2:04"
    assert len(line) <= COLUMNS
    behind = BlockRow("model.layers.3", 0.0123, 0.045)
    line = line_of("model.layers.3", 4, 30, rows, 6.1, 124.0, behind=behind)
    assert line == "block  4/30  error 0.0123 (rtn 0.045)  worst down_proj 0.0060  6.1s  eta 2:04"
    alone = line_of("model.layers.3", 4, 30, rows, 6.1, 124.0, behind=BlockRow("model.layers.3", 0.0123, None))
    assert alone == "block  4/30  error 0.0123  worst down_proj 0.0060  6.1s  eta 2:04"
    last = line_of("model.layers.3", 30, 30, rows, 6.1, 0.0)
    assert "eta" not in last
    unread = [row("model.layers.3.mlp.up_proj", None), row("model.layers.3.mlp.down_proj", None, weight_error=0.03)]
    assert "weight error 0.0250  worst down_proj 0.030" in line_of("model.layers.3", 1, 2, unread, 0.1, 1.0)
    line = line_of("model.layers.3", 1, 2, unread, 0.1, 1.0, behind=behind)
    assert line == "block 1/2  error 0.0123 (rtn 0.045)  worst down_proj 0.030  0.1s  eta 0:01"
    assert line_of("b", 1, 2, [], 0.1, 1.0) == "block 1/2  no linear  0.1s  eta 0:01"
    mixed = [row("b.x", bits=4), row("b.y", bits=8), row("b.z", bits="ternary")]
    assert "  4.7 bits  " in line_of("b", 1, 2, mixed, 0.1, 1.0, mixed=True)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("error", [None, 0.5, 12345.678, 3e-7])
@pytest.mark.parametrize("name", [LONG, "a", "b." + "x" * 300, "b.attention.output.dense"])
def test_no_block_line_is_wider(name: str, error: float | None, mixed: bool) -> None:
    line = line_of("b", 1999, 2000, [row(name, error)], 98765.4, 1e6, mixed)
    assert len(line) <= COLUMNS and line.endswith("27:26:05  eta 277:46:40") and "\n" not in line


def test_a_linear_is_told_from_others_of_its_block() -> None:
    for name, shown in (
        ("attention.output.dense", "output.dense"),
        ("mlp.experts.12.down_proj", "12.down_proj"),
    ):
        assert f"worst {shown} " in line_of("b", 2, 2, [row(f"b.{name}")], 0.0, 0.0)


def test_numbers() -> None:
    assert [number_of(value) for value in (0.0, 0.01194, 0.00036, 2.34e-6)] == [
        "0.0000",
        "0.0119",
        "0.00036",
        "2.3e-06",
    ]
    assert [clock(value) for value in (7, 124, 3724)] == ["0:07", "2:04", "1:02:04"]


def report(**values: Any) -> Report:
    settings = {
        "method": {"name": "GPTQ", "order": "natural", "damp_percent": 0.01, "static_groups": True},
        "grid": {"bits": 3, "group_size": 64, "sym": False, "fit": "auto"},
    }
    data = {"origin": "a text", "windows": 16, "seqlen": 512}
    return Report("demo", settings, "out", data=data, linears=[row("a.b")], seconds={"solve": 3.0}, **values)


def test_the_head_names_the_fields_and_what_is_usual() -> None:
    lines = head(report(), [])
    assert "method GPTQ order=natural" in lines  # the default is activation; other options are as by default
    assert "method GPTQ order=natural damp_percent=0.01 static_groups=True" in head(report(), [], verbose=True)
    assert "usual at 3 bits: 0.0023 to 0.017 for a linear" in lines
    assert "calibration a text: 16 windows of 512 tokens" in lines
    assert any("linears, the mean" in line and "(rtn)" in line for line in lines)
    for held_out, kind in ((True, "held-out"), (False, "calibration")):
        checked = head(report(check={"held_out": held_out}), [])
        assert f"of {kind} windows; (rtn), that of rounding to nearest on min-max ranges;" in checked
        lines += checked
    assert all(len(line) <= COLUMNS for line in lines)


def test_equal_notes_are_one_with_advice() -> None:
    events = [f"model.layers.{k}.mlp.down_proj: loss 1.2 times Babai's bound, 7 codes clipped" for k in range(12)]
    events += ["model.layers.3.q_proj: damping raised 2 times, to 0.04", "vLLM refuses this checkpoint: a reason"]
    said = grouped(events)
    assert said == [
        "vLLM refuses this checkpoint: a reason",
        "12 linears lose more than Babai's bound, because codes were clipped (model.layers.0.mlp.down_proj, ...): nothing to do",
        "model.layers.3.q_proj: damping raised 2 times, to 0.04: nothing to do; more --nsamples make it rarer",
    ]
    text = summary(report(events=events))
    assert text.splitlines()[-1] == "next: nearplane eval out --reference demo" and text.count("note: ") == 3
    assert summary(report(events=events), verbose=True).count("note: ") == 14


def test_every_kind_of_note_about_a_linear_has_advice() -> None:
    """The sentences that the run writes today."""
    notes = (
        "serves its objective worse than rounding to nearest (error 1, rtn 0.5)",
        "loss 1.2 times Babai's bound, 7 codes clipped", "damping raised 2 times, to 0.04",
        "extreme activations, moments scaled by 2^3; so are its loss and bound",
        "3 calibration tokens left out, NaN or Inf in the activation",
        "too few tokens to hold any out, so none could judge",
        "2 of 4 experts were reached by no token, or by zeros only, and rounded to nearest: 1, 2",
        "2 of 4 experts were shown fewer tokens than they have inputs, and damped by count: 1 (3) (tokens)",
        "the probe forward did not reach it, stays dense", "scaled: mlp.down_proj by alpha 0.4 through mlp.up_proj (error x 0.9)",
    )  # fmt: skip
    for note in notes:
        one, many = grouped([f"a.0.b: {note}"]), grouped([f"a.{k}.b: {note}" for k in range(3)])
        assert (
            one[0].startswith(f"a.0.b: {note}: ")
            and len(many) == 1
            and many[0].startswith(("3 linears ", "3 layers ", "3 blocks "))
        ), note


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.with_text(tmp_path_factory.mktemp("terminal"))


def words(model: Path, out: Path, *more: str) -> list[str]:
    data = ["--dataset", str(model.parent / "text.txt"), "--nsamples", "4", "--seqlen", "32", "--group-size", "32"]
    return ["quantize", str(model), str(out), "--method", "gptq", *data, *more]


def test_quiet_prints_the_summary_alone(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(model, tmp_path / "out", "--quiet")) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.startswith(f"{tmp_path / 'out'}: 14 linears at ")


def test_verbose_prints_every_stage(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(model, tmp_path / "out", "--verbose")) == 0
    printed = capsys.readouterr().err
    assert "model.layers.1 q_proj+k_proj+v_proj " in printed and printed.count("loss/bound") == 8
    assert len(re.findall("^block [12]/2  error ", printed, re.MULTILINE)) == 2
    assert "method GPTQ order=activation damp_percent=0.01" in printed


def test_a_run_is_a_line_per_block(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(model, tmp_path / "out")) == 0
    lines = capsys.readouterr().err.splitlines()
    blocks = [line for line in lines if line.startswith("block ")]
    assert len(blocks) == 2 and all(len(line) <= COLUMNS for line in blocks)
    assert (
        lines[0] == f"opening {model}" and lines[-1] == blocks[-1] and not any("loss/bound" in line for line in lines)
    )


def test_the_numbers_are_those_of_the_report(model: Path, tmp_path: Path) -> None:
    stream = io.StringIO()
    text = str(model.parent / "text.txt")
    report = nearplane.quantize(
        model, tmp_path / "out", method="gptq", bits=3, group_size=32, dataset=text, nsamples=4, seqlen=32,
        show=Terminal(stream=stream),
    )  # fmt: skip
    block = [row for row in report.linears if row.name.startswith("model.layers.1.")]
    errors = [row.error or 0.0 for row in block]
    line = stream.getvalue().splitlines()[-1]
    behind = report.blocks[-1]
    assert behind.error is not None and behind.rtn_error is not None
    assert (
        f"error {number_of(behind.error)} (rtn {rough(behind.rtn_error)})" in line
        and f" {rough(max(errors))}  " in line
    )
    assert report.settings["grid"]["bits"] == 3 and report.settings["calibration"]["nsamples"] == 4


class Screen(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_lines_are_broken_at_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    screen = Screen()
    sentence = "note: the quick brown fox jumps over the lazy dog, model.layers.0.self_attn.q_proj and --no-sym"
    progress.say(sentence, screen)
    shown = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in screen.getvalue().splitlines()]
    assert max(map(len, shown)) < 40 and " ".join(line.strip() for line in shown) == sentence
    log = io.StringIO()
    progress.say(sentence, log)
    assert log.getvalue() == sentence + "\n"


def test_a_bar_on_a_terminal_goes_away_with_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal there is a bar; the cursor comes back however the run ends."""
    monkeypatch.setattr("sys.stderr", Screen())
    monkeypatch.setenv("TERM", "xterm")
    solve, calls = RTN.solve, list[int]()

    def failing(self: RTN, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:  # of the four stages of the second block
            raise nearplane.NearplaneError("stop.")
        return solve(self, *args)

    monkeypatch.setattr(RTN, "solve", failing)
    with pytest.raises(nearplane.NearplaneError, match="stop"), Terminal() as show:
        nearplane.quantize(model, tmp_path / "out", method="rtn", group_size=32, force=True, show=show)
    import sys

    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "quantize" in shown and "block 1/2  weight error" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0


def test_a_real_terminal_of_eighty_columns(model: Path, tmp_path: Path) -> None:
    """Lines of blocks stand by themselves above the bar, and no line is wider than the terminal."""
    import fcntl
    import os
    import pty
    import select
    import struct
    import subprocess
    import sys
    import termios

    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    words = [sys.executable, "-m", "nearplane", "quantize", str(model), str(tmp_path / "out"), "--group-size", "32"]
    words += ["--dataset", str(model.parent / "text.txt"), "--nsamples", "4", "--seqlen", "32", "--verbose"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
    run = subprocess.Popen(words, stdin=child, stdout=child, stderr=child, env=environment)
    os.close(child)
    shown = b""
    while run.poll() is None or select.select([parent], [], [], 0.2)[0]:
        if select.select([parent], [], [], 0.2)[0]:
            try:
                shown += os.read(parent, 65536)
            except OSError:
                break
    os.close(parent)
    assert run.wait(60) == 0
    # What a terminal keeps of a line: from the last return to its start, without colours.
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
    blocks = [line for line in lines if re.search(r"block +\d+/\d+", line)]
    assert len(blocks) == 2 and all(line.startswith("block ") for line in blocks), blocks
    assert any(line.startswith("model.layers.0 ") for line in lines)
    assert max(map(len, lines)) <= 80, max(lines, key=len)
