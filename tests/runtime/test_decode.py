"""Tokens decoded in one call of C++ against transformers' own forward of the same packed model."""

import copy
import ctypes
import re
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from nearplane.checkpoint.packed import settle
from nearplane.core.errors import SettingError
from nearplane.core.grid import Grid, by_column, encode, fit_groups
from nearplane.runtime import cpu, decode, fused, growing
from nearplane.runtime.layout import tile
from nearplane.runtime.linear import QuantizedLinear, quantize_head, set_arithmetic

pytestmark = pytest.mark.skipif(cpu.best() is None, reason="no C++ kernel was built (no compiler)")
GRID = Grid(bits=4, group_size=32, sym=False, fit="minmax", scale_dtype="float16")


def packed(kind: str = "llama", arithmetic: Any = "exact", head_bits: int | None = None, **settings: Any) -> Any:
    """A random model whose blocks' linears are packed, as ``load`` leaves it."""
    return pack(tiny.build(kind, **settings), arithmetic, head_bits)


def pack(model: Any, arithmetic: Any = "exact", head_bits: int | None = None) -> Any:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            weight = module.weight.detach().float()
            scale, zero = fit_groups(weight, GRID)
            s, z = (by_column(part, GRID, weight.shape[1]) for part in (scale, zero))
            codes = encode(weight, s, z, GRID).to(torch.uint8)
            tiles = tile(codes, scale.half(), zero.to(torch.uint8), 4, 32)
            model.set_submodule(name, QuantizedLinear(tiles, module.bias))
    if head_bits is not None:
        quantize_head(model, head_bits)
    settle(model, arithmetic)
    return model.eval()


def front(model: Any) -> Any:
    """What stands before the model's forward."""
    found = fused._of(model)
    assert found is not None
    return found


def decoded(model: Any, ids: Tensor, prompt: int, way: Any = "auto", **more: Any) -> Tensor:
    """Logits of the tokens behind a prompt, decoded one by one."""
    fused.set_decode(model, way)
    with torch.inference_mode():
        out, logits = model(input_ids=ids[:, :prompt], use_cache=True), []
        for i in range(prompt, ids.shape[1]):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True, **more)
            logits.append(out.logits[0, -1].float())
    fused.set_decode(model, "auto")
    return torch.stack(logits)


def error(model: Any, ids: Tensor, prompt: int = 3) -> float:
    """Largest relative error of a token's logits; all tokens behind the prompt must have been decoded by C++."""
    before = front(model).tokens
    got = decoded(model, ids, prompt)
    assert front(model).tokens == before + ids.shape[1] - prompt, front(model).reason
    wanted = decoded(model, ids, prompt, "plain")
    return float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


STANDARD: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "heads of their own": ("llama", {"num_key_value_heads": 4}),
    "one head of keys": ("llama", {"num_key_value_heads": 1}),
    "heads of 20": ("llama", {"head_dim": 20}),
    "heads of 6": ("llama", {"head_dim": 6}),
    "heads of 80": ("llama", {"head_dim": 80}),
    "odd widths": ("llama", {"hidden_size": 72, "intermediate_size": 100, "vocab_size": 131}),
    "linear rotation": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama3 rotation": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16, "rope_theta": 1e4,
            }
        },
    ),
    "yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window of 8": ("mistral", {"sliding_window": 8}),
    "mistral, window of 2": ("mistral", {"sliding_window": 2}),
    "qwen2": ("qwen2", {}),
    "qwen2, one block with a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_multiplier": 0.2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STANDARD)
def test_logits_of_standard_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a prompt shorter and longer than the window, and memory that grows several times."""
    monkeypatch.setattr(growing, "SPARE", 3)
    kind, settings = STANDARD[name]
    model, ids = packed(kind, **settings), tiny.tokens(1, 40, seed=3)
    assert fused.why(model) == "fused decode"
    assert error(model, ids) < 1e-4 and error(model, ids, 17) < 1e-4


OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gelu": ("llama", {"hidden_act": "gelu"}, "not SiLU"),
    "rotation by length": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rotary embedding is of type dynamic",
    ),
    "window of 1": ("mistral", {"sliding_window": 1}, "its window is of 1"),
    "gemma": ("gemma", {}, "not SiLU"),
    "gemma, its function SiLU": ("gemma", {"hidden_activation": "silu", "hidden_act": "silu"}, "in the embedding's place"),
    "gemma2": ("gemma2", {}, "other modules"),
    "olmo2": ("olmo2", {}, "other modules"),
    "phi3": ("phi3", {}, "other modules"),
    "starcoder2": ("starcoder2", {}, "other modules"),
    "cohere": ("cohere", {}, "other modules"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_decode_as_before_and_say_why(name: str) -> None:
    kind, settings, reason = OTHERS[name]
    model, ids = packed(kind, **settings), tiny.tokens(1, 12, seed=3)
    assert re.search(f"^plain decode: .*({reason})", fused.why(model)), fused.why(model)
    assert torch.equal(decoded(model, ids, 3), decoded(model, ids, 3, "plain"))
    assert front(model).tokens == 0


def test_a_model_that_looks_standard_and_is_not_is_found_by_its_outputs() -> None:
    """A norm of the same name and weight that does something else, and attention that does."""
    ids, negative = tiny.tokens(1, 8, seed=3), lambda found: (-found[0], *found[1:])
    for place, change in (("layers.1.input_layernorm", torch.tanh), ("layers.0.self_attn", negative)):
        model = packed()
        replace_forward(model.model.get_submodule(place), change)
        assert "its hidden states differ by" in fused.why(model)
        assert torch.equal(decoded(model, ids, 3), decoded(model, ids, 3, "plain"))


def replace_forward(module: nn.Module, change: Any) -> None:
    """Make a module one of another class, whose outputs are changed."""
    kind: Any = type(module)
    module.__class__ = type("Other", (kind,), {"forward": lambda self, *a, **k: change(kind.forward(self, *a, **k))})


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_small_dtypes(dtype: torch.dtype, bound: float) -> None:
    """The plain path rounds hidden states between all modules, the fused one keys, values and logits alone: closer to float32."""
    ids = tiny.tokens(1, 20, seed=3)
    for settings in ({}, {"attention_bias": True, "tie_word_embeddings": False}):
        exact = pack(tiny.build("llama", **settings).to(dtype).float())
        model = pack(tiny.build("llama", **settings).to(dtype))
        got, plain, wanted = decoded(model, ids, 3), decoded(model, ids, 3, "plain"), decoded(exact, ids, 3, "plain")
        assert front(model).tokens == 17
        errors = [float(((part - wanted).norm(dim=-1) / wanted.norm(dim=-1)).mean()) for part in (got, plain)]
        assert errors[0] < bound and errors[0] < errors[1]
        with torch.no_grad():
            out = model(input_ids=ids[:, :3], use_cache=True)
            assert model(input_ids=ids[:, 3:4], past_key_values=out.past_key_values).logits.dtype == dtype


def test_heads_that_are_packed_and_linears_that_are_not() -> None:
    ids = tiny.tokens(1, 12, seed=3)
    model = packed(head_bits=8)
    assert isinstance(model.lm_head, QuantizedLinear) and error(model, ids) < 1e-4
    model = tiny.build("llama", attention_bias=True)
    settle(model, "exact")  # nothing packed at all
    assert error(model, ids) < 1e-4
    model = packed()
    model.set_submodule("model.layers.1.mlp.up_proj", nn.Linear(64, 96))
    assert error(model, ids) < 1e-4


@pytest.mark.parametrize(("arithmetic", "bound"), [("exact", 1e-4), ("a16", 1e-3), ("a8", 5e-2)])
def test_every_arithmetic(arithmetic: Any, bound: float) -> None:
    """And a change of it is followed."""
    model, ids = packed(arithmetic=arithmetic), tiny.tokens(1, 20, seed=3)
    assert error(model, ids) < bound
    first = decoded(model, ids, 3)
    set_arithmetic(model, "exact")
    assert error(model, ids) < 1e-4
    assert torch.equal(first, decoded(model, ids, 3)) == (arithmetic == "exact")


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.library(isa) is None:
        pytest.skip(f"this machine has no {isa}, or the compiler did not know it")
    monkeypatch.setattr(cpu, "best", lambda: isa)
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        model = pack(tiny.build("llama", head_dim=20, attention_bias=True).to(kind))
        assert error(model, tiny.tokens(1, 20, seed=3)) < {torch.float32: 1e-4, torch.float16: 1e-2}.get(kind, 6e-2)


LARGE = {
    "hidden_size": 256,
    "intermediate_size": 2100,
    "vocab_size": 20001,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
SHARED_OUT: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "odd rows": ("llama", torch.float32, {"vocab_size": 20003, "intermediate_size": 2107}),
    "heads of 20, three to a head of keys": (
        "llama",
        torch.bfloat16,
        {
            "hidden_size": 288,
            "head_dim": 20,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "one head of keys": ("mistral", torch.float16, {"num_key_value_heads": 1, "sliding_window": 700}),
    "norms of heads": ("qwen3", torch.float32, {"num_key_value_heads": 2}),
}


@pytest.mark.parametrize("name", SHARED_OUT)
@pytest.mark.parametrize("arithmetic", ["a16", "a8", "exact"])
def test_threads_agree_to_the_bit(name: str, arithmetic: Any) -> None:
    """With work large enough that other threads take part, and a number of them that changes between calls."""
    kind, dtype, sizes = SHARED_OUT[name]
    model = pack(tiny.build(kind, **{**LARGE, **sizes}).to(dtype), arithmetic)
    plain = nn.Linear(model.config.hidden_size, model.model.layers[1].self_attn.k_proj.out_features)
    model.model.layers[1].self_attn.k_proj = plain.to(dtype)
    ids, before = tiny.tokens(1, 820, seed=3), torch.get_num_threads()
    library = cpu.library(cpu.best() or "portable")
    assert library is not None
    library.nearplane_helped.restype = ctypes.c_int64
    try:
        torch.set_num_threads(1)
        with torch.no_grad():
            filled = model(input_ids=ids[:, :800], use_cache=True).past_key_values
        found, tokens = list[tuple[Tensor, ...]](), 0
        for threads in (1, 2, 3, 1, 2):
            torch.set_num_threads(threads)
            for _ in range(100):  # a busy machine may not run a helper at once
                cache, first = copy.deepcopy(filled), library.nearplane_helped()
                with torch.no_grad():
                    logits = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(800, 820)]
                found.append((torch.cat(logits), cache.layers[0].keys, cache.layers[1].values))
                tokens += 20
                if threads == 1 or library.nearplane_helped() > first:
                    break
            assert (library.nearplane_helped() > first) == (threads > 1)
    finally:
        torch.set_num_threads(before)
    assert front(model).tokens == tokens
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_the_structs_are_the_librarys() -> None:
    """Sizes as in C."""
    assert ctypes.sizeof(decode._Matrix) == 3 * 8 + 2 * 8 + 3 * 4 + 4
    assert ctypes.sizeof(decode._Norm) == 16
    assert ctypes.sizeof(decode._Block) == 7 * 56 + 4 * 16 + 16
    assert ctypes.sizeof(decode._Decoder) == 8 + 2 * 56 + 16 + 7 * 8 + 5 * 4 + 4
    assert ctypes.sizeof(growing.Memory) == 24


def test_words_for_decode() -> None:
    with pytest.raises(SettingError, match="decode must be auto or plain; got 'fast'"):
        fused.set_decode(packed(), "fast")  # type: ignore[arg-type]
    model = packed()
    fused.set_decode(model, "plain")
    assert fused.why(model) == "plain decode: asked for"
    assert "not packed" in fused.why(tiny.build("llama"))


def test_what_the_head_does_is_compared_too() -> None:
    model = packed()
    model.__class__ = type("Other", (type(model),), {"forward": softened})
    fused.fuse(model)
    assert "its logits differ by" in fused.why(model) and "from Other's own" in fused.why(model)


def softened(self: Any, *args: Any, **kwargs: Any) -> Any:
    out = super(type(self), self).forward(*args, **kwargs)
    out.logits = torch.tanh(out.logits)
    return out


def test_small_dtypes_are_compared_in_float32() -> None:
    """A wrong epsilon is far below what bfloat16 rounds."""
    model = pack(tiny.build("llama").bfloat16())
    assert fused.why(model) == "fused decode"
    for norm in [module for name, module in model.model.named_modules() if name.endswith("norm")]:
        replace_forward(norm, lambda found: found * 1.01)
    front(model).decoder = None
    assert "its hidden states differ by 0.0" in fused.why(model)
