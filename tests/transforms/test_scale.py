"""Scaled channels: the search against a restatement with kept inputs, and the scaled model against the original's logits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from nearplane import Grid
from nearplane.core.moments import Moments
from nearplane.machine.ranks import ALONE
from nearplane.models.discover import discover
from nearplane.models.source import Source, open_source
from nearplane.run.scale import _folds
from nearplane.run.stream import stream
from nearplane.transforms.folds import Fold, Found
from nearplane.transforms.rotation import make_rotate
from nearplane.transforms.scaling import KEY, Scaled, factors_of, scaled_source, search, stored_exactly
from nearplane.transforms.view import ChangedSource

OUTSIDE = "no norm and no linear of its block makes it channel by channel"


# --- the search ---------------------------------------------------------------------------------------------------


def by_hand(w: torch.Tensor, x: torch.Tensor, bits: int, group: int) -> tuple[float, torch.Tensor, list[float]]:
    """AWQ's search with kept inputs: s = mean|x| ** alpha over the root of largest times least; min-max rounding."""
    size, found = x.abs().mean(0), []
    for i in range(21):
        s = size ** (i / 20)
        s = s / (s.max() * s.min()).sqrt()
        groups = (w * s).reshape(len(w), -1, group)
        low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        zero = torch.round(-low / scale)
        q = (torch.clamp(torch.round(groups / scale) + zero, 0, 2**bits - 1) - zero) * scale
        out = (x / s) @ q.reshape(w.shape).T
        found.append((float((out - x @ w.T).square().sum()), i / 20, s))
    best = min(found, key=lambda each: each[0])
    return best[1], best[2], [each[0] for each in found]


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4]), st.sampled_from([4, 8, 16]))
def test_the_search_is_awqs(seed: int, bits: int, group: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 16, generator=generator, dtype=torch.float64)
    x *= 10 ** torch.empty(16, dtype=torch.float64).uniform_(-1, 1, generator=generator)
    w = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    moments = Moments.zeros(16, magnitude=True, dtype=torch.float64)
    moments.add(x[:11])
    moments.add(x[11:])
    fold = Fold("norm", None, torch.arange(16), ("linear",))
    # Linears of one input count together.
    grid = Grid(bits=bits, group_size=group, sym=False, fit="minmax")
    found = search(fold, [(w[:3], grid), (w[3:], grid)], moments)
    alpha, s, errors = by_hand(w, x, bits, group)
    assert found.alpha == alpha
    torch.testing.assert_close(found.factors, s, rtol=2**-8, atol=0)
    assert torch.equal(found.factors, found.factors.bfloat16().double())
    assert found.share == pytest.approx(min(errors) / errors[0], rel=1e-4)


def test_channels_of_one_output_share_a_factor_and_silent_ones_keep_theirs() -> None:
    rows = torch.tensor([0, 1, 0, 1, 2])
    factors = factors_of(torch.tensor([1.0, 9.0, 3.0, 9.0, 0.0]), rows, 0.5)
    expected = torch.tensor([2.0, 9.0], dtype=torch.float64).sqrt() / 18**0.25
    torch.testing.assert_close(factors, torch.cat([expected, expected, torch.ones(1, dtype=torch.float64)]))
    assert torch.equal(factors_of(torch.zeros(3), torch.arange(3), 0.5), torch.ones(3, dtype=torch.float64))
    assert torch.equal(factors_of(torch.tensor([1.0, 7.0]), torch.arange(2), 0), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_magnitude_is_the_mean_of_sizes(weighted: bool) -> None:
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[4, 2] = torch.nan  # left out
    weights = torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if weighted else None
    parts = [Moments.zeros(5, magnitude=True, weighted=weighted, dtype=torch.float64) for _ in range(2)]
    for part, some in zip(parts, (slice(0, 12), slice(12, 30)), strict=True):
        part.add(x[some], weight=None if weights is None else weights[some])
    kept = [i for i in range(30) if i != 4]
    each = torch.ones(30, dtype=torch.float64) if weights is None else weights
    expected = (x[kept].abs() * each[kept, None]).sum(0) / each[kept].sum()
    merged = parts[0].merge(parts[1])
    assert merged.magnitude is not None and parts[0].magnitude is not None
    torch.testing.assert_close(merged.magnitude, expected)
    large = Moments(merged.H * 2.0**120, tokens=29, magnitude=merged.magnitude * 2.0**60)
    power = large.rescale()
    assert large.magnitude is not None and power % 2 == 0 and power < 0
    torch.testing.assert_close(large.magnitude, expected * 2.0 ** (60 + power // 2))


# --- folds --------------------------------------------------------------------------------------------------------


def perturbed(model: Any, seed: int = 0) -> Any:
    """A random model whose norms and biases are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def folded(source: Source, samples: Any) -> dict[str, Found]:
    """What is found in every block."""
    kinds: dict[Any, tuple[str, Found]] = {}
    blocks = stream(source, discover(source), samples)
    return {block.block.name: _folds(block, kinds, ALONE) for block in blocks}


def drawn(found: dict[str, Found], source: Source, seed: int = 0) -> list[Scaled]:
    """Random factors from 1/3 to 3 for all folds, alike for channels of one output."""
    generator, scaled = torch.Generator().manual_seed(seed), []
    for fold in (fold for each in found.values() for fold in each.folds):
        size = 3 ** torch.empty(int(fold.rows.max()) + 1, dtype=torch.float64).uniform_(-1, 1, generator=generator)
        scaled.append(stored_exactly(Scaled(fold, 0.5, size[fold.rows], 1.0), source, source.store.dtype))
    return scaled


def materialized(source: ChangedSource, model: Any) -> Any:
    """The scaled model as an ordinary one."""
    result = copy.deepcopy(model)
    state = {name: source.store.get(disk) for name, disk in source.names.items()}
    _, unexpected = result.load_state_dict(state, strict=False)
    assert not unexpected
    return result


def difference(one: Any, other: Any, **batch: torch.Tensor) -> float:
    """Of the outputs for tokens that no probe has seen, relative to a token's."""
    batch = batch or {"input_ids": tiny.tokens(3, 17, seed=9)}
    options: dict[str, Any] = {} if "pixel_values" in batch else {"use_cache": False}
    with torch.no_grad():
        a, b = (model(**batch, **options)[0] for model in (one, other))
    return float(((a - b).norm(dim=-1) / a.norm(dim=-1)).max())


# By family: of the first block's inputs, in the order of their calls, what makes each; None: nothing does.
FAMILIES: dict[str, list[str | None]] = {
    "llama": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"],
    "qwen2": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"],
    "qwen3": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"],
    # s = 1 + weight; norms behind the linears as well
    "gemma": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"],
    "gemma2": ["input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"],
    "gemma3_text": ["input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"],
    # the stream goes into linears without a norm
    "olmo2": [None, "self_attn.v_proj", None, "mlp.up_proj"],
    # LayerNorms with biases; a ReLU passes scales, a GELU none
    "opt": ["self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm", "fc1"],
    "starcoder2": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", None],
    # fused projections
    "phi3": ["input_layernorm", "self_attn.qkv_proj", "post_attention_layernorm", "mlp.gate_up_proj"],
    "gpt2": ["ln_1", "attn.c_attn", "ln_2", None],
    "gpt_neox": ["input_layernorm", "attention.query_key_value", "post_attention_layernorm", None],
    "bloom": ["input_layernorm", "self_attention.query_key_value", "post_attention_layernorm", None],
    "mpt": ["norm_1", "attn.Wqkv", "norm_2", None],
    # parallel blocks: one norm for attention and MLP, and so one scale for all that read the norm
    "phi": ["input_layernorm", "self_attn.v_proj", None],
    "cohere": ["input_layernorm", "self_attn.v_proj", "mlp.up_proj"],
    "falcon": ["input_layernorm", "self_attention.query_key_value", None],
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_same_model(kind: str, tmp_path: Path) -> None:
    model = perturbed(tiny.build(kind))
    source = open_source(tiny.save(model, tmp_path / "m"))
    found = folded(source, tiny.tokens(4, 11))
    first = next(iter(found))
    made = {fold.readers[0]: fold.source.removeprefix(f"{first}.") for fold in found[first].folds}
    made |= {readers[0]: None for readers, why in found[first].left.items() if why == OUTSIDE}  # type: ignore[misc]
    stages = discover(source)[0].stages
    assert [made.get(stage[0].name, "?") for stage in stages] == FAMILIES[kind]
    view = scaled_source(source, drawn(found, source))
    # Every quantized linear is another one.
    moved = {reader for each in found.values() for fold in each.folds for reader in fold.readers}
    for name in moved:
        disk = source.names[f"{name}.weight"]
        assert not torch.equal(view.store.get(disk), source.store.get(disk)), name
    assert difference(model, materialized(view, model)) < 2e-5
    assert view.written_config()[KEY]["search"] == "awq"


@settings(max_examples=6)
@given(
    heads=st.integers(1, 3), share=st.sampled_from([1, 2, 3]), width=st.sampled_from([2, 6, 8]), seed=st.integers(0, 99)
)
def test_grouped_queries_share_factors(
    tmp_path_factory: pytest.TempPathFactory, heads: int, share: int, width: int, seed: int
) -> None:
    """The columns of all heads that read one value have one factor, which the value's row takes."""
    sizes = {
        "num_attention_heads": heads * share,
        "num_key_value_heads": heads,
        "head_dim": width,
        "hidden_size": 5 * heads * share,
    }
    model = perturbed(tiny.build("llama", seed, attention_bias=True, **sizes), seed)
    source = open_source(tiny.save(model, tmp_path_factory.mktemp("any") / "m"))
    found = folded(source, tiny.tokens(4, 11))
    values = next(fold for fold in found["model.layers.0"].folds if fold.source.endswith("v_proj"))
    column = torch.arange(heads * share * width)
    assert torch.equal(values.rows, column // (width * share) * width + column % width)
    assert difference(model, materialized(scaled_source(source, drawn(found, source)), model)) < 2e-5


@pytest.mark.parametrize("kind", ["bert", "t5", "whisper", "vit", "dinov2", "swin", "albert"])
def test_encoders(kind: str, tmp_path: Path) -> None:
    model = perturbed(tiny.build(kind))
    source = open_source(tiny.save(model, tmp_path / "m"))
    found = folded(source, tiny.batch(kind, 4))
    left = {why for each in found.values() for why in each.left.values()}
    if kind in ("bert", "albert"):  # the norm is the stream, which goes on beside the linears
        assert any("which others read, too" in why for why in left)
        assert all(fold.norm is None for each in found.values() for fold in each.folds)
    else:
        assert all(any(fold.norm is not None for fold in each.folds) for each in found.values())
    view = scaled_source(source, drawn(found, source))
    assert difference(model, materialized(view, model), **tiny.batch(kind, 2, seed=7)) < 5e-5


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_experts_are_left_out_and_named(kind: str, tmp_path: Path) -> None:
    model = perturbed(tiny.build_mixture(kind))
    source = open_source(tiny.save(model, tmp_path / "m"))
    found = list(folded(source, tiny.tokens(4, 11)).values())[-1]
    experts = [readers for readers, why in found.left.items() if "router" in why]
    assert experts and all(".experts." in name for name in experts[0])
    assert any(fold.source.endswith("layernorm") for fold in found.folds)
    assert not [fold for fold in found.folds if any(".experts." in name for name in fold.readers)]


def test_a_linear_that_stays_dense_is_scaled_with_the_others(tmp_path: Path) -> None:
    """Left out of the quantization, the value projection reads the same norm."""
    model = perturbed(tiny.build("llama"))
    source = open_source(tiny.save(model, tmp_path / "m"))
    blocks = discover(source)
    for block in blocks:
        block.stages[0][:] = [site for site in block.stages[0] if not site.name.endswith("v_proj")]
    kinds: dict[Any, tuple[str, Found]] = {}
    found = {b.block.name: _folds(b, kinds, ALONE) for b in stream(source, blocks, tiny.tokens(4, 11))}
    assert any(name.endswith("v_proj") for name in found["model.layers.1"].folds[0].readers)
    assert difference(model, materialized(scaled_source(source, drawn(found, source)), model)) < 2e-5


@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt"])
def test_rounding_a_norm_to_bfloat16_makes_no_other_model(kind: str, tmp_path: Path) -> None:
    """The factors are those of the rounded norm, so that the stored model is the original to float32's rounding."""
    model = perturbed(tiny.build(kind)).bfloat16()
    source = open_source(tiny.save(model, tmp_path / "m"))
    found = folded(source, tiny.tokens(4, 11))
    norms = [s for s in drawn(found, source) if s.fold.norm is not None]
    assert len(norms) == 4
    view = scaled_source(source, norms)
    for scaled in norms:
        disk = source.names[f"{scaled.fold.source}.weight"]
        stored = view.store.get(disk)
        assert torch.equal(stored, stored.bfloat16().float()) and not torch.equal(
            stored, source.store.get(disk).float()
        )
    if kind != "opt":  # whose biases are rounded as they are stored
        assert difference(model.float(), materialized(view, model.float())) < 2e-5


@pytest.mark.parametrize("kinds", ["r1,r2", "r4"])
def test_after_rotations(kinds: str, tmp_path: Path) -> None:
    """Scales follow rotations; an input that is rotated while the model runs cannot be scaled through the linear before it."""
    model = perturbed(tiny.build("llama"))
    source: Source = make_rotate(kinds, 3).apply(open_source(tiny.save(model, tmp_path / "m")), torch.device("cpu"))
    found = folded(source, tiny.tokens(4, 11))
    sources = [fold.source.rpartition(".")[2] for fold in found["model.layers.0"].folds]
    assert sources == ["input_layernorm", "v_proj", "post_attention_layernorm"] + ["up_proj"] * (kinds == "r1,r2")
    view = scaled_source(source, drawn(found, source))
    assert set(view.written_config()) >= {KEY, "nearplane_rotation"}
    if kinds == "r1,r2":
        turned = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(source.config)).eval()
        assert difference(model, materialized(view, turned)) < 5e-5
