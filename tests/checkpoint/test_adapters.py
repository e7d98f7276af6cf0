"""Adapters are trained beside packed weights: gradients are those of the dense model, and a packed weight has no values."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional

import nearplane
from nearplane import RTN, NearplaneError
from nearplane.core.activations import TokenGrid
from nearplane.runtime.linear import QuantizedLinear, quantized_linears, rounded

IDS = tiny.tokens(2, 12)


class Adapter(nn.Module):
    """What peft's LoRA makes of a linear, in a few lines: it asks the base layer for its sizes, device and dtype."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        assert isinstance(base, nn.Linear)
        self.base = base
        like: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        generator = torch.Generator().manual_seed(base.in_features)
        self.a = nn.Parameter(torch.randn(4, base.in_features, generator=generator).to(**like) / 8)
        self.b = nn.Parameter(torch.randn(base.out_features, 4, generator=generator).to(**like) / 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + x @ self.a.T @ self.b.T
        return result


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    tiny.save(tiny.build("llama", attention_bias=True, num_hidden_layers=3).bfloat16(), folder / "model")
    nearplane.quantize(folder / "model", folder / "out", method=RTN(), bits=4, group_size=16, progress=False)
    return folder / "out"


def adapted(folder: Path, packed: bool, **settings: Any) -> nn.Module:
    model = nearplane.load(folder, packed=packed, arithmetic="exact", **settings).requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.endswith(("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")):
            model.set_submodule(name, Adapter(module))  # type: ignore[arg-type]
    return model.train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_of_adapters_are_those_beside_dense_weights(out: Path) -> None:
    """In earlier layers, too: they pass through every packed linear behind the adapter."""
    dense, packed = (gradients(adapted(out, way)) for way in (False, True))
    assert len(packed) == 4 and packed.keys() == dense.keys()
    for name, wanted in dense.items():
        assert packed[name].dtype == torch.float32 and wanted.norm() > 0
        assert (packed[name] - wanted).norm() < 1e-4 * wanted.norm(), name


def test_training_lowers_the_loss(out: Path) -> None:
    model = adapted(out, True)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(learned, 1e-2), list[float]()
    for _ in range(40):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_bias_is_trained_where_its_gradient_is_asked_for(out: Path) -> None:
    found = []
    for packed in (False, True):
        model = nearplane.load(out, packed=packed, arithmetic="exact").requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("proj.bias"))
        found.append(gradients(model))
    assert len(found[1]) == 12 and found[0].keys() == found[1].keys()
    for name, wanted in found[0].items():
        assert (found[1][name] - wanted).norm() < 1e-4 * wanted.norm() + 1e-6, name


def test_gradients_pass_rounded_activations(tmp_path: Path) -> None:
    """Straight through: the rounding has a gradient of zero, with which nothing before it would learn."""
    tiny.save(tiny.build("llama"), tmp_path / "model")
    settings: dict[str, Any] = {"method": RTN(), "bits": 8, "group_size": -1, "act_bits": 8, "progress": False}
    nearplane.quantize(tmp_path / "model", tmp_path / "out", **settings)
    dense, packed = (gradients(adapted(tmp_path / "out", way)) for way in (False, True))
    original = gradients(adapted(tmp_path / "model", False))
    for name, wanted in original.items():
        assert functional.cosine_similarity(packed[name].flatten(), wanted.flatten(), 0) > 0.98, name
        assert (packed[name] - dense[name]).norm() < 1e-3 * wanted.norm()
    x = torch.randn(3, 8, requires_grad=True)
    rounded(x, TokenGrid(4)).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones(3, 8))
    assert torch.equal(rounded(x, TokenGrid(4)), rounded(x.detach(), TokenGrid(4)))


def test_a_packed_weight_says_its_shape_and_gives_no_values(out: Path) -> None:
    """Merging, decomposing or casting it would go wrong in silence."""
    model = nearplane.load(out)
    linear = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(linear, QuantizedLinear | nn.Linear)
    weight: Any = linear.weight
    assert tuple(weight.shape) == (96, 64) == tuple(weight.size()) and weight.ndim == 2 and weight.numel() == 96 * 64
    assert weight.dtype == torch.float32 and weight.device == torch.device("cpu") and weight.is_floating_point()
    assert (
        nearplane.load(out, dtype="bfloat16").get_submodule("model.layers.0.mlp.up_proj").weight.dtype == torch.bfloat16
    )
    assert linear.half().weight.dtype == torch.float16  # type: ignore[union-attr]
    delta = torch.ones(96, 64)

    def merge() -> None:
        weight.data += delta

    for use in (
        merge, lambda: weight + delta, weight.clone, weight.float, weight.norm, lambda: weight.T,
        lambda: torch.linalg.svd(weight), lambda: functional.linear(torch.ones(1, 64), weight), lambda: weight.copy_(delta),
        lambda: weight[0], weight.tolist, lambda: weight.to(torch.float16), lambda: copy.deepcopy(weight),
    ):  # fmt: skip
        with pytest.raises(NearplaneError, match=r"packed weight gives no values .* packed=False"):
            use()


def test_peft(out: Path, tmp_path: Path) -> None:
    """The library itself, where it is installed."""
    peft = pytest.importorskip("peft")

    def made(packed: bool, **more: Any) -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(
            **{"target_modules": ["q_proj", "down_proj"], "r": 4, "init_lora_weights": "gaussian"} | more
        )
        return peft.get_peft_model(nearplane.load(out, packed=packed, arithmetic="exact"), config).train()

    dense, packed = gradients(made(False)), gradients(made(True))
    assert len(packed) == 12 and packed.keys() == dense.keys()
    for name, wanted in dense.items():
        assert (packed[name] - wanted).norm() <= 1e-4 * wanted.norm(), name
    model = made(True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    wanted = model.eval()(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(out)
    again = peft.PeftModel.from_pretrained(nearplane.load(out, arithmetic="exact"), tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=IDS).logits, wanted)
    dora, pissa = {"use_dora": True}, {"init_lora_weights": "pissa"}
    for wrong in (again.merge_and_unload, partial(made, True, **dora), partial(made, True, **pissa)):
        with pytest.raises(NearplaneError, match="packed=False"):
            wrong()
    merged = peft.PeftModel.from_pretrained(nearplane.load(out, packed=False), tmp_path / "adapter").merge_and_unload()
    assert (merged(input_ids=IDS).logits - wanted).norm() < 1e-4 * wanted.norm()
    assert len(quantized_linears(again.unload())) == 21
