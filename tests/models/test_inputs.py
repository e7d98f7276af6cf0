"""What the forward of a model reads, found without a table of models."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import nn

from nearplane.core.errors import NearplaneError
from nearplane.models import inputs as classes
from nearplane.models.discover import discover
from nearplane.models.sketch import drawn
from nearplane.models.source import open_source

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
PICTURES = {**SMALL, "image_size": 16, "patch_size": 8}


def skeleton(kind: str, **sizes: Any) -> Any:
    with torch.device("meta"):
        return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **sizes))


@pytest.mark.parametrize(
    ("kind", "sizes", "wanted"),
    [("smolvlm_vision", PICTURES, ("pixel_values",)),  # its class names no main input, and would be given text
     ("siglip_vision_model", PICTURES, ("pixel_values",)),
     ("aimv2", {"text_config": SMALL, "vision_config": PICTURES}, ("input_ids", "pixel_values")),  # compares embeddings
     ("grounding-dino", {"text_config": {**SMALL, "model_type": "bert"}}, ("pixel_values", "input_ids")),  # both are needed
     ("kosmos-2", {"text_config": {"layers": 1}, "vision_config": PICTURES}, ("input_ids",)),  # it writes about images
     ("qwen2_5_vl_vision", {"depth": 1, "hidden_size": 64, "num_heads": 2}, ("hidden_states", "grid_thw"))],
)  # fmt: skip
def test_what_a_forward_reads(kind: str, sizes: dict[str, Any], wanted: tuple[str, ...]) -> None:
    assert classes.reads(skeleton(kind, **sizes)) == wanted


@pytest.mark.parametrize(
    ("config", "said"),
    [(transformers.VideoMAEConfig(**PICTURES, num_frames=2), "a model of type videomae reads videos"),
     (transformers.DecisionTransformerConfig(n_layer=1, n_head=2, hidden_size=32), "DecisionTransformerModel reads states")],
)  # fmt: skip
def test_inputs_that_are_not_made_are_named(config: Any, said: str, tmp_path: Path) -> None:
    folder = tiny.save(transformers.AutoModel.from_config(config).eval(), tmp_path / "model")
    with pytest.raises(NearplaneError, match=said):
        discover(open_source(folder))


def test_a_model_that_reads_characters_has_no_vocabulary(tmp_path: Path) -> None:
    """CANINE hashes code points: its configuration names no number of tokens, and any text can be read."""
    config = transformers.CanineConfig(
        **SMALL, num_hash_buckets=64, local_transformer_stride=4, max_position_embeddings=64
    )
    folder = tiny.save(transformers.CanineModel(config).eval(), tmp_path / "model")
    assert classes.vocabulary(config) is None
    assert {block.tower for block in discover(open_source(folder))} == {"encoder.layer"}


def test_the_least_vocabulary_of_several_parts() -> None:
    """MusicGen has two parts that read tokens; transformers' own question for the text part is ambiguous."""
    config = transformers.AutoConfig.for_model(
        "musicgen",
        text_encoder={"model_type": "t5", "vocab_size": 90},
        decoder={"model_type": "musicgen_decoder", "vocab_size": 70},
        audio_encoder={"model_type": "encodec"},
    )
    assert classes.vocabulary(config) == 70


class Marked(nn.Embedding):
    """An embedding with another vector beside its table, as T5Gemma 2's."""

    def __init__(self) -> None:
        super().__init__(12, 8)
        self.mark = nn.Parameter(torch.zeros(8))


def test_an_embedding_with_more_than_a_table_can_be_sketched() -> None:
    """Its other parameters are drawn in their own shape."""
    found = drawn(nn.ModuleDict({"table": Marked()}), ["table.weight", "table.mark"])
    assert {name: tuple(value.shape) for name, value in found.items()} == {"table.weight": (12, 8), "table.mark": (8,)}
