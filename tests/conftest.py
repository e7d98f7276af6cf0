"""Run-time checks of shapes and dtypes, reproducible examples, and threads that do not fight over cores."""

import os
import sys
from pathlib import Path

import jaxtyping
import torch
from hypothesis import HealthCheck, settings

# timm needs torchvision's transforms. The torchvision of package indexes is built for CUDA's torch: beside a CPU torch its
# operators are not loaded, and its import, and with it transformers', fails over two of them. Declared, they are never called.
try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")

# Annotations such as Float[Tensor, "out in"] are asserted at every call of these packages. The hook rewrites modules as
# they are imported, so it must come before the first import of any of them.
CHECKED = ("nearplane.core", "nearplane.methods")
early = [name for name in sys.modules if name.startswith(CHECKED)]
assert not early, f"imported before their type checks could be installed: {early}"
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

# tests/oracles.py is shared by the folders below, under any of pytest's import modes.
sys.path.insert(0, str(Path(__file__).parent))

# Small matrices: a second thread costs more than it brings, and pytest-xdist fills the other cores. With TEST_THREADS=2, or with
# ATEN_CPU_CAPABILITY=default or avx2, sums are added in another order: no test may depend on it.
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))

settings.register_profile(
    "nearplane", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("nearplane")
# What tests/test_fuzz.py is run with once in a while: --hypothesis-profile=fuzz
settings.register_profile("fuzz", settings.get_profile("nearplane"), derandomize=False, max_examples=160)
