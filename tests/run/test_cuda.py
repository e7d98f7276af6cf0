"""What a GPU computes, against the CPU: codes, checkpoints, memory, the compiled Triton kernel. Needs a GPU, and is
skipped, by name, where there is none; the same kernel is tested under Triton's interpreter everywhere."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from test_resume import contents

import nearplane
import nearplane.api
from nearplane import GPTAQ, GPTQ, OBQ, RTN, Calibration, Grid, NearPlane, ResComp
from nearplane.cli.main import main
from nearplane.run.estimate import CUDA_CONTEXT, estimate
from nearplane.run.events import BlockDone
from nearplane.run.plan import make_plan
from nearplane.run.resume import Saver
from nearplane.runtime.linear import QuantizedLinear, quantized_linears
from nearplane.runtime.triton import linear as triton_linear
from nearplane.runtime.tuned import candidates
from nearplane.runtime.words import Words

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
from problems import problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GRID = Grid(bits=3, group_size=16, sym=False)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "text.txt").write_text(tiny.text(2000))
    return tiny.save(tiny.build(request.param), folder / "model")


def run(model: Path, out: Path, device: str, **options: Any) -> nearplane.Report:
    calibration = Calibration(dataset=str(model.parent / "text.txt"), nsamples=8, seqlen=32)
    settings = {"method": GPTQ(), "grid": GRID, "calibration": calibration, "format": "gptq_v2", "progress": False}
    settings |= options
    return nearplane.quantize(model, out, device=device, **settings)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in float64, so that devices differ in the last digits only."""
    plan_of = nearplane.api.complete
    made = lambda *given: dataclasses.replace(plan_of(*given), compute=torch.float64)  # noqa: E731
    monkeypatch.setattr(nearplane.api, "complete", made)


@pytest.mark.parametrize(
    "method",
    [RTN(), OBQ(), GPTQ(), GPTQ(order="activation"), GPTAQ(), ResComp(), NearPlane(), NearPlane(beam=3)],
    ids=lambda method: f"{type(method).__name__}-{getattr(method, 'order', '')}-{getattr(method, 'beam', '')}",
)
@pytest.mark.usefixtures("exact")
def test_the_same_checkpoint_as_on_the_cpu(model, tmp_path, method):
    reports = [run(model, tmp_path / device, device, method=method) for device in ("cpu", "cuda")]
    here, there = (tensors(tmp_path / device) for device in ("cpu", "cuda"))
    assert here.keys() == there.keys()
    for name, value in here.items():
        assert torch.equal(value, there[name]), name
    for a, b in zip(*(report.linears for report in reports), strict=True):
        for x, y in ((a.error, b.error), (a.loss, b.loss)):
            assert x is y is None or y == pytest.approx(x, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_packed_logits_are_the_dense_ones(model, tmp_path, sym, dtype):
    run(model, tmp_path / "out", "cuda", grid=Grid(bits=4, group_size=16, sym=sym))
    packed = nearplane.load(tmp_path / "out", device="cuda", dtype=dtype)
    dense = nearplane.load(tmp_path / "out", device="cpu", packed=False)
    linears = quantized_linears(packed)
    assert linears and all(layer.why(dtype=getattr(torch, dtype)) == "Triton" for layer in linears.values())
    ids = tiny.tokens(3, 20)
    with torch.no_grad():
        expected, got = dense(ids).logits, packed(ids.cuda()).logits.float().cpu()
    tolerance = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}[dtype]
    assert float((got - expected).norm() / expected.norm()) < tolerance


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is tuned out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 17, 600])
def test_choices_against_float64(bits, shuffled, rows):
    """The first choice of all kinds, and all choices of one kind; each is compiled."""
    given = problem(200, 1000, bits, 64, False, torch.float16, shuffled, free=shuffled)
    weight = QuantizedLinear(given.tiles).cuda().packed
    assert isinstance(weight, Words)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        x = torch.randn(rows, 1000, generator=torch.Generator().manual_seed(rows)).to(dtype)
        bias = torch.arange(200.0).to(dtype)
        expected = x.double() @ given.dense.T + bias.double()
        everything = bits == 3 and not shuffled and dtype == torch.bfloat16
        for choice in candidates(rows)[: None if everything else 1]:
            got = [triton_linear(x.cuda(), weight, bias.cuda(), choice) for _ in range(3)]
            assert float((got[0].cpu().double() - expected).norm() / expected.norm()) < tolerance, choice
            assert all(torch.equal(other, got[0]) for other in got), choice


def test_layouts_on_both_devices():
    given = problem(200, 384, 3, 64, shuffled=True)
    layer = QuantizedLinear(given.tiles)
    state = layer.cuda().state_dict()
    assert all(torch.equal(value.cpu(), getattr(QuantizedLinear(given.tiles), name)) for name, value in state.items()
               if name != "_extra_state")  # fmt: skip
    assert torch.equal(layer.dequantized().cpu(), given.dense.float())
    assert torch.equal(layer.cpu().codes, given.tiles.codes)


@pytest.mark.usefixtures("cache")
def test_a_recorded_product_is_the_same():
    """Split over programs, in a graph, replayed out of turn: the bits of a call without a graph."""
    layers = [QuantizedLinear(problem(512, 2048, 3, 64, seed=i).tiles).cuda() for i in range(2)]
    x = torch.randn(1, 2048, device="cuda", dtype=torch.bfloat16)
    expected = [layer(x) for layer in layers]
    graphs, results = [torch.cuda.CUDAGraph() for _ in layers], []
    for layer, graph in zip(layers, graphs, strict=True):
        with torch.cuda.graph(graph):
            results.append(layer(x))
    for order in ((1, 0), (0, 1, 1, 0)):
        for i in order:
            graphs[i].replay()
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    fresh = torch.randn(40, 2048, device="cuda")
    with pytest.raises(nearplane.NearplaneError, match="call the model once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        layers[0](fresh)


@pytest.mark.usefixtures("cache")
def test_compiled_with_graphs():
    layer = QuantizedLinear(problem(512, 2048, 4, 64).tiles).cuda()
    x = torch.randn(1, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected, work = layer(x), torch.compile(layer, mode="reduce-overhead", fullgraph=True)
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(work(x), expected)


def test_a_resumed_run_ends_in_the_same_bytes(model, tmp_path):
    run(model, tmp_path / "whole", "cuda")
    calls = 0
    take = Saver.take

    def once(saver: Saver, event: Any) -> None:
        nonlocal calls
        take(saver, event)
        calls += isinstance(event, BlockDone)
        if calls == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "take", once)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "parts", "cuda")
    run(model, tmp_path / "parts", "cuda", resume=True)
    parts, whole = contents(tmp_path / "parts"), contents(tmp_path / "whole")
    parts.pop("report.json"), whole.pop("report.json")
    assert parts == whole


def test_offloaded_hidden_states_change_nothing(model, tmp_path):
    run(model, tmp_path / "memory", "cuda", method=NearPlane())
    run(model, tmp_path / "disk", "cuda", method=NearPlane(), offload=tmp_path / "scratch")
    for name, value in tensors(tmp_path / "memory").items():
        assert torch.equal(value, tensors(tmp_path / "disk")[name])


@pytest.mark.parametrize("method", [GPTQ(), GPTAQ(), NearPlane()], ids=lambda method: type(method).__name__)
def test_planned_memory(tmp_path, method):
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "head_dim": 64, "num_attention_heads": 16}
    folder = tiny.save(
        tiny.build("llama", num_key_value_heads=16, max_position_embeddings=512, **sizes), tmp_path / "model"
    )
    (tmp_path / "text.txt").write_text(tiny.text(20000))
    calibration = Calibration(dataset=str(tmp_path / "text.txt"), nsamples=32, seqlen=256)
    settings = {"method": method, "grid": Grid(bits=4, group_size=64), "calibration": calibration}
    plan = make_plan(folder, **settings, device="cuda")
    expected = estimate(plan).memory[-1].peak - CUDA_CONTEXT
    nearplane.quantize(folder, tmp_path / "warm", device="cuda", progress=False, **settings)  # workspaces of libraries
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    nearplane.quantize(folder, tmp_path / "out", device="cuda", progress=False, **settings)
    found = torch.cuda.max_memory_allocated() - held
    print(f"{type(method).__name__}: planned {expected / 1e6:.0f} MB, allocated {found / 1e6:.0f} MB")
    assert 0.75 < found / expected < 1.25


def test_commands(model, tmp_path, capsys):
    data = ["--dataset", str(model.parent / "text.txt")]
    words = ["--bits", "4", "--group-size", "16", "--format", "gptq_v2", *data, "--nsamples", "8", "--seqlen", "32"]
    assert main(["quantize", str(model), str(tmp_path / "out"), *words, "--device", "cuda"]) == 0
    assert main(["plan", str(model), *words, "--device", "cuda", "--json"]) == 0
    text = capsys.readouterr().out
    assert "cuda" in text
    evaluation = ["eval", str(tmp_path / "out"), "--reference", str(model), *data]
    figures = []
    for device in ("cpu", "cuda"):
        assert main([*evaluation, "--seqlen", "32", "--device", device, "--json"]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[0]["perplexity"] == pytest.approx(figures[1]["perplexity"], rel=1e-3)
    prompt = ["--prompt", "w5 w6", "--max-new-tokens", "5"]
    assert main(["generate", str(tmp_path / "out"), *prompt, "--device", "cuda"]) == 0
