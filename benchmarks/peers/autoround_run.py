"""Runs inside the environment of auto-round: MODEL WINDOWS.json OUT BITS GROUP_SIZE ITERS [--blocks N] [--sym].

ITERS 0: no tuning. With --blocks only the first N blocks are quantized, and OUT/linears.safetensors holds their
dequantized weights.
"""

import argparse
import json
import os

import torch
from auto_round import AutoRound
from laps import Laps
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def dequantized(done):
    """The quantized linears' weights in float32; the model itself has been cast to bfloat16."""
    found = {}
    for name, module in done.named_modules():
        if isinstance(getattr(module, "scale", None), torch.Tensor):
            rows = module.weight.shape[0]
            scale = module.scale.float().view(rows, -1, 1)
            level = module.weight.float().view(rows, scale.shape[1], -1) / scale
            found[f"{name}.weight"] = (level.round() * scale).view(rows, -1)
            assert (level - level.round()).abs().max() < 0.1, name
    return found


parser = argparse.ArgumentParser(description=__doc__)
for name in ("model", "windows", "out"):
    parser.add_argument(name)
for name in ("bits", "group_size", "iters"):
    parser.add_argument(name, type=int)
parser.add_argument("--blocks", type=int, default=0)
parser.add_argument("--sym", action="store_true")
args = parser.parse_args()
with open(args.windows, encoding="utf-8") as file:
    samples = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))} for ids in json.load(file)]
laps = Laps()
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
laps.lap("load")
only = {"to_quant_block_names": ",".join(rf"\.{number}$" for number in range(args.blocks))} if args.blocks else {}
rounder = AutoRound(
    model,
    AutoTokenizer.from_pretrained(args.model),
    bits=args.bits,
    group_size=args.group_size,
    sym=args.sym,
    iters=args.iters,
    dataset=samples,
    nsamples=len(samples),
    seqlen=samples[0]["input_ids"].shape[1],
    batch_size=4,
    device_map="cpu",
    enable_torch_compile=False,
    **only,
)
if args.blocks:
    done, _ = rounder.quantize()
    laps.lap("quantize")
    os.makedirs(args.out)
    save_file(dequantized(done), os.path.join(args.out, "linears.safetensors"))
else:
    rounder.quantize_and_save(args.out, format="auto_gptq")
    laps.lap("quantize")
laps.show()
