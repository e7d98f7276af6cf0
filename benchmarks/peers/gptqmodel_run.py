"""Runs inside the environment of GPTQModel: MODEL WINDOWS.json OUT BITS GROUP_SIZE gptq|gptaq|plain."""

import json
import os
import sys

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it does not start with fewer

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import GPTAQConfig
from laps import Laps

model, windows, out, bits, group_size, kind = sys.argv[1:7]
config = QuantizeConfig(
    bits=int(bits),
    group_size=int(group_size),
    sym=False,
    desc_act=True,
    act_group_aware=False,
    mse=0.0 if kind == "plain" else 2.4,  # its own search for scales, off by default
    gptaq=GPTAQConfig() if kind == "gptaq" else None,
)
with open(windows, encoding="utf-8") as file:
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in json.load(file)]
laps = Laps()
# Its default on a CPU is bfloat16, many times slower where the processor has no instructions for it.
quantizer = GPTQModel.load(model, config, device="cpu", backend=BACKEND.TORCH, dtype=torch.float32)
laps.lap("load")
quantizer.quantize(samples, batch_size=4, backend=BACKEND.TORCH)
laps.lap("quantize")
quantizer.save(out)
laps.lap("save")
laps.show()
