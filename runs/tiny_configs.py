"""Small sizes for any model type, made of what its configuration class has by default.

There are three sizings, to be tried in turn (``tiny_models.py``):

- ``named``: the usual names of sizes get the usual small numbers (``tests/tiny.py``), as in the tests;
- ``scaled``: the heads of a part are divided by one factor, its widths by another, so that what fits stays fitting;
- ``shallow``: fewer layers and a smaller vocabulary, the widths as they are.

Whatever lists one item per layer is cut to the layers that are left, which are one of each kind at least.
"""

import dataclasses
import math
import re
import typing
from typing import Any

import tiny
import transformers

# What a field means, by its name.
DEPTH = re.compile(r"^(num_|n_|n)?(\w+_)?(layers?|depths?|blocks)$")
HEADS = re.compile(r"(^|_)(heads?|head|num_query_groups)(_per_stage|_per_layer)?$")
HEAD = re.compile(
    r"((?<!num)_head_(dim|size)|^(global_)?head_dim|headdim|d_kv|kv_channels|rotary_dim|attention_head_size)$"
)
WIDTH = re.compile(
    r"(hidden_sizes?|_dims?|^dims?|width|channels?|_rank|units|filters|^d_model|^d_ff|ffn_size|n_embd|n_inner|_size_mlp"
    r"|(intermediate|embedding|embed|proj|inner|mid|feature|output|emb|bottleneck|feed_forward|projection)_sizes?|_dim_per_stage)$"
)
NO_WIDTH = re.compile(
    r"vocab|image|patch|kernel|window|position|^num_|^max_|chunk|_conv_dim|state|sampl|codebook_size|attn_unit"
)
INDICES = re.compile(r"(indices|indexes|_idxs?|_ids|_index|_layers?|attention_blocks)$")
VOCABULARIES = re.compile(r"vocab_size$")
TOKENS = re.compile(r"_(token_ids?|token_index|id|ids)$")
POSITIONS = re.compile(r"(positions?|position_embeddings|max_seq_len|max_length)$")
COUNTS = {name: value for name, value in tiny.EXPERTS.items() if re.search("expert|top_?k|moe_k|group", name)}
SMALL, FEW_LAYERS, MOST_POSITIONS, MOST_PIXELS = 16, 2, 512, 256
HEAD_WIDTHS = (16, 32, 8, 24, 20, 12, 40, 10, 6)  # the first that divides a head is taken
SIZINGS = ("named", "scaled", "shallow")


def settings_of(kind: str, sizing: str) -> dict[str, Any]:
    """What to make a configuration of a type with, by one of ``SIZINGS``."""
    default = default_of(kind)
    found = _named(default, kind) if sizing == "named" else Scaled(default, sizing == "shallow").sizes(default)
    own = {**tiny.EXTRA.get(kind, {}), **tiny.MIXTURES.get(kind, {})}
    return _merged(_merged(found, own), EXTRA.get(kind, {}))


def _merged(sizes: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Settings with others put in their place, inside parts as well."""
    inner = {k: _merged(sizes[k], v) for k, v in more.items() if isinstance(v, dict) and isinstance(sizes.get(k), dict)}
    return {**sizes, **more, **inner}


def default_of(kind: str) -> Any:
    """What the class makes of nothing, or of what it does not come without."""
    return transformers.AutoConfig.for_model(kind, **NEEDED.get(kind, {}))


def parts_of(config: Any) -> dict[str, Any]:
    """The configurations inside one, by the field."""
    return {name: part for name, part in vars(config).items() if isinstance(part, transformers.PreTrainedConfig)}


def _fields(config: Any) -> dict[str, Any]:
    """Values of the declared fields; what the class computes where nothing is given is left out."""
    found = {}
    for field in dataclasses.fields(config):
        value = vars(config).get(field.name)
        given = field.default if field.default is not dataclasses.MISSING else value
        if given is not None or isinstance(value, transformers.PreTrainedConfig):
            found[field.name] = value
    return found


def _settable(config: Any, name: str, value: Any) -> bool:
    """Whether a value can be given by this name: a field, or another name of one, that need not be a list."""
    name = getattr(type(config), "attribute_map", {}).get(name, name)
    computed = getattr(type(config), name, None)
    if name not in vars(config) or (isinstance(computed, property) and computed.fset is None):
        return False
    kinds = {field.name: (field.type, *typing.get_args(field.type)) for field in dataclasses.fields(config)}
    return not isinstance(vars(config)[name], list | tuple | dict) or type(value) in kinds.get(name, ())


def _named(config: Any, kind: str = "") -> dict[str, Any]:
    """The usual names, at any depth."""
    usual = {**tiny.SIZES, **tiny.EXPERTS, **SIZES}
    sizes = {k: v for k, v in usual.items() if _settable(config, k, v) and k not in tiny.REFUSED.get(kind, ())}
    if "kv_lora_rank" in vars(config):
        sizes |= tiny.LATENT
    sizes |= _sections(config, {**vars(config), **sizes})
    for name, part in parts_of(config).items():
        inner, depth = _named(part), getattr_or_none(part, "num_hidden_layers")
        given = {k: v for k, v in _unusual(part).items() if not isinstance(v, list | tuple) or len(v) != depth}
        sizes[name] = {"model_type": part.model_type, **given, **inner, **_outputs(part, inner)}
    return sizes


def _unusual(part: Any) -> dict[str, Any]:
    """What the configuration around a part gives it."""
    default = vars(type(part)())
    return {
        name: value
        for name, value in vars(part).items()
        if name[0] != "_" and name not in UNSAID and isinstance(value, PLAIN) and value != default.get(name)
    }


def _outputs(part: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Of a backbone: which layers' states are read; as many as by default, of the first layers if few are left."""
    outputs = vars(part).get("_out_indices")
    if not outputs or list(outputs) == list(vars(type(part)()).get("_out_indices") or ()):
        return {}
    if "num_hidden_layers" in sizes or "depth" in sizes:
        name = "num_hidden_layers" if "num_hidden_layers" in sizes else "depth"
        return {name: len(outputs), "out_indices": list(range(1, len(outputs) + 1))}
    return {"out_indices": list(outputs)}


def _kept_layers(config: Any, depth: int) -> list[int] | None:
    """Of a list of layers' kinds: the first layer of each kind, two at least; None if no list says."""
    kinds = list(_lists(config, depth).values())
    if not kinds:
        return None
    together = list(zip(*(map(str, value) for value in kinds), strict=True))
    first = {kind: together.index(kind) for kind in together}
    chosen = sorted(first.values())[:4]
    return sorted({*chosen, *([] if len(chosen) > 1 else [i for i in range(depth) if i not in chosen][:1])})


def _per_layer(config: Any, depth: int, kept: list[int]) -> dict[str, Any]:
    return {name: [value[i] for i in kept] for name, value in _lists(config, depth).items()}


def _lists(config: Any, depth: int) -> dict[str, Any]:
    """Fields with one item per layer."""
    names = {field.name for field in dataclasses.fields(config)}
    values = {name: value for name, value in vars(config).items() if name in names}
    return {k: v for k, v in values.items() if isinstance(v, list | tuple) and len(v) == depth > FEW_LAYERS}


def _sections(config: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions in three dimensions: sections that fill half of the rotary dimensions."""
    rope = vars(config).get("rope_parameters")
    known = "mrope_section" in (getattr(type(config), "ignore_keys_at_rope_validation", None) or ())
    if not isinstance(rope, dict) or not (known or "mrope_section" in str(rope)):
        return {}
    heads = sizes.get("num_attention_heads") or 1
    head = sizes.get("head_dim") or sizes["hidden_size"] // heads

    def cut(one: dict[str, Any]) -> dict[str, Any]:
        half = int(head * (one.get("partial_rotary_factor") or 1)) // 2
        side = -(-half // 3)
        return {**one, "mrope_section": [side, side, half - 2 * side]}

    if not rope:  # not given by default
        rope = {"rope_type": "default", "rope_theta": 1e4}
        rope = {kind: rope for kind in dict.fromkeys(vars(config).get("layer_types") or ())} or rope
    by_kind = bool(rope) and all(isinstance(value, dict) for value in rope.values())
    return {"rope_parameters": {k: cut(v) for k, v in rope.items()} if by_kind else cut(rope)}


class Scaled:
    """Divide the sizes of a configuration and of those inside it.

    One factor divides the numbers of heads of a part, one the dimensions of a head, their product all other widths: products
    and sums that held by default hold then.
    """

    def __init__(self, whole: Any, shallow: bool) -> None:
        self.shallow = shallow
        self.tokens: dict[int, int] = {}
        self.widths: dict[int, int] = {}  # of hidden sizes, which other parts name
        self._note(whole)

    def _note(self, config: Any) -> None:
        heads, head = self.factors(config)
        hidden = getattr_or_none(config, "hidden_size")
        if isinstance(hidden, int):
            self.widths.setdefault(hidden, _over(hidden, heads * head))
        for part in parts_of(config).values():
            self._note(part)

    def factors(self, config: Any) -> tuple[int, int]:
        """What divides heads, and what divides the dimensions of one."""
        heads, hidden = (getattr_or_none(config, name) for name in ("num_attention_heads", "hidden_size"))
        if self.shallow or not isinstance(heads, int) or not isinstance(hidden, int):
            return 1, 1
        few = next((n for n in (4, 3, 2) if heads % n == 0), heads)
        head = getattr_or_none(config, "head_dim")
        head = head if isinstance(head, int) else hidden // heads
        return heads // few, next((head // n for n in HEAD_WIDTHS if head >= n and head % n == 0), 1)

    def sizes(self, config: Any) -> dict[str, Any]:
        """What to make a configuration of this class with."""
        fields, found = _fields(config), {}
        factors, depth = self.factors(config), getattr_or_none(config, "num_hidden_layers")
        kept = _kept_layers(config, depth) if isinstance(depth, int) else None
        layers = len(kept) if kept is not None else FEW_LAYERS
        for name, value in fields.items():
            if isinstance(value, transformers.PreTrainedConfig):
                inner = self.sizes(value)
                found[name] = {"model_type": value.model_type, **_unusual(value), **inner, **_outputs(value, inner)}
            elif isinstance(value, int | list | tuple) and not isinstance(value, bool):
                new = self._size(name, value, factors, layers, depth)
                if new != value:
                    found[name] = new
        if kept is not None:
            found |= _per_layer(config, depth, kept)
        return found | _sections(config, {**vars(config), **found})

    def _size(self, name: str, value: Any, factors: tuple[int, int], layers: int, depth: Any) -> Any:
        """A number or a list of numbers, by its name."""
        if not isinstance(value, list | tuple):
            few = self._few(name, value, layers)
            return self._divided(name, value, *factors) if few is None else few
        if INDICES.search(name) and not DEPTH.search(name) and _are_layers(value, depth):
            return sorted({min(item, layers - 1) for item in value}) if max(value) >= layers else list(value)
        if value and all(type(item) is int for item in value):
            return [self._size(name.removesuffix("s"), item, factors, FEW_LAYERS, None) for item in value]
        return value

    def _few(self, name: str, value: int, layers: int) -> int | None:
        """A number of things, which are few in any sizing; None if the name says no such number."""
        if TOKENS.search(name) and value >= tiny.VOCABULARY:
            return self.tokens.setdefault(value, tiny.VOCABULARY - 1 - len(self.tokens))
        most = COUNTS.get(name)
        for pattern, number in ((VOCABULARIES, tiny.VOCABULARY), (POSITIONS, MOST_POSITIONS), (DEPTH, layers)):
            most = number if most is None and pattern.search(name) else most
        return None if most is None else min(value, most)

    def _divided(self, name: str, value: int, heads: int, head: int) -> int:
        """A width or a number of heads."""
        found = value
        if name == "image_size":
            found = min(value, MOST_PIXELS)
        elif HEADS.search(name):
            found = _over(value, heads, multiple=1)
        elif HEAD.search(name):
            found = _over(value, head, multiple=2)
        elif value > SMALL and WIDTH.search(name) and not NO_WIDTH.search(name):
            found = self.widths.get(value) or _over(value, heads * head)
        return value if self.shallow else found


def _are_layers(value: Any, depth: Any) -> bool:
    return isinstance(depth, int) and bool(value) and all(type(item) is int and 0 <= item <= depth for item in value)


def _over(value: int, by: int, multiple: int = 8) -> int:
    """Divide, up to a multiple: kernels for experts take multiples of 8."""
    return max(multiple, math.ceil(value / by / multiple) * multiple)


def getattr_or_none(config: Any, name: str) -> Any:
    """A field by any of its names, unless its value differs from layer to layer."""
    return vars(config).get(getattr(type(config), "attribute_map", {}).get(name, name))


PLAIN = (int, float, str, bool, list, tuple, dict)
# Not given to a part a second time.
UNSAID = {
    "id2label", "label2id", "dtype", "architectures", "model_type", "transformers_version", "stage_names", "per_layer_config",
}  # fmt: skip
# Names of sizes besides those that the tests use.
SIZES: dict[str, Any] = {
    "vocab_size_per_layer_input": tiny.VOCABULARY, "hidden_size_per_layer_input": 16, "width_coefficient": 0.5,
    "depth_coefficient": 0.5, "out_hidden_size": 64, "audio_hidden_size": 64, "upsample_groups": 64, "num_filters": 4,
    "upsample_initial_channel": 64, "text_hidden_size": 64, "hidden_size_global": 64, "base_channels": 32,
    "adapter_input_size": 64, "encoder_hash_byte_group_vocab": 500,
    "mamba_d_ssm": 128, "index_head_dim": 16, "index_n_heads": 4, "index_topk": 4, "mamba_num_heads": 8, "mamba_head_dim": 16,
    "ssm_state_size": 8, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_headdim": 16, "n_mamba_heads": 2,
}  # fmt: skip
NO_LAYER_INPUTS = {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
GEMMA3N = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.5, 0.0] * 2,
}  # fmt: skip
SHARED = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}  # which share weights
SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
# What a class does not come without.
NEEDED: dict[str, dict[str, Any]] = {"gemma4_assistant": {"text_config": NO_LAYER_INPUTS}}
# Of types whose sizes follow from nothing that a name says.
EXTRA: dict[str, dict[str, Any]] = {
    "xmod": {"default_language": "en_XX"},
    "shieldgemma2": {"yes_token_index": 3, "no_token_index": 4},
    "paddleocr_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}}
    },
    "depth_anything": {"backbone_config": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}},
    "prompt_depth_anything": {"backbone_config": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}},
    "zoedepth": {"backbone_config": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}},
    "chmv2": {"backbone_config": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}},
    "gemma3n_text": GEMMA3N,
    "gemma3n": {"text_config": GEMMA3N, "vision_config": {"architecture": "resnet10t"}},
    "gemma3n_vision": {"architecture": "resnet10t"},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "d_fine": {"backbone_config": {"out_indices": [2, 3, 4]}},
    "deimv2": {"backbone_config": {"out_indices": [2, 3, 4]}},
    "esmfold2": {"num_key_value_heads": 4},
    "gemma4_assistant": {"text_config": NO_LAYER_INPUTS},
    "maskformer": {"backbone_config": {"embed_dim": 32, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}},
    "fast_vlm": {"vision_config": {"architecture": "fastvit_t8"}},
    "perception_lm": {"vision_config": {"architecture": "vit_tiny_patch16_224", "model_args": {"embed_dim": 192}}},
    "swin2sr": {"embed_dim": 48, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "image_size": 32},
    "clap_audio_model": {"num_mel_bins": 64},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0}},
    "deepseek_ocr2_text": SPARSE,
    "deepseek_ocr2": {"text_config": SPARSE},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "zamba": SHARED,
    "zamba2": SHARED,
    "timm_wrapper": {"architecture": "vit_tiny_patch16_224"},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "pp_doclayout_v2": {"class_thresholds": [0.5] * 25, "class_order": list(range(25))},
    "step3p5": {"sliding_window": 16},
    "perceiver": {"d_latents": 64, "num_latents": 16, "num_self_attends_per_block": 2},
    "timm_backbone": {"backbone": "vit_tiny_patch16_224"},
    "mamba2": {"num_heads": 8, "n_groups": 2, "state_size": 16},
}
