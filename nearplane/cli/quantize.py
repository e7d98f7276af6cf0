"""``nearplane quantize``: from a model to a checkpoint."""

import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearplane.cli.options import JOB
from nearplane.cli.terminal import Terminal
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.machine.progress import printed
from nearplane.machine.signals import Interrupted, is_first

SETTINGS = {JOB: None}
GROUPS = {
    "output": ("verbose", "quiet", "push_to_hub", "private"),
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
    push_to_hub: str | None = None
    """Upload the finished checkpoint to this repository of the model hub, as nearplane push does. Login and name are checked
    before the run."""
    private: bool = False
    """With --push-to-hub, make a new repository that others do not see."""
    config: Path | None = None
    """A JSON or YAML file of settings: your own, another toolkit's quantize_config.json, or the report.json of a run, which
    repeats the run. Options that are given count before the file's."""


def run(options: Options, settings: dict[str, Any]) -> int:
    """Quantize, and print the summary of the run on standard output."""
    if options.verbose and options.quiet:
        raise SettingError("--verbose and --quiet exclude each other; give one.")
    if options.private and options.push_to_hub is None:
        raise SettingError("--private is about a repository on the hub; give --push-to-hub REPO, too.")
    if options.push_to_hub is not None and is_first():
        from nearplane.checkpoint.hub.push import check_push

        check_push(options.push_to_hub, private=options.private)
    with Terminal(verbose=options.verbose, quiet=options.quiet, silent=not is_first()) as show:
        show.say(f"opening {options.model}")
        from nearplane.api import quantize

        report = quantize(options.model, options.out, show=show, **settings)
    if is_first():
        print(show.summary(report))
        if options.push_to_hub is not None:
            _push(options, options.push_to_hub)
    return 0


def _push(options: Options, repo: str) -> None:
    """Upload, and say how to go on where that does not come about: the checkpoint is finished, whatever happens here."""
    from nearplane.checkpoint.hub.push import push

    try:
        printed(push(options.out, repo, private=options.private, progress=not options.quiet))
    except (NearplaneError, KeyboardInterrupt) as error:
        command = shlex.join(["nearplane", "push", str(options.out), repo, *["--private"] * options.private])
        print(f"{options.out} is finished; upload it with: {command}", file=sys.stderr)
        if isinstance(error, NearplaneError):
            raise
        stopped = Interrupted(signal.SIGINT)
        stopped.told = True  # the run itself was not interrupted
        raise stopped from None
