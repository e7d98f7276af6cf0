"""Tiny weights, and a tiny Llama written to disk, for the tests of the formats."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nearplane.core.grid import Grid, Quantized
from nearplane.formats import FORMATS
from nearplane.formats.parts import Writer
from nearplane.methods.rtn import RTN

# tests/formats/checkpoints.py is found under any of pytest's import modes.
sys.path.insert(0, str(Path(__file__).parent))

LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=64,
)


class Written(NamedTuple):
    folder: Path
    model: LlamaForCausalLM  # its linears replaced by what the codes stand for
    solved: dict[str, Quantized]


def values(quantized: Quantized, grid: Grid) -> torch.Tensor:
    """What the codes stand for, written out."""
    columns = quantized.codes.shape[1]
    width = columns if grid.group_size == -1 else grid.group_size
    scale, zero = (part.repeat_interleave(width, 1)[:, :columns].float() for part in (quantized.scale, quantized.zero))
    return (quantized.codes.float() - zero) * scale


@pytest.fixture(name="values")
def values_fixture() -> Callable[[Quantized, Grid], torch.Tensor]:
    return values


@pytest.fixture
def rtn() -> Callable[..., Quantized]:
    """Round a random (out, in) weight to nearest."""

    def solve(out: int, columns: int, grid: Grid, seed: int = 0) -> Quantized:
        # Off centre, so that asymmetric zeros differ from the symmetric one and from each other.
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(out, columns, generator=generator) + torch.randn(out, 1, generator=generator)
        return RTN().solve(weight, None, grid)

    return solve


@pytest.fixture
def write_llama(tmp_path: Path) -> Callable[..., Written]:
    """Quantize a tiny Llama with RTN and write it, norms and embeddings included."""

    def write(grid: Grid, format: str = "compressed-tensors", shard_bytes: int = 4 * 2**30) -> Written:
        torch.manual_seed(0)
        model, chosen, solved = LlamaForCausalLM(LLAMA).eval(), FORMATS[format], {}
        folder = tmp_path / "out"
        with Writer(folder, shard_bytes=shard_bytes) as writer:
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and name != "lm_head":
                    solved[name] = RTN().solve(module.weight.data, None, grid)
                    assert chosen.supports(grid, tuple(module.weight.shape)) is None
                    writer.put(chosen.pack(name, solved[name], grid))
                    module.weight.data = values(solved[name], grid)
                elif isinstance(getattr(module, "weight", None), torch.Tensor):
                    writer.put({f"{name}.weight": module.weight})
            config = chosen.config(grid, ignore=["lm_head"], settings={"version": "0", "damp_percent": 0.01})
            fields = {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "quantization_config": config}
            writer.json("config.json", {**LLAMA.to_dict(), **fields})
            for name, content in chosen.extra_files(config).items():
                writer.json(name, content)
            writer.finish()
        return Written(folder, model, solved)

    return write
