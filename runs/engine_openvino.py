"""Run a checkpoint in OpenVINO through optimum-intel, in an environment that has them and not nearplane.

    python runs/engine_openvino.py FOLDER IDS.json OUT.npz

IDS.json is a list of lists of token ids. OUT.npz has for the list i: ``logprobs_i``, float32 (tokens, vocabulary), of each
position, and ``greedy_i``, the token ids that follow. Inference and the cache are float32, no activations are rounded.

OpenVINO's frontend takes 4-bit pack-quantized linears as they are. optimum-intel's own export runs the model first, by
which compressed-tensors makes the weights dense; so the model is loaded here, that hook is removed, and then it is exported.
docs/serve.md says which versions were run.
"""

import argparse
import importlib.metadata
import json
import tempfile
from pathlib import Path

import numpy

SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def main() -> None:
    """Convert, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--new", type=int, default=16, help="greedy tokens behind each list")
    given = parser.parse_args()
    import torch
    from optimum.exporters.openvino import export_from_model
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        loaded = AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32)
        hook = getattr(loaded, "ct_decompress_hook", None)
        if hook is not None:
            hook.remove()
        export_from_model(loaded, scratch, task="text-generation-with-past", stateful=True)
        kept = sum(path.stat().st_size for path in Path(scratch).glob("*.bin"))
        model = OVModelForCausalLM.from_pretrained(scratch, ov_config=SETTINGS)
        found = {}
        for number, ids in enumerate(json.loads(given.ids.read_text())):
            row = torch.tensor([ids])
            logits = torch.as_tensor(model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0])
            found[f"logprobs_{number}"] = logits.float().log_softmax(-1).numpy()
            settings = {
                "max_new_tokens": given.new,
                "do_sample": False,
                "repetition_penalty": 1.0,
                "eos_token_id": None,
            }
            tokens = model.generate(row, attention_mask=torch.ones_like(row), pad_token_id=0, **settings)
            found[f"greedy_{number}"] = tokens[0, len(ids) :].numpy()
    numpy.savez(given.out, **found)
    versions = {
        name: importlib.metadata.version(name) for name in ("openvino", "optimum-intel", "nncf", "transformers")
    }
    print(json.dumps({"engine": "openvino", **versions, "weights": kept, "lists": len(found) // 2}))


if __name__ == "__main__":
    main()
