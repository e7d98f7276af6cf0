"""Describe a model whose decoder blocks are of the standard kind, by its modules; or tell why they are not.

The standard kind: RMSNorm, q, k, v, (norms of their heads,) rotation, attention over groups of heads, o; RMSNorm, gate, up,
SiLU, down. Llama, Mistral, Qwen 2 and 3, SmolLM 2 and 3 and Granite are of it. What a module does is not read from its
class: a description is trusted after ``fused.py`` has compared outputs. What a few tokens would not show is read here: windows,
rotations that change with the length, and code that watches or replaces modules.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _everywhere

from nearplane.runtime import cpu
from nearplane.runtime.decode import Block, Description
from nearplane.runtime.linear import QuantizedLinear

BLOCK = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION, HEAD_NORMS = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
ROTATIONS = ("default", "linear", "llama3", "yarn")  # those that are the same whatever the length
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS: list[Any] = [getattr(_everywhere, f"_global{name}") for name in HOOKS]


class NotStandardError(Exception):
    """A reason why a model is not described."""


def describe(model: Any) -> Description:
    """Describe a model.

    Args:
        model: a causal language model of transformers.

    Raises:
        NotStandardError: in a few words, what is not of the standard kind.
    """
    kernel = cpu.supports(torch.device("cpu"), torch.float32)
    if kernel is not None:
        raise NotStandardError(kernel)
    body: Any = getattr(model, "model", None)
    if children(model) != {"model", "lm_head"} or children(body) != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        raise NotStandardError(f"{type(model).__name__} is not made of embedding, blocks, norm and head alone")
    blocks, watch = list(body.layers), watched(model)
    if watch is not None:
        raise NotStandardError(watch)
    if not blocks:
        raise NotStandardError("it has no blocks")
    attention, config = blocks[0].self_attn if hasattr(blocks[0], "self_attn") else None, model.config
    described = tuple(_block(block, config) for block in blocks)
    rotation = getattr(body.rotary_emb, "rope_type", None)
    if rotation not in ROTATIONS:
        raise NotStandardError(f"its rotary embedding is of type {rotation}")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            raise NotStandardError(f"config.json has {name}")
    width = int(getattr(attention, "head_dim", 0))
    first = described[0].linears
    if not width or any(size(block) != size(described[0]) for block in described):
        raise NotStandardError("its blocks are of different sizes")
    heads, shared = out_of(first[0]) // width, out_of(first[1]) // width
    if heads * width != out_of(first[0]) or shared * width != out_of(first[1]) or heads % shared:
        raise NotStandardError(f"heads of {width} do not divide its projections")
    factors = (getattr(config, name, 1.0) for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"))
    found = Description(
        described, body.embed_tokens, body.norm, model.lm_head, body.rotary_emb, heads, shared, width,
        float(getattr(attention, "scaling", width**-0.5)), *map(float, factors),
    )  # fmt: skip
    _check(found)
    return found


def _block(block: Any, config: Any) -> Block:
    """Describe one block."""
    attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
    name = type(block).__name__
    if children(block) != BLOCK or children(mlp) != MLP:
        raise NotStandardError(f"{name} has other modules than a standard block")
    if children(attention) not in (ATTENTION, ATTENTION | HEAD_NORMS):
        raise NotStandardError(f"{type(attention).__name__} has other modules than standard attention")
    assert attention is not None and mlp is not None
    if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        raise NotStandardError(f"its MLP's function is {type(mlp.act_fn).__name__}, not SiLU")
    window = _window(attention, config)
    linears = tuple(
        [getattr(attention, f"{part}_proj") for part in ("q", "k", "v", "o")]
        + [getattr(mlp, f"{part}_proj") for part in ("gate", "up", "down")]
    )
    norms = (block.input_layernorm, block.post_attention_layernorm)
    heads = (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
    return Block(linears, (*norms, *heads), window, bool(getattr(attention, "use_rope", True)))


def _window(attention: Any, config: Any) -> int:
    """Give the positions that a token of a block sees, itself included; 0: all."""
    kinds, index = getattr(config, "layer_types", None), getattr(attention, "layer_idx", 0)
    kind = kinds[index] if kinds else None
    if kind not in (None, "full_attention", "sliding_attention"):
        raise NotStandardError(f"its attention is of type {kind}")
    window = getattr(attention, "sliding_window", None)
    if kind == "sliding_attention" or (kind is None and not hasattr(attention, "sliding_window")):
        window = getattr(config, "sliding_window", None)
    if window is not None and window < 2:
        raise NotStandardError(f"its window is of {window} positions")
    return int(window or 0)


def _check(found: Description) -> None:
    """Raise NotStandardError for a module of another kind than its place asks for."""
    linears: list[Any] = [part for block in found.blocks for part in block.linears] + [found.head]
    for linear in linears:
        if type(linear) not in (nn.Linear, QuantizedLinear):
            raise NotStandardError(f"a {type(linear).__name__} stands in a linear's place")
        if isinstance(linear, QuantizedLinear) and linear.activations is not None:
            raise NotStandardError("its activations are rounded")
        if isinstance(linear, QuantizedLinear) and linear.codes.device.type != "cpu":
            raise NotStandardError("packed weights are not in the memory of the CPU")
    hidden = linears[0].in_features
    for block in found.blocks:
        _check_norms(block.norms[:2], hidden)
        _check_norms(block.norms[2:], found.width)
    _check_norms((found.last,), hidden)
    embedding: Any = found.embedding
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None or embedding.embedding_dim != hidden:
        raise NotStandardError(f"a {type(embedding).__name__} stands in the embedding's place")
    if linears[-1].in_features != hidden:
        raise NotStandardError("its head reads another width than that of a block")
    for tensor in read_tensors(found):
        if tensor.device.type != "cpu" or tensor.dtype not in cpu.DTYPES or not tensor.is_contiguous():
            raise NotStandardError(f"a weight is {tensor.dtype} on {tensor.device.type}")


def _check_norms(norms: tuple[nn.Module | None, ...], width: int) -> None:
    """Raise NotStandardError for what is no RMSNorm of a width. A norm that is not there is none."""
    for norm in norms:
        if norm is None:
            continue
        tensors = [(name, tuple(tensor.shape)) for name, tensor in (*norm.named_parameters(), *norm.named_buffers())]
        if tensors != [("weight", (width,))] or not (hasattr(norm, "variance_epsilon") or hasattr(norm, "eps")):
            raise NotStandardError(f"a {type(norm).__name__} is no RMSNorm with one weight for what it norms")


def read_tensors(found: Description) -> list[Tensor]:
    """List the dense tensors that C++ reads: weights and biases."""
    modules: list[Any] = found.modules()
    dense = [module.weight for module in modules if not isinstance(module, QuantizedLinear)]
    return dense + [module.bias for module in modules if getattr(module, "bias", None) is not None]


def size(block: Block) -> tuple[Any, ...]:
    """Sizes of a block's linears, and which norms it has."""
    return tuple((out_of(part), part.in_features) for part in block.linears), tuple(
        part is None for part in block.norms
    )


def out_of(linear: Any) -> int:
    """Channels that a linear gives; 0 for what is none."""
    return int(getattr(linear, "out_features", 0))


def children(module: Any) -> set[str]:
    """Names of the modules in a module that holds no tensor of its own; else none."""
    if not isinstance(module, nn.Module) or module._parameters or module._buffers:
        return set()
    return set(module._modules)


def watched(model: nn.Module) -> str | None:
    """Tell what code looks at, or stands before, modules inside a model; None: none does."""
    if any(GLOBAL_HOOKS):
        return "a hook is registered for all modules"
    for module in model.modules():
        if module is model:
            continue
        if any(getattr(module, name) for name in HOOKS):
            return f"a {type(module).__name__} has hooks"
        if "forward" in module.__dict__:
            return f"the forward of a {type(module).__name__} was replaced"
        if module.training and not isinstance(module, nn.Linear):  # which does the same in both modes
            return f"a {type(module).__name__} is in training mode"
    return None
