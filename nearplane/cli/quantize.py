"""``nearplane quantize``: from a model to a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearplane.cli.options import JOB
from nearplane.cli.terminal import Terminal
from nearplane.core.errors import SettingError
from nearplane.machine.signals import is_first

SETTINGS = {JOB: None}
GROUPS = {
    "output": ("verbose", "quiet"),
    "settings from a file": ("config",),
    "which linears": ("override", "ignore", "towers"),
    "mixed bits": ("budget", "widths"),
    "rotation": ("rotate", "rotate_seed"),
    "scaling": ("scale",),
    "tuning": ("tune",),
    "GGUF files": ("gguf_type", "template", "gguf_dense"),
}
EPILOG = "The method's own options are listed with --method NAME --help. docs/cli.md has all of them."


@dataclass(frozen=True)
class Options:
    """Quantize every linear of a model's blocks and write a checkpoint that engines load.

    The default is for vLLM, SGLang and transformers, --format gguf for llama.cpp and Ollama, --format mlx for MLX.
    Calibrates block by block on a text, in the memory of one block, the hidden states and up to 4 GiB of activations.
    What cannot fit into this machine is refused first; nearplane plan says why. OUT is complete when it has an index; a run
    that was ended before (Ctrl-C, kill, a full disk) goes on with --resume.
    """

    model: str
    """A local transformers folder, a hub id, or "demo"."""
    out: Path
    """Folder to write; must not exist, or be empty, or with --resume hold what an ended run left."""
    verbose: bool = False
    """Print a line per stage, every setting and every note."""
    quiet: bool = False
    """Print the summary alone."""
    config: Path | None = None
    """A JSON or YAML file of settings: your own, another toolkit's quantize_config.json, or the report.json of a run, which
    repeats the run. Options that are given count before the file's."""


def run(options: Options, settings: dict[str, Any]) -> int:
    """Quantize, and print the summary of the run on standard output."""
    if options.verbose and options.quiet:
        raise SettingError("--verbose and --quiet exclude each other; give one.")
    with Terminal(verbose=options.verbose, quiet=options.quiet, silent=not is_first()) as show:
        show.say(f"opening {options.model}")
        from nearplane.api import quantize

        report = quantize(options.model, options.out, show=show, **settings)
    if is_first():
        print(show.summary(report))
    return 0
