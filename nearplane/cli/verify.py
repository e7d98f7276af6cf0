"""``nearplane verify``: whether a checkpoint is whole."""

import json
from dataclasses import dataclass
from typing import Any

from nearplane.machine.progress import printed

SETTINGS: dict[str, None] = {}


@dataclass(frozen=True)
class Options:
    """Re-read a whole checkpoint, every file and tensor, and say whether it is whole; list what is wrong with it.

    Exit status 0: nothing is wrong; 1: something is; 2: the folder is no checkpoint.
    """

    out: str
    """A transformers folder, quantized by nearplane or another tool, or not at all."""
    engine: str | None = None
    """Also say what this engine (vllm, sglang, transformers, llama.cpp, mlx, onnxruntime-genai, openvino) would refuse."""
    files: bool = False
    """List every file with its bytes and sha256."""
    json: bool = False
    """Print one JSON object and nothing else on standard output."""
    revision: str | None = None
    """Of a hub id, the branch, tag or commit; OUT@REVISION says the same."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


def run(options: Options, _: dict[str, Any]) -> int:
    """Print the verdict; returns 1 where something is wrong."""
    from nearplane.checkpoint.verify import verify

    asked: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    result = verify(options.out, options.engine, progress=True, **asked)
    printed(result) if not options.json else print(json.dumps(result.as_dict()))
    if options.files and not options.json:
        print(result.listing())
    return 0 if result.ok else 1
