"""The methods, one file each; the table below is the whole registry.

A method is a frozen dataclass whose fields are its options. A user's own class needs no entry here:
``quantize(method=Mine())``, or ``--method package.module:Mine`` on the command line.
"""

from nearplane.methods.awq import AWQ
from nearplane.methods.base import Method
from nearplane.methods.gptaq import GPTAQ
from nearplane.methods.gptq import GPTQ
from nearplane.methods.nearplane import NearPlane
from nearplane.methods.obq import OBQ
from nearplane.methods.rescomp import ResComp
from nearplane.methods.rtn import RTN

METHODS: dict[str, type[Method]] = {
    "rtn": RTN,
    "awq": AWQ,
    "obq": OBQ,
    "gptq": GPTQ,
    "gptaq": GPTAQ,
    "rescomp": ResComp,
    "nearplane": NearPlane,
}

__all__ = ["AWQ", "GPTAQ", "GPTQ", "METHODS", "OBQ", "RTN", "Method", "NearPlane", "ResComp"]
