"""What vLLM and SGLang load. vLLM 0.32, the last release with a CPU build, was run; vLLM 0.33 and SGLang were read."""

import re

from nearplane.checkpoint.engines.describe import Described, Model, Weight
from nearplane.checkpoint.engines.findings import AWQ, COMPRESSED, GPTQS, Findings, clipped, grids_of, online, tail
from nearplane.core.grid import Grid

VLLM, SGLANG = "vLLM 0.33", "SGLang 0.5.23"
FORMATS = (COMPRESSED, *GPTQS, AWQ)
# Marlin, the fast kernel of vLLM and SGLang, knows these group sizes, 4 and 8 bits symmetric, and 4 bits asymmetric.
MARLIN_GROUPS = (-1, 32, 64, 128)
FAST_BITS = (4, 8)
# Classes of fused checkpoints whose experts vLLM reads one by one, under the names that are written here.
SPLIT_BY_VLLM = ("GraniteMoe", "Llama4")
# Classes without an output head of their own in vLLM 0.32: Gemma 2 was run, and refused; the others were read.
HEADLESS_IN_VLLM = ("Gemma2", "Gemma3n", "Cohere")
# Classes that vLLM loads without finding their experts: what it generates is garbage.
GARBAGE_IN_VLLM = ("GptOss",)
# Classes that do not say in vLLM 0.32 which linears they fuse: GPT-J and StableLM were run as GPTQ, and refused.
UNNAMED_IN_VLLM = ("GPTJ", "StableLm", "HrmText")
# Modules of the first Mamba, which vLLM has in no quantized form.
MAMBA = "MambaMixer"
# Classes for language that vLLM 0.32 neither lists nor runs by its Transformers backend; Mpt was run, and refused.
NOT_IN_VLLM = (
    "BailingHybrid", "Bamba", "Bart", "BigBird", "BigBirdPegasus", "BioGpt", "Blenderbot", "BlenderbotSmall", "Blt",
    "CodeGen", "CpmAnt", "GPTNeo", "GPTNeoXJapanese", "Git", "Inkling2", "MBart", "Marian", "MegatronBert", "Mpt",
    "Musicgen", "MusicgenMelody", "Mvp", "OpenAIGPT", "PLBart", "Pegasus", "ProphetNet", "Reformer", "RemBert",
    "RoFormer", "Rwkv", "TrOCR", "Whisper", "XGLM", "XLM", "XLNet", "Zamba", "xLSTM",
)  # fmt: skip
HEADS = re.compile(r"(ForCausalLM|LMHeadModel|ModelWithLMHead|WithLMHeadModel)$")


def judge(engine: str, checkpoint: Described, found: Findings) -> None:
    """Add what is known of vLLM ("vllm") or SGLang ("sglang")."""
    format, title = checkpoint.format, VLLM if engine == "vllm" else SGLANG
    found.refuse(online(checkpoint))
    found.refuse(clipped(title, checkpoint))
    grids = list(grids_of(checkpoint))
    for grid, shapes in grids:
        reason = tail(grid, shapes) or _refusal(engine, format, grid)
        if reason is None and checkpoint.ordered and engine == "vllm" and format in GPTQS and grid.group_size != -1:
            reason = f"{VLLM} refuses groups in activation order (desc_act)"
        if not found.refuse(reason):
            found.note(_kernels(engine, title, format, grid))
    for weight in checkpoint.weights:
        found.refuse(_rounding(engine, title, weight))
        if weight.activations is not None and engine == "vllm" and weight.grid.storage_bits == 4:
            found.note(
                "vLLM 0.32 rounds the inputs of 4-bit weights by another rule than nearplane; on a CPU log-probabilities "
                "of a tiny model differed by 0.01"
            )
    if len(grids) > 1 and format != COMPRESSED and engine == "sglang":
        found.note(f"{title} takes several grids from GPTQ's dynamic rules, which nothing here has tried")
    if format == AWQ and engine == "sglang":
        found.note(f"{title} lists AWQ among its formats; it was not run with it here")
    if checkpoint.model is not None:
        _judge_model(engine, title, checkpoint, checkpoint.model, found)


def _refusal(engine: str, format: str, grid: Grid) -> str | None:
    """Tell why the engine does not load weights on this grid; None if it does."""
    bits, gptq, size = grid.storage_bits, format in GPTQS, grid.group_size
    if engine == "vllm" and gptq and bits not in FAST_BITS:
        return f"{VLLM} loads GPTQ of 4 or 8 bits, not {bits}; compressed-tensors of {bits} bits it loads"
    if engine == "vllm" and gptq and not grid.sym:
        return f"{VLLM} loads symmetric GPTQ only; asymmetric weights it loads as compressed-tensors"
    if engine == "vllm" and gptq and size not in MARLIN_GROUPS:
        return (
            f"{VLLM} loads GPTQ in groups of {_known_groups()} only, not {size}; as compressed-tensors it loads {size}"
        )
    if engine == "sglang" and format == COMPRESSED and bits not in FAST_BITS:
        return f"{SGLANG} loads compressed-tensors of 4 or 8 bits, not {bits}"
    return None


def _rounding(engine: str, title: str, weight: Weight) -> str | None:
    """Tell why the engine does not run a weight with its activations rounded; None if it does, or none are."""
    grid, activations = weight.grid, weight.activations
    if activations is None:
        return None
    bits, sym = grid.storage_bits, grid.sym and activations.bits == 8
    if sym and bits == 8 and grid.group_size == -1:
        return None
    if sym and bits == 4 and engine == "vllm":
        return None
    also = ", and beside 4-bit symmetric ones" if engine == "vllm" else ""
    return f"{title} rounds activations to 8 bits beside 8-bit symmetric weights of one scale per row (group_size -1){also} only"


def _kernels(engine: str, title: str, format: str, grid: Grid) -> str | None:
    """Tell what is run more slowly than by Marlin, or by a package of its own. Read in sources: there was no GPU."""
    bits = grid.storage_bits
    if engine == "sglang" and format in GPTQS and (bits not in FAST_BITS or not grid.sym):
        return f"{SGLANG} runs it without its Marlin kernels, slower"
    if bits not in FAST_BITS:
        return f"{VLLM} runs {bits} bits on CUDA by the kernels of the package humming only"
    if not grid.sym and bits == 8:
        rest = (
            "on CUDA those of the package humming run it" if engine == "vllm" else "another kernel must run it, slower"
        )
        return f"the Marlin kernels of {title} take 8 bits symmetric only; {rest}"
    if grid.group_size in MARLIN_GROUPS:
        return None
    rest = "on CUDA others run" if engine == "vllm" else "another must run"
    return f"the Marlin kernels of {title} take group sizes {_known_groups()}; {rest} {grid.group_size}, slower"


def _known_groups() -> str:
    return f"{', '.join(map(str, MARLIN_GROUPS[1:]))} and -1"


def _judge_model(engine: str, title: str, checkpoint: Described, model: Model, found: Findings) -> None:
    """Add what is known of the model's class and its experts."""
    if engine == "vllm":
        _judge_class(checkpoint.format, model, found)
    if model.experts and not model.merges and not model.name.startswith(SPLIT_BY_VLLM):
        worse = engine == "vllm" and model.name.startswith(GARBAGE_IN_VLLM)
        garbage = "; it loads the checkpoint all the same, and generates garbage" if worse else ""
        found.refuse(f"no loader of experts one by one was found for {model.name} in {title}{garbage}")
    elif model.renamed:
        found.refuse(
            f"this checkpoint names experts {', '.join(model.renamed)}, where {title} reads gate_proj, up_proj and down_proj, "
            "so that it loads no expert; quantize the model again"
        )
    asymmetric = any(not w.grid.sym and w.grid.storage_bits == 8 for w in checkpoint.weights)
    if engine == "vllm" and model.zeros and asymmetric:
        found.refuse(f"{VLLM} has no kernel for experts of 8 bits asymmetric; symmetric ones, or fewer bits, it loads")
    if not model.causal and checkpoint.format == COMPRESSED:
        found.note(f"whether {title} has {model.name} was not looked up")
    if model.head and engine == "vllm":
        found.refuse(
            f"vLLM 0.32 has no output head of its own in {model.name}, only the input embedding: leave the head dense"
            if model.name.startswith(HEADLESS_IN_VLLM)
            else None
        )
    elif model.head:
        found.note(f"whether {title} loads a quantized output head was not tried")


def _judge_class(format: str, model: Model, found: Findings) -> None:
    """Add why vLLM does not load quantized linears of some classes. All but the list of absent ones were run."""
    if HEADS.sub("", model.name) in NOT_IN_VLLM and model.causal:
        found.refuse(f"vLLM 0.32 has no {model.name}")
    if any(part.partition(".")[0].endswith(MAMBA) for part in model.parts):
        found.refuse(
            f"vLLM 0.32 has the Mamba layers of {model.name} in dense form only: leave them dense, by --ignore 'mamba|mixer'"
        )
    if model.name.startswith("Phimoe"):
        found.note(
            "vLLM 0.32 knows this class as PhiMoEForCausalLM; a tiny checkpoint whose architectures say "
            "PhimoeForCausalLM was refused"
        )
    if "BloomAttention.query_key_value" in model.parts:
        found.refuse(
            f"vLLM 0.32 splits query_key_value of {model.name} while loading, not a packed one: leave it dense, by "
            "--ignore query_key_value"
        )
    if model.name.startswith(UNNAMED_IN_VLLM) and format in GPTQS:
        found.refuse(
            f"vLLM 0.32 finds no GPTQ weights of the linears that it fuses in {model.name}; as compressed-tensors it loads"
        )
