"""Which linears engines fuse into one module, and by which names: such linears must share bits and group size.

vLLM and SGLang make one matrix of the linears that read one input, and one module of all experts of a layer. What a
configuration says of one of the linears must hold for all of them, and some rules are looked up by the fused module's name.
"""

import re
from collections.abc import Iterable

# Linears that read the same input, which engines fuse into one: they must share bits and group size.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"),
    ("q", "k", "v"), ("wq", "wk", "wv"), ("wi_0", "wi_1"), ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"), ("c_fc_0", "c_fc_1"),
)  # fmt: skip
# What vLLM and SGLang call the fused module, by which they look for GPTQ's dynamic rules: all names that vLLM 0.32 has.
FUSED_NAMES = {
    ("q_proj", "k_proj", "v_proj"): ("qkv_proj",), ("gate_proj", "up_proj"): ("gate_up_proj",),
    ("k_proj", "v_proj"): ("kv_proj",), ("w1", "w3"): ("w13", "gate_up_proj"), ("c_fc_0", "c_fc_1"): ("gate_up_proj",),
    ("q_a_proj", "kv_a_proj_with_mqa"): ("fused_qkv_a_proj",),
    ("in_proj_qkv", "in_proj_z"): ("in_proj_qkvz",), ("in_proj_b", "in_proj_a"): ("in_proj_ba",),
}  # fmt: skip
EXPERTS = re.compile(r"(.*\bexperts)\.\d+\.")


def fused(names: Iterable[str]) -> list[list[str]]:
    """List those of the linears that engines fuse: siblings, and all experts of a layer."""
    present = set(names)
    groups = [
        [f"{parent}{leaf}" for leaf in leaves] for parent in sorted(set(map(_parent, present))) for leaves in SIBLINGS
    ]
    experts: dict[str, list[str]] = {}
    for name in sorted(present):
        match = EXPERTS.match(name)
        if match:
            experts.setdefault(match.group(1), []).append(name)
    found = [[name for name in group if name in present] for group in [*groups, *experts.values()]]
    return [list(group) for group in dict.fromkeys(tuple(group) for group in found if len(group) > 1)]


def fused_names(names: Iterable[str]) -> list[str]:
    """Name the modules into which engines fuse some of these linears: siblings, and all experts of a layer."""
    present, found = set(names), dict[str, None]()
    experts = {match.group(1) for match in map(EXPERTS.match, present) if match}
    for parent in sorted(map(_parent, present - {name for name in present if EXPERTS.match(name)})):
        for leaves, fused_as in FUSED_NAMES.items():
            if all(f"{parent}{leaf}" in present for leaf in leaves):
                found |= dict.fromkeys(f"{parent}{name}" for name in fused_as)
    return [*found, *sorted(experts)]


def _parent(name: str) -> str:
    """Give a module's name up to its last part, the dot included."""
    return name[: len(name) - len(name.rpartition(".")[2])]
