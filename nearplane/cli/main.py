"""The command line. Flags are derived from the dataclasses they set (Grid, Calibration, the method's own), never listed
twice. A NearplaneError becomes one sentence on standard error and exit status 2.
"""

import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from rich.console import Console

from nearplane import __version__
from nearplane.api import evaluate, load, quantize
from nearplane.checkpoint.convert import convert
from nearplane.checkpoint.inspect import inspect
from nearplane.checkpoint.verify import verify
from nearplane.cli import flags
from nearplane.cli.options import canonical, method_name, parse
from nearplane.cli.terminal import summary
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.core.grid import Grid
from nearplane.data.text import Calibration
from nearplane.evaluation.compare import compare, is_language_model
from nearplane.evaluation.generation import generate
from nearplane.evaluation.speed import bench, check_threads
from nearplane.formats.journal import STATE, holder
from nearplane.machine.progress import waiting
from nearplane.machine.ranks import is_first, started
from nearplane.machine.signals import Interrupted
from nearplane.models.locate import locate
from nearplane.models.source import load_tokenizer
from nearplane.run.forecast import forecast
from nearplane.run.job import method_class
from nearplane.runtime.linear import quantized_linears

USAGE = f"""nearplane {__version__}: quantize transformers by error compensation.

  nearplane quantize MODEL OUT [--bits 3] [--method gptq]   write a quantized checkpoint
  nearplane plan MODEL [--method gptq]                       memory, disk and time that quantize will take
  nearplane eval MODEL [--reference ORIGINAL]                perplexity, KL divergence, agreement; features, accuracy
  nearplane inspect MODEL                                    blocks, stages, sizes, before any compute
  nearplane generate MODEL --prompt "..." [--chat]           text from packed weights, with tokens/s
  nearplane bench MODEL                                      tokens/s, packed against bf16 and fp32
  nearplane verify OUT [--engine vllm]                       every file and tensor re-read, problems listed
  nearplane convert OUT NEW --format gptq                    the same codes and scales in another format

MODEL is a local transformers folder, a hub id, or "demo". Each command explains itself with --help.
Start here:  nearplane quantize demo out --bits 3 --group-size 64 --no-sym --nsamples 16
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int | None]] = {
        "quantize": _quantize,
        "plan": _plan,
        "eval": _eval,
        "inspect": _inspect,
        "generate": _generate,
        "bench": _bench,
        "verify": _verify,
        "convert": _convert,
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
    status = 0
    try:
        if argv[0] not in commands:
            raise SettingError(f"unknown command {argv[0]!r}; the commands are {', '.join(commands)}.")
        status = commands[argv[0]](canonical(argv[1:])) or 0
    except NearplaneError as error:
        if not error.told:
            print(f"nearplane: {error}", file=sys.stderr)
            if not isinstance(error, SettingError):  # which the same command would meet again
                _how_to_resume(argv, "once that is mended, ")
        return 2
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
    return status


def _left_something(argv: list[str]) -> bool:
    """Whether a quantize command has left finished blocks in its OUT, and nobody else is at work there."""
    folders = (Path(word) for word in argv[1:] if word[:1] != "-")
    return argv[0] == "quantize" and any((folder / STATE).is_dir() and holder(folder) is None for folder in folders)


def _how_to_resume(argv: list[str], condition: str = "") -> None:
    """The command that goes on, where there is something to go on with."""
    if _left_something(argv):
        start, nodes = started()
        command = shlex.join([*start, *argv, *(["--resume"] if "--resume" not in argv else [])])
        where = f", on each of the {nodes} nodes and with your rendezvous options," if nodes > 1 else ""
        print(f"finished blocks are kept; {condition}go on{where} with: {command}", file=sys.stderr)


def _quantize(argv: list[str]) -> None:
    args = _job(flags.Quantize, "quantize", argv)
    report = quantize(args.model, args.out, **_choices(args), resume=args.resume, force=args.force)
    if is_first():
        print(summary(report))


def _plan(argv: list[str]) -> int:
    args = _job(flags.Plan, "plan", argv)
    with waiting("measuring this machine, about ten seconds"):
        found = forecast(args.model, **_choices(args), ranks=args.ranks)
    print(json.dumps(found.as_dict()) if args.json else found)
    return 1 if found.lacking() else 0


def _job(base: type[flags.Job], name: str, argv: list[str]) -> Any:
    """The flags of ``quantize`` and ``plan``: the command's own, and those of method, grid and calibration."""
    kind = method_class(method_name(argv))
    options: list[Any] = [
        ("method_options", tyro.conf.OmitArgPrefixes[kind], field(default_factory=kind)),
        ("grid", tyro.conf.OmitArgPrefixes[Grid], field(default_factory=Grid)),
        ("calibration", tyro.conf.OmitArgPrefixes[Calibration], field(default_factory=Calibration)),
    ]
    command = make_dataclass(base.__name__, options, bases=(base,))
    command.__doc__ = base.__doc__
    return parse(command, name, argv)


def _choices(args: Any) -> dict[str, Any]:
    """What ``quantize`` and ``forecast`` take alike."""
    names = (
        "grid calibration format device dtype offload trust_remote_code ignore budget widths rotate rotate_seed towers"
    )
    same = {name: getattr(args, name) for name in names.split()}
    rounding = {name: getattr(args, name) for name in ("act_bits", "act_sym", "act_clip")}
    return {"method": args.method_options, "override": args.override, **rounding, **same}


def _eval(argv: list[str]) -> None:
    args = parse(flags.Eval, "eval", argv)
    if args.labels or not is_language_model(args.model, trust_remote_code=args.trust_remote_code):
        _compare(args)
        return
    result = evaluate(
        args.model,
        dataset=args.dataset,
        seqlen=args.seqlen or 2048,
        windows=args.windows,
        reference=args.reference,
        device=args.device,
        dtype=args.dtype,
        packed=args.packed,
        arithmetic=args.arithmetic,
        head_bits=args.head_bits,
        kv_bits=args.kv_bits,
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


def _compare(args: flags.Eval) -> None:
    if args.head_bits is not None or args.arithmetic != "auto" or args.kv_bits != 16:
        raise SettingError("--head-bits, --kv-bits and --arithmetic are for language models.")
    names = ("reference", "dataset", "labels", "windows", "device", "dtype", "packed", "trust_remote_code")
    options = {name: getattr(args, name) for name in names}
    result = compare(args.model, seqlen=args.seqlen or 512, progress=True, **options)
    print(json.dumps({"model": args.model, **result.as_dict()}) if args.json else result)


def _generate(argv: list[str]) -> None:
    args = parse(flags.Generate, "generate", argv)
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
    args = parse(flags.Bench, "bench", argv)
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


def _verify(argv: list[str]) -> int:
    args = parse(flags.Verify, "verify", argv)
    result = verify(args.out, args.engine, trust_remote_code=args.trust_remote_code, progress=True)
    print(json.dumps(result.as_dict()) if args.json else result)
    return 0 if result.ok else 1


def _convert(argv: list[str]) -> None:
    args = parse(flags.Convert, "convert", argv)
    print(convert(args.out, args.new, args.format, trust_remote_code=args.trust_remote_code, progress=True))


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        check_threads(threads)
        torch.set_num_threads(threads)


def _inspect(argv: list[str]) -> None:
    args = parse(flags.Inspect, "inspect", argv)
    print(inspect(args.model, args.grid, trust_remote_code=args.trust_remote_code))
