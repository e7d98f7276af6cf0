"""FP8 and FP4 weights become the numbers that they stand for, bit for bit, and nothing else is guessed."""

import json
from pathlib import Path
from typing import Any

import coded
import pytest
import safetensors.torch
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nearplane.core.errors import NearplaneError
from nearplane.formats.read import Checkpoint, open_checkpoint
from nearplane.formats.small_floats import DenseStore
from nearplane.formats.store import Shard

Tensors = dict[str, Tensor]
W = "m.weight"
FP8, E8M0 = coded.FP8_CONFIG, getattr(torch, "float8_e8m0fnu", None)
UNNAMED = {"quant_method": "fp8", "weight_block_size": None}


def floats(layout: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8, "symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}, "ignore": []}


def opened(folder: Path, tensors: Tensors, how: Any, /, **config: Any) -> Checkpoint:
    safetensors.torch.save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors"
    )
    stated = {} if how is None else {"quantization_config": how}
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "dtype": "bfloat16", **config, **stated}))
    return open_checkpoint(folder)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) / 8


def float8(value: Tensor, scale: Tensor, dtype: torch.dtype = coded.FP8) -> Tensor:
    return (value / scale).clamp(-400, 400).to(dtype)


def e5m2(name: str, weight: Tensor) -> Tensors:
    codes, scale = float8(weight, torch.tensor(0.01), torch.float8_e5m2), torch.tensor([[0.01]])
    return {name: codes, f"{name}_scale_inv": scale, "dense": codes.float() * 0.01}


def exponents(name: str, weight: Tensor) -> Tensors:
    """MXFP8: an exponent for 32 inputs, a byte."""
    power = torch.floor(torch.log2(weight.unflatten(1, (-1, 32)).abs().amax(-1))) - 8
    wide = (2.0**power).repeat_interleave(32, 1)
    codes = float8(weight, wide)
    return {name: codes, f"{name}_scale": (power + 127).to(torch.uint8), "dense": codes.float() * wide}


def groups_of_96(name: str, weight: Tensor) -> Tensors:
    """Two groups, of which 128 would also make two."""
    scale = weight.unflatten(1, (-1, 96)).abs().amax(-1) / 448
    wide = scale.repeat_interleave(96, 1)
    return {name: float8(weight, wide), f"{name}_scale": scale, "dense": float8(weight, wide).float() * wide}


def modelopt(name: str, weight: Tensor) -> Tensors:
    """NVFP4 as ModelOpt stores it: the scale of the scales multiplies."""
    found = coded.nvfp4(name, weight)
    whole = 1 / found["m.weight_global_scale"][0]
    scale = found["m.weight_scale"].float() * whole
    values = coded.LEVELS[torch.stack([found["m.weight_packed"] & 15, found["m.weight_packed"] >> 4], -1).long()]
    dense = values.flatten(1) * scale.repeat_interleave(16, 1)
    return {
        name: found["m.weight_packed"], f"{name}_scale": found["m.weight_scale"], f"{name}_scale_2": whole,
        "m.input_scale": torch.tensor(0.1), "dense": dense,
    }  # fmt: skip


CASES: dict[str, tuple[tuple[int, ...], Any, dict[str, Any]]] = {
    "blocks of 128": ((256, 384), coded.by_blocks(), FP8),
    "a block does not divide 192": ((192, 320), coded.by_blocks(), FP8),
    "a block does not divide 576 and 40": ((576, 40), coded.by_blocks(), FP8),
    "no size named": ((192, 130), coded.by_blocks(), {"quant_method": "fp8"}),
    "other blocks": ((96, 200), coded.by_blocks(64, 32), {**FP8, "weight_block_size": [64, 32]}),
    "suffix weight_scale": ((192, 130), coded.by_blocks(suffix="_scale"), FP8),
    "e5m2": ((40, 30), e5m2, UNNAMED),
    "rows": ((40, 30), coded.by_rows, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "rows of compressed-tensors": ((40, 30), coded.by_rows, floats("float-quantized", strategy="channel")),
    "a tensor": ((40, 30), coded.by_tensor, floats("naive-quantized", strategy="tensor")),
    "a tensor of AutoFP8": ((40, 30), coded.by_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
    "a tensor of ModelOpt": ((40, 30), coded.by_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "blocks of compressed-tensors": (
        (192, 320), coded.by_blocks(suffix="_scale"),
        floats("float-quantized", strategy="block", block_structure=[128, 128]),
    ),
    "groups of compressed-tensors": (
        (40, 192), groups_of_96, floats("float-quantized", strategy="group", group_size=96),
    ),
    "mxfp8": ((40, 96), exponents, floats("mxfp8-quantized", strategy="group", group_size=32, scale_dtype="torch.uint8")),
    "nvfp4": ((40, 96), coded.nvfp4, floats("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16)),
    "nvfp4 of ModelOpt": ((40, 96), modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "experts in one tensor": ((3, 192, 130), coded.by_blocks(), FP8),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_they_stand_for(case: str, tmp_path: Path) -> None:
    """The dense weight of a plain loop, without rounding; other tensors as they are; scales are gone."""
    shape, code, quantization = CASES[case]
    tensors = code(W, drawn(*shape))
    dense = tensors.pop("dense")
    store = opened(tmp_path, {**tensors, "norm.weight": torch.ones(3)}, quantization).store
    assert store.names == {W, "norm.weight"}
    assert store.shape(W) == shape and store.dtype(W) == torch.bfloat16 and store.get(W).dtype == torch.float32
    assert torch.equal(store.get(W), dense)
    assert torch.equal(store.rows(W, 1, 2), dense[1:3])
    assert torch.equal(store.get("norm.weight"), torch.ones(3)) and store.total == sum(
        value.nbytes for value in (*tensors.values(), torch.ones(3))
    )


def test_blocks_read_in_slices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("nearplane.formats.small_floats.AT_ONCE", 1000)
    tensors = coded.by_blocks()(W, drawn(192, 320))
    dense = tensors.pop("dense")
    store = opened(tmp_path, tensors, FP8).store
    assert torch.equal(store.get(W), dense) and torch.equal(store.rows(W, 100, 60), dense[100:160])


def test_gate_and_up_in_one_tensor_have_blocks_of_their_own(tmp_path: Path) -> None:
    """Of 192 rows each: two blocks and two, where the 384 rows would make three."""
    halves = [coded.in_blocks(part, 128, 128) for part in drawn(3, 384, 130).chunk(2, 1)]
    codes, scale, dense = (torch.cat(parts, 1) for parts in zip(*halves, strict=True))
    name = "experts.gate_up_proj"
    store = opened(tmp_path, {name: codes, f"{name}_scale_inv": scale}, FP8).store
    assert scale.shape == (3, 4, 2)
    assert torch.equal(store.get(name), dense) and torch.equal(store.rows(name, 2, 1), dense[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_what_transformers_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    """In sizes that a block divides; of 192 rows transformers 5.23 makes two blocks of 96."""
    tensors = coded.by_blocks()(W, drawn(256, 384))
    read = Fp8Dequantize(None)._dequantize_one(tensors[W], tensors["m.weight_scale_inv"], output_dtype=dtype)
    tensors.pop("dense")
    assert torch.equal(opened(tmp_path, tensors, FP8).store.get(W).to(dtype), read)


@pytest.mark.skipif(E8M0 is None, reason="this torch has no float8_e8m0fnu")
@pytest.mark.parametrize("name", ["m.scale", "m.weight_scale_inv"])
def test_packed_experts_of_fp8_are_what_transformers_reads(name: str, tmp_path: Path) -> None:
    """expert_dtype fp4: two numbers in an int8, an exponent of dtype E8M0 for 32 inputs."""
    codes = torch.randint(-128, 128, (40, 48), dtype=torch.int8)
    scale = torch.randint(120, 130, (40, 3), dtype=torch.uint8).view(E8M0)
    read = Fp8Dequantize(None)._dequantize_one(codes, scale, output_dtype=torch.float32)
    store = opened(tmp_path, {W: codes, name: scale}, {**FP8, "expert_dtype": "fp4"}).store
    assert store.names == {W} and torch.equal(store.get(W), read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_is_what_transformers_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    name = "experts.gate_up_proj"
    blocks = torch.randint(0, 256, (3, 40, 4, 16), dtype=torch.uint8)
    scales = torch.randint(100, 130, (3, 40, 4), dtype=torch.uint8)
    read = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    store = opened(tmp_path, {f"{name}_blocks": blocks, f"{name}_scales": scales}, {"quant_method": "mxfp4"}).store
    assert store.names == {name} and store.shape(name) == (3, 128, 40)
    assert torch.equal(store.get(name).to(dtype), read) and torch.equal(store.rows(name, 1, 2).to(dtype), read[1:])


def test_of_a_fused_tensor_one_expert_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and scales of the others stay on disk."""
    blocks = torch.randint(0, 256, (3, 40, 4, 16), dtype=torch.uint8)
    stored = {"x_blocks": blocks, "x_scales": torch.full((3, 40, 4), 120, dtype=torch.uint8)}
    store = opened(tmp_path, stored, {"quant_method": "mxfp4"}).store
    right, read = store.get("x")[1:2], [0]
    get = Shard._get

    def counted(self: Shard, name: str, part: Any) -> Tensor:
        read[0] += part.end - part.start
        return get(self, name, part)

    monkeypatch.setattr(Shard, "_get", counted)
    assert torch.equal(store.rows("x", 1, 1), right) and read[0] == 40 * 4 * 17


SCHEMES: dict[str, dict[str, Any]] = {
    "float-quantized": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "nvfp4-pack-quantized": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "mxfp4-pack-quantized": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "mxfp8-quantized": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
}  # fmt: skip


@pytest.mark.parametrize("layout", SCHEMES)
def test_weights_that_compressed_tensors_wrote(layout: str, tmp_path: Path) -> None:
    """Compressed by the package; in bfloat16, to which it rounds, the numbers that it reads back."""
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": SCHEMES[layout]})
    weight, group = drawn(40, 96), SCHEMES[layout].get("group_size", 96)
    scale = weight.unflatten(1, (-1, group)).abs().amax(-1) / (448 if "8" in layout or group == 96 else 6)
    state = {"weight": weight.bfloat16(), "weight_scale": scale}
    if "mx" in layout:
        state["weight_scale"] = (2.0 ** torch.ceil(torch.log2(scale))).bfloat16()
    elif group == 96:
        state["weight_scale"] = scale.bfloat16()
    else:
        state["weight_global_scale"] = 448 / scale.max()[None]
        state["weight_scale"] = (scale * state["weight_global_scale"]).to(torch.float8_e4m3fn)
        state["weight_scale"] = state["weight_scale"].float()
    package = BaseCompressor.get_value_from_registry(layout)
    compressed = package.compress(state, scheme)
    read = package.decompress(compressed, scheme)["weight"]
    stored = {f"m.{name}": value for name, value in compressed.items() if value is not None}
    found = opened(tmp_path, stored, floats(layout, **SCHEMES[layout])).store.get(W)
    assert float((found - weight).norm() / weight.norm()) < 0.15
    if layout.startswith("nv"):  # the package rounds each of three products to bfloat16
        torch.testing.assert_close(found, read.float(), rtol=2**-7, atol=0)
    else:
        assert torch.equal(found.bfloat16(), read.bfloat16())


def test_zero_points_that_are_zero_and_scales_of_inputs_are_dropped(tmp_path: Path) -> None:
    more = {"m.weight_zero_point": torch.zeros(1), "m.input_scale": torch.ones(1), "m.k_scale": torch.ones(())}
    more["experts.down_proj_activation_scale"] = torch.ones(3)
    kept = {"altup.correct_output_scale": torch.ones(3), "router.router_input_scale": torch.ones(1)}  # a model's own
    assert opened(tmp_path, {**blocks(), **more, **kept}, FP8).store.names == {W, *kept}


def blocks() -> Tensors:
    found = coded.by_blocks()(W, drawn(192, 320))
    found.pop("dense")
    return found


BAD: list[tuple[str, Any, Any]] = [
    (r"m\.weight is stored as float8_e4m3fn without its scale", {}, lambda t: t.pop("m.weight_scale_inv")),
    (r"scales m\.weight_scale_inv of shape \[3, 3\]", {}, lambda t: t.update({"m.weight_scale_inv": torch.ones(3, 3)})),
    (r"scales m\.weight_scale_inv of shape \[3, 2\]", {}, lambda t: t.update({"m.weight_scale_inv": torch.ones(3, 2)})),
    (r"do not fit m\.weight of shape \[192, 320\]", {"weight_block_size": [64, 128]}, lambda t: None),
    (r"names blocks of \[128\]", {"weight_block_size": [128]}, lambda t: None),
    (r"names blocks of \[0, 128\]", {"weight_block_size": [0, 128]}, lambda t: None),
    (r"tensor n\.weight_scale_inv .* does not explain", {}, lambda t: t.update({"n.weight_scale_inv": torch.ones(1)})),
    (r"tensor n\.qweight \(int32\) .* does not explain", {}, lambda t: t.update({"n.qweight": torch.ones(1).int()})),
    (r"tensor m\.weight .* \(gptq\) does not explain", {"quant_method": "gptq", "bits": 4}, lambda t: None),
    (
        r"tensor m\.weight_zero_point .* does not explain", {},
        lambda t: t.update({"m.weight_zero_point": torch.ones(1)}),
    ),
    ("sparse weights", {"sparsity_config": {"format": "sparse-24-bitmask"}}, lambda t: None),
    ("online transforms", {"transform_config": {"config_groups": {"u": {}}}}, lambda t: None),
    ("holds no quantized tensor; .* delete", {}, lambda t: (t.clear(), t.update({W: torch.ones(3, 3)}))),
    (r"tensor m\.weight_scale_inv", {}, lambda t: t.update({W: torch.ones(192, 320)})),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "settings", "change"), BAD)
def test_what_is_refused(sentence: str, settings: dict[str, Any], change: Any, tmp_path: Path) -> None:
    tensors = blocks()
    change(tensors)
    with pytest.raises(NearplaneError, match=sentence):
        opened(tmp_path, tensors, {**FP8, **settings})


def test_a_broken_weight_is_listed_beside_others(tmp_path: Path) -> None:
    """For verify: the reason by module, and everything else is opened."""
    tensors = blocks()
    found = {**tensors, "n.weight": tensors[W].clone(), "n.bias": torch.zeros(192)}
    with pytest.raises(NearplaneError, match=r"n\.weight is stored as"):
        opened(tmp_path, found, FP8)
    broken: dict[str, str] = {}
    checkpoint = open_checkpoint(tmp_path, broken)
    assert list(broken) == ["n"] and "without its scale" in broken["n"]
    assert isinstance(checkpoint.store, DenseStore) and checkpoint.dense == [W, "n.bias"]


def test_what_dense_weights_count_as(tmp_path: Path) -> None:
    """The dtype that config.json names, in a part of it too; else bfloat16."""
    assert opened(tmp_path, blocks(), FP8, dtype="float16").store.dtype(W) == torch.float16
    assert opened(tmp_path, blocks(), FP8, dtype=None).store.dtype(W) == torch.bfloat16
    part = {"text_config": {"torch_dtype": "float32"}}
    assert opened(tmp_path, blocks(), FP8, dtype=None, **part).store.dtype(W) == torch.float32
    assert opened(tmp_path, blocks(), None, text_config={"quantization_config": FP8}).original


def test_modelopt_states_its_quantization_beside(tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    tensors = coded.by_tensor(W, drawn(40, 30))
    dense = tensors.pop("dense")
    assert torch.equal(opened(tmp_path, tensors, None).store.get(W), dense)


SIGNS: list[tuple[str, Tensor]] = [
    ("m.weight", torch.ones(4, 4).to(torch.float8_e4m3fn)),
    ("m.weight", torch.ones(4, 4).to(torch.float8_e5m2)),
    ("embed.table", torch.ones(4, 4).to(torch.float8_e4m3fn)),
    ("m.weight_scale_inv", torch.ones(1, 1)),
    ("m.gate_up_proj_scale_inv", torch.ones(1, 1)),
    ("m.weight_scale", torch.ones(1)),
    ("m.weight_scale_2", torch.ones(1)),
    ("m.weight_scales", torch.ones(1)),  # EETQ
    ("m.qweight", torch.ones(4, 4, dtype=torch.int32)),
    ("m.qzeros", torch.ones(4, 4, dtype=torch.int32)),
    ("m.weight", torch.ones(4, 4, dtype=torch.int8)),
    ("m.weight", torch.ones(4, 4, dtype=torch.uint8)),
    ("m.weight", torch.ones(4, 4, dtype=torch.uint32)),  # MLX
    ("m.down_proj", torch.ones(4, 4, dtype=torch.int8)),
    ("m.SCB", torch.ones(4)),
    ("m.weight.absmax", torch.ones(4)),
    ("m.weight.nested_absmax", torch.ones(4)),
    ("m.weight.quant_map", torch.ones(16)),
    ("m.weight.quant_state.bitsandbytes__nf4", torch.ones(16, dtype=torch.uint8)),
    ("m.weight_packed", torch.ones(4, 4, dtype=torch.int32)),
    ("m.weight_zero_point", torch.ones(1)),
    ("m.W_q", torch.ones(4, 4, dtype=torch.uint8)),
    ("m.weight._data", torch.ones(4, 4, dtype=torch.int8)),
    ("m.weight._scale", torch.ones(4)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), SIGNS, ids=[f"{name} {value.dtype}" for name, value in SIGNS])
def test_tensors_that_show_a_quantized_weight_are_never_ignored(name: str, value: Tensor, tmp_path: Path) -> None:
    """Without a configuration: the first by its name."""
    with pytest.raises(NearplaneError, match=f"tensor {name} .*no quantization_config") as caught:
        opened(tmp_path, {"a.weight": torch.ones(2, 2), name: value}, None)
    assert "give the original model" in str(caught.value)


def test_pairs_that_show_a_quantized_weight(tmp_path: Path) -> None:
    for first, second in (("x_blocks", "x_scales"), ("m.codes", "m.codebooks"), ("m.dense_weights", "m.row_offsets")):
        one = {first: torch.ones(2, dtype=torch.uint8)}
        opened(tmp_path, one, None)
        with pytest.raises(NearplaneError, match=f"tensor {first} "):
            opened(tmp_path, {**one, second: torch.ones(2, dtype=torch.uint8)}, None)


def test_integers_that_are_no_weights_are_let_be(tmp_path: Path) -> None:
    """Masks, positions, counts and biases of old models; scales of norms."""
    plain = {
        "h.0.attn.bias": torch.ones(4, 4, dtype=torch.uint8), "embeddings.position_ids": torch.arange(4),
        "bn.num_batches_tracked": torch.tensor(3), "norm.scale": torch.ones(3), "logit_scale": torch.ones(1),
        "mask": torch.ones(2, dtype=torch.bool), "vq.codebooks": torch.ones(3), "gate.e_score_correction_bias": torch.ones(3),
    }  # fmt: skip
    assert opened(tmp_path, plain, None).dense == sorted(plain)


def test_the_card_names_the_original(tmp_path: Path) -> None:
    config = {"quant_method": "hqq", "bits": 4}
    tensors = {"m.qweight": torch.ones(4, 4, dtype=torch.int32)}
    with pytest.raises(NearplaneError, match=r"with hqq; .*often the base_model of its card"):
        opened(tmp_path, tensors, config)
    for head in ("base_model: org/name", "license: mit\nbase_model:\n- org/name\ntags: []", 'base_model: "org/name"'):
        (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# base_model: none\n")
        with pytest.raises(NearplaneError, match="base_model of its card: org/name"):
            opened(tmp_path, tensors, config)


OTHERS: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "hqq": {"quant_method": "hqq"},
    "aqlm": {"quant_method": "aqlm"},
    "quanto": {"quant_method": "quanto"},
    "torchao": {"quant_method": "torchao"},
    "eetq": {"quant_method": "eetq"},
    "vptq": {"quant_method": "vptq"},
    "spqr": {"quant_method": "spqr"},
}


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_are_named(method: str, tmp_path: Path) -> None:
    with pytest.raises(NearplaneError, match=f"is quantized with {method}; .*original model.*or make it dense"):
        opened(tmp_path, {"m.weight": torch.ones(2, 2, dtype=torch.uint8)}, OTHERS[method])
