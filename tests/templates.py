"""GGUF files of tiny models: those of runs/gguf_templates.py, with a vocabulary, in any type of the package gguf."""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "runs"))
import gguf_templates

tensors = gguf_templates.tensors


def write(path: Path, config: Any, tensors: dict[str, Tensor], type: str = "F16") -> Path:
    """Write a file: matrices in ``type``, the rest in F32."""
    return gguf_templates.write(config, tensors, path, type, [f"w{i}" for i in range(config.vocab_size)])


def of_folder(folder: Path, path: Path, type: str = "F16") -> Path:
    """Write the file of the model in a folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return write(path, model.config, tensors(model), type)
