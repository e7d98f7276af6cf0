"""Decode one token of one sequence in one call of C++, where a model is of the standard kind; else as transformers does.

``fuse`` stands before the model's forward. The first token that could be decoded so lets the model be described
(``standard.py``), and its logits be compared with those of the plain forward on the same tokens. What differs, or cannot be
described, runs the plain forward; ``why`` names the reason. A token is decoded by C++ only while nothing has changed: no hook,
adapter, other weight or setting since the comparison.
"""

import inspect
import weakref
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from nearplane.core.errors import SettingError
from nearplane.runtime.decode import Decoder, Description
from nearplane.runtime.growing import Run, hold
from nearplane.runtime.linear import QuantizedLinear
from nearplane.runtime.standard import GLOBAL_HOOKS, NotStandardError, describe, read_tensors

Decode = Literal["auto", "plain"]
PROBE = 3  # tokens of the comparison
# Largest relative error of hidden states in float32. That is up to the rounding of activations to 16 bits.
HIDDEN = 2e-3
# Largest relative error of a token's logits, by dtype: where hidden states were compared before, and where they were not. The
# small dtypes differ by the rounding of hidden states, too, which the plain path alone does; a model of 2 bits makes it large.
COMPARED = {torch.float32: 1e-2, torch.float16: 1e-1, torch.bfloat16: 3e-1}
TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Keywords of a forward that change nothing for one token, whatever their value.
IGNORED = {"logits_to_keep", "num_logits_to_keep"}
# Those that ``_step`` reads, and those that no model reads: transformers' server hands its tokenizer down.
READ, UNREAD = ("input_ids", "past_key_values", "attention_mask", "position_ids", "cache_position"), ("tokenizer",)
FLAGS = ("output_attentions", "output_hidden_states")


class _Fused:
    """Stands where a model's ``forward`` was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.plain: Any = type(model).forward
        signature = inspect.signature(self.plain)
        self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
        self.__name__, self.__doc__ = "forward", self.plain.__doc__
        self.decode: Decode = "auto"
        self.reason: str | None = None
        self.decoder: _Watched | None = None
        self.tokens = 0
        """Tokens decoded by C++ so far."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model()
        if not torch.compiler.is_compiling():
            ids = args[0] if len(args) == 1 else kwargs.get("input_ids") if not args else None
            if type(ids) is Tensor and self.decode != "plain":
                if ids.shape != (1, 1):  # a new sequence: what stood against decoding may be gone
                    self.reason = None
                elif (out := self._step(model, ids, kwargs)) is not None:
                    return out
        return self.plain(model, *args, **kwargs)

    def _step(self, model: Any, ids: Tensor, kwargs: dict[str, Any]) -> Any:
        """Decode a token; None where the plain forward must."""
        if not _asks_for_logits(model, kwargs) or ids.device.type != "cpu" or ids.is_floating_point():
            return None
        watched = self.ready(model)
        if watched is None:
            return None
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in watched.tensors):
            return None
        decoder, cache = watched.decoder, kwargs.get("past_key_values")
        run = hold(cache, watched.shapes, watched.windows, decoder.description.dtype)
        if run is None or not _next(run.position, kwargs):
            return None
        token = int(ids)
        if not 0 <= token < watched.embeddings:
            return None
        logits = decoder.step(token, run)
        self.tokens += 1
        return CausalLMOutputWithPast(logits=logits.view(1, 1, -1), past_key_values=cache)

    def ready(self, model: Any) -> "_Watched | None":
        """Give the decoder of a model as it is now; None, and ``reason``, where there is none."""
        if self.decoder is not None:
            if self.decoder.unchanged(model):
                return self.decoder
            self.decoder, self.reason = None, None
        if self.reason is not None:
            return None
        try:
            described = describe(model)
            compare(self.plain, model, described)
            self.decoder = _Watched(model, described)
        except NotStandardError as reason:
            self.reason = str(reason)
        return self.decoder

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Fused":
        import copy

        return self._again(copy.deepcopy(self.model(), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (self.model(), self.decode)

    def _again(self, model: Any) -> "_Fused":
        return _made(model, self.decode)


def _made(model: Any, decode: Decode) -> _Fused:
    """Make what stands before a copy's forward."""
    made = _Fused(model)
    made.decode = decode
    return made


class _Watched:
    """A decoder, and what must stay as it was when the decoder was made."""

    def __init__(self, model: Any, found: Description) -> None:
        self.decoder = Decoder(found)
        self.shapes = len(found.blocks), found.shared, found.width
        self.windows = tuple(block.window for block in found.blocks)
        self.embeddings = int(found.embedding.weight.shape[0])  # type: ignore[index]
        self.tensors = read_tensors(found)
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]
        self.hooks: int = RemovableHandle.next_id
        self.places = [
            (module._modules, name, child)
            for module in model.modules()
            for name, child in module._modules.items()
            if child is not None
        ]
        self.inner = [(vars(child), isinstance(child, nn.Linear)) for _, _, child in self.places]
        self.forwards = [(kind, kind.forward) for kind in {type(child) for _, _, child in self.places}]
        self.numbers = [
            (vars(child), name, value)
            for _, _, child in self.places
            for name, value in vars(child).items()
            if isinstance(value, float) or name == "sliding_window"
        ]
        rotary = [tensor for tensor in found.rotation.buffers() if not tensor.is_inference()]
        self.versions = [(tensor, tensor._version) for tensor in rotary]
        packed = [module for module in found.modules() if isinstance(module, QuantizedLinear)]
        self.packed = [(vars(m), m._buffers, m._buffers["codes"], m._buffers["scales"], m.arithmetic) for m in packed]

    def unchanged(self, model: Any) -> bool:
        """Tell whether modules, their forwards and numbers, tensors, hooks and arithmetic are those of then."""
        if RemovableHandle.next_id != self.hooks:
            if any(GLOBAL_HOOKS) or any(
                child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks
                for _, _, child in self.places
            ):
                return False
            self.hooks = RemovableHandle.next_id
        for modules, name, child in self.places:
            if modules.get(name) is not child:
                return False
        for inside, linear in self.inner:
            if "forward" in inside or (inside["training"] and not linear):
                return False
        for inside, buffers, codes, scales, arithmetic in self.packed:
            if buffers["codes"] is not codes or buffers["scales"] is not scales:
                return False
            if inside["arithmetic"] != arithmetic or inside["activations"] is not None:
                return False
        return [tensor.data_ptr() for tensor in self.tensors] == self.addresses and self._same_numbers()

    def _same_numbers(self) -> bool:
        """Tell whether forwards of classes, numbers of modules and what turns positions are those of then."""
        return (
            all(kind.forward is forward for kind, forward in self.forwards)
            and all(inside.get(name) == value for inside, name, value in self.numbers)
            and all(tensor._version == version for tensor, version in self.versions)
        )


def _asks_for_logits(model: Any, kwargs: dict[str, Any]) -> bool:
    """Tell whether a forward asks for one token's logits over a cache, and for nothing else."""
    config = model.config
    for name, value in kwargs.items():
        if name in READ or name in UNREAD:
            continue
        if name in ("use_cache", "return_dict"):
            if value is False:
                return False
        elif name in IGNORED:
            if type(value) is not int:
                return False
        elif value is not None and value is not False:
            return False
    if model.training or torch.is_autocast_enabled("cpu") or (kwargs.get("use_cache") is None and not config.use_cache):
        return False
    if kwargs.get("return_dict") is None and not getattr(config, "return_dict", True):
        return False
    return not any(getattr(config, name, False) for name in FLAGS if kwargs.get(name) is None)


def _next(position: int, kwargs: dict[str, Any]) -> bool:
    """Tell whether a token stands directly behind ``position`` others and sees all of them."""
    mask = kwargs.get("attention_mask")
    if mask is not None and not (
        isinstance(mask, Tensor)
        and mask.shape == (1, position + 1)
        and not mask.is_floating_point()
        and bool(mask.all())
    ):
        return False
    for name in ("position_ids", "cache_position"):
        value = kwargs.get(name)
        if value is not None and not (value.numel() == 1 and int(value) == position):
            return False
    return True


def compare(plain: Any, model: Any, found: Description) -> None:
    """Compare the fused step with the plain forward on a few tokens.

    Hidden states behind the last norm are compared in float32, whatever the dtype; then the logits in the model's own. Rounding
    to 8 bits is a step function, on which two right sums part: linears with 8-bit activations are compared with 16 bits.

    Args:
        plain: the forward of the model's class.
        model: the model.
        found: its description.

    Raises:
        NotStandardError: they differ by more than ``HIDDEN``, or by more than ``COMPARED`` or ``TOLERANCE``.
    """
    count = int(found.embedding.weight.shape[0])  # type: ignore[index]
    ids = torch.tensor([[(2 * i + 1) * count // (2 * PROBE) for i in range(PROBE)]])
    eight = [part for part in found.modules() if isinstance(part, QuantizedLinear) and part.arithmetic == "a8"]
    dense = [part for block in found.blocks for part in block.linears if not isinstance(part, QuantizedLinear)]
    limit = TOLERANCE[found.dtype]
    for part in eight:
        part.arithmetic = "a16"
    try:
        with torch.no_grad():
            if all(part.weight.dtype == torch.float32 for part in dense):
                limit = COMPARED[found.dtype]
                embedded = found.embedding(ids).float()
                error = _hidden_error(model.model, found, ids, embedded)
                if not error <= HIDDEN:
                    raise NotStandardError(
                        f"its hidden states differ by {error:.2g} of their size from {_name(model)} own (at most {HIDDEN:g})"
                    )
            error = _logits_error(plain, model, found, ids)
    finally:
        for part in eight:
            part.arithmetic = "a8"
    if not error <= limit:
        raise NotStandardError(
            f"its logits differ by {error:.2g} of their size from {_name(model)} own (at most {limit:g})"
        )


def _name(model: nn.Module) -> str:
    return f"{type(model).__name__}'s"


def _run_behind(found: Description, cache: Any, dtype: torch.dtype) -> Run:
    """Hold a cache that the plain forward has filled. NotStandardError for one of another kind."""
    shapes, windows = (len(found.blocks), found.shared, found.width), tuple(block.window for block in found.blocks)
    run = hold(cache, shapes, windows, dtype)
    if run is None:
        raise NotStandardError("its cache is of another kind")
    return run


def _hidden_error(body: Any, found: Description, ids: Tensor, embedded: Tensor) -> float:
    """Give the largest relative error of a token's last hidden state, in float32."""
    cache = DynamicCache(config=body.config)
    body(inputs_embeds=embedded[:, :1], past_key_values=cache, use_cache=True)
    run, decoder = _run_behind(found, cache, torch.float32), Decoder(found, torch.float32)
    got = torch.stack([decoder.last(int(token), run) for token in ids[0, 1:]])
    wanted = body(inputs_embeds=embedded, use_cache=False).last_hidden_state[0, 1:]
    return _largest(got, wanted, wanted)


def _logits_error(plain: Any, model: Any, found: Description, ids: Tensor) -> float:
    """Give the largest relative error of a token's logits, to their size around their mean, in the model's dtype."""
    cache = DynamicCache(config=model.config)
    plain(model, input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    run, decoder = _run_behind(found, cache, found.dtype), Decoder(found)
    got = torch.stack([decoder.step(int(token), run) for token in ids[0, 1:]]).float()
    wanted = plain(model, input_ids=ids, use_cache=False).logits[0, 1:].float()
    return _largest(got, wanted, wanted - wanted.mean(-1, keepdim=True))


def _largest(got: Tensor, wanted: Tensor, size: Tensor) -> float:
    if got.shape != wanted.shape:
        return float("inf")
    return float(((got - wanted).norm(dim=-1) / size.norm(dim=-1).clamp_min(1e-30)).max())


def fuse(model: nn.Module, decode: Decode = "auto") -> None:
    """Have a model decode single tokens in C++ wherever it can. A model that has no head for tokens is left alone.

    Args:
        model: a packed model.
        decode: "auto", or "plain" to decode as transformers does.

    Raises:
        SettingError: another word for ``decode``.
    """
    check_decode(decode)
    if hasattr(model, "lm_head") and hasattr(model, "generate"):
        model.__dict__["forward"] = _made(model, decode)


def _of(model: nn.Module) -> _Fused | None:
    found = model.__dict__.get("forward")
    return found if isinstance(found, _Fused) else None


def check_decode(decode: str) -> None:
    """Raise SettingError for an unknown way to decode."""
    if decode not in ("auto", "plain"):
        raise SettingError(f"decode must be auto or plain; got {decode!r}.")


def set_decode(model: nn.Module, decode: Decode) -> None:
    """Set how a packed model decodes: "auto", fused where it can be, or "plain". SettingError for another word."""
    check_decode(decode)
    fused = _of(model)
    if fused is not None:
        fused.decode = decode


def decoder_of(model: nn.Module) -> Decoder | None:
    """Give what decodes a model's tokens in C++; None where they are decoded as transformers does."""
    fused = _of(model)
    ready = None if fused is None or fused.decode == "plain" else fused.ready(model)
    return None if ready is None else ready.decoder


def why(model: nn.Module) -> str:
    """Name how one token of one sequence is decoded: "fused decode", or "plain decode" with the reason."""
    fused = _of(model)
    if fused is None:
        return "plain decode: the model is not packed, or has no head for tokens"
    if fused.decode == "plain":
        return "plain decode: asked for"
    if fused.ready(model) is None:
        return f"plain decode: {fused.reason}"
    return "fused decode"
