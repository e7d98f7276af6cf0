"""llama.cpp, by the library in the package xllamacpp, runs a ``.gguf``. The contract is in contract.py.

    LLAMA_PYTHON runs/engines/llama.py MODEL.gguf IDS OUT

Keys and values are kept in float32 and attention is computed plainly, so that quantized matrices make the difference alone.
llama.cpp rounds what goes into a quantized matrix to 8 bits, in blocks of 32 or 256 numbers.

The library's structures of settings change between releases. So they are opaque here, as large as any release's. The few
fields that are set were found in the header of release 11434, and their defaults are compared before they are changed.
Options: ``threads`` (1).
"""

import ctypes
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import contract
import numpy as np

ERROR = 4
# Offset and default of fields of llama_context_params: uint32 or int32.
CONTEXT, BATCH, MICRO_BATCH, THREADS, BATCH_THREADS = (0, 512), (4, 2048), (8, 512), (28, 4), (32, 4)
FLASH, KEYS, VALUES = (52, -1), (104, 1), (108, 1)


class Settings(ctypes.Structure):
    """``llama_model_params`` or ``llama_context_params``: passed by value, in memory, so that more bytes do no harm."""

    _fields_ = (("bytes", ctypes.c_ubyte * 1024),)

    def change(self, field: tuple[int, int], value: int) -> None:
        """Set a field whose default is as it was when its place was looked up."""
        place, default = field
        number = ctypes.c_int32.from_buffer(self, place)
        if number.value != default:
            raise RuntimeError(
                f"this release of llama.cpp has {number.value} at byte {place} of its settings, not {default}"
            )
        number.value = value


class Batch(ctypes.Structure):
    """``llama_batch``."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class Llama:
    """A model and its context."""

    def __init__(self, path: Path, length: int, threads: int) -> None:
        """Load ``path`` for sequences of ``length`` tokens. Raises RuntimeError with llama.cpp's first words of error."""
        found = find_spec("xllamacpp")
        assert found is not None and found.submodule_search_locations
        (library,) = Path(found.submodule_search_locations[0]).glob("xllamacpp*.so")
        self.library = ctypes.CDLL(str(library))
        self.errors: list[str] = []
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self.listen = kind(
            lambda level, text, _: self.errors.append(text.decode(errors="replace")) if level == ERROR else None
        )
        self.library.llama_log_set(self.listen, None)
        pointer = ctypes.c_void_p
        self.call("llama_backend_init", None)
        model_settings = self.call("llama_model_default_params", Settings)
        self.model = self.call("llama_model_load_from_file", pointer, str(path).encode(), model_settings)
        self.check(self.model)
        settings = self.call("llama_context_default_params", Settings)
        for field, value in (
            (CONTEXT, max(length, 32)), (BATCH, max(length, 32)), (MICRO_BATCH, max(length, 32)), (THREADS, threads),
            (BATCH_THREADS, threads), (FLASH, 0), (KEYS, 0), (VALUES, 0),
        ):  # fmt: skip
            settings.change(field, value)
        self.context = self.call("llama_init_from_model", pointer, pointer(self.model), settings)
        self.check(self.context)
        vocabulary = self.call("llama_model_get_vocab", pointer, pointer(self.model))
        self.vocabulary = self.call("llama_vocab_n_tokens", ctypes.c_int32, pointer(vocabulary))
        self.batch = self.call("llama_batch_init", Batch, ctypes.c_int32(length), ctypes.c_int32(0), ctypes.c_int32(1))

    def call(self, name: str, answer: Any, *values: Any) -> Any:
        """Call a function of the library; its answer is of the type ``answer``."""
        function = getattr(self.library, name)
        function.restype = answer
        return function(*values)

    def check(self, answer: Any) -> None:
        """Raise RuntimeError with llama.cpp's own reason where it gave no answer."""
        if not answer:
            raise RuntimeError("; ".join(line.strip() for line in self.errors if line.strip()) or "no reason was given")

    def restart(self) -> None:
        """Forget the sequence so far."""
        pointer = ctypes.c_void_p
        memory = self.call("llama_get_memory", pointer, pointer(self.context))
        self.call("llama_memory_clear", None, pointer(memory), ctypes.c_bool(True))

    def logits(self, tokens: list[int], start: int) -> np.ndarray:
        """Run tokens that begin at position ``start``; return logits (tokens, vocabulary)."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
            batch.seq_id[i][0] = 0
        pointer = ctypes.c_void_p
        status = self.call("llama_decode", ctypes.c_int32, pointer(self.context), batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}: {'; '.join(self.errors).strip()}")
        found = self.call("llama_get_logits", ctypes.POINTER(ctypes.c_float), pointer(self.context))
        return np.ctypeslib.as_array(found, (len(tokens), self.vocabulary)).copy()


def run(checkpoint: Path, ids: np.ndarray, greedy: int, options: dict[str, Any]) -> contract.Ran:
    """Score each sequence in one batch, then generate behind it."""
    llama = Llama(checkpoint, ids.shape[1] + greedy, int(options.get("threads", 1)))
    scores, made = [], []
    for row in ids.tolist():
        llama.restart()
        logits = llama.logits(row, 0)
        scores.append(contract.log_softmax(logits))
        last, tokens = logits[-1], list[int]()
        for step in range(greedy):
            tokens.append(int(last.argmax()))
            last = llama.logits(tokens[-1:], len(row) + step)[-1]
        made.append(tokens)
    greedy_tokens = np.array(made, dtype=np.int64).reshape(len(ids), greedy)
    return contract.Ran(np.stack(scores), greedy_tokens, "float32, inputs of quantized matrices rounded to 8 bits")


if __name__ == "__main__":
    contract.main(run, "llama", ["xllamacpp", "gguf"])
