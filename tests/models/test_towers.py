"""Models of other kinds than decoders: towers and stages, against what is known of each and the model's own forward."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from close import near

import nearplane.run.stream
from nearplane.core.errors import NearplaneError
from nearplane.models import inputs as classes
from nearplane.models.discover import discover
from nearplane.models.source import open_source
from nearplane.run.stream import Place, stream

ENCODER, DECODER = (
    [3, 1, 1, 1],
    [3, 1, 1, 2, 1, 1, 1],
)  # q k v, out, fc1, fc2; between them cross-attention: q, k v, out
# Of each tower its name, the linears per stage of its first block, and positions and width of its hidden state.
TOWERS: dict[str, list[tuple[str, list[int], tuple[int, int]]]] = {
    "bert": [("bert.encoder.layer", ENCODER, (9, 64))],
    "roberta": [("encoder.layer", ENCODER, (9, 64))],
    "distilbert": [("distilbert.transformer.layer", ENCODER, (9, 64))],
    "electra": [("encoder.layer", ENCODER, (9, 64))],
    "mpnet": [("mpnet.encoder.layer", ENCODER, (9, 64))],
    "modernbert": [("model.layers", [1, 1, 1, 1], (9, 64))],
    "deberta-v2": [("encoder.layer", ENCODER, (9, 64))],
    "t5": [("encoder.block", ENCODER, (9, 64)), ("decoder.block", DECODER, (6, 64))],
    "bart": [("model.encoder.layers", ENCODER, (9, 64)), ("model.decoder.layers", DECODER, (6, 64))],
    "whisper": [("model.encoder.layers", ENCODER, (24, 64)), ("model.decoder.layers", DECODER, (6, 64))],
    "wav2vec2": [("wav2vec2.encoder.layers", ENCODER, (6, 64))],
    "vit": [("vit.layers", ENCODER, (17, 64))],
    "deit": [("layers", ENCODER, (18, 64))],
    "dinov2": [("encoder.layer", ENCODER, (17, 64))],
    "swin": [("encoder.layers.0.blocks", ENCODER, (64, 32)), ("encoder.layers.1.blocks", ENCODER, (16, 64))],
    "clip": [("vision_model.encoder.layers", ENCODER, (17, 64)), ("text_model.encoder.layers", ENCODER, (9, 64))],
    "siglip": [("vision_model.encoder.layers", ENCODER, (16, 64)), ("text_model.encoder.layers", ENCODER, (9, 64))],
}


def walked(source: Any, batch: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Each block's output by batch, as the walk has it."""
    found, blocks, cpu = {}, discover(source), torch.device("cpu")
    for opened in stream(source, blocks, batch, place=Place(cpu, torch.float32), reference=False):
        batches = range(len(opened.walk.batches))
        found[opened.block.name] = [opened._forward(0, number).until(None) for number in batches]
    return found  # type: ignore[return-value]


def own(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each block's output in the model's own forward."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if any(name.startswith(tower + ".") and name.count(".") == tower.count(".") + 1 for tower in towers(model)):
            module.register_forward_hook(
                lambda _m, _a, y, name=name: found.__setitem__(name, y[0] if isinstance(y, tuple) else y)
            )
    with torch.no_grad():
        model(**batch)
    return found


def towers(model: Any) -> list[str]:
    return [name for name, _, _ in TOWERS[model.config.model_type]]


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_stages_and_replay(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks one at a time, the others stubbed, are the model's own forward, from one tower to the next."""
    monkeypatch.setattr(nearplane.run.stream, "BATCH_TOKENS", 40)
    model = tiny.build(kind)
    source = open_source(tiny.save(model, tmp_path / "m"))
    assert type(source.model) is type(model)
    blocks = discover(source)
    assert [block.name for block in blocks] == [f"{name}.{i}" for name in towers(model) for i in range(2)]
    batch = tiny.batch(kind, 5)
    for (name, stages, shape), block in zip(TOWERS[kind], blocks[::2], strict=True):
        assert block.tower == name and [len(stage) for stage in block.stages] == stages and not block.unreached
        assert block.shape[-1] == shape[1]
    expected, found = own(model, batch), walked(source, batch)
    assert found.keys() == expected.keys()
    for (_, _, shape), block in zip(TOWERS[kind], blocks[::2], strict=True):
        assert expected[block.name].shape[1:] == shape
    for name, parts in found.items():
        near(torch.cat(parts), expected[name], sums=96)


@pytest.mark.parametrize("kind", ["bert", "t5", "bart"])
def test_replay_with_padding(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T5's blocks return a bias that holds the batch's own mask, and hand it on."""
    monkeypatch.setattr(nearplane.run.stream, "BATCH_TOKENS", 20)
    model = tiny.build(kind)
    source = open_source(tiny.save(model, tmp_path / "m"))
    batch = tiny.batch(kind, 5)
    lengths = torch.tensor([9, 4, 7, 3, 5])
    batch["attention_mask"] = (torch.arange(9) < lengths[:, None]).long()
    expected, found = own(model, batch), walked(source, batch)
    for name, parts in found.items():
        rows = 0
        for part in parts:
            for output in part:
                real = int(lengths[rows]) if expected[name].shape[1] == 9 else len(output)
                near(output[:real], expected[name][rows][:real], sums=96)
                rows += 1


def test_groups_of_layers_that_run_twice_are_blocks(tmp_path: Path) -> None:
    """ALBERT's two groups of two layers each, of which each runs twice in a row."""
    sizes = {"num_hidden_groups": 2, "num_hidden_layers": 4, "inner_group_num": 2}
    source = open_source(tiny.save(tiny.build("albert", **sizes), tmp_path / "m"))
    blocks = discover(source)
    assert [(block.name, block.calls, len(block.sites)) for block in blocks] == [
        (f"encoder.albert_layer_groups.{group}", 2, 2 * 6) for group in range(2)
    ]
    assert not any(site.adds_to for block in blocks for site in block.sites)  # other in each call


def test_a_checkpoint_without_architectures(tmp_path: Path) -> None:
    """The likeliest class: of an encoder the one with the masked head, of an encoder-decoder all of it."""
    for kind, name in (
        ("bert", "BertForMaskedLM"),
        ("t5", "T5ForConditionalGeneration"),
        ("llama", "LlamaForCausalLM"),
    ):
        config = tiny.build(kind).config
        config.architectures = None
        build = classes.builder(config)
        assert build is not None and type(build(config)).__name__ == name


@pytest.mark.parametrize(("kind", "causal"), [("llama", True), ("bert", False), ("t5", False), ("vit", False)])
def test_what_predicts_the_next_token(kind: str, causal: bool) -> None:
    assert classes.is_causal(tiny.build(kind)) is causal


@pytest.mark.parametrize(("kind", "positions"), [("dinov2", 5), ("vit", 17)])
def test_the_probe_reads_what_the_image_processor_makes(kind: str, positions: int, tmp_path: Path) -> None:
    """DINOv2 interpolates its positions to any size; a ViT reads the one that it is made for."""
    folder = tiny.save(tiny.build(kind), tmp_path / "m")
    size = '"crop_size": {"height": 16, "width": 16}, "do_center_crop": true, "size": {"shortest_edge": 20}'
    (folder / "preprocessor_config.json").write_text(f'{{"image_processor_type": "BitImageProcessor", {size}}}')
    assert {block.shape for block in discover(open_source(folder))} == {(1, positions, 64)}


def test_a_list_of_lists_is_no_tower(tmp_path: Path) -> None:
    """PVT has as many stages as blocks in a stage: the list of stages, through which no forward runs, hides no tower."""
    sizes = {"hidden_sizes": [16, 32], "num_attention_heads": [1, 2], "patch_sizes": [4, 2], "strides": [4, 2]}
    config = transformers.PvtConfig(
        image_size=64, num_encoder_blocks=2, depths=[2, 2], sequence_reduction_ratios=[2, 1], mlp_ratios=[2, 2], **sizes
    )
    folder = tiny.save(transformers.PvtForImageClassification(config).eval(), tmp_path / "model")
    blocks = discover(open_source(folder))
    assert [block.tower for block in blocks] == ["pvt.encoder.block.0"] * 2 + ["pvt.encoder.block.1"] * 2
    assert [len(block.sites) for block in blocks] == [6] * 4


def test_blocks_that_share_weights_are_refused(tmp_path: Path) -> None:
    """Zamba 2 has one transformer in several of its blocks."""
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 128,
    }
    sizes |= {"n_mamba_heads": 8, "mamba_d_state": 8, "mamba_ngroups": 1, "adapter_rank": 8}
    for kinds, shares in ((["linear_attention", "hybrid"] * 2, True), (["linear_attention"] * 3 + ["hybrid"], False)):
        config = transformers.Zamba2Config(**sizes, layers_block_type=kinds)
        folder = tiny.save(transformers.Zamba2ForCausalLM(config).eval(), tmp_path / str(shares))
        if shares:
            with pytest.raises(
                NearplaneError, match=r"layers\.3\.shared_\S+ is one weight with model\.layers\.1\..*share weights"
            ):
                discover(open_source(folder))
        else:
            assert len(discover(open_source(folder))) == 4
