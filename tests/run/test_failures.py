"""What goes wrong around a run: the disk, the model's numbers, odd inputs. A sentence, and what is done stays done."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from layers import Layer, layer
from safetensors.torch import load_file, save_file
from test_resume import GRID, contents, model, run, whole  # noqa: F401

import nearplane
from nearplane import GPTAQ, GPTQ, OBQ, RTN, Calibration, Grid, NearPlane, ResComp
from nearplane.core.errors import NearplaneError, NumericalError, SettingError
from nearplane.core.grid import dequantize
from nearplane.core.moments import Moments
from nearplane.formats import FORMATS
from nearplane.formats.journal import STATE
from nearplane.formats.read import open_checkpoint

METHODS: list[Any] = [RTN(), OBQ(), GPTQ(), GPTQ(order="pivot"), GPTAQ(), ResComp(), NearPlane()]


def copied(source: Path, folder: Path) -> Path:
    """The model in another place, in a shard for each block, with the calibration text beside it."""
    shutil.copytree(source, folder / "model")
    shutil.copy(source.parent / "text.txt", folder / "text.txt")
    tensors = load_file(folder / "model" / "model.safetensors")
    (folder / "model" / "model.safetensors").unlink()
    places = {name: f"{'.'.join(name.split('.')[1:3])}.safetensors" for name in tensors}
    for file in set(places.values()):
        save_file({name: t for name, t in tensors.items() if places[name] == file}, folder / "model" / file)
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder / "model"


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def after(monkeypatch: pytest.MonkeyPatch, stages: int, act: Callable[[], object]) -> None:
    """Do something when so many stages are solved."""
    solve, calls = NearPlane.solve, []

    def solved(self: NearPlane, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == stages:
            act()
        return solve(self, *args)

    monkeypatch.setattr(NearPlane, "solve", solved)


# --- disk ---------------------------------------------------------------------------------------------------------


def test_a_source_shard_cut_short_in_mid_run(
    model: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    source, out = copied(model, tmp_path), tmp_path / "out"
    shard = source / "layers.2.safetensors"
    good = shard.read_bytes()
    after(monkeypatch, 5, lambda: shard.write_bytes(good[: len(good) // 2]))  # in place, as a sync tool may do
    with pytest.raises(NearplaneError, match=r"cannot be read from .*layers\.2\.safetensors: the file ends .* early"):
        run(source, out)
    assert len(list((out / STATE).glob("block-*.json"))) >= 1
    monkeypatch.undo()
    shard.write_bytes(good)
    report = run(source, out, resume=True)
    assert report.resumed == 1
    assert weights(out) == {name: data for name, data in whole.items() if name.endswith(".safetensors")}


def test_a_source_shard_removed_in_mid_run_is_still_read(
    model: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """What is open stays readable; a later run says what is missing."""
    source, out = copied(model, tmp_path), tmp_path / "out"
    after(monkeypatch, 5, (source / "layers.2.safetensors").unlink)
    run(source, out)
    assert weights(out) == {name: data for name, data in whole.items() if name.endswith(".safetensors")}
    with pytest.raises(NearplaneError, match=r"layers\.2\.safetensors is missing"):
        run(source, tmp_path / "again")


def test_out_that_cannot_be_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Below a file, in a file system that takes no folders, and on one mounted read-only."""
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", Path("/proc/nearplane-out")):
        with pytest.raises(NearplaneError, match=rf"{out} cannot be (read|written to)"):
            run(model, out, force=True)  # else the estimate may say first that no disk is there
    mkdir = Path.mkdir

    def refused(self: Path, *args: Any, **options: Any) -> None:
        if str(self).startswith(str(tmp_path)):
            raise OSError(30, "Read-only file system")
        mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(NearplaneError, match=r"out cannot be written to: .*Read-only file system"):
        run(model, tmp_path / "out")


def test_unicode_and_spaces_in_every_path(model: Path, whole: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    place = tmp_path / "Größe 模型 (1) 'a'"
    shutil.copytree(model, place / "mo del")
    shutil.copy(model.parent / "text.txt", place / "Tëxt datei.txt")
    run(
        place / "mo del",
        place / "aus gabe ü",
        offload=place / "öff load",
        calibration=Calibration(str(place / "Tëxt datei.txt"), nsamples=8, seqlen=24),
    )
    assert weights(place / "aus gabe ü") == {n: d for n, d in whole.items() if n.endswith(".safetensors")}
    nearplane.load(place / "aus gabe ü")


# --- numbers ------------------------------------------------------------------------------------------------------


def spoiled(source: Path, folder: Path, name: str, act: Callable[[torch.Tensor], object]) -> Path:
    """The model with one weight changed."""
    shutil.copytree(source, folder / "model")
    shutil.copy(source.parent / "text.txt", folder / "text.txt")
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    act(tensors[name])
    save_file(tensors, file)
    return folder / "model"


def test_an_activation_that_overflows_is_named_and_the_block_before_it_is_safe(
    model: Path, whole: dict[str, Any], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    """A finite weight whose product with the up projection's output is infinite in every token."""
    name, out = "model.layers.1.mlp.gate_proj.weight", tmp_path / "out"
    source = spoiled(model, tmp_path, name, lambda w: w.fill_(3e38))
    with pytest.raises(NumericalError, match=r"model\.layers\.1\..*NaN or Inf|model\.layers\.1\..*(overflow|finite)"):
        run(source, out)
    assert len(list((out / STATE).glob("block-*.json"))) == 1
    shutil.copy(model / "model.safetensors", source / "model.safetensors")
    assert run(source, out, resume=True).resumed == 1
    assert weights(out) == {n: d for n, d in whole.items() if n.endswith(".safetensors")}


@pytest.mark.parametrize("size", [1e12, 1e25])
def test_extreme_activations_are_named(size: float, model: Path, tmp_path: Path) -> None:  # noqa: F811
    """1e25 has no square in float32: an error; 1e12 has one, and the run goes on and says so."""
    name = "model.layers.1.input_layernorm.weight"
    source, out = spoiled(model, tmp_path, name, lambda w: w.fill_(size)), tmp_path / "out"
    if size > 1e20:
        with pytest.raises(NumericalError, match=r"model\.layers\.1\.self_attn\.q_proj: the Hessian overflowed"):
            run(source, out, method=GPTQ())
        return
    report = run(source, out, method=GPTQ())
    assert any("layers.1.self_attn.q_proj: extreme activations" in event for event in report.events)
    for row in report.linears:
        assert row.error is not None and row.rtn_error is not None and row.error < row.rtn_error
    assert run(source, tmp_path / "budget", method=GPTQ(), budget=6).settings["choices"]  # what measures copes as well


SOLVERS = [m for m in METHODS if m.needs]


@pytest.mark.parametrize("method", SOLVERS, ids=repr)
@pytest.mark.parametrize("residual", [False, True])
def test_the_size_of_activations_changes_no_code(method: Any, residual: bool) -> None:
    """Scaled by a power of two every product is exact, so codes are equal to the last bit, or there is an error."""
    if residual and not isinstance(method, NearPlane):
        pytest.skip("only NearPlane reads R")
    m = layer(6, 24, 200, residual=residual).to(torch.float32)
    solved = method.solve(m.W, method.prepare(m.moments), GRID)
    refused = []
    for power in (-70, -58, -45, -30, -12, 20, 33, 47, 58, 66):
        drift = None if m.drift is None else m.drift * 2.0**power
        moments = Layer(m.W, m.xhat * 2.0**power, m.x * 2.0**power, drift, m.held).moments
        if not -24 <= power <= 24:
            with pytest.raises(NumericalError, match=r"squares float32 cannot hold|overflowed|is zero"):
                method.prepare(moments)
        moments.rescale()
        try:
            found = method.solve(m.W, method.prepare(moments), GRID)
        except NumericalError:
            refused.append(power)
            continue
        assert torch.equal(found.codes, solved.codes) and torch.equal(found.scale, solved.scale)
    assert refused == [-70, -58, 66]


def test_ordinary_moments_are_not_rescaled() -> None:
    m = layer(6, 24, 200).moments
    before = m.H.clone()
    assert m.rescale() == 0 and torch.equal(m.H, before)


# --- hard Hessians ------------------------------------------------------------------------------------------------


def hard(kind: str) -> Layer:
    """A layer without drift, so that its loss is that of one weight."""
    m = layer(6, 40, 200)
    if kind == "rank one":
        m.xhat = m.xhat[:, :1] * torch.linspace(0.5, 2, 40, dtype=torch.float64)
    elif kind == "dead columns":
        m.xhat[:, ::3] = 0
    elif kind == "one column a million times larger":
        m.xhat[:, 17] *= 1e6
    elif kind == "one column a million times smaller":
        m.xhat[:, 17] *= 1e-6
    m.x = m.xhat.clone()
    return m.to(torch.float32)


KINDS = ["rank one", "dead columns", "one column a million times larger", "one column a million times smaller"]


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4])
def test_hard_hessians(method: Any, kind: str, bits: int) -> None:
    """Codes in range, finite values, and at most the loss of plain rounding, whose own errors are half a step at most."""
    m, grid = hard(kind), Grid(bits=bits, group_size=16, sym=False)
    solved = method.solve(m.W, method.prepare(m.moments) if method.needs else None, grid)
    assert int(solved.codes.max()) < 2**bits and bool((solved.scale > 0).all())
    assert bool(dequantize(solved, grid).isfinite().all())
    plain = RTN().solve(m.W, None, Grid(bits=bits, group_size=16, sym=False, fit="minmax"))
    if method.needs:
        assert m.loss(solved, grid) <= m.loss(plain, grid)
        return
    step = plain.scale.repeat_interleave(16, 1)[:, :40]
    assert bool(((dequantize(plain, grid) - m.W).abs() <= 0.51 * step).all())


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_hessian_of_zeros(method: Any) -> None:
    """Rounding needs none; the others refuse."""
    m = layer(6, 40, 50).to(torch.float32)
    m.xhat, m.x = m.xhat * 0, m.x * 0
    if not method.needs:
        assert int(method.solve(m.W, None, GRID).codes.max()) < 8
        return
    with pytest.raises(NumericalError, match="the Hessian is zero: every calibration input"):
        method.prepare(m.moments)


@pytest.mark.parametrize("method", SOLVERS, ids=repr)
@pytest.mark.parametrize("tokens", [0, 1, 39])
def test_few_tokens(method: Any, tokens: int) -> None:
    m = layer(6, 40, tokens or 1).to(torch.float32)
    m.x = m.xhat.clone()
    if tokens == 0:
        with pytest.raises(NumericalError, match="no calibration token reached this input"):
            method.prepare(Moments.zeros(40, drift="D" in method.needs))
        return
    solved = method.solve(m.W, method.prepare(m.moments), GRID)
    assert int(solved.codes.max()) < 8 and bool(dequantize(solved, GRID).isfinite().all())
    plain = RTN().solve(m.W, None, Grid(bits=3, group_size=16, sym=False, fit="minmax"))
    assert m.loss(solved, GRID) <= m.loss(plain, GRID)


@pytest.mark.parametrize("method", SOLVERS, ids=repr)
def test_a_run_on_two_tokens(method: Any, model: Path, tmp_path: Path) -> None:  # noqa: F811
    calibration = Calibration(str(model.parent / "text.txt"), nsamples=1, seqlen=2)
    report = run(model, tmp_path / "out", method=method, calibration=calibration)
    assert all(row.tokens == 2 and row.error is not None and row.error < 1 for row in report.linears)
    ids = tiny.tokens(1, 8)
    assert nearplane.load(tmp_path / "out")(input_ids=ids, use_cache=False).logits.isfinite().all()


# --- odd shapes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 40), (3, 33), (7, 31), (1, 65)])
@pytest.mark.parametrize("grid", [Grid(3, 16, False), Grid(4, -1), Grid(8, 32, False), Grid(2, 1)], ids=repr)
def test_odd_shapes_through_disk(method: Any, shape: tuple[int, int], grid: Grid, tmp_path: Path) -> None:
    """What is solved comes back from a compressed-tensors file."""
    m = layer(*shape, 60).to(torch.float32)
    solved = method.solve(m.W, method.prepare(m.moments) if method.needs else None, grid)
    chosen = FORMATS["compressed-tensors"]
    save_file(chosen.pack("m", solved, grid), tmp_path / "model.safetensors")
    config = {"model_type": "x", "quantization_config": chosen.config(grid, ignore=[], settings={})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = open_checkpoint(tmp_path)
    assert found.layers["m"].shape == shape
    assert torch.equal(found.quantized("m").codes, solved.codes)
    torch.testing.assert_close(found.weight("m"), dequantize(solved, grid), rtol=0, atol=0)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "gptq_v2"])
def test_levels_that_are_no_integers_are_refused_before_a_block_is_opened(
    model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
) -> None:
    monkeypatch.setattr(NearPlane, "solve", lambda *_: pytest.fail("a weight was solved"))
    with pytest.raises(SettingError, match=r"q_proj: no checkpoint format holds the levels nf4, which are no integers"):
        run(model, tmp_path / "out", grid=Grid.named("nf4"), format=format, force=True)
    assert not (tmp_path / "out").exists()


def _zeroed(part: str) -> Any:
    """A model with a linear whose inputs are all zero, and the name of that linear."""
    made = tiny.build("opt" if part == "relu" else "llama")
    with torch.no_grad():
        if part == "relu":
            made.model.decoder.layers[0].fc1.bias.fill_(-1000.0)
            return made, "model.decoder.layers.0.fc2"
        layer = made.model.layers[1]
        zeroed = {"up_proj": layer.mlp.up_proj, "v_proj": layer.self_attn.v_proj}[part]
        zeroed.weight.zero_()
    return made, f"model.layers.1.{'mlp.down_proj' if part == 'up_proj' else 'self_attn.o_proj'}"


@pytest.mark.parametrize(
    "settings", [{"method": m} for m in ("gptq", "gptaq", "rescomp", "nearplane")] + [{"budget": 3.5}]
)
@pytest.mark.parametrize("part", ["relu", "up_proj", "v_proj"])
def test_inputs_that_are_all_zero(part: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Such a linear is rounded to nearest, counted and named; the others are solved, and the run ends well."""
    made, name = _zeroed(part)
    tiny.save(made, tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.text(2000))
    data = {"dataset": str(tmp_path / "text.txt"), "nsamples": 8, "seqlen": 16}
    report = nearplane.quantize(tmp_path / "model", tmp_path / "out", group_size=32, progress=False, **data, **settings)
    assert report.totals["rounded_linears"] == 1
    assert [row.name for row in report.linears if row.rounded] == [name]
    assert [e for e in report.events if "rounded to nearest" in e and name in e]
    layer = open_checkpoint(tmp_path / "out").layers[name]
    weight, grid = made.get_submodule(name).weight.detach(), replace(layer.grid, fit="auto")
    expected = RTN().solve(weight, None, replace(grid, scale_dtype="float32"))
    assert torch.equal(open_checkpoint(tmp_path / "out").quantized(name).codes, expected.codes)


@pytest.mark.parametrize("where", ["held out", "not held out"])
def test_inputs_that_are_zero_on_some_tokens_only(where: str) -> None:
    """Nothing can be judged then, and what is left is a plain sweep."""
    x, zeros = torch.randn(200, 40, generator=torch.Generator().manual_seed(0)), torch.zeros(600, 40)
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(1))

    def moments(tokens: torch.Tensor) -> Moments:
        made = Moments.zeros(40, drift=True)
        made.add(tokens, 1.01 * tokens)
        return made

    parts = (zeros, x) if where == "held out" else (x, zeros)
    both = moments(parts[0]).join(moments(parts[1]))
    if where == "held out":
        assert int((both.fit("H") != 0).sum()) == 0
    method = NearPlane(rounds=0)
    solved = method.solve(weight, method.prepare(both), GRID)
    plain = GPTQ(order="activation").solve(weight, GPTQ(order="activation").prepare(both), GRID)
    assert solved.course is not None and solved.course.alpha == 0.0
    error = [dequantize(q, GRID) - weight for q in (solved, plain)]
    losses = [float(((e @ both.H) * e).sum()) for e in error]
    assert losses[0] <= 1.05 * losses[1]
