"""nearplane: quantize transformers by error compensation.

Public names are imported when they are first used, so that ``import nearplane`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nearplane.api import bench, evaluate, generate, inspect, load, plan, quantize
    from nearplane.auto import NearplaneForCausalLM
    from nearplane.checkpoint.convert import Conversion, convert
    from nearplane.checkpoint.enable import disable, enable
    from nearplane.checkpoint.hub.push import Pushed, push
    from nearplane.checkpoint.inspect import Anatomy
    from nearplane.checkpoint.load import LoadSettings
    from nearplane.checkpoint.verify import Verification, verify
    from nearplane.core.activations import TokenGrid
    from nearplane.core.errors import NearplaneError, NumericalError, SettingError
    from nearplane.core.grid import Grid, Quantized
    from nearplane.core.moments import Moments
    from nearplane.data.text import Calibration
    from nearplane.evaluation.compare import compare
    from nearplane.evaluation.features import Features
    from nearplane.evaluation.generation import Generation
    from nearplane.evaluation.perplexity import Evaluation
    from nearplane.evaluation.speed import Speed
    from nearplane.evaluation.tasks import TaskResults, evaluate_tasks
    from nearplane.methods import AWQ, GPTAQ, GPTQ, OBQ, RTN, Method, NearPlane, ResComp
    from nearplane.models.discover import Block, Site, Stage, discover
    from nearplane.models.source import open_source
    from nearplane.run.events import BlockDone, Noted, Solved, StageDone
    from nearplane.run.forecast import Forecast
    from nearplane.run.job import Job, Override
    from nearplane.run.plan import Plan, make_plan
    from nearplane.run.report import Report
    from nearplane.run.stream import Place, stream
    from nearplane.run.walk import walk

    __version__: str

# Where each public name lives.
_HOMES = {
    "nearplane.api": ("bench", "evaluate", "generate", "inspect", "load", "plan", "quantize"),
    "nearplane.auto": ("NearplaneForCausalLM",),
    "nearplane.checkpoint.convert": ("Conversion", "convert"),
    "nearplane.checkpoint.enable": ("disable", "enable"),
    "nearplane.checkpoint.hub.push": ("Pushed", "push"),
    "nearplane.checkpoint.inspect": ("Anatomy",),
    "nearplane.checkpoint.load": ("LoadSettings",),
    "nearplane.checkpoint.verify": ("Verification", "verify"),
    "nearplane.core.activations": ("TokenGrid",),
    "nearplane.core.errors": ("NearplaneError", "NumericalError", "SettingError"),
    "nearplane.core.grid": ("Grid", "Quantized"),
    "nearplane.core.moments": ("Moments",),
    "nearplane.data.text": ("Calibration",),
    "nearplane.evaluation.compare": ("compare",),
    "nearplane.evaluation.features": ("Features",),
    "nearplane.evaluation.generation": ("Generation",),
    "nearplane.evaluation.perplexity": ("Evaluation",),
    "nearplane.evaluation.speed": ("Speed",),
    "nearplane.evaluation.tasks": ("TaskResults", "evaluate_tasks"),
    "nearplane.methods": ("AWQ", "GPTAQ", "GPTQ", "OBQ", "RTN", "Method", "NearPlane", "ResComp"),
    "nearplane.models.discover": ("Block", "Site", "Stage", "discover"),
    "nearplane.models.source": ("open_source",),
    "nearplane.run.events": ("BlockDone", "Noted", "Solved", "StageDone"),
    "nearplane.run.forecast": ("Forecast",),
    "nearplane.run.job": ("Job", "Override"),
    "nearplane.run.report": ("Report",),
    "nearplane.run.plan": ("Plan", "make_plan"),
    "nearplane.run.stream": ("Place", "stream"),
    "nearplane.run.walk": ("walk",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AWQ",
    "GPTAQ",
    "GPTQ",
    "OBQ",
    "RTN",
    "Anatomy",
    "Block",
    "BlockDone",
    "Calibration",
    "Conversion",
    "Evaluation",
    "Features",
    "Forecast",
    "Generation",
    "Grid",
    "Job",
    "LoadSettings",
    "Method",
    "Moments",
    "NearPlane",
    "NearplaneError",
    "NearplaneForCausalLM",
    "Noted",
    "NumericalError",
    "Override",
    "Place",
    "Plan",
    "Pushed",
    "Quantized",
    "Report",
    "ResComp",
    "SettingError",
    "Site",
    "Solved",
    "Speed",
    "Stage",
    "StageDone",
    "TaskResults",
    "TokenGrid",
    "Verification",
    "bench",
    "compare",
    "convert",
    "disable",
    "discover",
    "enable",
    "evaluate",
    "evaluate_tasks",
    "generate",
    "inspect",
    "load",
    "make_plan",
    "open_source",
    "plan",
    "push",
    "quantize",
    "stream",
    "verify",
    "walk",
]

if not TYPE_CHECKING:  # a type checker would take it for every name

    def __getattr__(name: str) -> Any:
        """Import a public name where it is first used."""
        if name == "__version__":
            from importlib.metadata import version

            found = version("nearplane")
        elif name in _HOME:
            found = getattr(import_module(_HOME[name]), name)
        else:
            raise AttributeError(f"module 'nearplane' has no attribute {name!r}")
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
