"""Weights whose scales float16 cannot hold are refused before the run, not noted after it."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import nearplane
from nearplane import GPTQ, RTN, Calibration
from nearplane.cli.main import main
from nearplane.core.errors import SettingError
from nearplane.core.grid import Grid, encode, fit_groups, spoiled_groups
from nearplane.formats.read import open_checkpoint

LINEAR = "model.layers.1.mlp.up_proj"
REFUSED = f"{LINEAR}: .* of 384 scales leave the range of float16"


def model(folder: Path, factor: float, *, rows: int = 96, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A Llama with some rows of one linear scaled."""
    built = tiny.build("llama")
    with torch.no_grad():
        built.get_submodule(LINEAR).weight[:rows].mul_(factor)
    return tiny.save(built.to(dtype), folder)


def run(folder: Path, out: Path, **settings: Any) -> nearplane.Report:
    return nearplane.quantize(folder, out, progress=False, **{"method": RTN(), "bits": 4, "group_size": 16} | settings)


@pytest.mark.parametrize("factor", [1e-7, 1e-12, 1e7])
def test_tiny_and_huge_weights_are_refused_before_the_run(factor: float, tmp_path: Path) -> None:
    """Whatever stores float16 scales; bfloat16 ones hold the same weights."""
    folder, out = model(tmp_path / "model", factor), tmp_path / "out"
    for settings, advice in (
        ({"format": "gptq"}, "compressed-tensors with --dtype bfloat16"),
        ({"format": "gptq_v2", "sym": False}, "compressed-tensors with --dtype bfloat16"),
        ({"dtype": "float16", "act_bits": 8, "group_size": -1}, "use --dtype bfloat16"),
        ({"dtype": "float16"}, "use --dtype bfloat16"),
    ):
        with pytest.raises(SettingError, match=f"{LINEAR}: .* scales leave the range of float16.*{advice}"):
            run(folder, out, **settings)
        assert not out.exists()
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(400))
    with pytest.raises(SettingError, match=REFUSED):
        run(
            folder, out, format="gptq", method=GPTQ(), calibration=Calibration(dataset=str(text), nsamples=4, seqlen=16)
        )
    report = run(folder, out)
    row = next(row for row in report.linears if row.name == LINEAR)
    assert row.weight_error < 0.02 and nearplane.verify(out).ok
    stored = open_checkpoint(out)
    assert stored.layers[LINEAR].grid.scale_dtype == "bfloat16"


def test_the_command_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model(tmp_path / "model", 1e-7)
    words = [str(folder), str(tmp_path / "out"), "--method", "rtn", "--group-size", "16", "--format", "gptq"]
    assert main(["quantize", *words]) == 2
    heard = capsys.readouterr().err
    assert f"{LINEAR}: 384 of 384 scales leave the range of float16" in heard and "Traceback" not in heard


def test_what_is_spoiled_in_part_is_noted(tmp_path: Path) -> None:
    report = run(model(tmp_path / "model", 1e-7, rows=24), tmp_path / "out", format="gptq")
    notes = [event for event in report.events if "leave the range of float16" in event]
    assert len(notes) == 1 and notes[0].startswith(f"{LINEAR}: 96 of 384 scales leave the range")


@pytest.mark.parametrize("factor", [1.0, 1e-2])
def test_usual_weights_pass(factor: float, tmp_path: Path) -> None:
    """Also of a model in float16, and with rows of zeros."""
    folder = model(tmp_path / "model", factor, dtype=torch.float16)
    zeros = model(tmp_path / "zeros", 0.0, rows=24)
    for source in (folder, zeros):
        report = run(source, tmp_path / f"{source.name}-out", format="gptq")
        assert not any("float16" in event for event in report.events)


def test_a_budget_is_judged_by_the_bits_that_it_may_choose(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(400))
    calibration = Calibration(dataset=str(text), nsamples=4, seqlen=16)
    settings: dict[str, Any] = {"budget": 5.5, "widths": (2, 3, 8), "calibration": calibration, "format": "gptq"}
    with pytest.raises(SettingError, match=LINEAR):
        run(model(tmp_path / "model", 1e-9), tmp_path / "out", **settings)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("power", [-3, -5, -7, -9])
def test_what_counts_as_spoiled_costs_weight_error(bits: int, power: int) -> None:
    """Rounded to nearest on float16 scales and on exact ones: no group spoiled, as good; every group spoiled, far worse."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(bits)) * 10.0**power
    errors = []
    for dtype in ("float32", "float16"):
        grid = Grid(bits, 32, fit="minmax", scale_dtype=dtype)  # type: ignore[arg-type]
        scale, zero = (value.repeat_interleave(32, 1) for value in fit_groups(weight, grid))
        errors.append(float(((encode(weight, scale, zero, grid) - zero) * scale - weight).double().square().sum()))
    bad, energy = spoiled_groups(weight, Grid(bits, 32, scale_dtype="float16"))
    assert bad.shape == energy.shape == (64, 3)
    assert float(energy.sum()) == pytest.approx(float(weight.square().sum()), rel=1e-5)
    ratio = errors[1] / errors[0]
    assert ratio < 1.1 if not bool(bad.any()) else True
    assert ratio > 2 if bool(bad.all()) else True
    assert bool(bad.any()) == (power == -9 or (power == -7 and bits > 2) or (power == -5 and bits == 8))


def test_zeros_tails_and_infinite_scales() -> None:
    weight = torch.ones(3, 40)
    weight[0] = 0
    weight[1, 32:] = 1e-9  # a smaller last group
    weight[2, :16] = 1e7
    bad, _ = spoiled_groups(weight, Grid(4, 16, scale_dtype="float16"))
    assert bad.tolist() == [[False, False, False], [False, False, True], [True, False, False]]
    assert not bool(spoiled_groups(weight, Grid(4, 16, scale_dtype="bfloat16"))[0].any())
