"""Parameters that a checkpoint need not hold: tied ones, counted once, and ones that transformers computes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
import transformers
from torch import nn

import nearplane
from nearplane import GPTQ, RTN, Calibration, Grid, NearplaneError
from nearplane.checkpoint.packed import check_size
from nearplane.models import absent
from nearplane.models.sketch import Promised
from nearplane.models.source import build_skeleton, open_source
from nearplane.run.plan import make_plan

WORDS = 40_000  # a vocabulary beside which the blocks are nothing
GRID = Grid(bits=8, group_size=32)
# Of each type its class, and what it calls the smallest sizes.
SIZES = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64, "vocab_size": WORDS, "pad_token_id": 1,
    "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {"d_model": 64, "num_layers": 2, "d_ff": 64, "d_kv": 16, "num_heads": 4, "vocab_size": WORDS}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", T5),
    "umt5": ("UMT5ForConditionalGeneration", T5),
    "m2m_100": ("M2M100ForConditionalGeneration", SIZES),
    "bart": ("BartForConditionalGeneration", SIZES),
    "marian": ("MarianMTModel", SIZES),
}


def build(kind: str, **settings: Any) -> Any:
    name, sizes = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **{**sizes, **settings})).eval()
    with torch.no_grad():  # so that blocks do something
        for part, parameter in model.named_parameters():
            if parameter.dim() == 2 and len(parameter) < 100 and "embed" not in part:
                parameter.mul_(0.5 if "t5" in kind else 3)  # T5 does not scale its products
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**tiny.batch("t5", 2), use_cache=False).logits
    return result


def stored(folder: Path) -> int:
    """Numbers on disk."""
    return sum(value.numel() for value in safetensors.torch.load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_large_tied_vocabulary(kind: str, tie: bool, tmp_path: Path) -> None:
    """Quantized, loaded packed and dense; the size that is asked for is the size that is stored."""
    settings = {} if tie else {"tie_word_embeddings": False}
    model = build(kind, **settings)
    folder = tiny.save(model, tmp_path / "model")
    source = open_source(folder)
    positions = sum(p.numel() for n, p in model.named_parameters() if kind == "marian" and "embed_positions" in n)
    buffers = sum(b.numel() for n, b in model.named_buffers() if n in model.state_dict())
    assert absent.size(source.model) == stored(folder) + positions - buffers
    nearplane.quantize(folder, tmp_path / "out", method=RTN(), grid=GRID, progress=False)
    wanted = logits(model)
    assert torch.equal(logits(nearplane.load(folder)), wanted)
    found = logits(nearplane.load(tmp_path / "out"))
    assert 0 < float((found - wanted).norm()) < 0.05 * float(wanted.norm())
    assert nearplane.verify(tmp_path / "out").ok


def nllb() -> tuple[Any, nn.Module]:
    """NLLB-200-distilled-600M in its own sizes, without any memory."""
    config = transformers.M2M100Config(
        vocab_size=256_206, d_model=1024, encoder_layers=12, decoder_layers=12, encoder_attention_heads=16,
        decoder_attention_heads=16, encoder_ffn_dim=4096, decoder_ffn_dim=4096, max_position_embeddings=1024,
        scale_embedding=True, architectures=["M2M100ForConditionalGeneration"],
    )  # fmt: skip
    return config, build_skeleton(config, Path("nllb"))


def test_nllb_in_its_real_sizes(tmp_path: Path) -> None:
    config, skeleton = nllb()
    assert absent.size(skeleton) == 615_073_792  # as its authors count
    store = Promised(tmp_path, skeleton, torch.float16)
    checkpoint: Any = SimpleNamespace(store=store, dense=sorted(store.names), layers={})
    check_size(skeleton, checkpoint)
    half = [name for name in checkpoint.dense if ".layers." not in name or ".layers.1" in name]
    checkpoint.dense = [name for name in half if "embed_tokens" not in name and "shared" not in name]
    with pytest.raises(NearplaneError, match=r"config.json asks for 6\.15e\+08"):
        check_size(skeleton, checkpoint)
    config.save_pretrained(tmp_path)
    plan = make_plan(tmp_path, sketch=True, grid=Grid(bits=4, group_size=64), method=RTN())
    numbers = sum(store.nbytes(name) for name in plan.source.store.names) // 2
    assert numbers == absent.size(skeleton)  # a plan counts what will be stored
    assert sum(s.shape[0] * s.shape[1] for s in plan.sites) == 12 * (4 + 8) * 1024**2 + 12 * (8 + 8) * 1024**2


@pytest.mark.parametrize("name", ["lm_head.weight", "decoder.embed_tokens.weight"])
def test_a_table_stored_under_the_name_of_one_that_is_tied_to_it(name: str, tmp_path: Path) -> None:
    """As older conversions left it: transformers ties either way round."""
    model = build("t5", vocab_size=500)
    folder = tiny.save(model, tmp_path / "model")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors[name] = tensors.pop("shared.weight")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text(tiny.text(500))
    nearplane.quantize(
        folder, tmp_path / "out", method=GPTQ(), grid=GRID, progress=False,
        calibration=Calibration(dataset=str(tmp_path / "text.txt"), nsamples=4, seqlen=24),
    )  # fmt: skip
    wanted, found = logits(model), logits(nearplane.load(tmp_path / "out"))
    assert 0 < float((found - wanted).norm()) < 0.02 * float(wanted.norm())
    assert nearplane.verify(tmp_path / "out").ok


def test_a_head_of_its_own_that_is_stored_though_the_class_ties_it(tmp_path: Path) -> None:
    """As T5 1.1 and Flan-T5: both are stored and differ, so transformers ties nothing, and neither do we."""
    model = build("t5", vocab_size=500)
    folder = tiny.save(model, tmp_path / "model")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["shared.weight"])
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    nearplane.quantize(folder, tmp_path / "out", method=RTN(), grid=GRID, progress=False)
    assert torch.equal(nearplane.load(tmp_path / "out").lm_head.weight, tensors["lm_head.weight"])  # type: ignore[union-attr]


def test_a_parameter_that_only_identity_shows_to_be_shared() -> None:
    """As code that comes with a model may share it, without a word in ``all_tied_weights_keys``."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(100, 8), nn.Linear(8, 100, bias=False)
            self.head.weight = self.table.weight

    draft, skeleton = Own(), Own()
    skeleton.head.weight = nn.Parameter(torch.empty(100, 8, device="meta"))
    assert absent.size(skeleton) == 1600
    absent.note_shared(skeleton, draft)
    assert absent.tied(skeleton) == {"head.weight": "table.weight"} and absent.size(skeleton) == 800


def test_positions_that_marian_computes(tmp_path: Path) -> None:
    """They are in no file; the walk has them all the same, and another missing weight is still refused."""
    model = build("marian", vocab_size=500)
    folder = tiny.save(model, tmp_path / "model")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    assert not any("embed_positions" in name for name in tensors)
    source = open_source(folder)
    for side in ("encoder", "decoder"):
        name = f"model.{side}.embed_positions"
        found, wanted = (m.get_submodule(name).weight for m in (source.model, model))
        assert isinstance(found, torch.Tensor) and isinstance(wanted, torch.Tensor) and torch.equal(found, wanted)
    del tensors["model.encoder.layers.0.fc1.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NearplaneError, match=r"lacks 1 weights .* model\.encoder\.layers\.0\.fc1\.weight"):
        open_source(folder)


def test_a_random_initialisation_is_no_computed_parameter() -> None:
    """transformers may let a checkpoint lack a weight, and draw it: such a model is refused as before."""
    _, skeleton = nllb()
    names = ["model.encoder.layers.0.fc1.weight", "model.encoder.layers.0.fc1.bias"]
    assert absent.compute(skeleton, names) == []
    skeleton._keys_to_ignore_on_load_missing = ["fc1"]  # type: ignore[assignment]
    assert absent.compute(skeleton, names) == names[1:]  # zeros, whatever the seed
    assert skeleton.get_submodule("model.encoder.layers.0.fc1").weight.is_meta  # type: ignore[union-attr]
