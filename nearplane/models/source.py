"""Open a model on disk: a skeleton on the meta device, weights that are read when needed, a tokenizer.

The skeleton is an instance of the model's own class. ``Source.load`` reads the parameters of one module from disk.
``Source.unload`` sends them back to the meta device, so that only the weights at work are in memory. In sketch mode no
weight is read (``sketch.py``). Every tensor that is read is checked for NaN and Inf and hashed, which identifies a resumed run.
"""

import copy
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
from nearplane.formats.originals import already, empty, is_original, named_strays, plain_config, strays, unexplained
from nearplane.formats.read import open_original, stated
from nearplane.formats.store import INDEX, Store, Twice, read_index, read_json
from nearplane.models import absent
from nearplane.models.experts import LargeOnMeta, set_visit, unfuse
from nearplane.models.experts_disk import converts, names_in_model, split, unread
from nearplane.models.inputs import builder
from nearplane.models.locate import (
    BAD_CONFIG,
    MOST_BUFFERS,
    commit_of,
    first_line,
    locate,
    read_config,
    with_revision,
)
from nearplane.models.sketch import Promised, drawn, promised_dtype, stand_down, stand_in
from nearplane.models.values import fingerprint, finite, kept_in_float32, only_rows


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
    twice: tuple[str, str] | None = None  # the parameter of an untied head, and the embedding's, whose values it has
    revision: str | None = None  # of a hub id, as it was asked for
    commit: str | None = None  # of a hub id, the one whose files were read
    promise_of: "Source | None" = None  # of a view with known sizes and unknown tensors: the opened source

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer."""
        return load_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)

    def raw_config(self) -> dict[str, Any]:
        """Read config.json as a dictionary."""
        return read_json(self.folder / "config.json")

    def written_config(self) -> dict[str, Any]:
        """Return config.json for a folder with this source's tensors, which are dense."""
        config = plain_config(self.raw_config())
        return config if self.twice is None else without_tie(config)

    @property
    def original(self) -> Store:
        """The tensors on disk, before any transform."""
        return self.store.store if isinstance(self.store, Twice) else self.store

    @cached_property
    def parameters(self) -> dict[str, str]:
        """Names of parameters and buffers by their names on disk."""
        return {disk: name for name, disk in self.names.items()}

    def written(self, name: str, asked: torch.dtype | None) -> torch.dtype:
        """Return the dtype in which a stored tensor is written where it stays dense.

        Args:
            name: on disk.
            asked: dtype for floating tensors; None: each keeps its own. Tensors that transformers keeps in float32 keep
                their own, too.
        """
        own = self.store.dtype(name)
        if asked is None or not own.is_floating_point:
            return own
        return own if kept_in_float32(self.model, asked)(self.parameters.get(name, name)) else asked

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

    def check(self, besides: set[str], asked: torch.dtype | None) -> str:
        """Check and hash every stored tensor that is copied unquantized.

        Args:
            besides: names of the quantized linears, whose weights are left out.
            asked: dtype in which the tensors will be written, as ``written`` takes it.

        Returns:
            Hashes, separated by spaces.

        Raises:
            NumericalError: a tensor holds NaN or Inf, or would as it will be written.
        """
        sites, sums = {self.names[name + ".weight"] for name in besides}, list[str]()
        for name in sorted(self.store.names - sites):
            value = self.store.get(name)
            sums.append(self.digest(name, value))
            if not finite(value):
                raise NumericalError(
                    f"weight {name} holds NaN or Inf; the checkpoint is broken, download or convert it again."
                )
            written = self.written(name, asked)
            if not finite(value, written):
                raise NumericalError(
                    f"weight {name} does not fit the range of {str(written)[6:]}; give another --dtype."
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
        if isinstance(self.original, Promised):
            repository = self.name if self.revision is None else self.name.partition("@")[0]
            commit = self.commit or self.revision  # of the same commit as the small files
            self.folder = locate(repository, revision=commit)
            store, told = open_original(Store(self.folder))
            self.store, self.notes = split(self.model, store), [*self.notes, *([told] if told else [])]
            if self.twice is not None:
                self._show(*self.twice)
            self.names = _disk_names(self.model, self.store, self.folder)
        self.unload("")

    def show_twice(self, parameter: str, like: str) -> None:
        """Give a tied parameter a tensor of its own, with the values of the parameter ``like``."""
        self.twice = parameter, like
        self._show(parameter, like)
        self.names = {**self.names, parameter: parameter}

    def _show(self, parameter: str, like: str) -> None:
        self.store = Twice(self.store, parameter, names_in_model(self.model, self.store.names)[like])

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


def open_source(
    model: str | Path, *, sketch: bool = False, trust_remote_code: bool = False, revision: str | None = None
) -> Source:
    """Open a local transformers folder, a hub id or ``demo``. No weight is read.

    Args:
        model: the folder, the id or ``demo``.
        sketch: read no weight until ``Source.read_weights``. The folder may hold config.json alone; of a hub id only the
            small files are fetched.
        trust_remote_code: run Python code that comes with the model.
        revision: of a hub id, the branch, tag or commit.

    Returns:
        The source: a skeleton on the meta device, and its tensors, read when they are asked for.

    Weights stored as FP8 or FP4 with scales are shown as dense ones (``formats/small_floats.py``).

    Raises:
        NearplaneError: a missing, unreadable, pickled, remote-code or unknown model; a tensor of a quantized weight that
            config.json does not explain.
        SettingError: a model that is quantized in another way.
    """
    folder = locate(model, weights=not sketch, revision=revision)
    bare = sketch and not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))
    store = None if bare else Store(folder)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    told, coded = None, _refuse_quantized(str(model), folder, store)
    if store is not None:
        store, told = open_original(store)
    undress(config)
    dtype = promised_dtype(folder) if store is None else None
    skeleton = build_skeleton(config, folder, trust_remote_code=trust_remote_code)
    refuse_unread(skeleton, folder)
    if store is None:
        assert dtype is not None
        absent.compute(skeleton, [name for name, value in skeleton.named_parameters() if value.is_meta])
        store = Promised(folder, skeleton, dtype, coded=coded)
        names = {name: name for name in store.names}
    else:
        store = split(skeleton, store)
        names = _disk_names(skeleton, store, folder)
    set_visit(skeleton, "each")
    if sketch:
        stand_in(skeleton)
    notes, asked = [told] if told else [], with_revision(model, revision)[1]
    return Source(
        str(model), folder, config, store, skeleton, names, trust_remote_code, notes=notes, sketch=sketch, revision=asked,
        commit=commit_of(folder),
    )  # fmt: skip


def open_skeleton(folder: Path, *, trust_remote_code: bool = False) -> tuple[Any, nn.Module]:
    """Return the configuration and the skeleton of a folder, without its quantization if it has one."""
    config = read_config(folder, trust_remote_code=trust_remote_code)
    undress(config)
    return config, build_skeleton(copy.deepcopy(config), folder, trust_remote_code=trust_remote_code)


def undress(config: Any) -> None:
    """Take the quantization out of a configuration and out of those inside it, in place."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            undress(getattr(config, name))


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


def without_tie(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json that ties no head to an embedding, in its text part neither."""
    text = config.get("text_config")
    inner = {"text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, dict) else {}
    return {**config, **inner, "tie_word_embeddings": False}


def _refuse_quantized(model: str, folder: Path, store: Store | None) -> bool:
    """Raise SettingError for a model that is quantized and is no original that is read as dense.

    Args:
        model: as the user gave it.
        folder: its folder.
        store: its tensors; None: the folder holds none.

    Returns:
        Whether it is an original whose weights are stored as small floats.

    Raises:
        NearplaneError: the folder holds no tensors, and the index shows quantized ones.
    """
    quantization = stated(folder, read_json(folder / "config.json"))
    if quantization is not None and not is_original(quantization):
        if store is not None and not strays(store, store.names):
            raise SettingError(empty(folder, quantization))
        raise SettingError(already(model, folder, quantization))
    if quantization is None and store is None and (folder / INDEX).is_file():
        for name in named_strays(read_index(folder / INDEX)):
            raise NearplaneError(unexplained(folder, name, None))
    return quantization is not None


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
            if value.is_floating_point() and not store.dtype(on_disk[name]).is_floating_point:
                raise NearplaneError(unexplained(folder, on_disk[name], None, store.dtype(on_disk[name])))
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
