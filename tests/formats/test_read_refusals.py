"""What cannot be read, and the one sentence for each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import IN, OUT, Tensors, by_package, ct_config, named, save

from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Grid, Quantized
from nearplane.formats import FORMATS

Change = Callable[[Tensors, dict[str, Any]], object]


def group(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["config_groups"]["group_0"]
    return found


BAD_COMPRESSED: list[tuple[str, Change]] = [
    ("format float-quantized", lambda t, c: group(c).update(format="float-quantized")),
    ("format nvfp4-pack-quantized", lambda t, c: group(c).update(format="nvfp4-pack-quantized")),
    (r"format pack-quantized \(float\)", lambda t, c: group(c)["weights"].update(type="float")),
    ("strategy block", lambda t, c: group(c)["weights"].update(strategy="block")),
    ("has 1 bits; 2 to 8", lambda t, c: group(c)["weights"].update(num_bits=1)),
    ("num_bits must be of type int", lambda t, c: group(c)["weights"].update(num_bits="4")),
    ("must be spelled out", lambda t, c: c.update(config_groups={"W4A16": ["Linear"]})),
    ("no config group with weights", lambda t, c: c.update(config_groups={})),
    ("online transforms", lambda t, c: c.update(transform_config={"config_groups": {"u": {}}})),
    ("sparse weights", lambda t, c: c.update(sparsity_config={"format": "sparse-24-bitmask"})),
    (r"ignore must be of type list", lambda t, c: c.update(ignore="lm_head")),
    (r"'re:\(' .* no regular expression", lambda t, c: c.update(ignore=["re:("])),
    (
        r"tensor m\.weight_packed .* shape \(32, 8\), but a \(32, 64\) .*8 bits",
        lambda t, c: group(c)["weights"].update(num_bits=8),
    ),
    (
        r"tensor m\.weight_scale .* groups of 32\) takes \(32, 2\)",
        lambda t, c: group(c)["weights"].update(group_size=32),
    ),
    (r"tensor m\.weight_scale .* one scale per channel", lambda t, c: group(c)["weights"].update(strategy="channel")),
    (r"but no m\.weight_zero_point", lambda t, c: group(c)["weights"].update(symmetric=False)),
    (r"but no m\.weight_scale", lambda t, c: t.pop("m.weight_scale")),
    (r"but no m\.weight_shape", lambda t, c: t.pop("m.weight_shape")),
    (r"has shape \[2, 32, 64\]", lambda t, c: t.update({"m.weight_shape": torch.tensor([2, 32, 64])})),
    (
        r"scales m\.weight_scale .* torch.float64, not",
        lambda t, c: t.update({"m.weight_scale": t["m.weight_scale"].double()}),
    ),
    (
        r"m\.weight_packed .* is torch.uint8",
        lambda t, c: t.update({"m.weight_packed": t["m.weight_packed"].to(torch.uint8)}),
    ),
    ("says that it is quantized .* no quantized tensor", lambda t, c: [t.clear(), t.update(a=torch.ones(1))]),
    ("quantized with hqq; nearplane reads", lambda t, c: c.update(quant_method="hqq")),
    (
        r"tensor m.weight_packed \(int32\) is part .* \(fp8\) does not explain",
        lambda t, c: c.update(quant_method="fp8"),
    ),
    ("quantized with bitsandbytes; nearplane reads", lambda t, c: c.update(quant_method="bitsandbytes")),
]


@pytest.mark.parametrize(("sentence", "change"), BAD_COMPRESSED)
def test_bad_compressed_tensors(tmp_path: Path, rtn: Callable[..., Quantized], sentence: str, change: Change) -> None:
    grid = Grid(4, 16, fit="minmax")
    tensors = FORMATS["compressed-tensors"].pack("m", rtn(OUT, IN, grid), grid)
    config = FORMATS["compressed-tensors"].config(grid, ignore=[], settings={})
    change(tensors, config)
    with pytest.raises(NearplaneError, match=sentence) as caught:
        save(tmp_path, tensors, config)
    assert "\n" not in str(caught.value)


BAD_GPTQ: list[tuple[str, Change]] = [
    ("layout 'marlin'", lambda t, c: c.update(checkpoint_format="marlin")),
    ("layout 'marlin'", lambda t, c: c.update(is_marlin_format=True)),
    ("packed in int16", lambda t, c: c.update(pack_dtype="int16")),
    ("has bits 5", lambda t, c: c.update(bits=5)),
    ("has bits None", lambda t, c: c.pop("bits")),
    ("group_size 0", lambda t, c: c.update(group_size=0)),
    ("sym must be of type bool", lambda t, c: c.update(sym="yes")),
    (
        r"tensor m\.qweight .* shape \(8, 32\), but a \(32, 64\) weight of 8 bits takes \(16, 32\)",
        lambda t, c: c.update(bits=8),
    ),
    (r"tensor m\.scales .* groups of 32 takes \(2, 32\)", lambda t, c: c.update(group_size=32)),
    (r"tensor m\.qzeros .* takes \(4, 4\)", lambda t, c: t.update({"m.qzeros": t["m.qzeros"][:, :3].contiguous()})),
    (r"m\.qweight .* int32 matrix", lambda t, c: t.update({"m.qweight": torch.zeros(0, OUT, dtype=torch.int32)})),
    (r"m\.qzeros .* int32 matrix", lambda t, c: t.update({"m.qzeros": t["m.qzeros"].long()})),
    (r"but no m\.qzeros", lambda t, c: t.pop("m.qzeros")),
    (r"tensor m\.qzeros .* does not explain", lambda t, c: t.update({"w": t.pop("m.qweight")})),
]


@pytest.mark.parametrize(("sentence", "change"), BAD_GPTQ)
def test_bad_gptq(tmp_path: Path, rtn: Callable[..., Quantized], sentence: str, change: Change) -> None:
    grid = Grid(4, 16, fit="minmax", scale_dtype="float16")
    tensors = FORMATS["gptq"].pack("m", rtn(OUT, IN, grid), grid)
    config = FORMATS["gptq"].config(grid, ignore=[], settings={})
    change(tensors, config)
    with pytest.raises(NearplaneError, match=sentence) as caught:
        save(tmp_path, tensors, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_damaged_scales(tmp_path: Path, rtn: Callable[..., Quantized], format: str) -> None:
    grid = Grid(4, 16, fit="minmax", scale_dtype="float16")
    tensors = FORMATS[format].pack("m", rtn(OUT, IN, grid), grid)
    tensors["m.scales" if format == "gptq" else "m.weight_scale"][1, 1] = torch.nan
    checkpoint = save(tmp_path, tensors, FORMATS[format].config(grid, ignore=[], settings={}))
    with pytest.raises(NearplaneError, match=r"^m in .* has scales that are not finite"):
        checkpoint.weight("m")


def test_plain_codes_off_their_grid(tmp_path: Path) -> None:
    scheme = {"num_bits": 4, "symmetric": True, "strategy": "channel"}
    tensors, _ = by_package(scheme, "int-quantized")
    tensors["weight"][3, 3] = 8
    checkpoint = save(tmp_path, named("m", tensors), ct_config("int-quantized", (["Linear"], scheme)))
    with pytest.raises(NearplaneError, match=r"tensor m\.weight .* leaves the range -8 to 7"):
        checkpoint.weight("m")


def test_float_weights_beside_a_scale(tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "symmetric": True, "strategy": "channel"}
    tensors = {"m.weight": torch.ones(4, 4), "m.weight_scale": torch.ones(4, 1)}
    with pytest.raises(NearplaneError, match=r"tensor m\.weight .* torch\.float32, but config group group_0"):
        save(tmp_path, tensors, ct_config("int-quantized", (["Linear"], scheme)))


def test_an_unclear_group(tmp_path: Path) -> None:
    scheme = {"num_bits": 4, "symmetric": True, "strategy": "channel"}
    tensors, _ = by_package(scheme, "pack-quantized")
    config = ct_config("pack-quantized", (["a"], scheme), (["b"], scheme))
    with pytest.raises(NearplaneError, match="no config group whose targets name m"):
        save(tmp_path, named("m", tensors), config)
