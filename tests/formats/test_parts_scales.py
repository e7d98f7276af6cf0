"""Free offsets, signed and nested scales in a run's parts: the same bytes back, and plain formats that refuse them."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import nearplane
from nearplane import Calibration, Grid, NearPlane
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.core.grid import Quantized, dequantize, fit_groups, round_to_nearest
from nearplane.core.scales import Affine
from nearplane.formats import FORMATS
from nearplane.formats.base import check, scales_reason, stored_grid
from nearplane.formats.compressed import NEUTRAL, CompressedTensors
from nearplane.formats.parts import Writer
from nearplane.formats.read import open_checkpoint
from nearplane.run.events import BlockDone
from nearplane.run.resume import Saver

GRIDS = {name: Grid.named(name) for name in ("q4_0", "q8_0", "q4_1", "q2_k", "q3_k", "q4_k", "q6_k")}
GRIDS |= {"mlx": Grid.of(scales=Affine("bfloat16"), bits=3, group_size=64), "plain": Grid(3, 32, False)}


@dataclass(frozen=True)
class AnyScales(CompressedTensors):
    """Keeps a run's parts as they are, whatever their scales."""

    name: str = "any-scales"
    parts: bool = True

    def supports(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        return grid.scales.row_reason(shape[1], grid.group_width(shape[1]))

    def config(self, grid: Grid, **given: Any) -> dict[str, Any]:
        return {**super().config(grid, **given), "quant_method": self.name}


def solved(grid: Grid, dtype: torch.dtype = torch.float32, out: int = 6) -> Quantized:
    W = torch.randn(out, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    return round_to_nearest(W, *fit_groups(W, grid), grid)


# --- parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_part_gives_every_grid_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {name: solved(grid, dtype) for name, grid in GRIDS.items()}
    with Writer(tmp_path / "out") as writer:
        for name, quantized in weights.items():
            writer.put_quantized(name, quantized, GRIDS[name])
        writer.seal({})
        part = writer.part(writer.records[0]).open()
        assert part is not None and set(part.layers) == set(GRIDS)
        for name, grid in GRIDS.items():
            layer, read = part.layers[name], part.quantized(name)
            assert replace(layer.grid, scale_dtype="float32") == stored_grid(grid)
            assert torch.equal(read.codes, weights[name].codes)
            assert (
                torch.equal(read.scale.to(dtype), weights[name].scale) and read.zero.dtype == weights[name].zero.dtype
            )
            assert torch.equal(read.zero, weights[name].zero)
            values = dequantize(weights[name]._replace(scale=read.scale.float()), grid)
            assert torch.equal(part.weight(name), values)
            assert torch.equal(part.weight(name, torch.float16), values.half())
            size = sum(part.store.get(tensor).nbytes for tensor in layer.tensors.values())
            assert size == NEUTRAL.nbytes((6, 512), grid)
            assert list(part.reader.flaws(part.store, *part.decode(name))) == []  # type: ignore[union-attr]
            if grid.scales.joint:
                for mine, its in zip(
                    grid.scales.parts(read.scale, read.zero), grid.scales.parts(*weights[name][1:3]), strict=True
                ):
                    assert (mine is None and its is None) or torch.equal(mine, its)
        zero = part.store.get("mlx.weight_zero_point")
        assert zero.dtype == torch.float32 and zero.shape == (6, 8)


@pytest.mark.parametrize(
    "zero, told",
    [(torch.zeros(6, 8).half(), "float16, not float32"), (torch.zeros(8, 6), r"\(8, 6\)"),
     (torch.full((6, 8), torch.nan), "not finite")],
)  # fmt: skip
def test_damaged_offsets_are_named(tmp_path: Path, zero: torch.Tensor, told: str) -> None:
    grid = GRIDS["mlx"]
    tensors = {**NEUTRAL.pack("fc", solved(grid), grid), "fc.weight_zero_point": zero}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = NEUTRAL.config(grid, ignore=[], settings={})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(NearplaneError, match=told):
        open_checkpoint(tmp_path).quantized("fc")


@pytest.mark.parametrize(
    "told", [{"kind": "other"}, {"kind": "affine", "dtype": "int4"}, 3, {"kind": "signed", "dtype": "float16"}]
)
def test_scales_that_are_none_are_named(tmp_path: Path, told: Any) -> None:
    grid = GRIDS["mlx"]
    save_file(NEUTRAL.pack("fc", solved(grid), grid), tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = NEUTRAL.config(grid, ignore=[], settings={})
    config["config_groups"]["group_0"]["weights"]["observer_kwargs"]["nearplane_scales"] = told
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(
        NearplaneError, match=r"nearplane_scales|observer_kwargs|knows no scales|says both symmetric|must be of type"
    ):
        open_checkpoint(tmp_path).quantized("fc")


# --- a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}
    return tiny.with_text(tmp_path_factory.mktemp("scales"), **sizes)


def run(model: Path, out: Path, grid: Grid, **options: Any) -> nearplane.Report:
    calibration = Calibration(dataset=str(model.parent / "text.txt"), nsamples=8, seqlen=24)
    given = {"method": NearPlane(), "format": AnyScales(), "calibration": calibration, "progress": False, **options}
    return nearplane.quantize(model, out, grid=grid, **given)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


@pytest.mark.parametrize("name", ["q4_k", "q3_k", "mlx"])
def test_an_interrupted_run_ends_in_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole = run(model, tmp_path / "whole", GRIDS[name])
    take = Saver.take

    def stop(self: Saver, event: Any) -> None:
        take(self, event)
        if isinstance(event, BlockDone):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "take", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out", GRIDS[name])
    assert list((tmp_path / "out").glob("part-*"))
    with pytest.raises(SettingError, match="grid"):
        run(model, tmp_path / "out", GRIDS["q2_k"], resume=True)
    resumed = run(model, tmp_path / "out", GRIDS[name], resume=True)
    assert resumed.resumed == 1
    mine, its = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    assert mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in its)
    grid = whole.as_dict()["settings"]["grid"] if "settings" in whole.as_dict() else whole.as_dict()["grid"]
    assert grid["own_scales"]["kind"] in ("nested", "affine")
    read = open_checkpoint(tmp_path / "out", formats=[AnyScales()])
    layer = next(iter(read.layers.values()))
    assert layer.grid.scales == GRIDS[name].scales and layer.grid.bits == GRIDS[name].bits
    again = nearplane.convert(tmp_path / "out", tmp_path / "copy", AnyScales("others"), formats=[AnyScales()])
    assert again.layers == len(read.layers)
    copied = tensors(tmp_path / "copy")
    assert all(torch.equal(copied[key], its[key]) for key in its)
    with pytest.raises(NearplaneError, match=r"^model.*holds no (nested|affine) scales"):
        nearplane.convert(tmp_path / "out", tmp_path / "ct", "compressed-tensors", formats=[AnyScales()])
    assert not (tmp_path / "ct").exists()


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "gptq_v2"])
@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q4_k", "q3_k"])
def test_plain_formats_refuse_such_scales_before_a_run(model: Path, tmp_path: Path, format: str, name: str) -> None:
    grid = GRIDS[name]
    assert "holds no" in (FORMATS[format].supports(grid, (256, 256)) or "")
    with pytest.raises(SettingError, match=r"holds no (signed|affine|nested) scales"):
        run(model, tmp_path / "out", grid, format=format)
    assert not (tmp_path / "out").exists()
    with pytest.raises(NearplaneError, match=r"^fc: this format holds no"):
        check("fc", solved(grid), grid)


def test_what_no_file_holds_exactly_is_refused() -> None:
    grid = GRIDS["mlx"]
    good = solved(grid)
    assert torch.equal(check("fc", good, grid, any_scales=True).zero, good.zero)
    for bad, told in (
        (good._replace(zero=good.zero.to(torch.uint8)), "zeros float32"),
        (good._replace(zero=good.zero * torch.inf), "offset is not finite"),
        (good._replace(scale=good.scale * 1.001), "storing the scales in bfloat16"),
    ):
        with pytest.raises(NearplaneError, match=told):
            check("fc", bad, grid, any_scales=True)
    with pytest.raises(NearplaneError, match="must be uint8"):
        check("fc", good, GRIDS["plain"])
    assert scales_reason(GRIDS["plain"]) is None and scales_reason(Grid.named("mxfp4")) is None


def test_offsets_that_no_configuration_tells_are_refused(tmp_path: Path) -> None:
    """Real zeros read as codes would be silently wrong."""
    grid = GRIDS["mlx"]
    save_file(NEUTRAL.pack("fc", solved(grid), grid), tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = NEUTRAL.config(Grid(3, 64, False), ignore=[], settings={})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(NearplaneError, match=r"weight_zero_point .*float32, and no integers"):
        open_checkpoint(tmp_path).quantized("fc")
