"""QuantizedLinear as a module among others, and what runs where the kernel cannot."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from problems import Problem, problem
from torch import nn

from nearplane.core.errors import SettingError
from nearplane.runtime import cpu, linear, triton
from nearplane.runtime.linear import QuantizedLinear, quantize_head, quantized_linears, set_arithmetic


@pytest.fixture(params=["kernel", "no kernel"])
def layer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> QuantizedLinear:
    """A layer, on a machine with a kernel and on one without."""
    if request.param == "kernel" and cpu.best() is None:
        pytest.skip("no C++ kernel was built (no compiler)")
    if request.param == "no kernel":
        monkeypatch.setattr(cpu, "best", lambda: None)
    return made()


def made(seed: int = 0, **options: Any) -> QuantizedLinear:
    return QuantizedLinear(given(seed).tiles, torch.arange(40.0) / 40, **options)


def given(seed: int = 0) -> Problem:
    return problem(40, 96, 3, 32, seed=seed)


def expected(x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return x.double() @ given(seed).dense.T + torch.arange(40.0) / 40


def close(found: torch.Tensor, x: torch.Tensor, seed: int = 0, tolerance: float = 1e-4) -> bool:
    wanted = expected(x, seed)
    return bool((found.double() - wanted).norm() <= tolerance * wanted.norm())


def test_dtypes_in_and_out(layer: QuantizedLinear) -> None:
    x = torch.randn(2, 5, 96)
    for dtype, tolerance in (
        (torch.float32, 1e-4),
        (torch.float64, 1e-7),
        (torch.float16, 2e-3),
        (torch.bfloat16, 2e-2),
    ):
        y = layer(x.to(dtype))
        assert y.dtype == dtype and y.shape == (2, 5, 40)
        assert close(y, x.to(dtype), tolerance=tolerance)


def test_copies_stand_alone(layer: QuantizedLinear) -> None:
    x = torch.randn(1, 96)
    before = layer(x)  # makes a handle, which must not be shared
    twin, thawed = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    layer.codes.zero_()
    for other in (twin, thawed):
        assert torch.equal(other(x), before)
    assert not torch.equal(layer(x), before), "a change of the codes in place is seen"


def test_state_dict_round_trip(layer: QuantizedLinear) -> None:
    x, other = torch.randn(3, 96), made(seed=1)
    layer(x), other(x)
    for assign in (False, True):
        target = made(seed=2)
        target(x)
        target.load_state_dict(other.state_dict(), assign=assign)
        assert close(target(x), x, seed=1)
    assert set(layer.state_dict()) == {"codes", "scales", "zeros", "order", "bias", "_extra_state"}
    # What the tensors do not tell, here dtype of the scales and the common zero, goes with them.
    plain = [QuantizedLinear(problem(40, 96, 4, 32, True, dtype).tiles) for dtype in (torch.float16, torch.bfloat16)]
    plain[1](x)
    plain[1].load_state_dict(plain[0].state_dict())
    assert torch.equal(plain[1](x), plain[0](x))


def test_real_zeros_stay_as_they_are(layer: QuantizedLinear) -> None:
    """Offsets that are numbers of their own: a cast of the model, a copy and a state keep all bits of them."""
    given, x = problem(40, 96, 3, 32, free=True), torch.randn(3, 96)
    free = QuantizedLinear(given.tiles)
    wanted = x.double() @ given.dense.T
    before = free(x)
    assert (before.double() - wanted).norm() <= 1e-4 * wanted.norm()
    twin = QuantizedLinear(problem(40, 96, 3, 32, seed=1, free=True).tiles)
    twin.load_state_dict(free.state_dict())
    for same in (free.half(), free.bfloat16(), copy.deepcopy(free), pickle.loads(pickle.dumps(free)), twin):
        assert torch.equal(same.dequantized(), given.dense.float()) and torch.equal(same(x), before)
    # Zeros of the other kind do not become numbers by a cast.
    other = QuantizedLinear(problem(40, 96, 3, 32).tiles)
    other.load_state_dict(free.state_dict())
    with pytest.raises(ValueError, match="zeros must be"):
        torch.ops.nearplane.linear(x, *other._parts(), None, *linear._described(other.shape), "exact")
    arguments = (x, *free._parts(), None, *linear._described(free.shape), "exact")
    assert torch.equal(torch.ops.nearplane.linear(*arguments), QuantizedLinear(given.tiles, arithmetic="exact")(x))
    x.requires_grad_()
    free(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad.double(), given.dense.sum(0).expand(3, -1), atol=1e-4)


def test_tensors_that_are_replaced_are_seen(layer: QuantizedLinear) -> None:
    """However it is done: the kernel holds addresses, and must not use old ones."""
    x, other = torch.randn(3, 96), made(seed=1)
    layer(x)
    swapped = {name: getattr(other, name) for name in ("codes", "scales", "zeros")}
    assert close(torch.func.functional_call(layer, swapped, (x,)), x, seed=1)
    assert close(layer(x), x)
    for name, tensor in swapped.items():
        layer._buffers[name] = tensor
    assert close(layer(x), x, seed=1)
    for name in swapped:
        getattr(layer, name).data = getattr(made(seed=2), name)
    assert close(layer(x), x, seed=2)
    layer.codes.share_memory_()
    assert close(layer(x), x, seed=2)
    layer.bfloat16()
    assert layer.bias is not None
    before = layer(x)
    layer.bias.add_(100)
    assert torch.allclose(layer(x), before + 100, atol=1)


def test_malformed_weights_are_refused(layer: QuantizedLinear) -> None:
    x = torch.randn(2, 96)
    good = layer._parts()
    sizes = linear._described(layer.shape)

    def call(*parts: torch.Tensor, given: torch.Tensor = x) -> torch.Tensor:
        found: torch.Tensor = torch.ops.nearplane.linear(given, *parts, None, *sizes, "exact")
        return found

    assert call(*good).shape == (2, 40)
    broken = [
        (good[0][:1], *good[1:]), (good[0].float(), *good[1:]), (good[0].transpose(0, 1).contiguous().transpose(0, 1), *good[1:]),
        (good[0], good[1].float(), *good[2:]), (*good[:2], good[2][:, :1], good[3]),
        (*good[:3], torch.full((96,), 96, dtype=torch.int32)),
    ]  # fmt: skip
    for parts in broken:
        with pytest.raises(ValueError, match="a packed weight's"):
            call(*parts)
    with pytest.raises(ValueError, match="96"):
        call(*good, given=x[:, :48])
    layer.codes = broken[2][0]
    if cpu.best() is not None:
        with pytest.raises(ValueError, match="not contiguous"):
            layer(x)


def test_casting_the_model_leaves_the_weight_alone(layer: QuantizedLinear) -> None:
    x = torch.randn(4, 96)
    layer(x)
    for change in (layer.half, layer.bfloat16, layer.double, layer.float, lambda: layer.to(torch.float16)):
        change()
        assert layer.codes.dtype == torch.uint8 and layer.scales.dtype == torch.int16
        assert close(layer(x), x, tolerance=3e-3)  # the bias has been rounded
    layer.bias = nn.Parameter(torch.zeros(40), requires_grad=False)
    assert close(layer(x) + torch.arange(40.0) / 40, x)


def test_gradients_reach_the_input(layer: QuantizedLinear) -> None:
    wanted = given().dense.sum(0).expand(3, -1)
    for x in (torch.randn(3, 96, requires_grad=True), nn.Parameter(torch.randn(3, 96))):
        for module in (layer, torch.compile(layer, backend="aot_eager")):
            x.grad = None
            module(x).sum().backward()
            assert x.grad is not None and torch.allclose(x.grad.double(), wanted, atol=1e-5)


def test_compiled_without_a_break(layer: QuantizedLinear) -> None:
    model = nn.Sequential(layer, nn.ReLU())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 96)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        assert compiled(torch.randn(7, 2, 96)).shape == (7, 2, 40)
    exported = torch.export.export(model, (x,))
    assert "nearplane.linear" in str(exported.graph)


def test_the_operator_is_well_made(layer: QuantizedLinear) -> None:
    arguments = (torch.randn(2, 96), *layer._parts(), layer.bias, *linear._described(layer.shape), "exact")
    torch.library.opcheck(torch.ops.nearplane.linear, arguments)


def test_callers_in_many_threads(layer: QuantizedLinear) -> None:
    x = torch.randn(8, 96)
    right, wrong = layer(x), list[int]()
    fresh = made()  # its handle is made by whichever comes first

    def call(i: int) -> None:
        for _ in range(50):
            if not torch.allclose(fresh(x[i]), right[i], atol=1e-4):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_wrong_inputs_are_refused(layer: QuantizedLinear) -> None:
    for bad in (torch.randn(2, 95), torch.zeros(2, 96, dtype=torch.int64), torch.randn(()), torch.randn(96, 2)):
        with pytest.raises(ValueError, match=r"expected \(..., 96\) floats"):
            layer(bad)
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        made()(torch.randn(2, 96, device="meta"))
    with pytest.raises(ValueError, match="floats"):
        layer(torch.randn(2, 96).to_sparse())
    x = torch.randn(2, 96)
    assert torch.equal(layer(torch._neg_view(x)), layer(-x))
    assert layer(torch.randn(0, 96)).shape == (0, 40)
    assert layer(torch.full((1, 96), torch.nan)).isnan().all()


def test_it_says_what_it_is(layer: QuantizedLinear) -> None:
    assert "in_features=96, out_features=40, bias=True, bits=3" in repr(layer)
    weight = layer.weight
    assert weight.shape == (40, 96) and weight.device == layer.codes.device
    assert torch.equal(layer.dequantized(), given().dense.float())


def test_why_names_the_kernel_or_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = made()
    if cpu.best() is not None:
        assert layer.why() == f"C++ ({cpu.best()}, {cpu.resolve('auto', cpu.best() or 'portable')})"
        assert "not torch.float64" in layer.why(dtype=torch.float64)
    monkeypatch.setattr(cpu, "best", lambda: None)
    reasons = layer.why()
    assert reasons.startswith("plain torch: ") and "C++ compiler" in reasons and "runs on CUDA" in reasons
    cuda = torch.device("cuda")
    monkeypatch.setattr(triton, "find_spec", lambda _: True)
    assert layer.why(cuda) == "Triton"
    assert "not torch.float64" in layer.why(cuda, torch.float64)
    monkeypatch.setattr(triton, "find_spec", lambda _: None)
    assert "Triton is not installed" in layer.why(cuda)


@pytest.mark.skipif(cpu.best() in (None, "portable"), reason="no C++ kernel with vectors")
def test_arithmetic_is_chosen_by_name() -> None:
    model, x = nn.Sequential(made(), nn.Linear(40, 2)), torch.randn(4, 96)
    results = []
    for arithmetic in ("exact", "a16", "a8", "auto"):
        set_arithmetic(model, arithmetic)  # type: ignore[arg-type]
        results.append(model[0](x))
    assert torch.equal(results[1], results[3])
    errors = [float((y.double() - expected(x)).norm()) for y in results]
    assert errors[0] < errors[1] < errors[2]
    with pytest.raises(SettingError, match="a9"):
        set_arithmetic(model, "a9")  # type: ignore[arg-type]
    assert list(quantized_linears(model)) == ["0"]


def test_a_head_is_rounded_on_request() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(96, 50)

        def get_output_embeddings(self) -> Any:
            return self.lm_head

    model, x = Model(), torch.randn(5, 96)
    with torch.no_grad():
        before = model.lm_head(x)
        quantize_head(model, 8)
        assert isinstance(model.lm_head, QuantizedLinear)
        after = model.lm_head(x)
        assert 1e-4 < (after - before).norm() / before.norm() < 1e-2
    with pytest.raises(SettingError, match="no dense output head"):
        quantize_head(model, 8)
    with pytest.raises(SettingError, match="no dense output head"):
        quantize_head(nn.Linear(2, 2), 8)
