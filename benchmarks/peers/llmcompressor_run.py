"""Runs inside the environment of llm-compressor: MODEL WINDOWS.json OUT BITS GROUP_SIZE gptq|plain."""

import json
import sys

from datasets import Dataset
from laps import Laps
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

model, windows, out, bits, group_size, kind = sys.argv[1:7]
with open(windows, encoding="utf-8") as file:
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in json.load(file)]
weights = {
    "num_bits": int(bits),
    "type": "int",
    "strategy": "group",
    "group_size": int(group_size),
    "symmetric": False,
    "actorder": "static",
}
if kind != "plain":
    weights["observer"] = "mse"  # its own search for scales, not its default
group = {"targets": ["Linear"], "weights": weights}
laps = Laps()
loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
laps.lap("load")
oneshot(
    model=loaded,
    dataset=Dataset.from_list(samples),
    recipe=GPTQModifier(config_groups={"group_0": group}, ignore=["lm_head"]),
    max_seq_length=len(samples[0]["input_ids"]),
    num_calibration_samples=len(samples),
)
laps.lap("quantize")
loaded.save_pretrained(out, save_compressed=True)
AutoTokenizer.from_pretrained(model).save_pretrained(out)
laps.lap("save")
laps.show()
