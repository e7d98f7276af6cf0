"""Runs inside the environment of auto-round: MODEL WINDOWS.json OUT BITS GROUP_SIZE ITERS (0: no tuning)."""

import json
import sys

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

model, windows, out, bits, group_size, iters = sys.argv[1:7]
with open(windows, encoding="utf-8") as file:
    samples = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))} for ids in json.load(file)]
rounder = AutoRound(
    AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
    AutoTokenizer.from_pretrained(model),
    bits=int(bits),
    group_size=int(group_size),
    sym=False,
    iters=int(iters),
    dataset=samples,
    nsamples=len(samples),
    seqlen=samples[0]["input_ids"].shape[1],
    batch_size=4,
    device_map="cpu",
    enable_torch_compile=False,
)
rounder.quantize_and_save(out, format="auto_gptq")
