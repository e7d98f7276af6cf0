"""Negative scales of symmetric groups through a run: solved, stored, read, converted, verified, switched off."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import nearplane
from nearplane import GPTQ, RTN, Calibration, Grid, NearPlane
from nearplane.cli.main import main
from nearplane.core.errors import SettingError
from nearplane.core.grid import dequantize
from nearplane.formats import FORMATS
from nearplane.formats.parts import Writer
from nearplane.formats.read import open_checkpoint
from nearplane.run.job import Override
from nearplane.runtime.linear import quantized_linears

IDS = tiny.tokens(2, 20, seed=3)
CT = "compressed-tensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.with_text(tmp_path_factory.mktemp("signs"), num_hidden_layers=3)


def run(model: Path, out: Path, **options: Any) -> nearplane.Report:
    calibration = Calibration(dataset=str(model.parent / "text.txt"), nsamples=8, seqlen=24)
    settings = {"method": RTN(), "bits": 4, "group_size": 32, "calibration": calibration, "progress": False, **options}
    if "grid" in settings:
        del settings["bits"], settings["group_size"]
    return nearplane.quantize(model, out, **settings)


def negative(out: Path) -> float:
    """The share of negative scales."""
    opened = open_checkpoint(out)
    scales = torch.cat([opened.quantized(name).scale.flatten() for name in opened.layers])
    return float((scales < 0).float().mean())


def logits(out: Path, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = nearplane.load(out, **options)(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("format", [CT, "gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "size"), [(2, 32), (3, -1), (4, 32), (8, 32), (8, -1)])
def test_every_format_gives_back_what_was_solved(format: str, bits: int, size: int, tmp_path: Path) -> None:
    grid = Grid(bits, size, scale_dtype="float16")
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    solved = RTN().solve(weight, None, grid)
    assert 0.1 < float((solved.scale < 0).float().mean()) < 0.9
    tensors = FORMATS[format].pack("m", solved, grid)
    plain = FORMATS[format].pack("m", solved._replace(scale=solved.scale.abs()), grid)
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {n: (t.shape, t.dtype) for n, t in plain.items()}
    assert FORMATS[format].nbytes((64, 96), grid) == sum(tensor.nbytes for tensor in tensors.values())
    with Writer(tmp_path / "out") as writer:
        writer.put(tensors)
        config = FORMATS[format].config(grid, ignore=[], settings={})
        writer.json("config.json", {"quantization_config": config})
        writer.finish()
    opened = open_checkpoint(tmp_path / "out")
    assert all(map(torch.equal, opened.quantized("m")[:3], (solved.codes, solved.scale.half(), solved.zero)))
    torch.testing.assert_close(opened.weight("m").float(), dequantize(solved, grid).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("settings", [
    {"method": RTN(), "format": CT}, {"method": RTN(), "format": "gptq"}, {"method": GPTQ(), "format": "gptq_v2"},
    {"method": NearPlane(), "format": CT}, {"method": RTN(), "format": "awq"},
    {"method": GPTQ(static_groups=False, order="natural"), "format": CT},
    {"method": RTN(), "format": CT, "act_bits": 8, "bits": 8, "group_size": -1},
    {"method": GPTQ(), "format": CT, "act_bits": 4, "act_sym": False},
], ids=str)  # fmt: skip
def test_a_run_stores_negative_scales_unless_they_are_switched_off(
    settings: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    report = run(model, tmp_path / "out", **settings)
    plain = run(model, tmp_path / "plain", negative_scales=False, **settings)
    assert 0.1 < negative(tmp_path / "out") < 0.7 and negative(tmp_path / "plain") == 0
    assert report.bytes == plain.bytes
    worse = [row.weight_error for row in plain.linears]
    if settings["method"] == RTN():  # by their own objective; other methods trade it for the output's
        assert sum(row.weight_error for row in report.linears) < sum(worse) * (0.99 if "act_bits" in settings else 0.95)
    for out, allowed in ((tmp_path / "out", True), (tmp_path / "plain", False)):
        checked = nearplane.verify(out)
        assert checked.ok and not any("negative" in note for note in checked.notes)
        assert json.loads((out / "report.json").read_text())["settings"]["grid"]["negative_scales"] is allowed
    packed = nearplane.load(tmp_path / "out", arithmetic="exact")
    assert any(bool((m.scales.view(m.shape.scale_dtype) < 0).any()) for m in quantized_linears(packed).values())
    torch.testing.assert_close(logits(tmp_path / "out", arithmetic="exact"), logits(tmp_path / "out", packed=False),
                               rtol=0, atol=2e-3)  # fmt: skip


@pytest.mark.parametrize("settings", [{"sym": False}, {"bits": "ternary"}, {"format": "awq", "sym": False}, {"format": "mlx"}],
                         ids=str)  # fmt: skip
def test_grids_that_have_no_need_of_them_store_the_same_bits(
    settings: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    for name, allowed in (("a", True), ("b", False)):
        run(model, tmp_path / name, negative_scales=allowed, **settings)
    a, b = open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b")
    for name in a.layers:
        assert all(map(torch.equal, a.quantized(name)[:3], b.quantized(name)[:3]))
        assert bool((a.quantized(name).scale > 0).all())


@pytest.mark.parametrize(
    ("before", "after"), [(CT, "gptq"), ("gptq", CT), (CT, "gptq_v2"), (CT, "mlx"), ("gptq", "awq")]
)
def test_conversions_keep_the_sign(before: str, after: str, model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", format=before, dtype="float16")
    nearplane.convert(tmp_path / "out", tmp_path / "new", after)
    a, b = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "new")
    for name in a.layers:
        torch.testing.assert_close(b.weight(name).float(), a.weight(name).float(), rtol=2e-3, atol=1e-5)
    assert nearplane.verify(tmp_path / "new").ok and negative(tmp_path / "new") > 0.1


def test_one_linear_of_another_kind(model: Path, tmp_path: Path) -> None:
    """An asymmetric linear among symmetric ones has scales above 0, a symmetric one among asymmetric ones either sign."""
    for name, sym, other in (("a", True, "false"), ("b", False, "true")):
        run(model, tmp_path / name, sym=sym, override=[f"down_proj=sym={other}"])
        opened = open_checkpoint(tmp_path / name)
        for layer in opened.layers:
            turned = bool((opened.quantized(layer).scale < 0).any())
            assert turned == (sym != ("down_proj" in layer)), layer
        assert nearplane.verify(tmp_path / name).ok


def test_the_command_line_switches_them_off(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quantize", str(model), str(tmp_path / "out"), "--method", "rtn", "--group-size", "32"]
    assert main([*words, "--no-negative-scales"]) == 0 and negative(tmp_path / "out") == 0
    words[2] = str(tmp_path / "gguf")
    gguf = ["--format", "gguf", "--gguf-type", "Q4_0", "--no-negative-scales"]
    capsys.readouterr()
    assert main([*words[:-2], *gguf]) == 2
    heard = capsys.readouterr().err
    assert "the scales of gguf_type Q4_0 have a sign of their own" in heard and "Traceback" not in heard


def test_an_override_cannot_turn_the_switch_round() -> None:
    with pytest.raises(SettingError, match=r"'down_proj': Signed scales have a sign of their own"):
        Override("down_proj", gguf_type="Q5_0").apply(Grid(4, 32, negative_scales=False))
