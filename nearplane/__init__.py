"""nearplane: quantize transformers by error compensation."""

from importlib.metadata import version

from nearplane.api import Calibration, Evaluation, Grid, NearplaneError, Report, evaluate, load, quantize
from nearplane.core.grid import Quantized
from nearplane.core.moments import Moments
from nearplane.methods import GPTAQ, GPTQ, OBQ, RTN, Method, ResComp

__version__ = version("nearplane")

__all__ = [
    "GPTAQ",
    "GPTQ",
    "OBQ",
    "RTN",
    "Calibration",
    "Evaluation",
    "Grid",
    "Method",
    "Moments",
    "NearplaneError",
    "Quantized",
    "Report",
    "ResComp",
    "evaluate",
    "load",
    "quantize",
]
