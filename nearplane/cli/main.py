"""The command line: which verb runs, what is said when it cannot, and how to go on.

A verb is a module of this folder, called as typed: its ``Options``, its ``SETTINGS``, its ``run``. A NearplaneError becomes
one sentence on standard error and exit status 2. Exit status 0: done; 1: plan or verify say no; 130, 143: interrupted.
"""

import importlib
import os
import shlex
import signal
import sys
import threading
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

from nearplane.cli.fields import constant, methods
from nearplane.cli.options import SWITCHES, help_text, options_of, parse, takes_job
from nearplane.cli.serve import COMMON
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.machine.signals import Interrupted, started
from nearplane.models.locate import locate, refuse_missing
from nearplane.run.names import ALIASES

VERBS = ("quantize", "plan", "eval", "inspect", "generate", "bench", "verify", "convert", "report", "push")
# All that may stand behind ``nearplane``: serve has options of transformers, help and completion have none.
WORDS = (*VERBS, "serve", "help", "completion")
# Those that decode token by token in this process, beside serve.
DECODING = ("generate", "bench")
# What people type for completion where other programs have it.
INSTALL = ("--install-completion", "--show-completion")
LINE = 'eval "$(nearplane completion {0})" to ~/.{0}rc'
EVAL = f"it is printed: add {LINE.format('bash')}, or {LINE.format('zsh')}"
USAGE = """nearplane: quantize transformers by error compensation.

  nearplane quantize MODEL OUT --bits 3     write a quantized checkpoint
  nearplane plan MODEL --bits 3             memory, disk and time it will take
  nearplane eval OUT --reference MODEL      perplexity, KL divergence, agreement
  nearplane inspect MODEL                   blocks, stages, sizes; grids of OUT
  nearplane generate OUT --prompt "..."     text from packed weights
  nearplane bench OUT                       tokens/s, packed against dense
  nearplane verify OUT --engine vllm        every file and tensor re-read
  nearplane convert OUT NEW --format gptq   the same codes in another format
  nearplane report OUT --open               a page: is it good, where is it bad
  nearplane push OUT USER/NAME              onto the model hub, in one commit
  nearplane serve OUT --port 8000           transformers' server, packed weights

  nearplane help VERB                       the options of a verb
  nearplane completion bash                 a script for completion; bash or zsh
  nearplane --version

MODEL is a local transformers folder, a hub id, or "demo". Start here:

  nearplane quantize demo out --bits 3 --group-size 64 --no-sym --nsamples 16
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: its words; none: those of this process.

    Returns:
        The exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing half-written stays
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status
    except NearplaneError as error:
        if not error.told:
            print(f"nearplane: {error}", file=sys.stderr)
            if not isinstance(error, SettingError):  # which the same command would meet again
                _how_to_resume(argv, "once that is mended, ")
        return 2
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a file or folder that the system will not give us
        print(f"nearplane: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        asked = error if isinstance(error, Interrupted) else None
        if asked is None or not asked.told:
            kept = "" if _left_something(argv) else "; nothing was written"
            print(f"nearplane: interrupted{kept}.", file=sys.stderr)
            _how_to_resume(argv)
        return 128 + (asked.signal if asked else signal.SIGINT)


def _run(argv: list[str]) -> int:
    """Choose the verb, and run it."""
    word, words = (argv[0], argv[1:]) if argv else ("help", [])
    if word in ("-V", "--version", "version"):
        from nearplane import __version__

        print(f"nearplane {__version__}")
        return 0
    if word == "completion":
        print(completion(words[0] if words else ""))
        return 0
    if word.partition("=")[0] in INSTALL:
        raise SettingError(f"completion is not installed by nearplane; {EVAL}.")
    if word == "serve" or (word in ("-h", "--help", "help") and words[:1] == ["serve"]):
        from nearplane.cli import serve

        _rest_soon()
        return serve.run(words if word == "serve" else ["--help"])
    asks = word in ("-h", "--help", "help")
    if asks and (not words or words[0] in ("help", "completion")):
        print(USAGE)
        return 0
    if asks:
        word, words = words[0], [*words[1:], "--help"]
    module = verb(word)
    if {"-h", "--help"} & set(words):
        print(help_text(module, words), end="")
        return 0
    options, settings = parse(module, words)
    if word in DECODING:
        _rest_soon()
    if not getattr(module, "LOCAL", False):
        _refuse_missing(getattr(options, "model", None) or options.out, {**vars(options), **settings}.get("revision"))
    _quiet_transformers()
    return int(module.run(options, settings))


def _refuse_missing(model: str, revision: str | None) -> None:
    """Refuse a model that is not there before torch is imported; of a hub id the small files are fetched first."""
    refuse_missing(model)
    if model != "demo" or revision is not None:
        locate(model, weights=False, revision=revision)


def verb(name: str) -> ModuleType:
    """The module of a verb. SettingError, with the nearest one, for a word that is none."""
    if name not in VERBS:
        near = get_close_matches(name, WORDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(WORDS)}."
        raise SettingError(f"unknown command {name!r}; {hint}")
    return importlib.import_module(f"nearplane.cli.{name}")


def _quiet_transformers() -> None:
    """Have transformers print errors alone, now or when it is imported; a user's own choice stays."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.set_verbosity_error()


def _rest_soon() -> None:
    """Have torch's threads sleep 0.05 ms after an operation, if torch is still to be imported; a user's own choice stays.

    GNU's OpenMP lets them spin for several ms. Between two tokens they would hold the cores that the next token needs.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _left_something(argv: list[str]) -> bool:
    """Whether a quantize command has left finished blocks in its OUT, and nobody else is at work there."""
    if not argv or argv[0] != "quantize":
        return False
    state = constant("nearplane.formats.journal:STATE")  # importing it would import torch
    left = [Path(word) for word in argv[1:] if word[:1] != "-" and (Path(word) / state).is_dir()]
    if not left:
        return False
    from nearplane.formats.journal import holder

    return any(holder(folder) is None for folder in left)


def _how_to_resume(argv: list[str], condition: str = "") -> None:
    """Print the command that goes on, where there is something to go on with."""
    if _left_something(argv):
        start, nodes = started()
        command = shlex.join([*start, *argv, *(["--resume"] if "--resume" not in argv else [])])
        where = f", on each of the {nodes} nodes and with your rendezvous options," if nodes > 1 else ""
        print(f"finished blocks are kept; {condition}go on{where} with: {command}", file=sys.stderr)


COMPLETION = """# nearplane completion {shell}: source this, or put it where your shell looks for completions
{start}_nearplane() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then words="{words} --help --version"
  else case "${{COMP_WORDS[1]}}:$before" in
    help:*) words="{words}" ;;
    completion:*) words="bash zsh" ;;
{values}
    *) case "${{COMP_WORDS[1]}}" in
{flags}
      esac
      [ "${{word#-}}" = "$word" ] && words="" ;;
  esac fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _nearplane nearplane"""


def completion(shell: str) -> str:
    """The completion script of a shell.

    Args:
        shell: bash or zsh, which runs bash's.

    Raises:
        SettingError: another shell.
    """
    if shell not in ("bash", "zsh"):
        got = f"got {shell!r}" if shell else "name one of them"
        raise SettingError(f"completion is for bash or zsh; {got}. For these {EVAL}.")
    flags, values = [f'        serve) words="{" ".join(COMMON)}" ;;'], []
    for name in VERBS:
        module = verb(name)
        found = options_of(module)
        if takes_job(module):
            found += [option for method in methods() for option in options_of(module, method)]
            values.append(f'    {name}:--method) words="{" ".join(methods())}" ;;')
        shown = dict.fromkeys(flag for option in found if not option.by_place for flag in option.flags)
        flags.append(f'        {name}) words="{" ".join([*shown, "--help"])}" ;;')
        chosen = {option.flag: option.kind.choices for option in found if option.kind.choices}
        values += [f'    {name}:{flag}) words="{" ".join(words)}" ;;' for flag, words in chosen.items()]
    start = "autoload -U bashcompinit && bashcompinit\n" * (shell == "zsh")
    parts = {"values": "\n".join(values), "flags": "\n".join(flags), "words": " ".join(WORDS)}
    return COMPLETION.format(shell=shell, start=start, **parts)


def known_names() -> dict[str, list[str]]:
    """Names of other toolkits that are accepted, by the flag that each stands for; for docs/cli.md and tests."""
    found: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        found.setdefault("--" + name.replace("_", "-"), []).append("--" + alias.replace("_", "-"))
    for switch, words in SWITCHES.items():
        found.setdefault(" ".join(words) or "nothing: always so", []).append(switch)
    return found
