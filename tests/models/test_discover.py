"""Discovery on many architectures, against what is known of each and against the model's own forward."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from close import near
from torch import nn
from transformers.pytorch_utils import Conv1D

import nearplane
from nearplane.core.errors import NearplaneError
from nearplane.models.discover import discover
from nearplane.models.source import open_source
from nearplane.run.stream import Place, stream

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", tiny.STAGES)
def test_stages_and_replay(kind: str, tmp_path: Path) -> None:
    model = tiny.build(kind)
    source = open_source(tiny.save(model, tmp_path / "m"))
    blocks = discover(source)
    assert [len(stage) for stage in blocks[0].stages] == tiny.STAGES[kind]
    assert len(blocks) == 2 and not any(block.unreached for block in blocks)
    # Every linear below the blocks is a site, exactly once.
    for block in blocks:
        linears = {
            f"{block.name}.{name}"
            for name, module in source.model.get_submodule(block.name).named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
        assert {site.name for site in block.sites} == linears
        assert len(block.sites) == len(linears)
    # Running the blocks one at a time, the others stubbed, is the model's own forward.
    ids = tiny.tokens(3, 20)
    seen: dict[str, torch.Tensor] = {}
    for block in blocks:
        model.get_submodule(block.name).register_forward_hook(
            lambda _m, _a, output, name=block.name: seen.__setitem__(
                name, output[0] if isinstance(output, tuple) else output
            )
        )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for k, opened in enumerate(stream(source, blocks, ids, place=Place(CPU, torch.float32), reference=False)):
        quantized = opened.walk.streams[0]
        if k > 0:
            before = torch.cat([hidden for hidden in quantized.hidden[blocks[k - 1].tower] if hidden is not None])
            near(before, seen[blocks[k - 1].name], sums=96)
        output = torch.cat([opened._forward(0, batch).until(None) for batch in range(len(quantized.batches))])
        near(output, seen[blocks[k].name], sums=96)


def test_weights_outside_the_open_block_stay_on_disk(tmp_path: Path) -> None:
    source = open_source(tiny.save(tiny.build("llama"), tmp_path / "m"))
    blocks = discover(source)
    for opened in stream(source, blocks, tiny.tokens(2, 8), place=Place(CPU, torch.float32), reference=True):
        live = {name for name, p in source.model.named_parameters() if ".layers." in name and not p.is_meta}
        assert live and all(name.startswith(opened.block.name + ".") for name in live)


def test_of_the_embedding_only_the_rows_that_run_are_there(tmp_path: Path) -> None:
    """And they are in the dtype that computes, whatever is stored: the replay above holds for all architectures."""
    model = tiny.build("gemma2").to(torch.bfloat16)
    source, ids = open_source(tiny.save(model, tmp_path / "m")), tiny.tokens(2, 8)
    blocks = discover(source)
    next(stream(source, blocks, ids, place=Place(CPU, torch.float32), reference=False))
    table, stored = source.model.get_input_embeddings().weight, model.get_input_embeddings().weight  # type: ignore[operator]
    used = torch.zeros(len(table), dtype=torch.bool)
    used[ids.flatten()] = True
    assert table.dtype == torch.float32 and table.shape == stored.shape and 0 < used.sum() < len(used)
    assert torch.equal(table[used], stored[used].float()) and not table[~used].any()


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    source = open_source(tiny.save(tiny.build("llama"), tmp_path / "m"))
    source.config.num_hidden_layers = 7
    with pytest.raises(NearplaneError, match="no list of 7 blocks"):
        discover(source)


# Linears that add to the residual stream, and the module that reads the stream just before they do.
ADDS_TO = {
    "llama": {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"},
    "qwen3": {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"},
    "gpt2": {"attn.c_proj": "ln_1", "mlp.c_proj": "ln_2"},
    "mpt": {"attn.out_proj": "norm_1", "ffn.down_proj": "norm_2"},
    "opt": {"self_attn.out_proj": "self_attn_layer_norm", "fc2": "final_layer_norm"},
    "bert": {"attention.output.dense": "attention.self.value", "output.dense": "intermediate.dense"},  # normalized then
    # Normalized, or scaled, before they are added.
    "gemma2": {},
    "olmo2": {},
    "dinov2": {},
    "swinv2": {},
    # Parallel blocks: two outputs are added to the stream at once (in Falcon one is first added to the other, in place).
    "phi": {},
    "gptj": {},
    "falcon": {},
}


@pytest.mark.parametrize("kind", ADDS_TO)
def test_where_an_output_joins_the_stream(kind: str, tmp_path: Path) -> None:
    model = tiny.build(kind)
    blocks = discover(open_source(tiny.save(model, tmp_path / "m")))
    for block in blocks:
        expected = {f"{block.name}.{a}": f"{block.name}.{b}" for a, b in ADDS_TO[kind].items()}
        assert {site.name: site.adds_to for site in block.sites if site.adds_to is not None} == expected
        assert {site.name for site in block.sites} > set(expected)


BEFORE_IT = {"self_attn.o_proj": ("post_attention_layernorm", "input_layernorm"),
             "mlp.down_proj": ("post_feedforward_layernorm", "pre_feedforward_layernorm")}  # fmt: skip
NO_NORM_BEFORE = {"self_attn.o_proj": ("post_attention_layernorm", "self_attn.v_proj"),
                  "mlp.down_proj": ("post_feedforward_layernorm", "mlp.up_proj")}  # fmt: skip
# Linears whose output passes a norm or a scale and then joins the stream: that module, and the one that reads the stream.
PASSES: dict[str, dict[str, tuple[str, str]]] = {
    "gemma2": BEFORE_IT,
    "gemma3_text": BEFORE_IT,
    "olmo2": NO_NORM_BEFORE,
    "exaone4": NO_NORM_BEFORE,
    "glm4": {
        "self_attn.o_proj": ("post_self_attn_layernorm", "input_layernorm"),
        "mlp.down_proj": ("post_mlp_layernorm", "post_attention_layernorm"),
    },
    "dinov2": {"attention.o_proj": ("layer_scale1", "norm1"), "mlp.fc2": ("layer_scale2", "norm2")},
    # No norm follows, or one of the sum; LayerNorms, which subtract a mean; two outputs at once.
    **{kind: {} for kind in ("llama", "gpt2", "bert", "swinv2", "phi", "mixtral")},
}


@pytest.mark.parametrize("sketch", [False, True])
@pytest.mark.parametrize("kind", PASSES)
def test_what_an_output_passes_before_it_joins_the_stream(kind: str, sketch: bool, tmp_path: Path) -> None:
    model = tiny.build_mixture(kind) if kind in tiny.MIXTURES else tiny.build(kind)
    for block in discover(open_source(tiny.save(model, tmp_path / "m"), sketch=sketch)):
        expected = {f"{block.name}.{a}": tuple(f"{block.name}.{b}" for b in names) for a, names in PASSES[kind].items()}
        assert {site.name: site.passage for site in block.sites if site.passage is not None} == expected
        assert not any(site.adds_to for site in block.sites if site.passage is not None)


@pytest.mark.parametrize("kind", [kind for kind, sites in ADDS_TO.items() if sites and kind != "bert"])
def test_the_stream_is_what_it_was_plus_the_output(kind: str, tmp_path: Path) -> None:
    """In the model's own forward: first norm's input + attention = second norm's input, + MLP = the block's output."""
    model = tiny.build(kind)
    seen: dict[str, torch.Tensor] = {}

    def after(name: str) -> Callable[..., None]:
        return lambda _m, _a, y: seen.__setitem__(name, (y[0] if isinstance(y, tuple) else y).clone())

    blocks = discover(open_source(tiny.save(model, tmp_path / "m")))
    for block in blocks:
        model.get_submodule(block.name).register_forward_hook(after(block.name))
        for site in block.sites:
            if site.adds_to is not None:
                model.get_submodule(site.name).register_forward_hook(after(site.name))
                model.get_submodule(site.adds_to).register_forward_pre_hook(
                    lambda _m, args, name=site.adds_to: seen.__setitem__(name, args[0].clone())
                )
    with torch.no_grad():
        model(input_ids=tiny.tokens(2, 11), use_cache=False)
    for block in blocks:
        attention, mlp = (site for site in block.sites if site.adds_to is not None)
        assert attention.adds_to is not None and mlp.adds_to is not None
        for site, result in ((attention, seen[mlp.adds_to]), (mlp, seen[block.name])):
            assert site.adds_to is not None
            before, output = seen[site.adds_to], seen[site.name]
            assert float(output.norm()) > 1e-2 * float(before.norm())
            near(before + output.view_as(before), result.view_as(before), sums=96)


def test_a_model_that_wants_more_than_it_is_given_is_one_sentence(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 96,
    }
    folder = tiny.save(transformers.BrosModel(transformers.BrosConfig(**sizes)), tmp_path / "model")
    with pytest.raises(NearplaneError, match=r"BrosModel does not run on input_ids alone .*bbox.* does not support it"):
        nearplane.quantize(folder, tmp_path / "out", method=nearplane.RTN(), progress=False)
    assert not (tmp_path / "out").exists()
