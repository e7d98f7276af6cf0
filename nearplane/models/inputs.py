"""Choose the transformers class that a configuration means, and find out what the forward of that class reads.

The class is the one that the checkpoint names (``architectures``). If the checkpoint names none, the class is the one that
the first of transformers' own mappings has for the configuration. The class decides the inputs: a main input, a
decoder's input behind it, or one input for each of two towers.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.formats.store import read_json
from nearplane.models.locate import first_line

CAUSAL, MASKED = transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM
SEQ2SEQ = (transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForSpeechSeq2Seq)
OTHERS = (transformers.AutoModelForImageClassification, transformers.AutoModelForZeroShotImageClassification)
TEXT, DECODER, IMAGES, AUDIO, WAVES = "input_ids", "decoder_input_ids", "pixel_values", "input_features", "input_values"
MEDIA = frozenset({IMAGES, AUDIO, WAVES})  # inputs that are read from files of a folder
WAVE = 80_000  # samples of a sound wave: five seconds at 16 kHz
PROBE_TOKENS, PROBE_DECODED = 8, 5
MOST_PIXELS = 4096  # of one side of an image
# Exceptions of a model's code over missing arguments, or over shapes and values that it does not expect.
FORWARD_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError, NotImplementedError)


class ForwardFailed(NearplaneError):
    """A failure of the model's own code on arguments that nearplane gives it."""


def builder(config: Any, trust_remote_code: bool = False) -> Callable[[Any], nn.Module] | None:
    """Return the function that builds a model of a configuration.

    Args:
        config: a transformers configuration.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        A function of a configuration; None if transformers has no class for this one.
    """
    named = getattr(config, "architectures", None)
    kind = getattr(transformers, named[0], None) if isinstance(named, list) and _is_name(named) else None
    own = getattr(kind, "config_class", None)
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and own is type(config):
        return kind._from_config  # type: ignore[attr-defined, no-any-return]
    for auto in _order(config):
        if type(config) in auto._model_mapping:
            return auto.from_config  # type: ignore[no-any-return]
    if not trust_remote_code:
        return None
    coded = getattr(config, "auto_map", None) or {}
    auto = next((a for a in (CAUSAL, MASKED, *SEQ2SEQ, *OTHERS) if a.__name__ in coded), None)
    auto = auto or (transformers.AutoModel if "AutoModel" in coded else CAUSAL)
    return lambda given: auto.from_config(given, trust_remote_code=True)


def bare_linears(config: Any) -> list[str]:
    """List the linears of the model that ``AutoModel`` builds of a configuration.

    That model may have a pooler that the checkpoint lacks. The list is empty if ``AutoModel`` does not know the configuration.
    """
    if type(config) not in transformers.AutoModel._model_mapping:
        return []
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(copy.deepcopy(config))
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def is_causal(model: nn.Module) -> bool:
    """Return whether a model reads text only and predicts the next token at every position."""
    if reads(model) != (TEXT,) or output_head(model) is None or getattr(model.config, "is_encoder_decoder", False):
        return False
    masked: Any = MASKED._model_mapping
    return type(model.config) not in masked or masked[type(model.config)] is not type(model)


def refuse_unless_causal(model: nn.Module, what: str) -> None:
    """Raise SettingError unless a model predicts the next token. ``what``: the refused operation."""
    if not is_causal(model):
        raise SettingError(
            f"{what} is for models that predict the next token of a text, which {type(model).__name__} is not."
        )


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the output head of a model; None for a model without one."""
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def text_config(config: Any) -> Any:
    """Return the text part of a configuration, or the whole if there are no parts."""
    return config.get_text_config()


def reads(model: nn.Module) -> tuple[str, ...]:
    """Return the arguments of a model's forward that a sample must hold."""
    takes = inspect.signature(model.forward).parameters
    if "return_loss" in takes:  # two towers whose embeddings are compared
        return tuple(name for name in (TEXT, IMAGES, AUDIO) if name in takes)
    main = str(getattr(model, "main_input_name", TEXT))
    decodes = getattr(model.config, "is_encoder_decoder", False) and DECODER in takes
    return (main, DECODER) if decodes else (main,)


def options(model: nn.Module) -> dict[str, Any]:
    """Return further arguments of a model's forward: no cache of keys and values, since nothing is generated."""
    takes = inspect.signature(model.forward).parameters
    named = "use_cache" in takes
    other = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values()) and hasattr(model.config, "use_cache")
    return {"use_cache": False} if named or other else {}


def probe(model: nn.Module, folder: Any) -> dict[str, Tensor]:
    """Make one small seeded sample for a model's forward.

    A decoder's tokens are fewer than its encoder's, so that no two inputs have one length by chance.

    Args:
        model: the skeleton.
        folder: folder of the model, whose image processor may decide the size.

    Returns:
        Arguments of the forward, each with a first dimension of 1.

    Raises:
        NearplaneError: the forward reads an input that nearplane cannot make.
    """
    if type(model).forward is nn.Module.forward:  # Qwen-Omni
        parts = [name for name, part in model.named_children() if isinstance(part, transformers.PreTrainedModel)]
        first = f" (model.{parts[0]}.save_pretrained(FOLDER))" if parts else ""
        raise NearplaneError(
            f"{folder}: {type(model).__name__} has no forward of its own, only its parts have ({', '.join(parts)}); save one "
            f"part as a model of its own{first}, with the tokenizer, and quantize that."
        )
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    makers: dict[str, Callable[[], Tensor]] = {
        TEXT: lambda: torch.arange(1, PROBE_TOKENS + 1)[None] % text_config(config).vocab_size,
        DECODER: lambda: torch.arange(1, PROBE_DECODED + 1)[None] % text_config(config).vocab_size,
        IMAGES: lambda: torch.randn(1, *image_shape(model, Path(folder)), generator=generator),
        AUDIO: lambda: torch.randn(1, *mel_shape(config), generator=generator),
        WAVES: lambda: torch.randn(1, *wave_shape(config), generator=generator),
    }
    wanted = reads(model)
    unknown = [name for name in wanted if name not in makers]
    if unknown:
        raise NearplaneError(
            f"{folder}: {type(model).__name__} reads {', '.join(unknown)}; nearplane makes {', '.join(makers)} only."
        )
    return {name: makers[name]() for name in wanted}


@contextmanager
def blamed(model: nn.Module, folder: Path) -> Iterator[None]:
    """Turn errors of the model's own code while inside into ForwardFailed."""
    try:
        yield
    except FORWARD_ERRORS as error:
        raise ForwardFailed(
            f"{folder}: {type(model).__name__} does not run on {', '.join(reads(model))} alone ({type(error).__name__}: "
            f"{first_line(error)[:120]}); nearplane does not support it, or config.json is wrong."
        ) from error


def image_shape(model: nn.Module, folder: Path) -> tuple[int, int, int]:
    """Return channels, height and width of the images that a model reads.

    The size is what the folder's image processor makes, if the model takes any size; else what the configuration names.
    """
    timm: Any = getattr(model, "timm_model", None)
    if timm is not None:  # its configuration may name nothing but an architecture
        channels, *sizes = timm.pretrained_cfg["input_size"]
        height, width = getattr(getattr(timm, "patch_embed", None), "img_size", None) or sizes
        return int(channels), int(height), int(width)
    config: Any = getattr(model.config, "vision_config", model.config)
    # No caller here asks to interpolate positions, so that the image processor's size may not fit.
    fixed = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    size = (None if fixed else _processed(folder)) or getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return int(getattr(config, "num_channels", 3)), height, width


def mel_shape(config: Any) -> tuple[int, int]:
    """Return mel channels and frames of a speech model's input. NearplaneError if the configuration lacks them."""
    audio = getattr(config, "audio_config", config)
    channels, frames = getattr(audio, "num_mel_bins", None), getattr(audio, "max_source_positions", None)
    if not isinstance(channels, int) or not isinstance(frames, int):
        raise NearplaneError(f"a model of type {config.model_type} does not say how long its input_features are.")
    return channels, 2 * frames


def wave_shape(config: Any) -> tuple[int]:
    """Return the samples of a speech model's sound wave. NearplaneError if ``input_values`` are no sound wave."""
    if not hasattr(config, "conv_stride"):
        raise NearplaneError(
            f"the input_values of a model of type {config.model_type} are no sound waves; not supported."
        )
    return (WAVE,)


def _processed(folder: Path) -> tuple[int, int] | None:
    """Return height and width of an image processor's output, if its configuration names both as plain integers."""
    path = folder / "preprocessor_config.json"
    raw = read_json(path) if path.is_file() else {}
    size = raw.get("crop_size" if raw.get("do_center_crop") else "size")
    sides = [size.get(side) for side in ("height", "width")] if isinstance(size, dict) else [None]
    whole = [side if type(side) is int and side <= MOST_PIXELS else 0 for side in sides]
    return (whole[0], whole[-1]) if min(whole) > 0 else None


def _order(config: Any) -> tuple[Any, ...]:
    """List transformers' mappings, the likeliest first. Many encoders can also be built as decoders."""
    if getattr(config, "is_encoder_decoder", False):
        return *SEQ2SEQ, CAUSAL, MASKED, *OTHERS, transformers.AutoModel
    encoder = type(config) in MASKED._model_mapping and not getattr(config, "is_decoder", False)
    first = (MASKED, CAUSAL) if encoder else (CAUSAL, MASKED)
    return *first, *SEQ2SEQ, *OTHERS, transformers.AutoModel


def _is_name(named: list[Any]) -> bool:
    return bool(named) and isinstance(named[0], str)
