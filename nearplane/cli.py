"""The command line. Flags are derived from the dataclasses they set (Grid, Calibration, the method's own), never listed
twice. A NearplaneError becomes one sentence on standard error and exit status 2.
"""

import contextlib
import importlib
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import field, make_dataclass
from itertools import pairwise
from typing import Any

import torch
import transformers
import tyro
from rich.console import Console

from nearplane import __version__, flags
from nearplane.api import evaluate, load, quantize
from nearplane.calibrate.data import Calibration
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.core.grid import Grid
from nearplane.forecast import forecast
from nearplane.generation import generate
from nearplane.inspection import inspect
from nearplane.methods import METHODS, Method
from nearplane.models.source import load_tokenizer, locate
from nearplane.narration import summary
from nearplane.runtime.linear import quantized_linears
from nearplane.speed import bench, check_threads

# Names that users of other toolkits type; one name inside.
ALIASES = {
    "--wbits": "--bits", "--w-bit": "--bits", "--num-bits": "--bits", "--nbits": "--bits",
    "--groupsize": "--group-size", "--q-group-size": "--group-size",
    "--percdamp": "--damp-percent", "--dampening-frac": "--damp-percent",
    "--nsample": "--nsamples", "--num-calibration-samples": "--nsamples", "--max-seq-length": "--seqlen",
}  # fmt: skip
# Switches of other toolkits that stand for a flag and its value.
SWITCHES = {
    "--act-order": ["--order", "activation"], "--actorder": ["--order", "activation"], "--desc-act": ["--order", "activation"],
    "--asym": ["--no-sym"], "--true-sequential": [],
}  # fmt: skip

USAGE = f"""nearplane {__version__}: quantize transformers by error compensation.

  nearplane quantize MODEL OUT [--bits 3] [--method gptq]   write a quantized checkpoint
  nearplane plan MODEL [--method gptq]                       memory, disk and time that quantize will take
  nearplane eval MODEL [--reference ORIGINAL]                perplexity, KL divergence, agreement
  nearplane inspect MODEL                                    blocks, stages, sizes, before any compute
  nearplane generate MODEL --prompt "..." [--chat]           text from packed weights, with tokens/s
  nearplane bench MODEL                                      tokens/s, packed against bf16 and fp32

MODEL is a local transformers folder, a hub id, or "demo". Each command explains itself with --help.
Start here:  nearplane quantize demo out --bits 3 --group-size 64 --no-sym --nsamples 16
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], None]] = {
        "quantize": _quantize,
        "plan": _plan,
        "eval": _eval,
        "inspect": _inspect,
        "generate": _generate,
        "bench": _bench,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"nearplane {__version__}")
        return 0
    transformers.logging.set_verbosity_error()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing half-written stays
    try:
        if argv[0] not in commands:
            raise SettingError(f"unknown command {argv[0]!r}; the commands are {', '.join(commands)}.")
        commands[argv[0]](_canonical(argv[1:]))
    except NearplaneError as error:
        print(f"nearplane: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a file or folder that the system will not give us
        print(f"nearplane: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nearplane: interrupted; nothing was written.", file=sys.stderr)
        return 130
    return 0


def _quantize(argv: list[str]) -> None:
    args = _job(flags.Quantize, "quantize", argv)
    print(summary(quantize(args.model, args.out, **_choices(args), force=args.force)))


def _plan(argv: list[str]) -> None:
    args = _job(flags.Plan, "plan", argv)
    found = forecast(args.model, **_choices(args))
    print(json.dumps(found.as_dict()) if args.json else found)


def _job(base: type[flags.Job], name: str, argv: list[str]) -> Any:
    """The flags of ``quantize`` and ``plan``: the command's own, and those of method, grid and calibration."""
    kind, default = _method_class(argv)
    options = [
        ("method_options", tyro.conf.OmitArgPrefixes[kind], field(default_factory=default)),
        ("grid", tyro.conf.OmitArgPrefixes[Grid], field(default_factory=Grid)),
        ("calibration", tyro.conf.OmitArgPrefixes[Calibration], field(default_factory=Calibration)),
    ]
    command = make_dataclass(base.__name__, options, bases=(base,))
    command.__doc__ = base.__doc__
    return _parse(command, name, argv)


def _choices(args: Any) -> dict[str, Any]:
    """What ``quantize`` and ``forecast`` take alike."""
    same = {
        name: getattr(args, name) for name in ("grid", "calibration", "format", "device", "dtype", "trust_remote_code")
    }
    return {"method": args.method_options, **same}


def _eval(argv: list[str]) -> None:
    args = _parse(flags.Eval, "eval", argv)
    result = evaluate(
        args.model,
        dataset=args.dataset,
        seqlen=args.seqlen,
        windows=args.windows,
        reference=args.reference,
        device=args.device,
        dtype=args.dtype,
        packed=args.packed,
        arithmetic=args.arithmetic,
        head_bits=args.head_bits,
        trust_remote_code=args.trust_remote_code,
        progress=True,
    )
    if args.json:
        print(json.dumps({"model": args.model, **result.as_dict()}))
        return
    print(f"perplexity {result.perplexity:.4f}")
    if result.kl is not None and result.top1 is not None and result.reference_perplexity is not None:
        print(f"reference perplexity {result.reference_perplexity:.4f}")
        print(f"mean KL(reference || model) {result.kl:.5f} nats per token, top-1 agreement {100 * result.top1:.2f}%")
    print(f"protocol: {result.protocol}")


def _generate(argv: list[str]) -> None:
    args = _parse(flags.Generate, "generate", argv)
    _set_threads(args.threads)
    options = {"device": args.device, "dtype": args.dtype, "arithmetic": args.arithmetic, "head_bits": args.head_bits}
    model = load(args.model, trust_remote_code=args.trust_remote_code, **options)
    tokenizer = load_tokenizer(locate(args.model), trust_remote_code=args.trust_remote_code)
    result = generate(
        model,
        tokenizer,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        chat=args.chat,
        temperature=args.temperature,
        seed=args.seed,
        write=lambda text: print(text, end="", flush=True),
    )
    print(flush=True)
    packed = list(quantized_linears(model).values())
    print(packed[0].why() if packed else "dense weights", result.summary(), sep="; ", file=sys.stderr)


def _bench(argv: list[str]) -> None:
    args = _parse(flags.Bench, "bench", argv)
    result = bench(
        args.model,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        rounds=args.rounds,
        threads=args.threads,
        against=args.against,
        head_bits=args.head_bits,
        trust_remote_code=args.trust_remote_code,
        progress=True,
    )
    if args.json:
        print(json.dumps(result.as_dict()))
    else:
        result.print(Console())


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        check_threads(threads)
        torch.set_num_threads(threads)


def _inspect(argv: list[str]) -> None:
    args = _parse(flags.Inspect, "inspect", argv)
    print(inspect(args.model, args.grid, trust_remote_code=args.trust_remote_code))


def _parse(command: Any, name: str, argv: list[str]) -> Any:
    """The command's fields from its flags; the parser's box about a wrong one becomes a sentence like any other."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(command, prog=f"nearplane {name}", args=argv, config=(tyro.conf.AvoidSubcommands,))
    except SystemExit as stop:
        if not complaint.getvalue():  # --help
            raise
        # A box, plainer where the terminal is: its title, a rule, what is wrong, a rule or an empty line, more.
        lines = [line.strip("│").rstrip() for line in complaint.getvalue().splitlines()[1:]]
        rule = [not line.strip("─- ") for line in lines]
        first = 1 if rule[0] else 0
        told = lines[first : rule.index(True, first)]
        words = " ".join(line.strip() for line in told if not line.startswith(" " * 8)).rstrip(".")
        raise SettingError(f"{words}; nearplane {name} --help lists the options.") from stop


def _canonical(argv: list[str]) -> list[str]:
    """Known aliases under the one name used inside; underscores become dashes."""
    result: list[str] = []
    for word in argv:
        if not word.startswith("--"):
            result.append(word)
            continue
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if flag == "--scale-dtype":
            raise SettingError(
                "scales are stored in the dtype that --format and --dtype imply; there is no flag for it."
            )
        if flag in SWITCHES and not equals:
            result += SWITCHES[flag]
        else:
            result.append(ALIASES.get(flag, flag) + equals + value)
    return result


def _method_class(argv: list[str]) -> tuple[type[Method], Callable[[], Method]]:
    """The class that --method names: its fields become flags."""
    given = [b for a, b in pairwise(argv) if a == "--method"]
    given += [a.partition("=")[2] for a in argv if a.startswith("--method=")]
    if len(given) > 1:
        raise SettingError(f"--method is given {len(given)} times; give it once.")
    name = given[0] if given else "nearplane"
    if name in METHODS:
        return METHODS[name], METHODS[name]
    module, _, attribute = name.partition(":")
    if not attribute or not module:
        raise SettingError(f"unknown method {name!r}; the methods are {', '.join(METHODS)}, or package.module:Class.")
    sys.path.insert(0, "")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SettingError(f"method {name!r} cannot be imported ({error}).") from error
    if not (isinstance(kind, type) and all(hasattr(kind, part) for part in ("needs", "prepare", "solve"))):
        raise SettingError(f"method {name!r} is not a class with needs, prepare and solve (nearplane.Method).")
    try:
        kind()
    except TypeError as error:
        raise SettingError(f"method {name!r} needs a default for every field ({error}).") from error
    return kind, kind
