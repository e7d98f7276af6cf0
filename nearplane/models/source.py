"""Where a model comes from: id or folder -> meta skeleton, lazy weights, tokenizer.

The skeleton is the model's own class with every parameter on the meta device; ``load`` brings the parameters of one module
to life from disk and ``unload`` sends them back, so that nothing is resident but what is being worked on.
"""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from nearplane.core.errors import NearplaneError, NumericalError, SettingError
from nearplane.formats.journal import STATE
from nearplane.formats.store import Store, read_json
from nearplane.models.experts import LargeOnMeta, set_visit, unfuse
from nearplane.models.experts_disk import names_in_model, split, unread

HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# No transformer is near these; a configuration that asks for more would be looped over, or allocated, for ever.
MOST_LAYERS, MOST_SIZE, MOST_BUFFERS = 1000, 1 << 31, 1 << 30
# What transformers raises over values it does not expect.
BAD_CONFIG = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RecursionError)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Source:
    """A model on disk. ``model`` is its skeleton; ``names`` maps each parameter or buffer to its name on disk."""

    name: str
    folder: Path
    config: Any
    store: Store
    model: nn.Module
    names: dict[str, str]
    trust_remote_code: bool = False

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer."""
        return load_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)

    def raw_config(self) -> dict[str, Any]:
        """config.json as it stands on disk."""
        return read_json(self.folder / "config.json")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype most of the checkpoint's numbers are stored in."""
        sizes: dict[torch.dtype, int] = {}
        for name in set(self.names.values()):
            dtype = self.store.dtype(name)
            sizes[dtype] = sizes.get(dtype, 0) + self.store.nbytes(name)
        return max(sizes, key=lambda dtype: sizes[dtype])

    def tensor(self, parameter: str) -> Tensor:
        """One stored parameter, checked for NaN and Inf."""
        value = self.store.get(self.names[parameter])
        if value.is_floating_point() and not bool(value.isfinite().all()):
            bad = int((~value.isfinite()).sum())
            raise NumericalError(
                f"weight {parameter} holds {bad} NaN or Inf values; the checkpoint is broken, download or convert it again."
            )
        return value

    def check(self, besides: set[str], stored: torch.dtype) -> None:
        """NumericalError for what is copied, all but the weights of ``besides``, and not finite as it will be stored."""
        sites = {self.names[name + ".weight"] for name in besides}
        for name in sorted(self.store.names - sites):
            value = self.store.get(name)
            if not value.is_floating_point():
                continue
            if not bool(value.isfinite().all()):
                raise NumericalError(
                    f"weight {name} holds NaN or Inf; the checkpoint is broken, download or convert it again."
                )
            if not bool(value.to(stored).isfinite().all()):
                raise NumericalError(
                    f"weight {name} does not fit the range of {str(stored)[6:]}; give another --dtype."
                )

    def load(self, prefix: str, device: torch.device, dtype: torch.dtype, *, skip: Iterable[str] = ()) -> None:
        """Bring every parameter and persistent buffer below ``prefix`` to ``device``; floats become ``dtype``."""
        for name in self._below(prefix):
            if any(name.startswith(s + ".") for s in skip):
                continue
            value = self.tensor(name)
            self._set(name, value.to(device, dtype) if value.is_floating_point() else value.to(device))
        module = self.model.get_submodule(prefix)
        for path, buffer in list(module.named_buffers()):
            if not buffer.is_meta:
                owner, _, leaf = path.rpartition(".")
                module.get_submodule(owner)._buffers[leaf] = buffer.to(device)

    def unload(self, prefix: str) -> None:
        """Send the parameters below ``prefix`` back to the meta device."""
        for name in self._below(prefix):
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if leaf in module._parameters:
                value = module._parameters[leaf]
                assert value is not None
                module._parameters[leaf] = nn.Parameter(value.to("meta"), requires_grad=False)

    def _below(self, prefix: str) -> list[str]:
        return [name for name in self.names if not prefix or name.startswith(prefix + ".")]

    def _set(self, name: str, value: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value


def open_source(model: str | Path, *, trust_remote_code: bool = False) -> Source:
    """Open a local transformers folder, a hub id or ``demo``. No weight is read.

    Raises NearplaneError with one sentence for a missing, unreadable, pickled, remote-code or unknown model.
    """
    folder = locate(model, trust_remote_code=trust_remote_code)
    store = Store(folder)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None or (folder / "quantize_config.json").exists():
        raise SettingError(f"{model} is quantized already; give the original model.")
    skeleton = build_skeleton(config, folder, trust_remote_code=trust_remote_code)
    refuse_unread(skeleton, folder)
    store = split(skeleton, store)
    names = _disk_names(skeleton, store, folder)
    set_visit(skeleton, "each")
    return Source(str(model), folder, config, store, skeleton, names, trust_remote_code)


def refuse_unread(model: nn.Module, folder: Path) -> None:
    """NearplaneError for experts of a layout that cannot be taken apart."""
    name = unread(model)
    if name is not None:
        raise NearplaneError(
            f"{folder}: transformers merges weights of {type(model).__name__} while loading ({name}) into a module of "
            "experts that nearplane cannot take apart."
        )


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model folder."""
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NearplaneError(
            f"{folder} has no tokenizer that transformers can load ({type(error).__name__})."
        ) from error


def locate(model: str | Path, *, weights: bool = True, trust_remote_code: bool = False) -> Path:
    """The local folder of a model given as a folder, a hub id (``weights=False``: its small files only) or ``demo``."""
    if str(model) == "demo":
        from nearplane.models.demo import demo_folder

        return demo_folder()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NearplaneError(f"{model} is a file; MODEL is a transformers folder, a hub id, or demo.")
    if not HUB_ID.fullmatch(str(model)):
        raise NearplaneError(f"{model}: no such folder; MODEL is a transformers folder, a hub id, or demo.")
    patterns = [pattern for pattern in HUB_PATTERNS if weights or pattern != "*.safetensors"]
    return _from_hub(str(model), patterns + ["*.py"] * trust_remote_code)


def _from_hub(model: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except HFValidationError as error:
        raise NearplaneError(f"{model}: no such folder, and not a valid hub id.") from error
    except HfHubHTTPError as error:
        raise NearplaneError(f"{model}: no such folder, and the hub refused it ({_first_line(error)}).") from error
    except OSError as error:  # no network, and nothing in the cache
        raise NearplaneError(
            f"{model}: no such folder here, and the model hub cannot be reached ({type(error).__name__}); "
            "download it where there is a network and give the folder."
        ) from error


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration, refusing code that the folder itself would run."""
    if (folder / STATE).is_dir():
        raise NearplaneError(f"{folder} holds a run that was not finished; nearplane quantize --resume finishes it.")
    path = folder / "config.json"
    raw = read_json(path)
    if not isinstance(raw.get("model_type"), str):
        raise NearplaneError(f"{path} names no model_type; it is not a transformers configuration.")
    known = raw["model_type"] in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    if not known and "auto_map" in raw and not trust_remote_code:
        raise NearplaneError(
            f"{folder} runs its own Python code (trust_remote_code); read that code, then pass --trust-remote-code."
        )
    if not known and "auto_map" not in raw:
        raise NearplaneError(
            f"{path}: transformers {transformers.__version__} does not know model_type {raw['model_type']!r}."
        )
    _refuse_absurd(raw, path)
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (*BAD_CONFIG, OSError, StrictDataclassError) as error:
        raise NearplaneError(f"{path} is not a usable configuration ({_first_line(error)}).") from error


def _refuse_absurd(value: Any, path: Path, key: str = "") -> None:
    """NearplaneError for a number of layers, or any size, that no model has."""
    if isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else ((key, part) for part in value):
            _refuse_absurd(part, path, str(name))
    elif isinstance(value, int):
        most = MOST_LAYERS if key.endswith(("layer", "layers")) else MOST_SIZE
        if abs(value) > most and not key.endswith(("seed", "theta", "base")):
            raise NearplaneError(f"{path} asks for {key}={str(value)[:20]}, beyond {most}; download it again.")


def build_skeleton(config: Any, folder: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The model with parameters on the meta device and real (computed) buffers, its experts taken apart."""
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping and not trust_remote_code:
        raise NearplaneError(
            f"{folder}: {config.model_type} is not a causal language model in transformers {transformers.__version__}."
        )
    config.dtype = torch.float32
    try:
        with torch.device("meta"):  # sizes first: buffers, such as masks, are real below
            draft = transformers.AutoModelForCausalLM.from_config(
                copy.deepcopy(config), trust_remote_code=trust_remote_code
            )
        size = sum(buffer.nbytes for buffer in draft.buffers())
        if size > MOST_BUFFERS:
            raise ValueError(f"its masks and tables alone would take {size / 1e9:.3g} GB")
        del draft
        with init_empty_weights(include_buffers=False), LargeOnMeta(MOST_BUFFERS):
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except (*BAD_CONFIG, ImportError, RuntimeError, MemoryError) as error:
        raise NearplaneError(f"{folder}: no model can be built from its config.json ({_first_line(error)}).") from error
    unfuse(model)
    return model.eval()


def open_skeleton(folder: Path, *, trust_remote_code: bool = False) -> tuple[Any, nn.Module]:
    """Configuration and skeleton of a folder, quantized or not: how its weights are stored is not the model's affair."""
    config = read_config(folder, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config, build_skeleton(copy.deepcopy(config), folder, trust_remote_code=trust_remote_code)


def _disk_names(model: nn.Module, store: Store, folder: Path) -> dict[str, str]:
    """Name on disk of every parameter."""
    state, on_disk = model.state_dict(), names_in_model(model, store.names)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    names: dict[str, str] = {}
    missing: list[str] = []
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name in on_disk and name in state:
            if store.shape(on_disk[name]) != tuple(value.shape):
                found, asked = list(store.shape(on_disk[name])), list(value.shape)
                raise NearplaneError(f"{folder}: {on_disk[name]} has shape {found}, config.json asks for {asked}.")
            names[name] = on_disk[name]
        elif value.is_meta and name not in tied:
            missing.append(name)
    converted = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightConverter)]
    if missing and converted:
        raise NearplaneError(
            f"{folder} lacks {missing[0]}; transformers converts weights of {type(model).__name__} while loading, and nearplane "
            "follows it for experts only."
        )
    if missing:
        raise NearplaneError(
            f"{folder} lacks {len(missing)} weights that config.json asks for, the first: {missing[0]}."
        )
    return names


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
