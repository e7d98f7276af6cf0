"""Held-out error of single linears on the grids of GGUF's types: NearPlane against llama.cpp's own quantization.

    python benchmarks/kquants.py [--types q3_k q2_k] [--layers 3 12 21 28] [--calibration VALID.txt --test TEST.txt]
        [--tokens 16384] [--engine PATH/TO/xllamacpp.abi3.so]

Needs the wheel ``xllamacpp`` (a library of llama.cpp; ``pip install xllamacpp``, or --engine of another environment), and
the demo model in its cache (``nearplane quantize demo OUT`` puts it there). The linears are ``down_proj``, whose 1536 inputs
256 divides. Their inputs come from forwards of the float model. H is of ``--tokens`` tokens of one text. The error is on half
as many of another text, or of what follows in the same file. Without files: the package's calibration and held-out texts.
llama.cpp gets the mean squares of the same inputs as its importance matrix. Same bytes, no walk: no method sees the error of
another linear. A column is tr(E H E^T) over that of llama.cpp with the matrix. The demo's weights came from a Q4_1 file, on
whose grid they lie: figures of q4_1, q4_k and q5_k say little on this model.
"""

import argparse
import ctypes
import importlib.util
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nearplane
from nearplane.core.grid import Grid, dequantize
from nearplane.core.moments import Moments
from nearplane.methods import GPTQ, RTN, NearPlane

FOLDER = Path.home() / ".cache/nearplane/SmolLM2-135M-Instruct"
TEXTS = Path(nearplane.__file__).parent / "data/embedded"
# number of a type in ggml.h, and bytes and weights of one of its blocks
GGML = {
    "q4_0": (2, 18, 32), "q4_1": (3, 20, 32), "q5_0": (6, 22, 32), "q5_1": (7, 24, 32), "q8_0": (8, 34, 32),
    "q2_k": (10, 84, 256), "q3_k": (11, 110, 256), "q4_k": (12, 144, 256), "q5_k": (13, 176, 256), "q6_k": (14, 210, 256),
}  # fmt: skip
SEQUENCE = 512


def engine(path: str | None) -> ctypes.CDLL:
    """Open llama.cpp's library."""
    if path is None:
        spec = importlib.util.find_spec("xllamacpp")
        if spec is None or spec.origin is None:
            raise SystemExit("this benchmark needs xllamacpp: pip install xllamacpp, or give --engine")
        path = str(next(Path(spec.origin).parent.glob("xllamacpp*.so")))
    library = ctypes.CDLL(path)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def by_llama(library: ctypes.CDLL, kind: str, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Quantize a weight as llama-quantize does, and read it back."""
    number, size, block = GGML[kind]
    out, columns = weight.shape
    source, target = weight.numpy().copy(), np.zeros(out * columns // block * size, dtype=np.uint8)
    squares = None if importance is None else importance.numpy().astype(np.float32)
    pointer = lambda array: None if array is None else array.ctypes.data_as(ctypes.c_void_p)  # noqa: E731
    rows = [ctypes.c_int64(value) for value in (0, out, columns)]
    library.ggml_quantize_chunk(number, pointer(source), pointer(target), *rows, pointer(squares))
    result = np.zeros((out, columns), dtype=np.float32)
    read = getattr(library, f"dequantize_row_{kind[:-1] + kind[-1].upper()}")
    read(pointer(target), pointer(result), ctypes.c_int64(out * columns))
    return torch.from_numpy(result)


def inputs(names: list[str], tokens: int, texts: list[Path]) -> dict[str, tuple[torch.Tensor, Moments, torch.Tensor]]:
    """Return weight, moments (of the first text) and the held-out H (of the second) of each linear, by name in the model."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    linears = {name: model.get_submodule(name) for name in names}
    found = {name: [Moments.zeros(linear.in_features) for _ in range(3)] for name, linear in linears.items()}
    place = 0
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: found[name][place].add(args[0][0]))
        for name, linear in linears.items()
    ]
    fitted, tested = (tokenizer(path.read_text(), return_tensors="pt").input_ids[0] for path in texts)
    start = tokens if texts[0] == texts[1] else 0
    for which, ids in enumerate((fitted[:tokens], tested[start : start + tokens // 2])):
        for i, part in enumerate(ids.split(SEQUENCE)):
            place = 2 if which else int(i % 4 == 3)  # every fourth sequence judges, as in a run
            with torch.no_grad():
                model(part[None])
    for hook in hooks:
        hook.remove()
    return {name: (linears[name].weight.detach(), fit.join(held), test.H) for name, (fit, held, test) in found.items()}


def main() -> None:
    """Print one line per type, and one per layer with -v."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="*", default=["q3_k", "q2_k", "q4_k", "q4_0"], choices=list(GGML))
    parser.add_argument("--layers", nargs="*", type=int, default=[3, 12, 21, 28])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--calibration", type=Path, default=TEXTS / "calibration.txt")
    parser.add_argument("--test", type=Path, default=TEXTS / "held_out.txt")
    parser.add_argument("--engine")
    options = parser.parse_args()
    library = engine(options.engine)
    names = {f"model.layers.{k}.mlp.down_proj": k for k in options.layers}
    found = inputs(list(names), options.tokens, [options.calibration, options.test])
    layers = {names[name]: linear for name, linear in found.items()}
    methods = {"rtn": RTN(), "gptq": GPTQ(), "nearplane": NearPlane(target=False)}
    print(f"{len(layers)} linears, {options.tokens} tokens; held-out error over llama.cpp's with an importance matrix")
    print("type   layer  llama " + " ".join(f"{name:>10}" for name in methods) + "   seconds (nearplane)")
    for kind in options.types:
        grid, ratios = Grid.named(kind), []
        for k, (weight, moments, H) in layers.items():

            def lost(rounded: torch.Tensor, weight: torch.Tensor = weight, H: torch.Tensor = H) -> float:
                error = (rounded - weight).double()
                return float((error @ H.double() * error).sum())

            best = lost(by_llama(library, kind, weight, moments.H.diagonal()))
            row = [lost(by_llama(library, kind, weight, None)) / best]
            for method in methods.values():
                start = time.perf_counter()
                solved = method.solve(weight, method.prepare(moments), grid)
                seconds = time.perf_counter() - start
                row.append(lost(dequantize(solved, grid)) / best)
            ratios.append(row)
            print(
                f"{kind}  {k:>5}  {row[0]:.3f} "
                + " ".join(f"{value:>10.3f}" for value in row[1:])
                + f"   {seconds:.1f}"
            )
        mean = torch.tensor(ratios).mean(0).tolist()
        print(f"{kind}   mean  {mean[0]:.3f} " + " ".join(f"{value:>10.3f}" for value in mean[1:]), flush=True)


if __name__ == "__main__":
    main()
