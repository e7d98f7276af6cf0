"""Open a model on disk: a skeleton on the meta device, weights that are read when needed, a tokenizer.

The skeleton is an instance of the model's own class. ``Source.load`` reads the parameters of one module from disk.
``Source.unload`` sends them back to the meta device, so that only the weights at work are in memory. In sketch mode no
weight is read (``sketch.py``). Every tensor that is read is checked for NaN and Inf and hashed, which identifies a resumed run.
"""

import copy
import hashlib
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from nearplane.core.errors import NearplaneError, NumericalError, SettingError
from nearplane.core.moments import all_finite
from nearplane.formats.store import Store, read_json
from nearplane.models import absent
from nearplane.models.experts import LargeOnMeta, set_visit, unfuse
from nearplane.models.experts_disk import converts, names_in_model, split, unread
from nearplane.models.inputs import builder
from nearplane.models.locate import BAD_CONFIG, MOST_BUFFERS, first_line, locate, read_config
from nearplane.models.sketch import Promised, drawn, promised_dtype, stand_down, stand_in

# Elements that are processed at a time.
AT_ONCE = 1 << 22
# 64-bit words that a fingerprint adds up: 4 KiB.
ADDED_UP = 512


@dataclass
class Source:
    """A model on disk.

    ``model`` is the skeleton, ``names`` maps names of its parameters and buffers to names in ``store``.
    """

    name: str
    folder: Path
    config: Any
    store: Store
    model: nn.Module
    names: dict[str, str]
    trust_remote_code: bool = False
    settings: dict[str, Any] = field(default_factory=dict)  # of the transforms applied, for the report
    notes: list[str] = field(default_factory=list)  # remarks on the transforms, for the user
    sums: dict[str, str] = field(default_factory=dict)  # hash of each parameter that was read, as stored on disk
    sketch: bool = False  # no weight is read: see sketch.py
    promise_of: "Source | None" = None  # of a view with known sizes and unknown tensors: the opened source

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer."""
        return load_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)

    def raw_config(self) -> dict[str, Any]:
        """Read config.json as a dictionary."""
        return read_json(self.folder / "config.json")

    def written_config(self) -> dict[str, Any]:
        """Return config.json for a folder with this source's tensors."""
        return self.raw_config()

    @property
    def original(self) -> Store:
        """The tensors on disk, before any transform."""
        return self.store

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which most bytes of the checkpoint are stored."""
        sizes: dict[torch.dtype, int] = {}
        for name in set(self.names.values()):
            dtype = self.store.dtype(name)
            sizes[dtype] = sizes.get(dtype, 0) + self.store.nbytes(name)
        return max(sizes, key=lambda dtype: sizes[dtype])

    def tensor(self, parameter: str) -> Tensor:
        """Read a parameter and note its hash. NumericalError for NaN or Inf."""
        value = self.store.get(self.names[parameter])
        self.sums[parameter] = self.digest(self.names[parameter], value)
        if not finite(value):
            bad = int((~value.isfinite()).sum())
            raise NumericalError(
                f"weight {parameter} holds {bad} NaN or Inf values; the checkpoint is broken, download or convert it again."
            )
        return value

    def digest(self, name: str, value: Tensor) -> str:
        """Return the hash of the stored tensor ``name``, read as ``value``."""
        return fingerprint(value)

    def check(self, besides: set[str], stored: torch.dtype) -> str:
        """Check and hash every stored tensor that is copied unquantized.

        Args:
            besides: names of the quantized linears, whose weights are left out.
            stored: dtype in which the tensors will be written.

        Returns:
            Hashes, separated by spaces.

        Raises:
            NumericalError: a tensor holds NaN or Inf, or would in ``stored``.
        """
        sites, sums = {self.names[name + ".weight"] for name in besides}, list[str]()
        for name in sorted(self.store.names - sites):
            value = self.store.get(name)
            sums.append(self.digest(name, value))
            if not finite(value):
                raise NumericalError(
                    f"weight {name} holds NaN or Inf; the checkpoint is broken, download or convert it again."
                )
            if not finite(value, stored):
                raise NumericalError(
                    f"weight {name} does not fit the range of {str(stored)[6:]}; give another --dtype."
                )
        return " ".join(sums)

    def load(
        self, prefix: str, device: torch.device, dtype: torch.dtype, *,
        skip: Iterable[str] = (), rows: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Read every parameter and persistent buffer below ``prefix``.

        Args:
            prefix: name of a module; empty for the whole model.
            device: device of the loaded tensors.
            dtype: dtype of the loaded floats.
            skip: names of modules to leave on the meta device.
            rows: by parameter name, indices of the rows that will be read. On a CPU the other rows are zero and take no memory.

        Raises:
            NumericalError: a weight holds NaN or Inf.
        """
        names = [name for name in self._below(prefix) if not any(name.startswith(s + ".") for s in skip)]
        loaded: dict[str, Tensor] = drawn(self.model, names) if self.sketch else {}
        for name, value in loaded.items():
            self._set(name, value)
        for name in () if self.sketch else names:
            value = self.tensor(name)
            if rows is not None and name in rows and device.type == "cpu":
                value = only_rows(value, rows[name], dtype)
            loaded[name] = value.to(device, dtype) if value.is_floating_point() else value.to(device)
            self._set(name, loaded[name])
            del value  # free it before the next tensor is read
        self._tie(loaded, skip)
        if self.sketch:
            return
        module = self.model.get_submodule(prefix)
        for path, buffer in list(module.named_buffers()):
            if not buffer.is_meta:
                owner, _, leaf = path.rpartition(".")
                module.get_submodule(owner)._buffers[leaf] = buffer.to(device)
        self._move_computed(prefix, device, dtype)

    def read_weights(self) -> None:
        """Leave sketch mode, so that weights are read from now on. A hub id's weights are fetched now.

        Raises:
            NearplaneError: weights are missing or do not match the configuration.
        """
        if not self.sketch:
            return
        stand_down(self.model)
        self.sketch = False
        if isinstance(self.store, Promised):
            self.folder = locate(self.name, trust_remote_code=self.trust_remote_code)
            self.store = split(self.model, Store(self.folder))
            self.names = _disk_names(self.model, self.store, self.folder)
        self.unload("")

    def unload(self, prefix: str) -> None:
        """Send the parameters below ``prefix`` back to the meta device."""
        for name in self._below(prefix):
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if leaf in module._parameters:
                value = module._parameters[leaf]
                assert value is not None
                module._parameters[leaf] = nn.Parameter(value.to("meta"), requires_grad=False)

    def _move_computed(self, prefix: str, device: torch.device, dtype: torch.dtype) -> None:
        """Move parameters below ``prefix`` that are in no file: they are in the skeleton all the time."""
        stored = {*self.names, *absent.tied(self.model)}
        for name, value in list(self.model.named_parameters()):
            if name.startswith(prefix) and name not in stored and not value.is_meta:
                self._set(name, value.data.to(device, dtype))

    def _tie(self, loaded: dict[str, Tensor], skip: Iterable[str]) -> None:
        """Share loaded tensors with the parameters that are tied to them."""
        for name, origin in absent.tied(self.model).items():
            if origin in loaded and name not in self.names and not any(name.startswith(s + ".") for s in skip):
                self._set(name, loaded[origin])

    def _below(self, prefix: str) -> list[str]:
        return [name for name in self.names if not prefix or name.startswith(prefix + ".")]

    def _set(self, name: str, value: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value


def open_source(model: str | Path, *, sketch: bool = False, trust_remote_code: bool = False) -> Source:
    """Open a local transformers folder, a hub id or ``demo``. No weight is read.

    Args:
        model: the folder, the id or ``demo``.
        sketch: read no weight until ``Source.read_weights``. The folder may hold config.json alone; of a hub id only the
            small files are fetched.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        The source: a skeleton on the meta device, and its tensors, read when they are asked for.

    Raises:
        NearplaneError: a missing, unreadable, pickled, remote-code or unknown model.
        SettingError: a model that is quantized already.
    """
    folder = locate(model, weights=not sketch, trust_remote_code=trust_remote_code)
    bare = sketch and not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))
    store = None if bare else Store(folder)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None or (folder / "quantize_config.json").exists():
        raise SettingError(f"{model} is quantized already; give the original model.")
    dtype = promised_dtype(folder) if store is None else None
    skeleton = build_skeleton(config, folder, trust_remote_code=trust_remote_code)
    refuse_unread(skeleton, folder)
    if store is None:
        assert dtype is not None
        absent.compute(skeleton, [name for name, value in skeleton.named_parameters() if value.is_meta])
        store = Promised(folder, skeleton, dtype)
        names = {name: name for name in store.names}
    else:
        store = split(skeleton, store)
        names = _disk_names(skeleton, store, folder)
    set_visit(skeleton, "each")
    if sketch:
        stand_in(skeleton)
    return Source(str(model), folder, config, store, skeleton, names, trust_remote_code, sketch=sketch)


def open_skeleton(folder: Path, *, trust_remote_code: bool = False) -> tuple[Any, nn.Module]:
    """Return the configuration and the skeleton of a folder, without its quantization if it has one."""
    config = read_config(folder, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config, build_skeleton(copy.deepcopy(config), folder, trust_remote_code=trust_remote_code)


def build_skeleton(config: Any, folder: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """Build a model with parameters on the meta device and computed buffers, its experts taken apart.

    Args:
        config: its configuration; its dtype is set to float32.
        folder: its folder, for errors.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        NearplaneError: transformers has no class for the configuration, or the class rejects its values.
    """
    try:
        build = builder(config, trust_remote_code)
        if build is None:
            raise NearplaneError(
                f"{folder}: transformers {transformers.__version__} has no model class for {config.model_type}."
            )
        config.dtype = torch.float32
        with torch.device("meta"):  # sizes first: buffers, such as masks, are real below
            draft = build(copy.deepcopy(config))
        size = sum(buffer.nbytes for buffer in draft.buffers())
        if size > MOST_BUFFERS:
            raise ValueError(f"its masks and tables alone would take {size / 1e9:.3g} GB")
        with init_empty_weights(include_buffers=False), LargeOnMeta(MOST_BUFFERS):
            model = build(config)
    except (*BAD_CONFIG, ImportError, RuntimeError, MemoryError) as error:
        raise NearplaneError(f"{folder}: no model can be built from its config.json ({first_line(error)}).") from error
    absent.note_shared(model, draft)
    unfuse(model)
    return model.eval()


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer in a model folder. NearplaneError if there is none that transformers can load."""
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NearplaneError(
            f"{folder} has no tokenizer that transformers can load ({type(error).__name__})."
        ) from error


def refuse_unread(model: nn.Module, folder: Path) -> None:
    """Raise NearplaneError for fused experts of an unknown layout."""
    name = unread(model)
    if name is not None:
        raise NearplaneError(
            f"{folder}: transformers merges weights of {type(model).__name__} while loading ({name}) into a module of "
            "experts that nearplane cannot take apart."
        )


def finite(value: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return whether a tensor holds neither NaN nor Inf, after conversion to ``dtype`` if given."""
    if not value.is_floating_point():
        return True
    return all(all_finite(part.to(dtype or value.dtype)) for part in torch.split(value.flatten(), AT_ONCE))


def fingerprint(value: Tensor) -> str:
    """Hash the bytes of a tensor: BLAKE2b of one 64-bit sum per 4 KiB.

    Any single changed number changes the hash. Hashing runs at about the speed of memory.
    """
    raw = value.flatten().view(torch.uint8)
    parts = len(raw) // (8 * ADDED_UP)
    whole = parts * 8 * ADDED_UP
    total = raw[:whole].view(torch.int64).view(parts, ADDED_UP).sum(1)
    digest = hashlib.blake2b(total.numpy().tobytes(), digest_size=8)
    digest.update(raw[whole:].numpy().tobytes())
    return digest.hexdigest()


def only_rows(value: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy the given rows of a matrix; all other rows are zero.

    The result is an anonymous memory map, whose untouched pages take no memory.
    """
    pages = mmap.mmap(-1, value.numel() * dtype.itemsize)
    result = torch.frombuffer(pages, dtype=dtype).view(value.shape)
    for part in torch.split(rows, max(1, AT_ONCE // value.shape[1])):
        result[part] = value[part].to(dtype)
    return result


def _disk_names(model: nn.Module, store: Store, folder: Path) -> dict[str, str]:
    """Return the name on disk of every stored parameter. NearplaneError for a missing one or another shape."""
    state, on_disk = model.state_dict(), names_in_model(model, store.names)
    missing = absent.lacking(model, on_disk)
    on_disk |= absent.stored_as(model, on_disk)
    names: dict[str, str] = {}
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name in on_disk and name in state:
            if store.shape(on_disk[name]) != tuple(value.shape):
                stored, wanted = list(store.shape(on_disk[name])), list(value.shape)
                raise NearplaneError(f"{folder}: {on_disk[name]} has shape {stored}, config.json asks for {wanted}.")
            names[name] = on_disk[name]
    if missing and converts(model):
        raise NearplaneError(
            f"{folder} lacks {missing[0]}; transformers converts weights of {type(model).__name__} while loading, and nearplane "
            "follows it for experts only."
        )
    if missing:
        raise NearplaneError(
            f"{folder} lacks {len(missing)} weights that config.json asks for, the first: {missing[0]}."
        )
    return names
