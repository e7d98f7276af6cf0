"""nearplane: quantize transformers by error compensation."""

from importlib.metadata import version as _version

from nearplane.api import evaluate, load, quantize
from nearplane.calibrate.data import Calibration
from nearplane.comparison import compare
from nearplane.conversion import Conversion, convert
from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Grid, Quantized
from nearplane.core.moments import Moments
from nearplane.evaluate.features import Features
from nearplane.evaluate.perplexity import Evaluation
from nearplane.methods import GPTAQ, GPTQ, OBQ, RTN, Method, NearPlane, ResComp
from nearplane.mix.overrides import Override
from nearplane.report import Report
from nearplane.verification import Verification, verify

__version__ = _version("nearplane")

__all__ = [
    "GPTAQ",
    "GPTQ",
    "OBQ",
    "RTN",
    "Calibration",
    "Conversion",
    "Evaluation",
    "Features",
    "Grid",
    "Method",
    "Moments",
    "NearPlane",
    "NearplaneError",
    "Override",
    "Quantized",
    "Report",
    "ResComp",
    "Verification",
    "compare",
    "convert",
    "evaluate",
    "load",
    "quantize",
    "verify",
]
