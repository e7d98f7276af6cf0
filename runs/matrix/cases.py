"""The cases of the engines' matrix: which checkpoints are made, and which engines are given each."""

import json
from dataclasses import dataclass, field
from typing import Any

from matrix.models import DEMO, EXPERTS, FAMILIES, GGUF_FAMILIES, MLX_FAMILIES, ONNX_FAMILIES, OPENVINO_FAMILIES

from nearplane.formats.gguf.grids import grid_of

NATIVE = {"kernels": "native"}
CT, GPTQ1, GPTQ2 = "compressed-tensors", "gptq", "gptq_v2"
VLLM, TRANSFORMERS, LLAMA, MLX, ONNX, OPENVINO = (
    "vllm", "transformers", "llama.cpp", "mlx", "onnxruntime-genai", "openvino",
)  # fmt: skip
EIGHT: dict[str, Any] = {"override": {"down_proj": {"bits": 8}}}
GGUF_TYPES = ("Q4_0", "Q8_0", "Q5_0", "Q4_1", "Q5_1", "Q2_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


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
    engines: tuple[str, ...] = (VLLM, TRANSFORMERS)

    @property
    def name(self) -> str:
        """Name the case in words, as the record has it."""
        more = self.more and f", {self.more}"
        if self.format == "gguf":
            return f"{self.model} | gguf | {self.settings['gguf_type']}{more}"
        grid = f"{self.bits} bits{'' if self.sym else ' asymmetric'}, {'rows' if self.group == -1 else f'groups of {self.group}'}"
        return f"{self.model} | {self.format} | {grid}{more}"

    def options_of(self, engine: str) -> str:
        """Give the options of an engine's runner, as JSON."""
        if engine == VLLM:
            return json.dumps(self.options or {"kernels": "float32"})
        return json.dumps({"dequantize": True} if engine == TRANSFORMERS and not self.sym and self.format == CT else {})

    def given_to(self, engine: str) -> bool:
        """Tell whether an engine is given the checkpoint."""
        if engine == TRANSFORMERS and self.format != CT:
            return False  # by optimum and gptqmodel, which are not in its environment
        return engine in self.engines


def cases() -> list[Case]:
    """All cases: the demo model, every grid on one model, then every kind of model at 4 bits."""
    return [
        *_real(), *_grids(), *_activations(), *_families(), *_experts(), *_mlx(), *_onnx(), *_openvino(), *_gguf(), *_dense(),
    ]  # fmt: skip


def gguf_case(model: str, type: str, **more: Any) -> Case:
    """Make a case of llama.cpp's."""
    grid = grid_of(type)
    settings = {"gguf_type": type, **more.pop("settings", {})}
    return Case(model, "gguf", grid.bits, grid.group_size, grid.sym, settings, engines=(LLAMA,), **more)


def _real() -> list[Case]:
    """Give the demo model in each format, to every engine that loads it."""
    return [
        gguf_case(DEMO, "Q4_0"),
        Case(DEMO, "mlx", 4, 64, False, engines=(MLX,)),
        Case(DEMO, "awq", 4, 64, False, options=NATIVE, engines=(VLLM, MLX, ONNX)),
        Case(DEMO, GPTQ1, 4, 64, options=NATIVE, engines=(VLLM, ONNX)),
        Case(DEMO, CT, 4, 64, options=NATIVE, engines=(VLLM, TRANSFORMERS, OPENVINO)),
    ]


def _grids() -> list[Case]:
    """Every width, symmetry and kind of groups, in the formats of vLLM and transformers."""
    made = [Case("llama", CT, bits, 32, sym) for bits in range(2, 9) for sym in (True, False) if bits != 4]
    made += [Case("llama", CT, 4, group, sym, options=NATIVE) for group in (32, 64, -1) for sym in (True, False)]
    made += [Case("llama, 192 wide", CT, 4, 96, options=NATIVE), Case("llama, 192 wide", GPTQ1, 4, 96)]
    made += [Case("llama", GPTQ1, bits, 32) for bits in (2, 3, 8)] + [Case("llama", GPTQ1, 4, 32, options=NATIVE)]
    made += [Case("llama", GPTQ2, 4, 32, options=NATIVE)]
    made += [Case("llama", GPTQ2, bits, 32, False) for bits in (4, 8)]
    made += [Case("llama, 192 wide", CT, 4, 128, more="a tail group")]
    return made + [Case("llama", format, 4, 32, settings=EIGHT, more="down_proj 8 bits") for format in (CT, GPTQ1)]


def _activations() -> list[Case]:
    """Activations that are rounded."""
    made, exact = list[Case](), {"kernels": "native", "dtype": "float32"}
    kinds = ((8, -1, True, exact), (4, 32, True, NATIVE), (8, -1, False, NATIVE), (8, 32, True, NATIVE))
    for bits, group, sym, options in kinds:
        for tokens in (True, False):
            rounded = {"act_bits": 8, "act_sym": tokens}
            words = f"8-bit activations{'' if tokens else ' asymmetric'}"
            made.append(Case("llama", CT, bits, group, sym, rounded, words, options))
    for bits, width in ((3, 8), (4, 4)):
        made.append(Case("llama", CT, bits, 32, True, {"act_bits": width}, f"{width}-bit activations", NATIVE))
    return made


def _families() -> list[Case]:
    """Every kind of model."""
    return [Case(model, format, 4, 32) for model in FAMILIES for format in (CT, GPTQ1)]


def _experts() -> list[Case]:
    """Mixtures of experts on more grids, on two at once, and with some experts dense."""
    made = list[Case]()
    for model in ("mixtral", "granitemoe", "olmoe"):
        made += [Case(model, CT, 3, 32), Case(model, CT, 4, 32, False), Case(model, CT, 8, 32, False)]
        eight = {"override": {EXPERTS: {"bits": 8}}}
        made += [Case(model, format, 4, 32, settings=eight, more="experts 8 bits") for format in (CT, GPTQ1)]
    for model in ("mixtral", "granitemoe", "olmoe", "gpt_oss"):
        for format in (CT, GPTQ1):
            made.append(Case(model, format, 4, 32, settings={"ignore": [EXPERTS]}, more="experts dense"))
            first = {"ignore": [rf"layers\.0\..*{EXPERTS}"]}
            made.append(Case(model, format, 4, 32, settings=first, more="experts of the first layer dense"))
    return [*made, Case("bloom", CT, 4, 32, settings={"ignore": ["query_key_value"]}, more="query_key_value dense")]


def _mlx() -> list[Case]:
    """Those of mlx-lm; AWQ is also vLLM's and ONNX Runtime GenAI's."""
    made = [Case("llama", "awq", 4, group, False, options=NATIVE, engines=(VLLM, MLX, ONNX)) for group in (32, 64)]
    made += [Case("llama", "mlx", bits, 32, False, engines=(MLX,)) for bits in (2, 3, 4, 5, 6, 8)]
    made += [Case("llama", "mlx", 4, 64, False, engines=(MLX,))]
    made += [Case("llama, 256 wide", "awq", 4, 128, False, options=NATIVE, engines=(VLLM, MLX, ONNX))]
    made += [Case("llama, 256 wide", "awq", 4, group, False, options=NATIVE, engines=(MLX, ONNX)) for group in (16, -1)]
    made += [Case("llama, 256 wide", "mlx", 4, 128, False, engines=(MLX,)), Case("llama", CT, 4, 32, engines=(MLX,))]
    made += [Case("llama", "mlx", 4, 32, False, EIGHT, "down_proj 8 bits", engines=(MLX,))]
    made += [Case("llama", GPTQ1, bits, 32, engines=(MLX,)) for bits in (2, 3, 4, 8)]
    return made + [
        Case(model, format, 4, 32, False, engines=(MLX,)) for model in MLX_FAMILIES for format in ("mlx", "awq")
    ]


def _onnx() -> list[Case]:
    """Those of ONNX Runtime GenAI."""
    made = [Case("llama", GPTQ1, bits, 32, engines=(ONNX,)) for bits in (2, 3, 4, 8)]
    made += [Case("llama", GPTQ1, 4, group, engines=(ONNX,)) for group in (16, 64, -1)]
    made += [Case("llama, 256 wide", GPTQ1, bits, group, engines=(ONNX,)) for bits in (4, 8) for group in (8, 128, -1)]
    made += [Case("llama, 192 wide", GPTQ1, 4, 96, engines=(ONNX,))]
    made += [Case("llama", GPTQ1, 4, 32, settings=EIGHT, more="down_proj 8 bits", engines=(ONNX,))]
    made += [Case("llama", GPTQ2, bits, 32, sym, engines=(ONNX,)) for bits in (4, 8) for sym in (True, False)]
    made += [Case("llama", CT, 4, 32, engines=(ONNX,))]
    made += [Case(model, GPTQ1, 4, 32, engines=(ONNX,)) for model in ONNX_FAMILIES]
    some = ("qwen3", "mistral, no window", "phi3, no window", "mixtral, no window")
    return made + [Case(model, "awq", 4, 32, False, engines=(ONNX,)) for model in some]


def _openvino() -> list[Case]:
    """Those of OpenVINO."""
    made = [Case("llama", CT, bits, 32, sym, engines=(OPENVINO,)) for bits in (2, 3, 4, 8) for sym in (True, False)]
    made += [Case("llama", CT, 4, group, sym, engines=(OPENVINO,)) for group in (64, -1) for sym in (True, False)]
    made += [Case("llama, 192 wide", CT, 4, 96, engines=(OPENVINO,))]
    made += [Case("llama, 192 wide", CT, 4, 128, more="a tail group", engines=(OPENVINO,))]
    made += [Case("llama", CT, 4, 32, settings=EIGHT, more="down_proj 8 bits", engines=(OPENVINO,))]
    rounded = {"act_bits": 8, "act_sym": True}
    made += [Case("llama", CT, 4, 32, True, rounded, "8-bit activations", engines=(OPENVINO,))]
    made += [Case("llama", CT, 8, -1, True, rounded, "8-bit activations", engines=(OPENVINO,))]
    made += [Case("llama", format, 4, 32, engines=(OPENVINO,)) for format in (GPTQ1, GPTQ2)]
    made += [Case("llama", "awq", 4, 32, False, engines=(OPENVINO,))]
    return made + [Case(model, CT, 4, 32, engines=(OPENVINO,)) for model in OPENVINO_FAMILIES]


def _gguf() -> list[Case]:
    """Those of llama.cpp: every type on one model, every kind of model."""
    made = [gguf_case("llama, 256 wide", type) for type in GGUF_TYPES]
    return made + [gguf_case(model, "Q4_0") for model in GGUF_FAMILIES]


def _dense() -> list[Case]:
    """Linears that stay dense among quantized ones."""
    made, formats = (
        list[Case](),
        {CT: (VLLM, TRANSFORMERS, OPENVINO), GPTQ1: (VLLM, ONNX), "awq": (VLLM, MLX, ONNX), "mlx": (MLX,)},
    )
    for words, pattern in (("down_proj dense", "down_proj"), ("the first layer dense", r"layers\.0\.")):
        ignored: dict[str, Any] = {"settings": {"ignore": [pattern]}, "more": words}
        for format, engines in formats.items():
            sym = format in (CT, GPTQ1)
            made.append(Case("llama", format, 4, 32, sym, options=NATIVE, engines=engines, **ignored))
        made.append(gguf_case("llama", "Q4_0", **ignored))
    return made
