"""Load any folder as an ordinary transformers model: an original, or a checkpoint we or others quantized."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nearplane.core.errors import NearplaneError, NumericalError
from nearplane.formats.read import open_checkpoint
from nearplane.models.source import build_skeleton, locate, read_config
from nearplane.progress import CONSOLE


def load_model(
    model: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model, its quantized linears dequantized to ``dtype``. No other quantization package is needed.

    Raises NearplaneError with one sentence for anything that cannot be read.
    """
    folder = locate(model, trust_remote_code=trust_remote_code)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    checkpoint = open_checkpoint(folder)
    if checkpoint.quantization is not None and hasattr(config, "quantization_config"):
        del config.quantization_config
    skeleton = build_skeleton(copy.deepcopy(config), folder, trust_remote_code=trust_remote_code)
    state: dict[str, Tensor] = {}
    for name in checkpoint.dense:
        value = checkpoint.store.get(name)
        state[name] = value.to(dtype) if value.is_floating_point() else value
    for name in checkpoint.layers:
        weight = checkpoint.weight(name).to(dtype)
        state[name + ".weight"] = weight.T.contiguous() if _is_conv1d(skeleton, name) else weight
    for name, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise NumericalError(f"{folder}: weight {name} holds NaN or Inf; the checkpoint is broken.")
    return _assemble(type(skeleton), config, state, dtype, folder).to(device).eval()


def _assemble(kind: Any, config: Any, state: dict[str, Tensor], dtype: torch.dtype, folder: Path) -> nn.Module:
    """Let transformers place the tensors: names, ties and buffers are its business."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        options: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **options)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise NearplaneError(f"{folder} does not fit its config.json ({reason}).") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
    if info["mismatched_keys"]:
        name, found, asked = sorted(info["mismatched_keys"])[0]
        raise NearplaneError(f"{folder}: {name} has shape {list(found)}, config.json asks for {list(asked)}.")
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise NearplaneError(
            f"{folder} lacks {len(missing)} weights that config.json asks for, the first: {missing[0]}."
        )
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        CONSOLE.print(f"note: {folder} holds {len(unused)} tensors that its model does not use, the first: {unused[0]}")
    result: nn.Module = model
    return result


def _is_conv1d(skeleton: nn.Module, disk_name: str) -> bool:
    """Whether a layer stored under this name is GPT-2's transposed kind."""
    prefix = getattr(skeleton, "base_model_prefix", "")
    modules = dict(skeleton.named_modules())
    for name in (disk_name, disk_name.removeprefix(prefix + "."), f"{prefix}.{disk_name}"):
        if name in modules:
            return isinstance(modules[name], Conv1D)
    return False
