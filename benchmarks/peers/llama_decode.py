"""llama.cpp decodes greedily, a round for each line on standard input: what ``benchmarks/decode.py`` starts in its environment.

    LLAMA_PYTHON benchmarks/peers/llama_decode.py MODEL.gguf THREADS

A line is JSON: ``prompt``, tokens, and ``new``, the number of tokens to decode. The answer: seconds of CPU and of the clock
for all but the first new token, and the tokens. The library is called as ``runs/engines/llama.py`` calls it, but keys and values
are kept in float16 and attention is fused, as llama.cpp does by itself.
"""

import json
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2] / "runs" / "engines")
import llama

POSITIONS = 4096


class Usual(llama.Settings):
    """Settings of which only sizes and threads are changed."""

    def change(self, field: tuple[int, int], value: int) -> None:
        if field not in (llama.FLASH, llama.KEYS, llama.VALUES):
            super().change(field, value)


def main() -> None:
    llama.Settings = Usual
    model = llama.Llama(Path(sys.argv[1]), POSITIONS, int(sys.argv[2]))
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompt, tokens = asked["prompt"], list[int]()
        model.restart()
        last = model.logits(prompt, 0)[-1]
        cpu, clock = time.process_time(), time.perf_counter()
        for i in range(asked["new"]):
            tokens.append(int(last.argmax()))
            last = model.logits(tokens[-1:], len(prompt) + i)[-1]
        spent = time.process_time() - cpu, time.perf_counter() - clock
        print(json.dumps({"cpu": spent[0], "clock": spent[1], "tokens": tokens}), flush=True)


main()
