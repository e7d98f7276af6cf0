"""Products in float32 by the library that uses the whole vectors: only where they stay float32, only while it lasts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import nearplane
from nearplane.core import dense as products

CPU = torch.device("cpu")
SWITCH: Any = getattr(torch.backends.mkldnn, "matmul", None)
needs_switch = pytest.mark.skipif(not hasattr(SWITCH, "fp32_precision"), reason="this torch has no such setting")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    products.exact.cache_clear()
    yield
    products.exact.cache_clear()


@needs_switch
def test_products_stay_float32_on_this_processor() -> None:
    """Of shapes that a walk multiplies, also those that are not compared before: errors as small as MKL's."""
    with products.full_width(CPU):
        assert (SWITCH.fp32_precision == "bf16") == (products.halved() and products.exact())
        for shape in ((1, 64, 64), (17, 576, 192), (2048, 576, 576), (576, 2048, 576), (300, 3000, 7)):
            assert products._error(*shape) < products.MOST_ERROR


@needs_switch
def test_only_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "halved", lambda: True)
    monkeypatch.setattr(products, "_error", lambda *_: 1e-7)
    before = SWITCH.fp32_precision
    with pytest.raises(ValueError, match="inside"), products.full_width(CPU):
        assert before == "none" != SWITCH.fp32_precision
        with products.full_width(CPU):
            assert SWITCH.fp32_precision == "bf16"
        assert SWITCH.fp32_precision == "bf16"
        raise ValueError("inside")
    assert before == SWITCH.fp32_precision
    with products.full_width(torch.device("meta")):
        assert before == SWITCH.fp32_precision


@needs_switch
def test_products_that_lose_digits_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "halved", lambda: True)
    monkeypatch.setattr(products, "_error", lambda *_: 2e-3 if SWITCH.fp32_precision == "bf16" else 1e-7)
    with products.full_width(CPU):
        assert SWITCH.fp32_precision == "none"


@needs_switch
def test_a_setting_of_the_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "halved", lambda: True)
    monkeypatch.setattr(products, "_error", lambda *_: 1e-7)
    SWITCH.fp32_precision = "ieee"
    try:
        with products.full_width(CPU):
            assert SWITCH.fp32_precision == "ieee"
    finally:
        SWITCH.fp32_precision = "none"


def test_another_processor_or_an_older_torch_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for known, gains in (
        ({"cpu_name": "AMD EPYC", "avx512_f": True, "amx_tile": False}, True),
        ({"cpu_name": "AMD EPYC", "avx512_f": False}, False),
        ({"cpu_name": "AMD EPYC", "avx512_f": True, "amx_tile": True}, False),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True, "amx_tile": False}, False),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        assert products.halved() == (gains and torch.backends.mkl.is_available())
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not products.halved()
    monkeypatch.setattr(products, "_switch", lambda: None)
    products.bfloat16_is_fast.cache_clear()
    for isa, loops in (("avx2", "loops compiled for avx2"), (None, "loops by torch")):
        monkeypatch.setattr(products.compiled, "best", lambda isa=isa: isa)
        assert products.described() == f"float32 by torch's default library, coarse ones in float32, {loops}"
    products.bfloat16_is_fast.cache_clear()
    with products.full_width(CPU):
        assert torch.equal(torch.eye(2) @ torch.eye(2), torch.eye(2))


@needs_switch
def test_a_run_and_an_evaluation_ask_for_it_and_give_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(products, "halved", lambda: True)
    monkeypatch.setattr(products, "_error", lambda *_: 1e-7)
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda *a, **k: seen.append(SWITCH.fp32_precision) or linear(*a, **k)
    )
    model = tiny.with_text(tmp_path)
    text = tmp_path / "text.txt"
    report = nearplane.quantize(
        model, tmp_path / "out", dataset=text, nsamples=4, seqlen=16, group_size=32, check=False, progress=False
    )
    assert set(seen) == {"bf16"} and SWITCH.fp32_precision == "none"
    assert report.versions["products"].startswith("float32 by oneDNN")
    seen.clear()
    nearplane.evaluate(model, dataset=text, seqlen=16, windows=2)
    assert set(seen) == {"bf16"} and SWITCH.fp32_precision == "none"
