"""What config.json says besides the quantization: the class, the dtype, and every name that an engine may look for.

transformers reads a setting under several names and writes the newest. Other engines read config.json themselves, some
under older names, and take a default silently where the name is missing. So older names stand beside the newest. Which
older names a configuration class knows is found by trying: a name is written where the class reads the same
configuration with the name as without.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from nearplane.models.locate import BAD_CONFIG

ROPE, SCALING = "rope_parameters", "rope_scaling"
# Older names of numbers in ``rope_parameters``, by the number's name there.
OLDER = {
    "rope_theta": (
        "rope_theta", "rotary_emb_base", "rope_local_base_freq", "global_rope_theta", "local_rope_theta", "swa_rope_theta",
    ),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
}  # fmt: skip
# Older names of the distance between layers of full attention, which ``layer_types`` lists one by one.
PATTERNS = ("sliding_window_pattern", "full_attention_interval")
# Older names that transformers maps to newer ones, and mlx-lm 0.32 asks for.
RENAMED = ("num_experts", "num_experts_per_tok", "moe_num_experts", "moe_top_k", "num_attention_groups")
# Numbers that models work out where config.json has none, and some engines do not.
HEAD, CONTEXT = "head_dim", ("n_ctx", "n_positions")
# Two values of each number that no model has as its own.
PROBES: dict[str, tuple[Any, Any]] = {
    "rope_theta": (12345.0, 54321.0),
    "partial_rotary_factor": (0.5, 0.25),
    "factor": (3.0, 5.0),
}


def written_config(raw: Mapping[str, Any], kind: Any, model: nn.Module) -> dict[str, Any]:
    """Give a config.json under every name by which engines look for a setting.

    Args:
        raw: the source's config.json, without a quantization.
        kind: the configuration class that reads it.
        model: an instance of the class that was opened, which is named where ``raw`` names none.

    Returns:
        ``raw`` with more names; transformers reads an equal configuration.
    """
    result = dict(raw)
    if not result.get("architectures"):
        result["architectures"] = [type(model).__name__]
    for path, part in _parts(_open(kind, result), result):
        for name, value in _older(type(part), _at(result, path)):
            if name in _at(result, path):
                continue
            wanted, tried = _read(kind, result, path, name), copy.deepcopy(result)
            _at(tried, path)[name] = value
            if wanted is not None and _read(kind, tried, path, name) == wanted:
                result = tried
    return result


def in_dtype(config: Mapping[str, Any], dtype: torch.dtype, *, every: bool) -> dict[str, Any]:
    """Name a dtype in config.json under both names: of the whole and of the text part, of other parts, too, with ``every``."""
    name, result = str(dtype).removeprefix("torch."), dict(config)
    for key, part in result.items():
        if isinstance(part, dict) and part.keys() & {"dtype", "torch_dtype"} and (every or key == "text_config"):
            result[key] = in_dtype(part, dtype, every=every)
    return result | {"dtype": name, "torch_dtype": name}


def _parts(config: Any, raw: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield a configuration and those inside that config.json spells out, each with its keys from the top."""
    yield path, config
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None and isinstance(raw.get(name), dict):
            yield from _parts(getattr(config, name), raw[name], (*path, name))


def _at(raw: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for name in path:
        raw = raw[name]
    return raw


def _older(kind: Any, raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield further names of one configuration's settings, with their values."""
    for name, known in (getattr(kind, "attribute_map", None) or {}).items():
        if known in raw and name in RENAMED:
            yield name, raw[known]
    read = _open(kind, raw)
    yield from _worked_out(read, raw)
    rope = getattr(read, ROPE, None)
    if isinstance(rope, dict) and rope:
        yield from _rotary(kind, raw, rope)
    types = getattr(read, "layer_types", None)
    if isinstance(types, list) and "full_attention" in types and len(set(types)) == 2:
        distance = types.index("full_attention") + 1
        bare = {key: value for key, value in raw.items() if key not in ("layer_types", *PATTERNS)}
        for name in PATTERNS:
            found = [getattr(_open(kind, {**bare, name: n}), "layer_types", None) for n in (distance, distance + 1)]
            if found[0] == types != found[1]:
                yield name, distance


def _worked_out(read: Any, raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield numbers that a class has no field for, where the usual rule gives them."""
    width, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    latent = any("lora_rank" in name or name.endswith("_head_dim") for name in raw)
    known = {} if read is None else read.to_dict()
    if isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads == 0:
        lacks = "num_key_value_heads" in raw and HEAD not in known and not latent
        yield from [(HEAD, width // heads)] if lacks else []
    name, same = CONTEXT
    if same in raw and name not in known:
        yield name, raw[same]


def _rotary(kind: Any, raw: Mapping[str, Any], rope: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield older names of what ``rope_parameters`` holds, flat or by types of layers."""
    older = {name for names in OLDER.values() for name in names}
    bare = {key: value for key, value in raw.items() if key not in {ROPE, SCALING, *older}}
    for key, names in OLDER.items():
        for name in names:
            found = [_at(rope, place).get(key) for place in _places(kind, bare, key, {name: None})]
            if found and found[0] is not None and all(value == found[0] for value in found):
                yield name, found[0]
    scaled = {"rope_type": "linear", "factor": None}
    # Where a class refuses the probe, a flat dictionary is tried as a whole.
    places = _places(kind, bare, "factor", {SCALING: scaled}) or [()]
    parts = [{key: value for key, value in _at(rope, place).items() if key not in OLDER} for place in places]
    if all(part == parts[0] for part in parts) and not any(isinstance(value, dict) for value in parts[0].values()):
        scaling = parts[0]
        plain = scaling.keys() <= {"rope_type", "type"} and scaling.get("rope_type", "default") == "default"
        # Engines of 2024 look for "type", later ones for "rope_type".
        yield SCALING, None if plain else {"type": scaling.get("rope_type"), **scaling}
    yield ROPE, rope


def _places(kind: Any, bare: Mapping[str, Any], key: str, given: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Find where in ``rope_parameters`` a setting of config.json arrives.

    Args:
        kind: the configuration's class.
        bare: config.json without rotary settings.
        key: of the number in ``rope_parameters``.
        given: the setting, None in the place of the number.

    Returns:
        Keys from ``rope_parameters`` to the dictionaries that take the number.
    """
    found = []
    for value in PROBES[key]:
        filled = {
            name: value if part is None else {k: value if v is None else v for k, v in part.items()}
            for name, part in given.items()
        }
        rope = getattr(_open(kind, {**bare, **filled}), ROPE, None)
        rope = rope if isinstance(rope, dict) else {}
        nested = {name: part for name, part in rope.items() if isinstance(part, dict)}
        inside: dict[tuple[str, ...], Any] = {(name,): part for name, part in nested.items()} if nested else {(): rope}
        found.append({place for place, part in inside.items() if part.get(key) == value})
    return sorted(found[0] & found[1])


def _open(kind: Any, raw: Mapping[str, Any]) -> Any:
    """Read a configuration; None where its class refuses the values."""
    try:
        return kind.from_dict(copy.deepcopy(dict(raw)))
    except (*BAD_CONFIG, StrictDataclassError):
        return None


def _read(kind: Any, raw: Mapping[str, Any], path: tuple[str, ...], name: str) -> Any:
    """Read a configuration as plain values; some classes keep an older name beside the newest, which is left out here."""
    read = _open(kind, raw)
    if read is None:
        return None
    plain = _plain(read.to_dict())
    for key in (name, f"_{name}") if name != ROPE else ():
        _at(plain, path).pop(key, None)
    return plain


def _plain(value: Any) -> Any:
    """Leave out ``type`` where ``rope_type`` says the same."""
    if isinstance(value, dict):
        twice = "rope_type" in value and value.get("type") == value["rope_type"]
        return {key: _plain(part) for key, part in value.items() if not (twice and key == "type")}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
