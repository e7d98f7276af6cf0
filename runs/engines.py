"""What engines really do with checkpoints: the record, and docs/engines.md made of it.

    python runs/engines.py run [--engines vllm ...] [--cases REGEX]     # run, and replace these rows of the record
    python runs/engines.py check [--engines vllm ...] [--cases REGEX]   # run, and compare with verdict() alone
    python runs/engines.py table                                        # docs/engines.md and nearplane's ran.json

A case is a tiny random model, quantized to some format. Its checkpoint goes to the runner of an engine
(``runs/engines/NAME.py``), which runs in the engine's own environment: ``.engines/NAME``, made by ``make engines``, or
``$NEARPLANE_ENGINES/NAME``. An engine without an environment is left out. Log-probabilities and greedy tokens are compared
with ``nearplane.load``. Every row also holds what ``verdict`` looks at, so that a test compares the two without a model.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
import transformers

import nearplane
from nearplane import RTN, Grid
from nearplane.checkpoint.engines import Described, Model, Verdict, Weight, described, verdict
from nearplane.checkpoint.engines.judge import RAN
from nearplane.core.activations import TokenGrid
from nearplane.formats import FORMATS
from nearplane.formats.gguf.grids import grid_of, own_type
from nearplane.formats.read import open_checkpoint
from nearplane.models.source import open_skeleton

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gguf_templates

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "runs" / "engines.jsonl", ROOT / "docs" / "engines.md"
RUNNERS = ROOT / "runs" / "engines"
# Names of environments and runners, where they are not the engine's own.
ENVIRONMENTS = {"llama.cpp": "llama", "onnxruntime-genai": "onnxruntime"}
COLUMNS = ("vllm", "transformers", "llama.cpp", "mlx", "onnxruntime-genai")
# Mean difference of log-probabilities that an arithmetic explains. Those of tiny random models spread by about 0.5.
EXACT, OFFSETS, ROUNDED = 1e-3, 0.01, 0.05
NATIVE = {"kernels": "native"}
CT, GPTQ1, GPTQ2, ONNX = "compressed-tensors", "gptq", "gptq_v2", "onnxruntime-genai"
EIGHT: dict[str, Any] = {"override": {"down_proj": {"bits": 8}}}


@dataclass(frozen=True)
class Case:
    """A checkpoint, and the engines that are given it."""

    model: str
    """A name of ``models``."""
    format: str
    bits: int
    group: int
    sym: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    """Further settings of ``nearplane.quantize``."""
    more: str = ""
    """What the settings are, in words."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the vLLM runner; those of its reference products where none are given."""
    engines: tuple[str, ...] = ("vllm", "transformers")

    @property
    def name(self) -> str:
        """Name the case in words, as the record has it."""
        if self.format == "gguf":
            return f"{self.model} | gguf | {self.settings['gguf_type']}"
        grid = f"{self.bits} bits{'' if self.sym else ' asymmetric'}, {'rows' if self.group == -1 else f'groups of {self.group}'}"
        return f"{self.model} | {self.format} | {grid}{self.more and f', {self.more}'}"


SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 192, "vocab_size": 128, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_inner": 192, "n_positions": 64, "rotary_dim": 32,
    "ffn_dim": 192, "word_embed_proj_dim": 128, "d_model": 128, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
    "tie_word_embeddings": False, "moe_intermediate_size": 64, "shared_intermediate_size": 64, "num_local_experts": 4,
    "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "shared_expert_intermediate_size": 64, "first_k_dense_replace": 1, "mamba_d_state": 16, "sliding_window": 8,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "q_lora_rank": 32,
    "kv_lora_rank": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
HYBRID = {"layer_types": ["attention", "mamba"], "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1}
# Kinds of models: a type, what differs from SIZES, and what the kind stands for.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, "gate and up, fewer key heads"),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, "a tied head"),
    "llama, 192 wide": (
        "llama", {"hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 288}, "sizes 256 does not divide",
    ),
    "qwen2": ("qwen2", {}, "biases"),
    "qwen3": ("qwen3", {}, "norms of queries and keys"),
    "mistral": ("mistral", {}, "a sliding window"),
    "gemma2": ("gemma2", {"tie_word_embeddings": True}, "soft caps, windows in every other layer"),
    "gemma3": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}, "windows, two rotary bases"),
    "phi3": ("phi3", {}, "stored fused: qkv, gate and up"),
    "gpt_neox": ("gpt_neox", {}, "stored fused: qkv by heads; biases"),
    "opt": ("opt", {}, "learned positions, biases"),
    "starcoder2": ("starcoder2", {}, "no gate, biases"),
    "stablelm": ("stablelm", {}, "partial rotary"),
    "olmo2": ("olmo2", {}, "norms behind"),
    "cohere": ("cohere", {"tie_word_embeddings": True}, "attention beside the MLP"),
    "granite": ("granite", {}, "multipliers"),
    "smollm3": ("smollm3", {}, "layers without rotary"),
    "gptj": ("gptj", {}, "attention beside the MLP"),
    "bloom": ("bloom", {"tie_word_embeddings": True}, "stored fused: qkv by heads; ALiBi"),
    "mpt": ("mpt", {}, "ALiBi"),
    "mixtral": ("mixtral", {"intermediate_size": 64}, "experts w1, w3, w2"),
    "qwen3_moe": ("qwen3_moe", {}, "experts"),
    "qwen2_moe": ("qwen2_moe", {}, "experts, a shared one"),
    "olmoe": ("olmoe", {"intermediate_size": 64}, "experts"),
    "deepseek_v2": ("deepseek_v2", LATENT, "experts, latent attention"),
    "glm4_moe": ("glm4_moe", {"head_dim": 32}, "experts, shared ones"),
    "granitemoe": ("granitemoe", {"intermediate_size": 64}, "experts stored fused"),
    "granitemoeshared": ("granitemoeshared", {"intermediate_size": 64}, "experts stored fused, a shared one"),
    "granitemoehybrid": ("granitemoehybrid", {"intermediate_size": 64, **HYBRID}, "experts stored fused, Mamba 2"),
    "gpt_oss": ("gpt_oss", {"intermediate_size": 64}, "experts stored fused, biases"),
    "jamba": ("jamba", {"intermediate_size": 64}, "experts, Mamba"),
}  # fmt: skip
FAMILIES = tuple(MODELS)[1:]
EXPERTS = r"experts\."
# The same kinds where llama.cpp computes what the real models of that kind say, and not what transformers' defaults say.
GEMMA = {"tie_word_embeddings": True, "query_pre_attn_scalar": 32}
WINDOWS = ["sliding_attention"] * 5 + ["full_attention"]
MULTIPLIERS = {
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 1.5,
}
MODELS |= {
    "llama, 256 wide": (
        "llama", {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 256}, "sizes 256 divides",
    ),
    "llama, biased": ("llama", {"attention_bias": True, "mlp_bias": True}, "biases, rotary ones too"),
    "qwen3_moe, summing to 1": ("qwen3_moe", {"norm_topk_prob": True}, "experts"),
    "gemma2, heads of 32": ("gemma2", GEMMA, "soft caps, windows in every other layer, a tied head"),
    "gemma3, 6 layers": (
        "gemma3_text", {**GEMMA, "layer_types": WINDOWS, "num_hidden_layers": 6}, "windows, two rotary bases, a tied head",
    ),
    "mixtral, no window": ("mixtral", {"intermediate_size": 64, "sliding_window": None}, "experts w1, w3, w2"),
    "starcoder2, no window": ("starcoder2", {"sliding_window": None, "tie_word_embeddings": True}, "no gate, biases, tied head"),
    "cohere, scale 1": ("cohere", {"tie_word_embeddings": True, "logit_scale": 1.0}, "attention beside the MLP, a tied head"),
    "phi3, no window": ("phi3", {"sliding_window": None, "original_max_position_embeddings": 64}, "fused: qkv, gate and up"),
    "mistral, no window": ("mistral", {"sliding_window": None}, "fewer key heads"),
    "smollm3, no window": ("smollm3", {"sliding_window": None}, "layers without rotary"),
    "gemma2, no window": ("gemma2", {"tie_word_embeddings": True, "sliding_window": 64}, "soft caps, a tied head"),
    "gpt_neox, 4 times wider between": ("gpt_neox", {"intermediate_size": 512}, "stored fused: qkv by heads; biases"),
    "gptj, 4 times wider between": ("gptj", {"n_inner": 512}, "attention beside the MLP"),
    "granite, multiplied": ("granite", MULTIPLIERS, "multipliers"),
}  # fmt: skip
GGUF_FAMILIES = (
    "llama", "llama, tied", "llama, 192 wide", "llama, biased", "qwen2", "qwen3", "qwen3_moe, summing to 1", "mixtral, no window",
    "gemma2, heads of 32", "gemma3, 6 layers", "phi3, no window", "granite, multiplied", "olmo2", "stablelm",
    "starcoder2, no window", "cohere, scale 1",
)  # fmt: skip
# Without those in which mlx-lm takes a tiny model's configuration for another one: page.md says which.
MLX_FAMILIES = (
    "llama, tied",
    "llama, 192 wide",
    "llama, biased",
    "qwen2",
    "qwen3",
    "mistral, no window",
    "gemma2, no window",
    "gemma3",
    "phi3, no window",
    "gpt_neox, 4 times wider between",
    "opt",
    "starcoder2, no window",
    "stablelm",
    "olmo2",
    "cohere",
    "granite, multiplied",
    "smollm3",
    "gptj, 4 times wider between",
    "bloom",
    "mpt",
    "mixtral, no window",
    "qwen3_moe",
    "qwen2_moe",
    "olmoe",
    "glm4_moe",
    "granitemoe",
    "granitemoeshared",
    "gpt_oss",
)
ONNX_FAMILIES = (
    *(model for model in MLX_FAMILIES if model not in ("gemma2, no window", "smollm3")), "gemma2", "smollm3, no window",
)  # fmt: skip
GGUF_TYPES = ("Q4_0", "Q8_0", "Q5_0", "Q4_1", "Q5_1", "Q2_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def cases() -> list[Case]:
    """All cases: every grid on one model, then every kind of model at 4 bits."""
    made = [Case("llama", CT, bits, 32, sym) for bits in range(2, 9) for sym in (True, False)]
    made += [Case("llama", CT, 4, group, sym, options=NATIVE) for group in (32, 64, -1) for sym in (True, False)]
    made = [case for case in made if case.bits != 4 or case.options]
    made += [Case("llama, 192 wide", CT, 4, 96, options=NATIVE), Case("llama, 192 wide", GPTQ1, 4, 96)]
    made += [Case("llama", GPTQ1, bits, 32) for bits in (2, 3, 8)] + [Case("llama", GPTQ1, 4, 32, options=NATIVE)]
    made += [
        Case("llama", GPTQ2, 4, 32, options=NATIVE),
        Case("llama", GPTQ2, 4, 32, False),
        Case("llama", GPTQ2, 8, 32, False),
    ]
    made += [Case("llama, 192 wide", CT, 4, 128, more="a tail group")]
    made += [
        Case("llama", format, 4, 32, settings={"override": {"down_proj": {"bits": 8}}}, more="down_proj 8 bits")
        for format in (CT, GPTQ1)
    ]
    exact = {"kernels": "native", "dtype": "float32"}
    for bits, group, sym, options in (
        (8, -1, True, exact),
        (4, 32, True, NATIVE),
        (8, -1, False, NATIVE),
        (8, 32, True, NATIVE),
    ):
        for tokens in (True, False):
            rounded = {"act_bits": 8, "act_sym": tokens}
            words = f"8-bit activations{'' if tokens else ' asymmetric'}"
            made.append(Case("llama", CT, bits, group, sym, rounded, words, options))
    made += [
        Case("llama", CT, 3, 32, True, {"act_bits": 8}, "8-bit activations", NATIVE),
        Case("llama", CT, 4, 32, True, {"act_bits": 4}, "4-bit activations", NATIVE),
    ]
    for model in FAMILIES:
        made += [Case(model, format, 4, 32) for format in (CT, GPTQ1)]
    for model in ("mixtral", "granitemoe", "olmoe"):
        made += [Case(model, CT, 3, 32), Case(model, CT, 4, 32, False), Case(model, CT, 8, 32, False)]
        for format in (CT, GPTQ1):
            made.append(
                Case(model, format, 4, 32, settings={"override": {EXPERTS: {"bits": 8}}}, more="experts 8 bits")
            )
    for model in ("mixtral", "granitemoe", "olmoe", "gpt_oss"):
        for format in (CT, GPTQ1):
            made.append(Case(model, format, 4, 32, settings={"ignore": [EXPERTS]}, more="experts dense"))
            first = {"ignore": [rf"layers\.0\..*{EXPERTS}"]}
            made.append(Case(model, format, 4, 32, settings=first, more="experts of the first layer dense"))
    made += [
        Case("bloom", CT, 4, 32, settings={"ignore": ["query_key_value"]}, more="query_key_value dense"),
    ]
    made += [Case("llama", "awq", 4, group, False, options=NATIVE, engines=("vllm", "mlx", ONNX)) for group in (32, 64)]
    made += [Case("llama", "mlx", bits, 32, False, engines=("mlx",)) for bits in (2, 3, 4, 5, 6, 8)]
    made += [Case("llama", "mlx", 4, 64, False, engines=("mlx",))]
    made += [Case("llama", GPTQ1, bits, 32, engines=("mlx", ONNX)) for bits in (2, 3, 4, 8)]
    made += [Case("llama", GPTQ1, 4, group, engines=(ONNX,)) for group in (16, 64, -1)]
    wide = [Case("llama, 256 wide", GPTQ1, bits, group, engines=(ONNX,)) for bits in (4, 8) for group in (8, 128, -1)]
    made += [*wide, Case("llama, 192 wide", GPTQ1, 4, 96, engines=(ONNX,))]
    made += [
        Case("llama, 256 wide", "awq", 4, group, False, options=NATIVE, engines=("mlx", ONNX))
        for group in (16, 128, -1)
    ]
    made += [Case("llama, 256 wide", "mlx", 4, 128, False, engines=("mlx",))]
    made += [Case("llama", GPTQ1, 4, 32, settings=EIGHT, more="down_proj 8 bits", engines=(ONNX,))]
    made += [Case("llama", GPTQ2, bits, 32, sym, engines=(ONNX,)) for bits in (4, 8) for sym in (True, False)]
    made += [Case("llama", CT, 4, 32, engines=("mlx", ONNX))]
    made += [Case("llama", "mlx", 4, 32, False, EIGHT, "down_proj 8 bits", engines=("mlx",))]
    for model in MLX_FAMILIES:
        made += [Case(model, format, 4, 32, False, engines=("mlx",)) for format in ("mlx", "awq")]
    made += [Case(model, GPTQ1, 4, 32, engines=(ONNX,)) for model in ONNX_FAMILIES]
    for model in ("qwen3", "mistral, no window", "phi3, no window", "mixtral, no window"):
        made += [Case(model, "awq", 4, 32, False, engines=(ONNX,))]
    made += [gguf_case("llama, 256 wide", type) for type in GGUF_TYPES]
    made += [gguf_case(model, "Q4_0") for model in GGUF_FAMILIES]
    return [case for case in made if case.format in FORMATS]


def gguf_case(model: str, type: str) -> Case:
    """Make a case of llama.cpp's."""
    grid = grid_of(type)
    settings = {"gguf_type": type}
    return Case(model, "gguf", grid.bits, grid.group_size, grid.sym, settings, engines=("llama.cpp",))


def build(name: str, folder: Path) -> Path:
    """Save a random model of a kind, whose weights are large enough that its layers do something."""
    kind, changes, _ = MODELS[name]
    default = transformers.AutoConfig.for_model(kind)
    sizes = {key: value for key, value in SIZES.items() if hasattr(default, key)} | changes
    config = transformers.AutoConfig.for_model(kind, **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "experts" in parameter_name and "shared" not in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
            elif parameter.dim() == 2:
                parameter.mul_(3)
    model.save_pretrained(folder)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(sizes["vocab_size"])}, unk_token="w0")
    plain = tokenizers.Tokenizer(words)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"unk_token": "w0", "pad_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder)
    return folder


def template(source: Path) -> Path:
    """Write the GGUF of a model, and run it in llama.cpp as it is: what a checkpoint is compared with must be right."""
    file, ids, out = source.parent / f"{source.name}.gguf", source.parent / "ids.json", source / "plain.npz"
    if not file.exists():
        gguf_templates.of_folder(source, file)
        ids.write_text(json.dumps(tokens()))
        asked("llama.cpp", "{}", [(file, ids, out)], source.parent / "plain.log")
        with np.load(out) as answer:
            logprobs = answer["logprobs"]
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        off = float(np.abs(scored(model) - logprobs).mean())
        assert off <= EXACT, f"the template of {source.name} differs from its model by {off}"
        out.unlink()
    return file


def python_of(engine: str) -> Path | None:
    """Find the interpreter of an engine's environment; None: there is none."""
    name = ENVIRONMENTS.get(engine, engine)
    found = Path(os.environ.get("NEARPLANE_ENGINES", ROOT / ".engines")) / name / "bin" / "python"
    return found if found.exists() else None


def tokens() -> list[list[int]]:
    """Two sequences of 24 tokens."""
    return torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0)).tolist()


def tried(engine: str, made: list[tuple[Case, Path]], folder: Path) -> list[dict[str, Any]]:
    """Run an engine on checkpoints, and give a row for each."""
    ids = folder / "ids.json"
    ids.write_text(json.dumps(tokens()))
    rows, groups = list[dict[str, Any]](), dict[str, list[tuple[Case, Path, Path]]]()
    for i, (case, checkpoint) in enumerate(made):
        options = (case.options or {"kernels": "float32"}) if engine == "vllm" else {}
        if engine == "transformers" and not case.sym and case.format == CT:
            options = {"dequantize": True}
        groups.setdefault(json.dumps(options), []).append((case, checkpoint, folder / f"{engine}-{i}.npz"))
    for options, some in groups.items():
        triples = [(file_of(checkpoint), ids, out) for _, checkpoint, out in some]
        if engine == "llama.cpp":
            triples += [
                (wide, ids, out.with_suffix(".wide.npz"))
                for case, checkpoint, out in some
                if (wide := widened(case, checkpoint))
            ]
        asked(engine, options, triples, folder / f"{engine}.log")
        rows += [row_of(engine, case, checkpoint, out) for case, checkpoint, out in some]
    return rows


def asked(engine: str, options: str, triples: list[tuple[Path, Path, Path]], log: Path) -> None:
    """Call the runner of an engine."""
    runner = RUNNERS / f"{ENVIRONMENTS.get(engine, engine)}.py"
    with log.open("ab") as file:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        words = [str(word) for triple in triples for word in triple]
        command = [str(python_of(engine)), str(runner), "--options", options, *words]
        subprocess.run(command, stdout=file, stderr=file, check=False, env=environment)


def file_of(checkpoint: Path) -> Path:
    """Give what an engine opens: the .gguf file of a folder that has one, else the folder."""
    return next(checkpoint.glob("*.gguf"), checkpoint)


def widened(case: Case, checkpoint: Path) -> Path | None:
    """Write a GGUF checkpoint again in float32; None where the package gguf does not know its type, as Q2_0."""
    if case.settings["gguf_type"] not in gguf.GGMLQuantizationType.__members__:
        return None
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    return gguf_templates.widened(config, file_of(checkpoint), checkpoint.parent / f"{checkpoint.name}.wide.gguf")


def scored(model: Any) -> np.ndarray:
    """Give a model's log-probabilities of ``tokens``."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(tokens()), use_cache=False).logits
    found: np.ndarray = logits.float().log_softmax(-1).numpy()
    return found


def row_of(engine: str, case: Case, checkpoint: Path, out: Path) -> dict[str, Any]:
    """Compare an engine's answer with nearplane's, and describe the checkpoint for ``verdict``."""
    opened = described(open_checkpoint(checkpoint), open_skeleton(checkpoint)[1])
    row = {"case": case.name, "engine": engine, "kind": MODELS[case.model][2], "described": told(opened)}
    row |= {"format": case.format, "bits": case.bits, "sym": case.sym, "group": case.group, "more": case.more}
    if not out.exists():
        return {**row, "version": "", "outcome": "refused", "reason": "the engine ended without an answer"}
    with np.load(out) as answer:
        about = json.loads(str(answer["about"]))
        first = next(iter(about["versions"].items()))
        row |= {"version": " ".join(first), "versions": about["versions"], "arithmetic": about["arithmetic"]}
        if "refused" in about:
            return {**row, "outcome": "refused", "reason": told_without(about["refused"], checkpoint)}
        logprobs, greedy = answer["logprobs"], answer["greedy"]
    expected = scored(nearplane.load(checkpoint, arithmetic="exact"))
    off = np.abs(expected - logprobs[..., : expected.shape[-1]])
    last = expected[:, -1]
    behind = (
        last.max(-1) - last[np.arange(len(last)), greedy[:, 0]]
    )  # 0, unless two tokens are as likely as the noise is large
    agrees = bool((behind <= 2 * off.max()).all()) and float(off.mean()) <= tolerance(case, about["arithmetic"])
    row |= {"mean": float(f"{off.mean():.2g}"), "max": float(f"{off.max():.2g}")}
    wide = out.with_suffix(".wide.npz")
    if wide.exists():
        with np.load(wide) as answer:
            plain = float(np.abs(expected - answer["logprobs"]).mean())
        row["widened"], agrees = float(f"{plain:.2g}"), agrees and plain <= EXACT
    return {**row, "outcome": "ran" if agrees else "garbage"}


def told_without(words: str, checkpoint: Path) -> str:
    """Take the place, and the number, of a checkpoint out of an engine's words."""
    return (
        words.replace(str(checkpoint), "OUT")
        .replace(str(checkpoint.parent), "")
        .replace(f"/{checkpoint.name} ", "OUT ")
    )


def tolerance(case: Case, arithmetic: str) -> float:
    """Give the mean difference of log-probabilities that an arithmetic explains.

    mlx-lm rounds the offsets of awq, scale times zero, to the dtype of its scales.
    Deepseek's latent attention in vLLM differs by 0.01 and more from transformers' for the dense model, too.
    """
    if case.format == "awq" and "MLX" in arithmetic:
        return OFFSETS
    plain = "float32" in arithmetic and "rounded" not in arithmetic
    return EXACT if plain and "activations" not in case.more and case.model != "deepseek_v2" else ROUNDED


def told(found: Described) -> dict[str, Any]:
    """Write down what ``verdict`` looks at."""
    weights = [
        {
            "type": own_type(w.grid) if found.format == "gguf" else None,
            "bits": w.grid.storage_bits, "group_size": w.grid.group_size, "sym": w.grid.sym, "shape": list(w.shape),
            "activations": None if w.activations is None else asdict(w.activations),
        }
        for w in found.weights
    ]  # fmt: skip
    model = None if found.model is None else {**asdict(found.model), "parts": sorted(found.model.parts)}
    return {
        "format": found.format,
        "weights": weights,
        "model": model,
        "online": found.online,
        "ordered": found.ordered,
    }


def described_of(row: dict[str, Any]) -> Described:
    """Read ``told`` back."""
    held = row["described"]
    weights = tuple(
        Weight(
            grid_of(w["type"]) if w.get("type") else Grid(w["bits"], w["group_size"], w["sym"]), tuple(w["shape"]),
            None if w["activations"] is None else TokenGrid(**w["activations"]),
        )
        for w in held["weights"]
    )  # fmt: skip
    facts = held["model"]
    model = (
        None
        if facts is None
        else Model(**{**facts, "parts": frozenset(facts["parts"]), "renamed": tuple(facts["renamed"])})
    )
    return Described(held["format"], weights, model, held["online"], held["ordered"])


def disagreement(row: dict[str, Any]) -> str | None:
    """Tell that the verdict says something else than what happened; None where it does not."""
    said: Verdict = verdict(row["engine"], described_of(row))
    if bool(said.refusals) == (row["outcome"] != "ran"):
        return None
    happened = row["outcome"] + (f" ({row['reason']})" if "reason" in row else "")
    return f"{row['engine']}, {row['case']}: {happened}, but the verdict is: {said}"


def run(engines: list[str], wanted: str) -> Iterable[dict[str, Any]]:
    """Build, quantize, run and compare the cases whose names match, engine by engine."""
    chosen = [case for case in cases() if re.search(wanted, case.name)]
    with tempfile.TemporaryDirectory(prefix="engines-") as place:
        folder = Path(place)
        for engine in engines:
            made = []
            for i, case in enumerate(case for case in chosen if engine in case.engines):
                if engine == "transformers" and case.format != CT:
                    continue  # by optimum and gptqmodel, which are not in its environment
                source, out = folder / case.model.replace(" ", "_"), folder / f"{engine}-{i}"
                if not source.exists():
                    build(case.model, source)
                settings: dict[str, Any] = {"method": RTN(), "format": case.format, "progress": False}
                if case.format == "gguf":
                    settings["template"] = template(source)
                else:
                    settings["grid"] = Grid(case.bits, case.group, case.sym)
                try:
                    nearplane.quantize(source, out, **settings, **case.settings)
                except nearplane.NearplaneError as error:
                    print(f"left out: {case.name}: {str(error).replace(place, '')[:150]}", flush=True)
                    continue
                made.append((case, out))
            yield from tried(engine, made, folder)


def read() -> list[dict[str, Any]]:
    """Read the record."""
    return [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []


def ran(rows: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """List, by engine, the kinds of weights that were run, with the version; a refusal counts as run.

    Where the products of no row of a kind were the engine's own, the version says so.
    """
    found: dict[str, dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: "reference" not in row.get("arithmetic", "")):  # the engine's own come last
        reference = (
            " (its loader, with the products of a reference)" if "reference" in row.get("arithmetic", "") else ""
        )
        for kind in described_of(row).kinds:
            if row["outcome"] != "refused" or kind not in found.get(row["engine"], {}):
                found.setdefault(row["engine"], {})[kind] = row["version"] + reference
    return {engine: dict(sorted(kinds.items())) for engine, kinds in sorted(found.items())}


def cell(row: dict[str, Any] | None) -> str:
    """Write a cell of the table."""
    if row is None:
        return "not run here"
    if row["outcome"] == "ran":
        reference = ", products by a reference" if "reference" in row["arithmetic"] else ""
        wide = f"; by {row['widened']:.1g} with its weights in float32" if "widened" in row else ""
        return f"ran: log-probabilities differ by {row['mean']:.1g}{reference}{wide}"
    if row["outcome"] == "garbage":
        return "loads, and computes something else"
    return "refused: " + re.sub(r"\s+", " ", row["reason"]).replace("|", "/")[:110]


def page(rows: list[dict[str, Any]]) -> str:
    """Write docs/engines.md."""
    sys.path.insert(0, str(ROOT / "runs"))
    types = __import__("transformers_types")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["engine"]] = row
    columns = [engine for engine in COLUMNS if any(engine in some for some in found.values())]
    versions = {
        engine: sorted({row["version"] for row in rows if row["engine"] == engine and row["version"]})
        for engine in columns
    }
    heads = [f"{engine}: {', '.join(versions[engine])}" for engine in columns]
    lines = [*(RUNNERS / "page.md").read_text().rstrip().splitlines(), "", "<!-- engines -->"]
    lines += [f"| model | format | weights | {' | '.join(heads)} |", "|---" * (3 + len(columns)) + "|"]
    for case, some in found.items():
        model, format, grid = case.split(" | ")
        kind = next(iter(some.values()))["kind"]
        cells = [cell(some.get(engine)) for engine in columns]
        lines.append(f"| {model} ({kind}) | {format} | {grid} | {' | '.join(cells)} |")
    stored = [json.loads(line) for line in (ROOT / "runs" / "transformers_types.jsonl").read_text().splitlines()]
    lines += ["", "## Model types in plain transformers", "", types.table(stored)]
    return "\n".join(lines).rstrip() + "\n<!-- engines -->\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("run", "check", "table"))
    parser.add_argument("--engines", nargs="*", default=list(COLUMNS))
    parser.add_argument("--cases", default="")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows, wrong = read(), list[str]()
    if args.step != "table":
        here = [engine for engine in args.engines if python_of(engine) is not None]
        for engine in sorted(set(args.engines) - set(here)):
            print(f"{engine}: not run here, there is no environment (make engines)", flush=True)
        for row in run(here, args.cases):
            reason = disagreement(row)
            wrong += [] if reason is None else [reason]
            print(
                f"{row['engine']:<14} {row['case']}: {cell(row)}{'' if reason is None else '   <- not the verdict'}",
                flush=True,
            )
            key = (row["case"], row["engine"])
            places = {(old["case"], old["engine"]): i for i, old in enumerate(rows)}
            rows = (
                [*rows, row] if key not in places else [row if i == places[key] else old for i, old in enumerate(rows)]
            )
    if args.step == "run":
        order = {case.name: i for i, case in enumerate(cases())}
        rows.sort(key=lambda row: (order.get(row["case"], len(order)), COLUMNS.index(row["engine"])))
        RECORD.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if args.step != "check":
        RAN.write_text(json.dumps(ran(rows), indent=1) + "\n")
        PAGE.write_text(page(rows))
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
