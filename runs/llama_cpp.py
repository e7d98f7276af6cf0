"""NearPlane against llama.cpp's own quantization, at the same bytes and on the same calibration tokens, run by llama.cpp.

    python runs/llama_cpp.py BIN --calibration wikitext2-valid.txt --test wikitext2-test.txt
        [--cells Q4_0 Q3_K Q2_K] [--draws 0 1 2] [--threads 2] [--out runs/llama_cpp.jsonl]

BIN holds llama-quantize, llama-imatrix and llama-perplexity. Of each draw, 32 x 512 neighbouring tokens of the calibration
text go to llama-imatrix as text and to nearplane as token ids. Cells: Q4_0 of every linear, embedding and head Q8_0; a
K-quant of down projections alone, everything else F16, because 256 divides no other input of the demo model. The score is
llama-perplexity's on 32 x 512 tokens of the test text against the F16 file: KL first, then perplexity and the share of
equal best tokens. One line of OUT per finished file; a cell that is there is not run again.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import nearplane
from nearplane.models.locate import demo_template, locate
from nearplane.models.source import load_tokenizer

WINDOWS, LENGTH = 32, 512
DOWN = r"down_proj"
SCORES = {
    "kl": r"Mean\s+KLD:\s+([\d.]+)",
    "perplexity": r"Mean PPL\(Q\)\s*:\s+([\d.]+)",
    "top1": r"Same top p:\s+([\d.]+)",
}


def tool(bin: Path, name: str, *words: Any) -> str:
    """Run one of llama.cpp's tools and return what it printed."""
    done = subprocess.run([bin / name, *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} {' '.join(map(str, words))}\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout + done.stderr


def draw(text: str, number: int, folder: Path) -> tuple[Path, list[list[int]]]:
    """Cut the text of one draw; return its file for llama-imatrix and its windows of token ids."""
    tokenizer = load_tokenizer(locate("demo"))
    size = WINDOWS * LENGTH
    start = text.index("\n", number * len(text) // 8)  # draws do not overlap: a window is about 2 kB
    part = text[start : start + 8 * size]
    ids = tokenizer(part, add_special_tokens=False)["input_ids"][:size]
    file = folder / f"draw-{number}.txt"
    file.write_text(part, encoding="utf-8")
    return file, [ids[a : a + LENGTH] for a in range(0, size, LENGTH)]


def theirs(bin: Path, cell: str, original: Path, imatrix: Path | None, out: Path) -> None:
    """Quantize by llama-quantize, with an importance matrix or without."""
    with_matrix = [] if imatrix is None else ["--imatrix", imatrix]
    if cell == "Q4_0":
        tool(bin, "llama-quantize", *with_matrix, "--token-embedding-type", "q8_0", original, out, "Q4_0")
        return
    kept = [
        word
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up")
        for word in ("--tensor-type", f"{name}=f16")
    ]
    own = ["--tensor-type", f"ffn_down={cell.lower()}", "--token-embedding-type", "f16"]
    kind = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}.get(cell, cell)
    tool(bin, "llama-quantize", *with_matrix, *kept, *own, original, out, kind)


def ours(cell: str, method: str, ids: list[list[int]], original: Path, folder: Path) -> Path:
    """Quantize by nearplane to a GGUF file, which takes what is left dense from the same F16 file as theirs."""
    rest: dict[str, Any] = (
        {"gguf_dense": "Q8_0"} if cell == "Q4_0" else {"gguf_dense": "F16", "ignore": f"^(?!.*{DOWN})"}
    )
    nearplane.quantize(
        "demo", folder, method=method, format="gguf", gguf_type=cell, template=original, dataset=ids,
        nsamples=WINDOWS, seqlen=LENGTH, progress=False, **rest,
    )  # fmt: skip
    return next(folder.glob("*.gguf"))


def score(bin: Path, file: Path, base: Path, test: Path, threads: int) -> dict[str, float]:
    """Measure a file against the original's logits."""
    said = tool(
        bin, "llama-perplexity", "-m", file, "-f", test, "-c", LENGTH, "--chunks", WINDOWS, "-t", threads,
        "--kl-divergence", "--kl-divergence-base", base,
    )  # fmt: skip
    return {name: float(re.search(pattern, said)[1]) for name, pattern in SCORES.items()}


def main() -> None:
    """Run the cells that OUT lacks, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bin", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", default=["Q4_0", "Q3_K", "Q2_K"])
    parser.add_argument(
        "--rows", nargs="+", default=["imatrix", "nearplane"], help="none, imatrix, or a method of nearplane"
    )
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    given = parser.parse_args()
    done = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    text = given.calibration.read_text(encoding="utf-8")
    version = re.search(r"version: (\S+)", tool(given.bin, "llama-perplexity", "--version"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original, base = folder / "f16.gguf", folder / "base.bin"
        tool(given.bin, "llama-quantize", "--allow-requantize", demo_template(), original, "F16")
        tool(
            given.bin, "llama-perplexity", "-m", original, "-f", given.test, "-c", LENGTH, "--chunks", WINDOWS,
            "-t", given.threads, "--kl-divergence-base", base,
        )  # fmt: skip
        for number in given.draws:
            file, ids = draw(text, number, folder)
            imatrix = folder / f"imatrix-{number}.gguf"
            for cell in given.cells:
                for row in given.rows:
                    if any((some["cell"], some["row"], some["draw"]) == (cell, row, number) for some in done):
                        continue
                    out, start = folder / f"{cell}-{row}-{number}", time.perf_counter()
                    if row in ("none", "imatrix"):
                        if row == "imatrix" and not imatrix.exists():
                            tool(given.bin, "llama-imatrix", "-m", original, "-f", file, "-c", LENGTH, "--chunks", WINDOWS,
                                 "-t", given.threads, "-o", imatrix)  # fmt: skip
                        theirs(given.bin, cell, original, imatrix if row == "imatrix" else None, out)
                        made = out
                    else:
                        made = ours(cell, row, ids, original, out)
                    found = {"cell": cell, "row": row, "draw": number, "bytes": made.stat().st_size}
                    found |= {
                        "seconds": round(time.perf_counter() - start, 1),
                        "llama.cpp": version[1] if version else "",
                    }
                    done.append(found | score(given.bin, made, base, given.test, given.threads))
                    with given.out.open("a") as lines:
                        lines.write(json.dumps(done[-1]) + "\n")
                    print(done[-1], flush=True)
    for cell, row in dict.fromkeys((some["cell"], some["row"]) for some in done):
        same = [some for some in done if (some["cell"], some["row"]) == (cell, row)]
        means = {key: statistics.mean(some[key] for some in same) for key in SCORES}
        scores = f"{means['kl']:.3f} | {means['perplexity']:.2f} | {means['top1']:.1f}%"
        print(f"| {cell} | {row} | {same[0]['bytes']} | {scores} | {len(same)} |")


if __name__ == "__main__":
    main()
