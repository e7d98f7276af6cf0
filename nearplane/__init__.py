"""nearplane: quantize transformers by error compensation."""

from importlib.metadata import version as _version

from nearplane.api import evaluate, load, quantize
from nearplane.checkpoint.convert import Conversion, convert
from nearplane.checkpoint.verify import Verification, verify
from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Grid, Quantized
from nearplane.core.moments import Moments
from nearplane.data.text import Calibration
from nearplane.evaluation.compare import compare
from nearplane.evaluation.features import Features
from nearplane.evaluation.perplexity import Evaluation
from nearplane.methods import GPTAQ, GPTQ, OBQ, RTN, Method, NearPlane, ResComp
from nearplane.run.job import Job, Override
from nearplane.run.report import Report

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
    "Job",
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
