"""Checkpoints loaded packed: the model transformers would build, with nothing dense where codes are."""

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import nearplane
from nearplane import RTN, Grid, NearplaneError
from nearplane.core.errors import SettingError
from nearplane.evaluation.generation import generate
from nearplane.evaluation.speed import bench, token_bytes
from nearplane.models.source import load_tokenizer
from nearplane.runtime import cpu, reference
from nearplane.runtime.linear import QuantizedLinear, quantized_linears

IDS = tiny.tokens(2, 20, seed=5)


def written(folder: Path, kind: str = "llama", format: Any = "compressed-tensors", **grid: Any) -> Path:
    source = folder / "model"
    if not source.exists():
        tiny.save(tiny.build(kind), source)
    settings = Grid(**{"bits": 4, "group_size": 32, "sym": False} | grid)
    nearplane.quantize(source, folder / "out", method=RTN(), grid=settings, format=format, progress=False)
    return folder / "out"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("packed"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def same(packed: Any, dense: Any) -> bool:
    """Logits within what 16-bit activations cost."""
    found, wanted = logits(packed), logits(dense)
    return bool((found - wanted).norm() <= 1e-3 * wanted.norm())


GRIDS: list[dict[str, Any]] = [
    {"bits": 2}, {"bits": 3, "sym": True}, {"bits": 5}, {"bits": 6}, {"bits": 8, "sym": True}, {"bits": "ternary", "sym": True},
    {"bits": 4, "group_size": -1}, {"bits": 3, "group_size": 40}, {"bits": 4, "group_size": 16},
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_grid_of_compressed_tensors(grid: dict[str, Any], tmp_path: Path) -> None:
    out = written(tmp_path, **grid)
    packed = nearplane.load(out)
    assert len(quantized_linears(packed)) == 14
    assert same(packed, nearplane.load(out, packed=False))


@pytest.mark.parametrize(
    ("format", "bits", "sym"), [("gptq", 4, True), ("gptq", 8, True), ("gptq_v2", 2, False), ("gptq_v2", 3, False)]
)
def test_gptq(format: str, bits: int, sym: bool, tmp_path: Path) -> None:
    out = written(tmp_path, format=format, bits=bits, sym=sym)
    assert same(nearplane.load(out), nearplane.load(out, packed=False))


def test_gptq_with_groups_in_activation_order(tmp_path: Path) -> None:
    """As AutoGPTQ writes desc_act: columns of a group are not neighbours."""
    out = written(tmp_path, format="gptq_v2")
    generator = torch.Generator().manual_seed(0)
    for path in out.glob("*.safetensors"):
        state = load_file(path)
        for name in [name for name in state if name.endswith("g_idx")]:
            state[name] = state[name][torch.randperm(len(state[name]), generator=generator)]
        save_file(state, path, metadata={"format": "pt"})
    packed = nearplane.load(out)
    assert all(module.order.numel() for module in quantized_linears(packed).values())
    assert same(packed, nearplane.load(out, packed=False))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "phi", "gpt_neox", "cohere", "falcon", "gemma2", "mpt"])
def test_architectures(kind: str, tmp_path: Path) -> None:
    """Biases, Conv1D, fused qkv, tied and separate heads."""
    out = written(tmp_path, kind, "gptq_v2" if kind == "gpt2" else "compressed-tensors")
    packed, dense = nearplane.load(out), nearplane.load(out, packed=False)
    assert type(packed) is type(dense) and type(packed).__module__.startswith("transformers.")
    assert quantized_linears(packed)
    assert same(packed, dense)


def test_nothing_dense_is_left(checkpoint: Path) -> None:
    packed, dense = nearplane.load(checkpoint), nearplane.load(checkpoint, packed=False)
    names = set(quantized_linears(packed))
    states = [load_file(path) for path in checkpoint.glob("*.safetensors")]
    stored = sum(tensor.nbytes for state in states for name, tensor in state.items() if "weight_" in name)
    assert sum(module.tiles.nbytes for module in quantized_linears(packed).values()) <= 1.15 * stored
    kept = {name for name, _ in packed.named_parameters()}
    assert kept == {name for name, _ in dense.named_parameters() if name.removesuffix(".weight") not in names}


def test_a_packed_model_is_a_model(checkpoint: Path, tmp_path: Path) -> None:
    packed = nearplane.load(checkpoint)
    with pytest.raises(NearplaneError, match="copy the checkpoint's folder"):
        packed.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    assert not (tmp_path / "again").exists()
    twin = copy.deepcopy(packed)
    assert torch.equal(logits(twin), logits(packed))
    with pytest.raises(NearplaneError, match="copy the checkpoint's folder"):
        twin.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    for inner in (packed.model, pickle.loads(pickle.dumps(packed))):
        with pytest.raises(NearplaneError, match="copy the checkpoint's folder"):
            inner.save_pretrained(tmp_path / "again")  # type: ignore[operator,union-attr]
    torch.save(packed, tmp_path / "whole.pt")
    assert torch.equal(logits(torch.load(tmp_path / "whole.pt", weights_only=False)), logits(packed))
    fresh = nearplane.load(checkpoint)
    fresh.load_state_dict(packed.state_dict())
    assert torch.equal(logits(fresh), logits(packed))
    dense = nearplane.load(checkpoint, packed=False)
    dense.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    assert same(packed, nearplane.load(tmp_path / "dense"))


def test_dtype_is_that_of_everything_else(checkpoint: Path) -> None:
    packed = nearplane.load(checkpoint, dtype="bfloat16")
    assert {p.dtype for p in packed.parameters()} == {torch.bfloat16}
    dense = nearplane.load(checkpoint, packed=False)
    assert (logits(packed) - logits(dense)).norm() < 0.05 * logits(dense).norm()


def test_compiled(checkpoint: Path) -> None:
    packed = nearplane.load(checkpoint)
    compiled = torch.compile(packed, backend="aot_eager")
    assert torch.allclose(logits(compiled), logits(packed), atol=1e-4)
    found = compiled(input_ids=IDS, use_cache=False).logits  # gradients on, as they are by default
    assert torch.allclose(found, logits(packed), atol=1e-4)


@pytest.mark.skipif(cpu.best() is None, reason="no C++ kernel was built (no compiler)")
def test_the_kernel_runs_whether_gradients_are_on_or_not(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = nearplane.load(checkpoint)
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    monkeypatch.setattr(reference, "linear", None)  # any use of it fails
    assert not packed(input_ids=IDS, use_cache=False).logits.requires_grad


def test_a_rounded_head(checkpoint: Path) -> None:
    packed = nearplane.load(checkpoint, head_bits=8)
    assert isinstance(packed.get_output_embeddings(), QuantizedLinear)  # type: ignore[operator]
    plain = nearplane.load(checkpoint)
    assert 0 < (logits(packed) - logits(plain)).norm() < 0.02 * logits(plain).norm()
    assert token_bytes(packed) < token_bytes(plain)


def test_arithmetic_is_checked(checkpoint: Path) -> None:
    with pytest.raises(SettingError, match="a7"):
        nearplane.load(checkpoint, arithmetic="a7")  # type: ignore[arg-type]


def test_generation_is_what_transformers_generates(checkpoint: Path) -> None:
    packed, tokenizer = nearplane.load(checkpoint), load_tokenizer(checkpoint)
    pieces: list[str] = []
    result = generate(packed, tokenizer, "w5 w6 w7", max_new_tokens=8, write=pieces.append)
    ids = tokenizer("w5 w6 w7", return_tensors="pt").input_ids
    wanted = packed.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    assert result.text == "".join(pieces) == tokenizer.decode(wanted[0, 3:], skip_special_tokens=True)
    assert (result.prompt_tokens, result.new_tokens) == (3, wanted.shape[1] - 3)
    assert result.peak_bytes > 1e7 and "tokens/s" in result.summary()
    twice = [generate(packed, tokenizer, "w5", max_new_tokens=6, temperature=1.5, seed=s).text for s in (1, 1, 2)]
    assert twice[0] == twice[1] != twice[2]
    for wrong, sentence in (
        ({"max_new_tokens": 0}, "at least 1"), ({"temperature": -1.0}, "0 or from 0.01"), ({"chat": True}, "no chat template"),
        ({"max_new_tokens": 62}, "exceed the model's 64 positions"),
    ):  # fmt: skip
        with pytest.raises(SettingError, match=sentence):
            generate(packed, tokenizer, "w5 w6 w7", **wrong)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="no tokens"):
        generate(packed, tokenizer, "")


def test_chat_goes_through_the_template(checkpoint: Path) -> None:
    packed, tokenizer = nearplane.load(checkpoint), load_tokenizer(checkpoint)
    tokenizer.chat_template = "w9 {{ messages[0]['content'] }} w10"
    assert generate(packed, tokenizer, "w5", max_new_tokens=2, chat=True).prompt_tokens == 3


def test_bench_measures_what_it_says(checkpoint: Path) -> None:
    result = bench(checkpoint, prompt_tokens=8, new_tokens=4, rounds=1, threads=1)
    names = [row.name for row in result.rows]
    first = "packed plain" if cpu.best() is None else "packed a16"  # without a kernel there is one way only
    assert [name for name in names if name != "packed a8"] == [first, f"{first}, head8", "dense bf16", "dense fp32"]
    assert ("packed a8" in names) == (cpu.best() is not None)
    assert all(row.decode > 0 and row.prefill > 0 and 0 < row.head_share < 1 for row in result.rows)
    sizes = {row.name: row.token_bytes for row in result.rows}
    assert sizes["dense fp32"] == 2 * sizes["dense bf16"] > sizes[first] > sizes[f"{first}, head8"]
    dense = nearplane.load(checkpoint, packed=False)
    embedding = dense.get_input_embeddings().weight.nbytes  # type: ignore[operator,union-attr]
    assert sizes["dense fp32"] == sum(p.nbytes for p in dense.parameters()) - embedding
    assert result.threads == 1 and dataclasses.asdict(result) == result.as_dict()
    with pytest.raises(SettingError, match="at least 1"):
        bench(checkpoint, rounds=0)
    with pytest.raises(SettingError, match="not quantized"):
        bench(checkpoint.parent / "model")
