"""Which engines load a checkpoint: ``verdict`` of a ``Described``."""

from nearplane.checkpoint.engines.describe import (
    Described,
    Model,
    Weight,
    described,
    initialises_packed,
    kind_of,
    model_facts,
)
from nearplane.checkpoint.engines.findings import AWQ, COMPRESSED, GPTQS
from nearplane.checkpoint.engines.judge import ENGINES, TITLES, Verdict, check_engine, verdict, verdicts

__all__ = [
    "AWQ", "COMPRESSED", "ENGINES", "GPTQS", "TITLES", "Described", "Model", "Verdict", "Weight", "check_engine", "described",
    "initialises_packed", "kind_of", "model_facts", "verdict", "verdicts",
]  # fmt: skip
