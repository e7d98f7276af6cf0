"""Tiny random models of any model type: the class that a checkpoint names, sizes that fit, and what the model hears with.

Sizes are those of the first sizing (``tiny_configs.py``) whose model runs on the probe.
"""

import copy
import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from tiny_configs import SIZINGS, default_of, parts_of, settings_of
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES

from nearplane.core.errors import NearplaneError
from nearplane.models import inputs as classes

LARGEST = 64_000_000  # parameters; a type whose sizes go by other names stays large
# How far a type gets.
STEPS = ("", "configuration", "class", "model", "inputs", "forward", "runs")
# The class that a checkpoint names, where it is not what the mappings say.
CLASSES = {
    "levit": "LevitForImageClassification", "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}  # fmt: skip
# Feature extractors that transformers names otherwise or not at all, and their settings.
EXTRACTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2-bert": ("SeamlessM4TFeatureExtractor", {}),
    "moonshine_streaming": ("Wav2Vec2FeatureExtractor", {}),
    "clap": ("ClapFeatureExtractor", {"truncation": "rand_trunc"}),
    "clap_audio_model": ("ClapFeatureExtractor", {"truncation": "rand_trunc"}),
}
HEARING = ("audio_config", "encoder_config", "audio_encoder_config")
# Names of the channels of a mel spectrogram.
CHANNELS = ("num_mel_bins", "input_feat_per_channel", "num_mel_channels", "n_mels", "mel_bins", "feature_size")
MODELS = "transformers.models"


@dataclasses.dataclass
class Tiny:
    """A configuration, the function that builds its model, and why the model does not run, if so."""

    sizing: str
    step: str
    config: Any = None
    build: Callable[[Any], Any] | None = None
    error: Exception | None = None


def tiny_model(kind: str, folder: Path) -> Tiny:
    """The first sizing of a type whose model runs on the probe, else the one that gets furthest.

    Args:
        kind: the model type.
        folder: an empty folder, where the feature extractor of a type that hears is written.
    """
    best = Tiny("", "")
    for sizing in SIZINGS:
        tried = _tried(kind, sizing, settings_of(kind, sizing), folder)
        if tried.step in ("runs", "class", "inputs"):  # what other sizes cannot mend
            return tried
        if STEPS.index(tried.step) > STEPS.index(best.step):
            best = tried
    return best


def _tried(kind: str, sizing: str, settings: dict[str, Any], folder: Path) -> Tiny:
    """How far a model of these settings gets."""
    tried = Tiny(sizing, "configuration")
    try:
        tried.config = transformers.AutoConfig.for_model(kind, **settings)
        tried.step, tried.build = "class", class_of(tried.config)
        if tried.build is None:
            return tried
        tried.step = "model"
        with torch.device("meta"):
            size = sum(p.numel() for p in tried.build(copy.deepcopy(tried.config)).parameters())
        if size > LARGEST:
            raise NearplaneError(f"{size / 1e6:.0f} million parameters at the smallest sizes found")
        torch.manual_seed(0)
        model = tried.build(copy.deepcopy(tried.config)).float().eval()
        extractor = extractor_of(tried.config)
        if extractor is not None:
            extractor.save_pretrained(folder)
        tried.step = "inputs"
        batch = classes.probe(model, folder)
        tried.step = "forward"
        with torch.no_grad():
            model(**batch, **classes.options(model))
        tried.step = "runs"
    except (*classes.FORWARD_ERRORS, NearplaneError, ImportError, StrictDataclassError, OSError) as error:
        tried.error = error
    return tried


def class_of(config: Any) -> Callable[[Any], Any] | None:
    """What builds a model of a configuration, which is told the class that a checkpoint names if a mapping gives none."""
    kind, whole = config.model_type, transformers.AutoModel._model_mapping
    pair = hasattr(config, "text_config") and (hasattr(config, "vision_config") or hasattr(config, "audio_config"))
    if kind in CLASSES or kind in tiny.CLASSES:
        config.architectures = [CLASSES.get(kind) or tiny.CLASSES[kind]]
    elif pair and type(config) not in classes.CAUSAL._model_mapping and type(config) in whole:
        config.architectures = [whole[type(config)].__name__]  # both towers, not one's head
    elif classes.builder(config) is None:
        named = _published(config)
        config.architectures = [named] if named else None
    return classes.builder(config)


def _published(config: Any) -> str | None:
    """A class that transformers exports for a configuration: of a task's mapping, or else of the module beside it."""
    mappings = (value for name, value in vars(modeling_auto).items() if re.fullmatch("MODEL_FOR.*MAPPING_NAMES", name))
    tasks = [mapping[config.model_type] for mapping in mappings if config.model_type in mapping]
    try:
        beside = vars(importlib.import_module(type(config).__module__.replace("configuration_", "modeling_")))
    except ModuleNotFoundError:
        beside = {}
    own = [
        n for n, c in beside.items() if getattr(c, "config_class", None) is type(config) and hasattr(transformers, n)
    ]
    runs = [n for n in own if any("forward" in vars(c) for c in beside[n].__mro__ if c.__module__.startswith(MODELS))]
    bare = sorted(runs, key=lambda name: not name.endswith("Model"))
    return next((name for name in (*tasks, *bare) if isinstance(name, str)), None)


def extractor_of(config: Any) -> Any:
    """The feature extractor of a type that hears, for the channels that a configuration names; None for other types."""
    name, more = EXTRACTORS.get(config.model_type, (FEATURE_EXTRACTOR_MAPPING_NAMES.get(config.model_type), {}))
    if name is None:  # a part has its whole's
        package = type(config).__module__.rpartition(".")[0]
        beside = (k for k in FEATURE_EXTRACTOR_MAPPING_NAMES if CONFIG_MAPPING[k].__module__.startswith(package + "."))
        name = next((FEATURE_EXTRACTOR_MAPPING_NAMES[k] for k in beside), None)
    if name is None:
        return None
    audio = next((config.__dict__[key] for key in HEARING if key in config.__dict__), config)
    values = (getattr(audio, key, None) for key in CHANNELS)
    channels = next((value for value in values if isinstance(value, int)), None)
    stacked = getattr(config, "feature_projection_input_dim", None)
    sizes = {"feature_size": channels, "num_mel_bins": channels, "max_length": getattr(config, "max_length", None)}
    sizes |= {"feature_size": stacked // 2, "num_mel_bins": stacked // 2} if isinstance(stacked, int) else {}
    kind = getattr(transformers, name)
    takes = inspect.signature(kind.__init__).parameters
    try:
        return kind(**{key: value for key, value in sizes.items() if key in takes and value is not None}, **more)
    except ImportError:  # of torchaudio or librosa
        return None


def wholes() -> dict[str, list[str]]:
    """Of each type that is a part, the types whose configuration holds it, from the same package of transformers."""
    found: dict[str, list[str]] = {}
    for kind in CONFIG_MAPPING_NAMES:
        try:
            inside, home = dict.fromkeys(_inside(default_of(kind))), CONFIG_MAPPING[kind].__module__.rpartition(".")[0]
        except (*classes.FORWARD_ERRORS, StrictDataclassError, ImportError):
            continue
        for part in inside:
            if part in CONFIG_MAPPING_NAMES and part != kind and CONFIG_MAPPING[part].__module__.startswith(home + "."):
                found.setdefault(part, []).append(kind)
    return found


def _inside(config: Any) -> Iterator[str]:
    for part in parts_of(config).values():
        yield part.model_type
        yield from _inside(part)
