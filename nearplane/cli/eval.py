"""``nearplane eval``: perplexity of language models, features and accuracy of others."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nearplane.core.errors import SettingError
from nearplane.machine.progress import printed

# Options that both kinds of measurement take under one name.
SHARED = ("dataset", "dataset_split", "dataset_column", "windows", "bos", "reference")
# Options that are about tasks, and about a text, which is read beside tasks where one of them is given.
OF_TASKS = ("limit", "num_fewshot", "include_path", "batch_size")
OF_TEXT = ("dataset", "dataset_split", "dataset_column", "seqlen", "windows", "bos", "protocol")
SETTINGS = {"nearplane.checkpoint.load:LoadSettings": None}


@dataclass(frozen=True)
class Options:
    """Perplexity of a model or checkpoint, with its protocol; with --reference also KL divergence and top-1 agreement.

    Of encoders, encoder-decoders and vision models: how far their final hidden states are from those of --reference
    (relative error, cosine), or with --labels top-1 accuracy.
    """

    model: str
    """A transformers folder (original, compressed-tensors or GPTQ), a hub id, or "demo"."""
    dataset: str | None = None
    """File of texts or dataset name, one that quantize takes; none: the held-out part of the embedded text. A folder of images
    or recordings for a model that reads such."""
    dataset_split: str | None = None
    """Split of the dataset; none: test or validation, where a dataset has splits."""
    dataset_column: str | None = None
    """Column of the dataset's rows; none: input_ids, text, messages or conversations, the first that there is."""
    labels: Path | None = None
    """A folder of images for each class (or such folders in train and test): top-1 accuracy, of the model's classifier head
    if it knows the classes, else of a linear probe on frozen features."""
    seqlen: int | None = None
    """Tokens per window, cut to the model's own limit; none: 2048, or 512 for models that are no decoders."""
    windows: int | None = None
    """Read only this many windows, or files."""
    bos: bool = True
    """Begin each window with the tokens that the tokenizer puts before a text, such as BOS, where it does so; these are not
    scored."""
    protocol: Literal["gptq", "llama.cpp", "hf-stride"] | None = None
    """Cut and score the text as others do, so that perplexity compares with theirs: gptq (2048 tokens), llama.cpp (512, the
    second half scored), or hf-stride (as long as the model allows, 512 apart). Each decides about BOS itself."""
    reference: str | None = None
    """The original model, to compare with."""
    tasks: str | None = None
    """Ask tasks of lm-evaluation-harness in place of reading a text (extra tasks): names, or task files (.yaml), separated by
    commas; paper is the zero-shot set of GPTAQ, with its mean. With --dataset or --protocol the text is read, too."""
    limit: int | None = None
    """With --tasks, at most so many questions of each task."""
    num_fewshot: int | None = None
    """With --tasks, examples before each question; none: as the task has it."""
    include_path: Path | None = None
    """With --tasks, a folder of task files of your own."""
    batch_size: int = 8
    """With --tasks, sequences in one forward."""
    kv_bits: int = 16
    """Also round keys and values to so many bits, 2 to 8, as they enter the cache: a simulation, which no checkpoint carries."""
    json: bool = False
    """Print one JSON object and nothing else on standard output."""


def run(options: Options, settings: dict[str, Any]) -> int:
    """Measure a model by what it is for, and print the result with its protocol."""
    from nearplane.evaluation.compare import compare, is_language_model

    choices = {name: getattr(options, name) for name in SHARED}
    result: Any
    asked = {name: settings[name] for name in ("trust_remote_code", "revision") if name in settings}
    _refuse(options)
    language = not options.labels and is_language_model(options.model, **asked)
    if options.tasks is not None and not language:
        raise SettingError("--tasks are for language models.")
    answers = None if options.tasks is None else _tasks(options, options.tasks, settings)
    if answers is not None and not _reads_text(options):
        _print(options, answers, {"tasks": answers.as_dict()})
        return 0
    if not language:
        if options.kv_bits != 16 or options.protocol or settings.keys() & {"head_bits", "arithmetic"}:
            raise SettingError("--head-bits, --kv-bits, --arithmetic and --protocol are for language models.")
        choices |= {"labels": options.labels, "seqlen": options.seqlen or 512}
        result = compare(options.model, progress=True, **choices, **settings)
    else:
        from nearplane.api import evaluate

        choices |= {"kv_bits": options.kv_bits, "seqlen": options.seqlen, "protocol": options.protocol}
        result = evaluate(options.model, progress=True, **choices, **settings)
    found = result.as_dict() | ({} if answers is None else {"tasks": answers.as_dict()})
    _print(options, result if answers is None else f"{result}\n{answers}", found)
    return 0


def _print(options: Options, text: object, found: dict[str, Any]) -> None:
    """Print a result for a person, or as one object."""
    printed(text) if not options.json else print(json.dumps({"model": options.model, **found}))


def _refuse(options: Options) -> None:
    """Refuse options that mean nothing beside the others."""
    if options.tasks is None:
        given = [name for name in OF_TASKS if getattr(options, name) != getattr(Options, name)]
        if given:
            raise SettingError(f"--{given[0].replace('_', '-')} is about tasks; give --tasks NAME, too.")
    elif options.kv_bits != 16:
        raise SettingError("--kv-bits is for reading a text; leave --tasks out.")


def _reads_text(options: Options) -> bool:
    """Tell whether a text is read beside the tasks: where an option that is about a text was given."""
    return any(getattr(options, name) != getattr(Options, name) for name in OF_TEXT)


def _tasks(options: Options, names: str, settings: dict[str, Any]) -> Any:
    """Ask the tasks."""
    from nearplane.evaluation.tasks import evaluate_tasks

    more = {name: getattr(options, name) for name in OF_TASKS}
    return evaluate_tasks(options.model, names, reference=options.reference, **more, **settings)
