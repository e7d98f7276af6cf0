"""Discovery on many architectures, against what is known of each and against the model's own forward."""

from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nearplane.core.errors import NearplaneError
from nearplane.models.discover import discover
from nearplane.models.source import open_source
from nearplane.stream import stream

CPU = torch.device("cpu")

# Linears per stage of the first block, known from each architecture's definition.
STAGES = {
    "llama": [3, 1, 2, 1],
    "qwen2": [3, 1, 2, 1],
    "qwen3": [3, 1, 2, 1],
    "mistral": [3, 1, 2, 1],
    "gemma2": [3, 1, 2, 1],
    "gemma3_text": [3, 1, 2, 1],
    "olmo2": [3, 1, 2, 1],
    "granite": [3, 1, 2, 1],
    "starcoder2": [3, 1, 1, 1],
    "opt": [3, 1, 1, 1],
    "gpt_neo": [3, 1, 1, 1],
    "phi3": [1, 1, 1, 1],  # fused qkv and gate_up
    "gpt2": [1, 1, 1, 1],  # Conv1D
    "bloom": [1, 1, 1, 1],
    "gpt_neox": [1, 1, 1, 1],
    "mpt": [1, 1, 1, 1],
    "phi": [4, 1, 1],  # parallel block: q, k, v and fc1 read one norm
    "cohere": [5, 1, 1],  # parallel block: q, k, v, gate, up
    "gptj": [4, 1, 1],
    "falcon": [2, 1, 1],  # parallel block, its own Linear class
}


@pytest.mark.parametrize("kind", STAGES)
def test_stages_and_replay(kind: str, tmp_path: Path) -> None:
    model = tiny.build(kind)
    source = open_source(tiny.save(model, tmp_path / "m"))
    blocks = discover(source)
    assert [len(stage) for stage in blocks[0].stages] == STAGES[kind]
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
    for k, opened in enumerate(stream(source, blocks, ids, device=CPU, dtype=torch.float32, reference=False)):
        quantized = opened.walk.streams[0]
        if k > 0:
            before = torch.cat([hidden for hidden in quantized.hidden if hidden is not None])
            torch.testing.assert_close(before, seen[blocks[k - 1].name], rtol=1e-5, atol=1e-6)
        output = torch.cat([quantized.run(k, batch, opened.walk.rests) for batch in range(len(quantized.batches))])
        torch.testing.assert_close(output, seen[blocks[k].name], rtol=1e-5, atol=1e-6)


def test_weights_outside_the_open_block_stay_on_disk(tmp_path: Path) -> None:
    source = open_source(tiny.save(tiny.build("llama"), tmp_path / "m"))
    blocks = discover(source)
    for opened in stream(source, blocks, tiny.tokens(2, 8), device=CPU, dtype=torch.float32, reference=True):
        live = {name for name, p in source.model.named_parameters() if ".layers." in name and not p.is_meta}
        assert live and all(name.startswith(opened.block.name + ".") for name in live)


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    source = open_source(tiny.save(tiny.build("llama"), tmp_path / "m"))
    source.config.num_hidden_layers = 7
    with pytest.raises(NearplaneError, match="no list of 7 blocks"):
        discover(source)
