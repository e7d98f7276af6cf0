"""Forwards that pause: what is measured is what whole models would show, however a stage was reached."""

import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from greenlet import getcurrent

import nearplane
import nearplane.run.stream
from nearplane import RTN, Calibration, Grid, Moments, NearPlane
from nearplane.core import dense
from nearplane.core.grid import dequantize
from nearplane.models.discover import discover
from nearplane.models.source import open_source
from nearplane.run import observe
from nearplane.run.forward import Forward
from nearplane.run.stream import Place, stream

KINDS = ["llama", "gpt2", "opt", "gemma2", "falcon"]
GRID = Grid(bits=3, group_size=32, sym=False)
ALL: Any = frozenset({"H", "D", "R", "held_out"})
LOUD = 7  # a token whose embedding is large enough to make it a sink


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of tiny models, built when first asked for."""
    folder, made = tmp_path_factory.mktemp("forward"), {}
    (folder / "text.txt").write_text(tiny.text(2000))

    def get(kind: str) -> Path:
        if kind not in made:
            model = tiny.build(kind)
            with torch.no_grad():
                model.get_input_embeddings().weight[LOUD] *= 300
            made[kind] = tiny.save(model, folder / kind)
        return made[kind]

    return get


@pytest.fixture(autouse=True)
def several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences of 16 tokens per batch."""
    monkeypatch.setattr(nearplane.run.stream, "BATCH_TOKENS", 32)


@pytest.fixture(params=["paused", "anew"])
def keep(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "anew":
        monkeypatch.setattr(nearplane.run.stream, "IN_FLIGHT_BYTES", 0)
    return bool(request.param == "paused")


def ids_of(samples: int, length: int = 16) -> torch.Tensor:
    ids = tiny.tokens(samples, length, seed=3)
    ids[ids == LOUD] = LOUD + 1
    ids[:, 0] = LOUD
    return ids


def opened_blocks(source: Any, ids: torch.Tensor, dtype: torch.dtype = torch.float64, reference: bool = True) -> Any:
    return stream(source, discover(source), ids, place=Place(torch.device("cpu"), dtype), reference=reference)


def put(opened: Any, stage: Any, grid: Grid = GRID) -> dict[str, torch.Tensor]:
    """Round every linear of a stage and put it in place."""
    found = {}
    for site in stage:
        quantized = RTN().solve(opened.weight(site), None, grid)
        opened.replace(site, quantized, grid)
        found[site.name] = dequantize(quantized, grid)
    return found


def walk(folder: Path, ids: torch.Tensor, needs: Any = ALL, dtype: torch.dtype = torch.float64) -> dict[str, Moments]:
    """Moments of every stage, each measured behind all rounding before it."""
    source = open_source(folder)
    found: dict[str, Moments] = {}
    for opened in opened_blocks(source, ids, dtype):
        for stage in opened.stages:
            found[stage[0].name] = opened.observe(stage, needs)
            put(opened, stage)
    assert_clean(source.model)
    return found


def assert_clean(model: Any) -> None:
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks and not module._forward_hooks, name
        assert "forward" not in module.__dict__, name
    assert torch.is_grad_enabled()


def assert_same(a: Moments | None, b: Moments | None) -> None:
    """To the last bit."""
    assert (a is None) == (b is None)
    if a is None or b is None:
        return
    assert (a.tokens, a.dropped) == (b.tokens, b.dropped)
    for name in ("H", "D", "R"):
        mine, its = getattr(a, name), getattr(b, name)
        assert (mine is None) == (its is None)
        assert mine is None or torch.equal(mine, its), name
    assert_same(a.held, b.held)


def assert_alike(found: dict[str, Moments], expected: dict[str, Moments]) -> None:
    assert found.keys() == expected.keys()
    for name, moments in found.items():
        assert_same(moments, expected[name])


# --- paused or run anew -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pausing_changes_no_moment(kind: str, dtype: torch.dtype, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ids_of(5)  # three batches, the last one smaller
    found = walk(models(kind), ids, dtype=dtype)
    monkeypatch.setattr(nearplane.run.stream, "IN_FLIGHT_BYTES", 0)
    assert_alike(walk(models(kind), ids, dtype=dtype), found)
    assert all(m.tokens == ids.numel() and m.H.dtype == dtype for m in found.values())
    # Rounding has changed what later stages see.
    later = list(found.values())[1:]
    assert all(float((m.R if m.D is None else m.D).norm()) > 0 for m in later)


def test_pausing_saves_forwards(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block costs each stream one forward per batch, not one per stage; with no room to pause, one per stage."""
    begun = 0
    real = Forward._forward

    def counted(self: Forward) -> None:
        nonlocal begun
        begun += 1
        real(self)

    monkeypatch.setattr(Forward, "_forward", counted)
    walk(models("llama"), ids_of(6))
    assert begun == 2 * 2 * 3  # streams, blocks, batches
    begun = 0
    monkeypatch.setattr(nearplane.run.stream, "IN_FLIGHT_BYTES", 0)
    walk(models("llama"), ids_of(6))
    assert begun == 2 * 3 * (4 + 4 + 1)  # four stages per block, and the first block once more to the end


@pytest.mark.parametrize("kind", KINDS)
def test_pausing_changes_no_checkpoint(kind: str, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models(kind)
    calibration = Calibration(nsamples=6, seqlen=16, dataset=str(folder.parent / "text.txt"))
    format: Any = "gptq" if kind == "gpt2" else "compressed-tensors"
    digests = []
    for name, room in (("paused", 4 << 30), ("anew", 0)):
        monkeypatch.setattr(nearplane.run.stream, "IN_FLIGHT_BYTES", room)
        nearplane.quantize(
            folder,
            tmp_path / name,
            method=NearPlane(),
            grid=Grid(bits=3, group_size=32),
            format=format,
            calibration=calibration,
            progress=False,
        )
        files = sorted((tmp_path / name).glob("*.safetensors"))
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1] and digests[0]


# --- against whole models -----------------------------------------------------------------------------------------


class Reference:
    """Two copies of a model, one of them rounded as the walk goes; batches are those of the walk."""

    def __init__(self, folder: Path, ids: torch.Tensor, size: int = 2) -> None:
        self.plain, self.rounded = (nearplane.load(folder).double().eval() for _ in range(2))
        self.batches = ids.split(size)

    def replace(self, weights: dict[str, torch.Tensor], transposed: bool = False) -> None:
        for name, weight in weights.items():
            parameter = self.rounded.get_submodule(name).weight
            parameter.data = (weight.T if transposed else weight).to(parameter.dtype).clone()

    def inputs(self, module: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What goes into a module, batch by batch: (tokens, width) of both models."""
        result = []
        for model in (self.plain, self.rounded):
            seen: list[torch.Tensor] = []

            def hook(_m: Any, args: Any, kwargs: Any, seen: list[torch.Tensor] = seen) -> None:
                x = args[0] if args else kwargs["hidden_states"]
                seen.append(x.detach().reshape(-1, x.shape[-1]).clone())

            handle = model.get_submodule(module).register_forward_pre_hook(hook, with_kwargs=True)
            with torch.no_grad():
                for batch in self.batches:
                    model(input_ids=batch, use_cache=False)
            handle.remove()
            result.append(seen)
        return result[0], result[1]


def without_sinks(r: torch.Tensor, rhat: torch.Tensor) -> tuple[torch.Tensor, int]:
    drift = r - rhat
    energy = (rhat**2).sum(1)
    middle = energy.sort().values[(len(energy) - 1) // 2]
    sinks = [t for t in range(len(energy)) if energy[t] > observe.SINK * middle]
    for t in sinks:
        drift[t] = 0
    return drift, len(sinks)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma2"])
def test_moments_are_those_of_two_whole_models(kind: str, models: Any, keep: bool) -> None:
    """H, D and R of every stage and of its held-out sequences, by hooks on two models that know of no walk."""
    ids = ids_of(10)
    source, brute = open_source(models(kind)), Reference(models(kind), ids)
    with_R, sinks = [], 0
    held = torch.tensor([s % 4 == 3 for s in range(10)]).repeat_interleave(16)
    for opened in opened_blocks(source, ids):
        assert opened.walk.keep == keep
        for stage in opened.stages:
            site = stage[0]
            found = opened.observe(stage, ALL)
            x, xhat = (torch.cat(part) for part in brute.inputs(site.name))
            sides = {"H": xhat, "D": x - xhat}
            if found.R is not None:
                with_R.append(site.name)
                assert len(stage) == 1 and site.adds_to is not None
                parts = [without_sinks(*pair) for pair in zip(*brute.inputs(site.adds_to), strict=True)]
                own = sides.pop("D") @ opened.weight(site).T  # the linear's own drift, and the stream's before it
                sides["R"] = own + torch.cat([drift for drift, _ in parts])
                assert found.D is None
                sinks += sum(count for _, count in parts)
            assert found.held is not None
            assert found.tokens == 160 and found.held.tokens == 32 and found.dropped == 0
            for moments, rows in ((found, torch.ones(160, dtype=torch.bool)), (found.held, held)):
                for name, side in sides.items():
                    expected = side[rows].T @ xhat[rows] / int(rows.sum())
                    tolerance = 1e-8 * float((side[rows].norm() * xhat[rows].norm()) / int(rows.sum())) + 1e-12
                    torch.testing.assert_close(getattr(moments, name), expected, rtol=1e-6, atol=tolerance)
            brute.replace(put(opened, stage), transposed=site.transposed)
    if kind == "gemma2":  # what is added to the stream has passed a norm
        assert with_R == []
    else:
        assert len(with_R) == 4  # attention and feed-forward output of both blocks
        assert sinks > 0 or kind == "opt"
    assert_clean(source.model)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_bias_is_no_drift(kind: str, dtype: torch.dtype, tolerance: float, models: Any, tmp_path: Path) -> None:
    """R of linears with biases; in few digits, the drift behind the linear is a product in float32."""
    folder, ids = tmp_path / "biased", ids_of(10)
    model = nearplane.load(models(kind))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)
    source, brute, count = open_source(folder), Reference(folder, ids), 0
    for opened in opened_blocks(source, ids, dtype):
        for stage in opened.stages:
            site, found = stage[0], opened.observe(stage, ALL)
            if found.R is not None:
                x, xhat = (torch.cat(part) for part in brute.inputs(site.name))
                drift = torch.cat([without_sinks(*pair)[0] for pair in zip(*brute.inputs(site.adds_to), strict=True)])
                wanted = (drift + (x - xhat) @ opened.weight(site).double().T).T @ xhat / len(x)
                assert float((found.R - wanted).norm()) < tolerance * float(wanted.norm())
                count += 1
            brute.replace(put(opened, stage), transposed=site.transposed)
    assert count == 4


def test_no_residual_drift_where_none_is_asked_for(models: Any) -> None:
    for needs in ({"H"}, {"H", "D"}, {"H", "held_out"}, {"H", "R"}, {"H", "D", "R"}):
        found = walk(models("llama"), ids_of(4), frozenset(needs))
        for name, m in found.items():
            joins = "R" in needs and name.endswith(("o_proj", "down_proj"))
            assert (m.D is not None) == ("D" in needs and not joins)
            assert (m.R is not None) == joins
            assert (m.held is not None) == ("held_out" in needs)


def test_of_a_module_that_sees_some_tokens_only_runs_are_held_out() -> None:
    """An expert: 90 of the 128 tokens of each batch, runs counted over what it has seen."""
    tokens = torch.randn(360, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measuring = observe.Measuring(frozenset({"H", "held_out"}), 6, None, tokens, 16)
    for batch in range(4):
        measuring.add(torch.Size((4, 32)), 4 * batch, tokens[90 * batch : 90 * (batch + 1)], None, None)
    held = torch.cat([tokens[96:128], tokens[224:256], tokens[352:]])
    found = measuring.result()
    assert found.tokens == 360 and found.held is not None and found.held.tokens == len(held)
    torch.testing.assert_close(found.held.H, held.T @ held / len(held))


def test_a_token_that_is_not_finite_hides_no_sink() -> None:
    rhat = torch.ones(9, 4)
    rhat[2] *= 1000
    rhat[5, 1] = float("nan")
    found = observe.residual_drift(rhat + 1, rhat)
    assert not found[2].any() and bool((found[[0, 1, 3, 4, 6, 7, 8]] == 1).all())


def test_sinks_have_no_drift_and_others_all_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    r, rhat = (torch.randn(64, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    rhat = rhat / rhat.norm(dim=1, keepdim=True)
    rhat[5] *= (observe.SINK * 1.01) ** 0.5
    rhat[40] *= (observe.SINK * 0.99) ** 0.5
    found = observe.residual_drift(r, rhat)
    expected = r - rhat
    expected[5] = 0
    assert torch.equal(found, expected)


# --- what is held out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequences", "length", "held"),
    [
        (4, 16, [(3, 0, 16)]),
        (9, 16, [(3, 0, 16), (7, 0, 16)]),
        (1, 160, [(0, 96, 128)]),
        (3, 144, [(0, 96, 128), (1, 80, 112), (2, 64, 96)]),  # runs are counted over all tokens
        (2, 100, [(0, 96, 100), (1, 0, 28)]),
        (3, 20, [(2, 5, 20)]),  # runs of 15: a quarter, if there is one
        (1, 3, []),
    ],
)
def test_held_out_tokens(sequences: int, length: int, held: list[tuple[int, int, int]]) -> None:
    """Every fourth sequence, or every fourth run of 32 tokens where sequences are fewer than four."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(sequences * length, 6, generator=generator, dtype=torch.float64)
    apart = torch.zeros(sequences, length, dtype=torch.bool)
    for sequence, a, b in held:
        apart[sequence, a:b] = True
    size = 2 if sequences >= 4 else 1
    measuring = observe.Measuring(frozenset({"H", "held_out"}), 6, None, tokens, sequences)
    for a in range(0, sequences, size):
        count = min(size, sequences - a)
        measuring.add(torch.Size((count, length)), a, tokens[a * length : (a + count) * length], None, None)
    found = measuring.result()
    rows = apart.flatten()
    assert found.tokens == len(tokens) and found.held is not None and found.held.tokens == int(rows.sum())
    torch.testing.assert_close(found.H, tokens.T @ tokens / len(tokens))
    if held:
        torch.testing.assert_close(found.held.H, tokens[rows].T @ tokens[rows] / int(rows.sum()))
        rest = tokens[~rows]
        torch.testing.assert_close(found.fit("H"), rest.T @ rest / len(rest))


def test_few_sequences_in_a_walk(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ids_of(3, 64)
    ids[:, 40] = LOUD + 2
    for moments in walk(models("llama"), ids).values():
        assert moments.tokens == 192 and moments.held is not None
        assert moments.held.tokens == 32
    monkeypatch.setattr(nearplane.run.stream, "BATCH_TOKENS", 4096)
    source, brute = open_source(models("llama")), Reference(models("llama"), ids, 3)
    for opened in opened_blocks(source, ids):
        stage = opened.stages[3]
        found = opened.observe(stage, ALL)
        _, (xhat,) = brute.inputs(stage[0].name)
        assert found.held is not None and found.held.tokens == 32 and found.tokens == 192
        part = xhat[96:128]
        torch.testing.assert_close(found.held.H, part.T @ part / 32)
        break


# --- any order of calls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_stage_observed_twice(kind: str, models: Any, keep: bool) -> None:
    expected = walk(models(kind), ids_of(5))
    source, found = open_source(models(kind)), {}
    for opened in opened_blocks(source, ids_of(5)):
        for stage in opened.stages:
            first = opened.observe(stage, ALL)
            found[stage[0].name] = opened.observe(stage, ALL)
            assert_same(first, found[stage[0].name])
            opened.observe(stage, frozenset({"H"}))  # one stream only
            put(opened, stage)
    assert_alike(found, expected)
    assert_clean(source.model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("order", [(3, 0, 2, 1), (1, 3, 2, 0), (2, 3, 0, 3)])
def test_stages_observed_out_of_order(kind: str, order: tuple[int, ...], models: Any, keep: bool) -> None:
    """Each sees exactly what has been put in place by then."""
    ids = ids_of(4)
    source, brute = open_source(models(kind)), Reference(models(kind), ids)
    for opened in opened_blocks(source, ids):
        for number in order:
            stage = opened.stages[number]
            found = opened.observe(stage, frozenset({"H", "D"}))
            x, xhat = (torch.cat(part) for part in brute.inputs(stage[0].name))
            torch.testing.assert_close(found.H, xhat.T @ xhat / 64, rtol=1e-7, atol=1e-9)
            assert found.D is not None
            torch.testing.assert_close(found.D, (x - xhat).T @ xhat / 64, rtol=1e-6, atol=1e-8)
            brute.replace(put(opened, stage), transposed=stage[0].transposed)
    assert_clean(source.model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_site_replaced_after_it_was_passed(kind: str, models: Any, keep: bool) -> None:
    ids = ids_of(4)
    source, brute = open_source(models(kind)), Reference(models(kind), ids)
    coarse = Grid(bits=2, group_size=-1)
    for opened in opened_blocks(source, ids):
        stages = opened.stages
        for stage in stages[:3]:
            opened.observe(stage, ALL)
            put(opened, stage)
        for stage in stages[:3]:  # again, otherwise; the forwards stand at the third
            brute.replace(put(opened, stage, coarse), transposed=stage[0].transposed)
        found = opened.observe(stages[3], frozenset({"H", "D"}))
        _, xhat = (torch.cat(part) for part in brute.inputs(stages[3][0].name))
        torch.testing.assert_close(found.H, xhat.T @ xhat / 64, rtol=1e-7, atol=1e-9)
        brute.replace(put(opened, stages[3]), transposed=stages[3][0].transposed)
        for stage in stages[:2]:  # and once more before the block is left behind
            brute.replace(put(opened, stage), transposed=stage[0].transposed)
    assert_clean(source.model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_nothing_observed_in_a_block(kind: str, models: Any, keep: bool) -> None:
    """A block that is rounded without a look is still passed by both streams."""
    ids = ids_of(4)
    source, brute = open_source(models(kind)), Reference(models(kind), ids)
    for k, opened in enumerate(opened_blocks(source, ids)):
        for stage in opened.stages:
            if k == 1:
                found = opened.observe(stage, frozenset({"H"}))
                xhat = torch.cat(brute.inputs(stage[0].name)[1])
                torch.testing.assert_close(found.H, xhat.T @ xhat / 64, rtol=1e-7, atol=1e-9)
            brute.replace(put(opened, stage), transposed=stage[0].transposed)


@pytest.mark.parametrize("where", ["before", "observed", "replaced"])
@pytest.mark.parametrize("how", ["break", "raise", "close"])
@pytest.mark.parametrize("block", [0, 1])
def test_a_loop_left_early_leaves_the_model_alone(where: str, how: str, block: int, models: Any, keep: bool) -> None:
    source, ids = open_source(models("llama")), ids_of(4)

    def visit(opened: Any) -> None:
        for stage in opened.stages[: 0 if where == "before" else 2]:
            opened.observe(stage, ALL)
            if where == "replaced":
                put(opened, stage)

    blocks = opened_blocks(source, ids)
    if how == "raise":
        with pytest.raises(ZeroDivisionError):
            for opened in blocks:
                visit(opened)
                if opened.k == block:
                    raise ZeroDivisionError
    else:
        for opened in blocks:
            visit(opened)
            if opened.k == block:
                break
    blocks.close()
    assert_clean(source.model)
    assert not opened.paused
    # And another walk over the same folder is what it would have been.
    assert_alike(walk(models("llama"), ids), walk(models("llama"), ids))


def test_an_error_inside_the_model_reaches_the_caller(models: Any, keep: bool) -> None:
    source, ids = open_source(models("llama")), ids_of(4)

    def fails(_module: Any, _args: Any) -> None:
        raise OverflowError("in the model")

    expected = walk(models("llama"), ids, frozenset({"H", "D"}))
    blocks = opened_blocks(source, ids)
    opened = next(blocks)
    opened.observe(opened.stages[0], ALL)
    name = opened.block.name + ".post_attention_layernorm"
    handle = source.model.get_submodule(name).register_forward_pre_hook(fails)
    opened.observe(opened.stages[1], ALL)
    with pytest.raises(OverflowError, match="in the model"):
        opened.observe(opened.stages[2], ALL)
    handle.remove()
    put(opened, opened.stages[0])
    put(opened, opened.stages[1])
    assert_same(opened.observe(opened.stages[2], frozenset({"H", "D"})), expected[opened.stages[2][0].name])
    blocks.close()
    assert_clean(source.model)


# --- a stage that a batch never reaches ---------------------------------------------------------------------------


@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_a_batch_that_never_reaches_a_stage(skipped: int, models: Any, keep: bool) -> None:
    """Its tokens are missing there and nowhere else, and it goes on its way."""
    ids = ids_of(6)
    source, brute = open_source(models("llama")), Reference(models("llama"), ids)
    blocks = discover(source)
    name = "model.layers.0.mlp"

    def skipping(model: Any, number: Any) -> None:
        module = model.get_submodule(name)
        original = module.forward
        module.forward = lambda x: torch.zeros_like(x) if number() == skipped else original(x)

    skipping(source.model, lambda: getattr(getcurrent(), "batch", None))
    for model in (brute.plain, brute.rounded):
        seen: list[int] = []
        model.register_forward_pre_hook(lambda _m, _a, seen=seen: seen.append(1))
        skipping(model, lambda seen=seen: (len(seen) - 1) % 3)
    for opened in stream(source, blocks, ids, place=Place(torch.device("cpu"), torch.float64), reference=True):
        for stage in opened.stages:
            found = opened.observe(stage, ALL)
            x, xhat = brute.inputs(stage[0].name)
            missing = ".layers.0.mlp" in stage[0].name
            assert len(xhat) == (2 if missing else 3)
            both, hat = torch.cat(x), torch.cat(xhat)
            assert found.tokens == len(hat) == (64 if missing else 96)
            torch.testing.assert_close(found.H, hat.T @ hat / len(hat), rtol=1e-7, atol=1e-9)
            assert found.held is not None
            if found.R is None:
                torch.testing.assert_close(found.D, (both - hat).T @ hat / len(hat), rtol=1e-6, atol=1e-8)
            # The fourth sequence is in the second batch, and is held out at every stage or missing.
            assert found.held.tokens == (0 if missing and skipped == 1 else 16)
            brute.replace(put(opened, stage))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_coarse_reference_begins_behind_the_first_replaced_weight(
    kind: str, keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then both streams are equal, to the last bit; and only the linears of the reference stream change."""
    monkeypatch.setattr(dense, "bfloat16_is_fast", lambda: True)
    monkeypatch.setattr(dense, "LEAST_COARSE", 1)
    layers = {"num_hidden_layers": 4} | ({"n_layer": 4} if kind == "gpt2" else {})
    folder = tiny.save(tiny.build(kind, **layers), tmp_path / "model")
    found: dict[Any, list[list[torch.Tensor]]] = {"coarse": [], True: []}
    for reference, before in found.items():  # the streams in front of each block
        source = open_source(folder)
        place = Place(torch.device("cpu"), torch.float32)
        for k, opened in enumerate(stream(source, discover(source), ids_of(4), place=place, reference=reference)):
            before.append([torch.cat(each.hidden[opened.block.tower]) for each in opened.walk.streams] if k else [])
            for stage in opened.stages if k == 1 else ():
                opened.observe(stage, ALL)
                put(opened, stage)
    for k in (1, 2, 3):  # weights are replaced in block 1
        (xhat, x), (same_xhat, same_x) = (before[k] for before in found.values())
        assert torch.equal(xhat, same_xhat)
        assert torch.equal(xhat, x) == (k == 1)
        assert torch.equal(x, same_x) == (k < 3)
        torch.testing.assert_close(x, same_x, rtol=0, atol=0.05 * float(same_x.std()))


@pytest.mark.parametrize("bits, coarse", [(3, True), (5, True), (6, False), (8, False)])
def test_a_reference_is_coarse_where_bits_are_few(
    bits: int, coarse: bool, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 8 bits its rounding is half of what rounding the weights is."""
    monkeypatch.setattr(dense, "bfloat16_is_fast", lambda: True)
    monkeypatch.setattr(nearplane.run.stream, "coarse_linears", lambda _: lasting.append(1) or nullcontext())
    lasting: list[int] = []
    summed, zeros = [], Moments.zeros.__func__  # type: ignore[attr-defined]

    def seen(cls: Any, *args: Any, **named: Any) -> Moments:
        summed.append(named["coarse"])
        return zeros(cls, *args, **named)

    monkeypatch.setattr(Moments, "zeros", classmethod(seen))
    calibration = Calibration(dataset=str(models("llama").parent / "text.txt"), nsamples=4, seqlen=16)
    grid = Grid(bits=bits, group_size=32)
    nearplane.quantize(
        models("llama"), tmp_path / "out", method=NearPlane(), grid=grid, calibration=calibration, progress=False
    )
    assert bool(lasting) == coarse and summed and set(summed[-4:]) == {coarse}
