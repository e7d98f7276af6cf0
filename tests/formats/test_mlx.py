"""MLX's affine layout, against a reader of single bits; what mlx-lm makes of it is in runs/mlx_families.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from checkpoints import save

import nearplane
from nearplane import RTN, Grid, NearplaneError
from nearplane.core.errors import SettingError
from nearplane.core.grid import Quantized
from nearplane.core.scales import Affine
from nearplane.formats import FORMATS
from nearplane.formats.mlx import LOADED, REFUSED
from nearplane.formats.read import open_checkpoint
from nearplane.runtime.linear import quantized_linears

MLX = FORMATS["mlx"]
IDS = tiny.tokens(2, 20, seed=3)
HALF = "float16"


def affine(bits: int, size: int = 32, dtype: Any = HALF) -> Grid:
    return Grid.of(scales=Affine(dtype), bits=bits, group_size=size, sym=False, scale_dtype=dtype)


def stream(words: list[int], bits: int, n: int) -> list[int]:
    """The first ``n`` codes of a row of words: one long integer, read from its lowest bit."""
    whole = sum(word << (32 * i) for i, word in enumerate(words))
    return [whole >> (i * bits) & ((1 << bits) - 1) for i in range(n)]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_tensors(rtn: Callable[..., Quantized], bits: int, dtype: str) -> None:
    """Every weight is scale * code + bias, of the stored numbers."""
    grid, out, columns = affine(bits, 32, dtype), 12, 96
    quantized = rtn(out, columns, grid)
    tensors, stored = MLX.pack("m", quantized, grid), getattr(torch, dtype)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "m.weight": ((out, columns * bits // 32), torch.uint32),
        "m.scales": ((out, 3), stored),
        "m.biases": ((out, 3), stored),
    }
    codes = [stream(row, bits, columns) for row in tensors["m.weight"].tolist()]
    assert codes == quantized.codes.tolist()
    scale, bias = (tensors[f"m.{name}"].double().repeat_interleave(32, 1) for name in ("scales", "biases"))
    wanted = (quantized.codes.double() - quantized.zero.double().repeat_interleave(32, 1)) * scale
    assert torch.allclose(scale * torch.tensor(codes) + bias, wanted, atol=1e-5)
    assert sum(tensor.nbytes for tensor in tensors.values()) == MLX.nbytes((out, columns), grid)
    assert MLX.rounds(quantized, grid) < 1e-4  # the offset was rounded before a code was chosen


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_integer_zeros(rtn: Callable[..., Quantized], bits: int) -> None:
    """A symmetric zero is a power of two, and its product exact; others are rounded, by less than half a digit."""
    symmetric, other = (Grid(bits, 32, sym, scale_dtype=HALF) for sym in (True, False))
    quantized = rtn(16, 64, symmetric)
    assert MLX.rounds(quantized, symmetric) == 0
    tensors = MLX.pack("m", quantized, symmetric)
    assert torch.equal(tensors["m.biases"], -(2 ** (bits - 1)) * tensors["m.scales"])
    assert 0 < MLX.rounds(rtn(16, 64, other), other) <= 2.0 ** (bits - 11)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("llama", tie_word_embeddings=False), tmp_path_factory.mktemp("mlx") / "model")


def made(model: Path, out: Path, format: str = "mlx", **settings: Any) -> Path:
    settings = {"grid": Grid(4, 32), "dtype": HALF, **settings}
    nearplane.quantize(model, out, method=RTN(), format=format, progress=False, **settings)
    return out


def logits(path: Path, **settings: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = nearplane.load(path, dtype="float32", **settings)(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_run(dtype: str, model: Path, tmp_path: Path) -> None:
    """Offsets are numbers of their own whatever --sym says; load, verify and inspect read the folder."""
    out = made(model, tmp_path / "out", grid=Grid(3, 32), dtype=dtype)
    checked = nearplane.verify(out)
    assert checked.ok and checked.format == "mlx" and checked.notes == ()
    found = open_checkpoint(out)
    assert {layer.grid for layer in found.layers.values()} == {affine(3, 32, dtype)} and len(found.layers) == 14
    zeros = torch.cat([found.quantized(name).zero.flatten() for name in found.layers])
    assert zeros.dtype == torch.float32 and not torch.equal(zeros, zeros.round())
    told = json.loads((out / "config.json").read_text())
    wanted = {"group_size": 32, "bits": 3, "mode": "affine", "lm_head": False}
    assert told["quantization"] == told["quantization_config"] == wanted
    packed = quantized_linears(nearplane.load(out))
    assert set(packed) == set(found.layers) and all(module.shape.free for module in packed.values())
    assert all(torch.equal(module.dequantized(), found.weight(name)) for name, module in packed.items())
    wanted_logits = logits(out, packed=False)
    assert (logits(out) - wanted_logits).norm() <= 1e-3 * wanted_logits.norm()
    assert torch.allclose(logits(out, arithmetic="exact"), wanted_logits, atol=1e-5)
    assert sorted(path.name for path in out.glob("*.safetensors"))[0].startswith("model-")
    assert "3" in str(nearplane.inspect(out))


def test_offsets_of_their_own_are_better_than_codes(model: Path, tmp_path: Path) -> None:
    """Rounded to nearest, weights on free offsets are nearer to the original than on integer zeros."""
    free, whole = made(model, tmp_path / "free"), made(model, tmp_path / "whole", "awq", grid=Grid(4, 32, sym=False))
    state = safetensors.torch.load_file(model / "model.safetensors")
    errors = []
    for folder in (free, whole):
        found = open_checkpoint(folder)
        errors.append(
            sum(float((found.weight(name) - state[f"{name}.weight"]).square().sum()) for name in found.layers)
        )
    assert errors[0] < 0.97 * errors[1]


def test_several_grids_have_entries(model: Path, tmp_path: Path) -> None:
    several = {"down_proj": {"bits": 8}, "o_proj": {"group_size": 64}}
    out = made(model, tmp_path / "out", override=several, ignore=["layers.0.self_attn.o_proj"])
    told = json.loads((out / "config.json").read_text())["quantization"]
    assert told["model.layers.1.mlp.down_proj"] == {"group_size": 32, "bits": 8}
    assert told["model.layers.1.self_attn.o_proj"] == {"group_size": 64, "bits": 4}
    assert told["model.layers.0.self_attn.o_proj"] is False and "model.layers.1.self_attn.q_proj" not in told
    grids = {name: layer.grid for name, layer in open_checkpoint(out).layers.items()}
    assert grids["model.layers.0.mlp.down_proj"] == affine(8) and len(grids) == 13
    assert nearplane.verify(out).ok
    path = out / "config.json"
    config = json.loads(path.read_text())
    for key in ("quantization", "quantization_config"):  # mlx-lm tells the width from the shapes then
        config[key] = {"group_size": 32, "bits": 4, "model.layers.1.self_attn.o_proj": {"group_size": 64, "bits": 4}}
    path.write_text(json.dumps(config))
    assert {name: layer.grid for name, layer in open_checkpoint(out).layers.items()} == grids


@pytest.mark.parametrize(("sym", "note"), [(True, None), (False, "rounding them moved weights by up to 0.00")])
def test_conversion(sym: bool, note: str | None, model: Path, tmp_path: Path) -> None:
    before = made(model, tmp_path / "ct", "compressed-tensors", grid=Grid(4, 32, sym))
    told = nearplane.convert(before, tmp_path / "new", "mlx")
    assert (note is None) == (told.note is None) and (note or "") in str(told)
    assert ("zeros as they were" in str(told)) == sym
    one, other = open_checkpoint(before), open_checkpoint(tmp_path / "new")
    for name in one.layers:
        apart = (one.weight(name) - other.weight(name)).abs().max() / one.quantized(name).scale.abs().max()
        assert float(apart) <= (1e-6 if sym else 2.0**-7)
    assert nearplane.verify(tmp_path / "new").ok
    with pytest.raises(NearplaneError, match="offsets are numbers of their own"):
        nearplane.convert(tmp_path / "new", tmp_path / "back", "compressed-tensors")
    assert not (tmp_path / "back").exists()


def test_refusals(model: Path, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("mlx stores 2, 3, 4, 5, 6 or 8 bits, not 7", {"grid": Grid(7, 32)}),
        ("groups of 32, 64 or 128 inputs, not one scale per row", {"grid": Grid(4, -1)}),
        ("not groups of 16", {"grid": Grid(4, 16)}),
        ("64 does not divide the 96 input columns; of mlx's sizes 32 do", {"grid": Grid(4, 64)}),
        ("mlx cannot say that activations are rounded", {"activations": nearplane.TokenGrid(8)}),
        ("r4 rotates inputs while the model runs", {"rotate": ("r4",)}),
    ]
    for words, settings in cases:
        with pytest.raises(SettingError, match=words):
            made(model, tmp_path / "out", **settings)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_families(kind: str, tmp_path: Path) -> None:
    """Those that mlx-lm does not load rightly are refused; of a layer's experts, one linear has one grid."""
    assert not set(LOADED) & REFUSED.keys() and (kind in LOADED) == (kind == "mixtral")
    settings = {"moe_intermediate_size": 64} if kind == "qwen3_moe" else {}
    folder = tiny.save(tiny.build_mixture(kind, **settings), tmp_path / "model")
    if kind in REFUSED:
        with pytest.raises(SettingError, match="does not load a quantized qwen3_moe: it stacks the experts' weights"):
            made(folder, tmp_path / "out")
        return
    out = made(folder, tmp_path / "out")
    assert nearplane.verify(out).ok and any(".experts.3.w2" in name for name in open_checkpoint(out).layers)
    grids = {f"a.experts.{expert}.w1": affine(bits) for expert, bits in enumerate((4, 8))}
    assert "stacks the experts of a layer, and a.experts.0.w1 has 4 bits" in (MLX.together(grids, kind) or "")
    assert MLX.together({"a.experts.0.w1": affine(4), "a.experts.1.w2": affine(8)}, kind) is None


CASES: dict[str, tuple[str, Callable[[dict[str, Any], dict[str, Any]], Any]]] = {
    "mode": ("has mode 'mxfp4'; nearplane reads MLX's affine", lambda t, c: c.update(mode="mxfp4")),
    "bits": ("bits 7 and group_size 32", lambda t, c: c.update(bits=7)),
    "size": ("bits 4 and group_size 0", lambda t, c: c.update(group_size=0)),
    "type": ("bits must be of type int", lambda t, c: c.update(bits="4")),
    "part": (r"holds part of quantized layer m but no m\.biases", lambda t, c: t.pop("m.biases")),
    "dtype": (
        r"m\.weight in .* must be a uint32 matrix",
        lambda t, c: t.update({"m.weight": t["m.weight"].view(torch.int32)}),
    ),
    "stacked": ("stacked experts", lambda t, c: t.update({n: v.clone()[None] for n, v in t.items()})),
    "words": ("words and 2 groups of 32: no width", lambda t, c: t.update({"m.weight": t["m.weight"][:, :3].clone()})),
    "two": ("have different dtypes", lambda t, c: t.update({"m.biases": t["m.biases"].float()})),
}


@pytest.mark.parametrize("case", CASES)
def test_damaged_folders(case: str, rtn: Callable[..., Quantized], tmp_path: Path) -> None:
    words, change = CASES[case]
    tensors = MLX.pack("m", rtn(16, 64, affine(4)), affine(4))
    config = MLX.config(affine(4), ignore=[], settings={}) | {"quant_method": "mlx"}
    change(tensors, config)
    with pytest.raises(NearplaneError, match=words):
        save(tmp_path, tensors, config)


def test_what_mlx_lm_convert_writes(model: Path, tmp_path: Path) -> None:
    """It quantizes the embedding, too, and names no method: both keys hold sizes alone."""
    out = made(model, tmp_path / "out")
    tiny.one_shard(out)
    path = out / "model-00001-of-00001.safetensors"
    state = {name: value.clone() for name, value in safetensors.torch.load_file(path).items()}
    weight = state.pop("model.embed_tokens.weight")
    solved = RTN().solve(weight.float(), None, affine(4))
    state |= MLX.pack("model.embed_tokens", solved, affine(4))
    safetensors.torch.save_file(state, out / "model.safetensors")
    for name in (path.name, "model.safetensors.index.json"):
        (out / name).unlink(missing_ok=True)
    found = nearplane.load(out, dtype="float32")
    embedding = found.get_input_embeddings().weight  # type: ignore[operator]
    assert torch.equal(embedding, open_checkpoint(out).weight("model.embed_tokens"))
    assert len(quantized_linears(found)) == 14  # the embedding is dense
    wanted = logits(out, packed=False)
    assert torch.isfinite(wanted).all() and torch.allclose(logits(out, arithmetic="exact"), wanted, atol=1e-5)
