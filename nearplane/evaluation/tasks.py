"""Tasks of lm-evaluation-harness on a model as it will run: packed.

The harness (the extra ``tasks``) owns prompts, scoring and data. Decided here: which tasks ``paper`` stands for, what of
the harness's results is kept, and what is said when a task cannot run. Data is looked at before the model is loaded.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from huggingface_hub import errors, get_session

from nearplane.checkpoint.load import LoadSettings, load_model
from nearplane.core.errors import NearplaneError, SettingError, plain
from nearplane.models.inputs import refuse_unless_causal
from nearplane.models.locate import BAD_CONFIG, first_line, given_path, locate, refuse_loaded
from nearplane.models.source import load_tokenizer

# The zero-shot tasks of GPTAQ (arXiv 2504.02692): the default of ``--tasks`` in its code, fake_quant/utils.py, and of
# SpinQuant's scripts. As there, the mean is over acc_norm where a task has it, else acc.
PAPER = ("piqa", "hellaswag", "arc_easy", "arc_challenge", "winogrande", "boolq")
WORD = "paper"
FROM = "GPTAQ, arXiv 2504.02692"
# What a task's data, read by other libraries, may fail with.
PATIENCE = 3.0  # seconds that the hub has to answer
UNREAD = (OSError, ValueError, RuntimeError, errors.HTTPError)


@dataclass(frozen=True)
class TaskResults:
    """What the harness measured, and how."""

    results: dict[str, dict[str, float | None]]
    """Of each task, and of each group of tasks, its metrics by name; ``NAME_stderr`` is the standard error, None: not known."""
    shots: dict[str, int]
    """Examples before each question, by task."""
    samples: dict[str, int]
    """Questions asked, by task."""
    versions: dict[str, str]
    """Of each task, as the harness counts them."""
    harness: str
    """The version of lm-evaluation-harness."""
    limit: int | None = None
    mean: float | None = None
    """Over the tasks of ``paper``, where these were asked for: of acc_norm, else acc."""
    notes: tuple[str, ...] = ()
    """What is not as asked."""
    reference: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """``results`` of the reference; empty: there is none."""
    reference_mean: float | None = None

    @property
    def protocol(self) -> str:
        """One line that lets somebody else repeat the measurement."""
        shots = sorted(set(self.shots.values()))
        said = (
            f"{shots[0]}-shot" if len(shots) == 1 else ", ".join(f"{name} {n}-shot" for name, n in self.shots.items())
        )
        counted = f"; the first {self.limit} questions of each task" if self.limit is not None else ""
        tasks = ", ".join(f"{name} (version {self.versions.get(name, '?')})" for name in self.samples)
        return f"lm-evaluation-harness {self.harness}, {tasks}; {said}{counted}; no chat template"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the protocol, for JSON."""
        return {**asdict(self), "protocol": self.protocol}

    def __str__(self) -> str:
        lines = []
        for name, metrics in self.results.items():
            before = self.reference.get(name, {})
            for metric, value in metrics.items():
                if metric.endswith("_stderr") or value is None:
                    continue
                spread = metrics.get(f"{metric}_stderr")
                original = before.get(metric)
                said = f"{name} {metric} {value:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")
                lines.append(said + (f" (reference {original:.4f})" if original is not None else ""))
        if self.mean is not None:
            beside = f" (reference {self.reference_mean:.4f})" if self.reference_mean is not None else ""
            lines.append(
                f"mean of {len(PAPER)} tasks {self.mean:.4f}{beside}: acc_norm where there is one, else acc ({FROM})"
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, f"protocol: {self.protocol}"])

    __repr__ = __str__


def evaluate_tasks(
    model: str | Path,
    tasks: str | Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    batch_size: int = 8,
    reference: str | Path | None = None,
    **settings: Any,
) -> TaskResults:
    """Measure a model on tasks of lm-evaluation-harness, which ``pip install 'nearplane[tasks]'`` brings.

    Args:
        model: a transformers folder, a hub id, or "demo"; a quantized one stays packed.
        tasks: names of the harness, or paths of task files (.yaml), as a list or separated by commas. "paper" is the zero-shot
            set of GPTAQ: piqa, hellaswag, arc_easy, arc_challenge, winogrande, boolq, with its mean.
        limit: ask at most so many questions of each task.
        num_fewshot: examples before each question; none: as the task has it.
        include_path: a folder of task files of your own, whose names come before the harness's.
        batch_size: sequences in one forward.
        reference: the original model, which is asked the same.
        settings: fields of ``LoadSettings``; of the reference ``device``, ``dtype`` and ``trust_remote_code``.

    Returns:
        The metrics of each task, with the version of the harness and the protocol.

    Raises:
        NearplaneError: the harness is not installed, a task is not known, its data cannot be fetched, or it cannot be run.
    """
    names, limit, num_fewshot = _asked(tasks, limit, num_fewshot, batch_size)
    for some in (model, reference):
        refuse_loaded(some)
    harness = _harness()
    chosen = LoadSettings.of(settings)
    with _without_bars(), _one_try():
        built = _built(names, None if include_path is None else given_path("include_path", include_path))
    found = []
    for some, how in ((model, chosen), (reference, chosen.of_original())):
        if some is not None:
            loaded = load_model(some, how)
            refuse_unless_causal(loaded, "a task")
            folder = locate(some, revision=how.revision)
            tokenizer = load_tokenizer(folder, trust_remote_code=how.trust_remote_code)
            lm = _wrapped(loaded, tokenizer, batch_size)
            with _without_bars():
                found.append(_run(harness, lm, built, limit, num_fewshot))
    made = [_metrics(one["results"]) for one in found]
    shots = {name: int(count) for name, count in found[0]["n-shot"].items()}
    differ = [name for name, count in shots.items() if num_fewshot not in (None, count)]
    notes = [f"{name} is {shots[name]}-shot by its own file, not {num_fewshot}-shot" for name in differ]
    counts = {name: int(each["effective"]) for name, each in found[0]["n-samples"].items()}
    means = [_mean(one) if set(PAPER) <= set(one) and WORD in _words(tasks) else None for one in made]
    return TaskResults(
        results=made[0], shots={name: shots[name] for name in counts if name in shots}, samples=counts,
        versions={name: str(version) for name, version in found[0]["versions"].items()},
        harness=str(harness.__version__), limit=limit, mean=means[0], notes=tuple(notes),
        reference=made[1] if len(made) > 1 else {}, reference_mean=means[1] if len(made) > 1 else None,
    )  # fmt: skip


def _words(tasks: str | Sequence[str]) -> list[str]:
    """Return the names that a user gave."""
    given = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    if not given or not all(isinstance(word, str | Path) and str(word).strip() for word in given):
        raise SettingError(f"tasks are names or files, separated by commas; got {tasks!r}.")
    return [str(word).strip() for word in given]


def _asked(
    tasks: str | Sequence[str], limit: Any, num_fewshot: Any, batch_size: Any
) -> tuple[list[str], int | None, int | None]:
    """Check the settings, and put names in place of ``paper``."""
    limit, num_fewshot = plain(limit), plain(num_fewshot)
    for name, value, least in (
        ("limit", limit, 1),
        ("num_fewshot", num_fewshot, 0),
        ("batch_size", plain(batch_size), 1),
    ):
        if value is not None and (type(value) is not int or value < least):
            raise SettingError(f"{name} must be a whole number of at least {least}; got {value!r}.")
    words = _words(tasks)
    if WORD in words and num_fewshot not in (None, 0):
        raise SettingError(
            f"the tasks of paper are zero-shot, and num_fewshot={num_fewshot} is given; name the tasks instead."
        )
    named = [name for word in words for name in (PAPER if word == WORD else [word])]
    return list(dict.fromkeys(named)), limit, 0 if WORD in words else num_fewshot


def _harness() -> ModuleType:
    """Import the harness. NearplaneError where it is not installed."""
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise NearplaneError(
            f"tasks are run by lm-evaluation-harness, which cannot be imported ({first_line(error)}); "
            "run: pip install 'nearplane[tasks]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not hasattr(lm_eval.tasks.TaskManager, "load"):
        raise NearplaneError(
            f"lm-evaluation-harness {lm_eval.__version__} is too old; run: pip install -U 'nearplane[tasks]'"
        )
    module: ModuleType = lm_eval
    return module


@contextmanager
def _without_bars() -> Iterator[None]:
    """Have the harness and its libraries draw no bars where standard error is no terminal: a log would keep each step."""
    if sys.stderr.isatty():
        yield
        return
    from tqdm.std import tqdm

    made = tqdm.__init__

    def quiet(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = quiet
    try:
        yield
    finally:
        tqdm.__init__ = made


@contextmanager
def _one_try() -> Iterator[None]:
    """Ask once whether the hub answers. Where it does not, the libraries read their caches alone, and retry nothing."""
    import datasets
    from huggingface_hub import constants

    places = (constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        if not any(before):
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except UNREAD:
        for place in places:
            place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _built(names: list[str], folder: Path | None) -> list[Any]:
    """Make the tasks, which fetches their data, each by itself, so that an error can name it."""
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise SettingError(f"include_path {folder} is no folder; give one with task files (.yaml).")
    files = [name for name in names if Path(name).suffix in (".yaml", ".yml")]
    for name in files:
        if not Path(name).is_file():
            raise SettingError(f"task file {name} does not exist.")
    try:
        manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=False)
        if not set(names) <= {*files, *manager.all_tasks}:  # the harness's own, which are thousands of files
            manager = TaskManager(include_path=None if folder is None else str(folder))
    except (yaml.YAMLError, *BAD_CONFIG, OSError) as error:
        raise NearplaneError(f"the task files in {folder} cannot be read ({first_line(error)}).") from error
    built = []
    for name in names:
        if name not in files and name not in manager.all_tasks:
            near = get_close_matches(name, [WORD, *manager.all_tasks], n=1)
            hint = (
                f"did you mean {near[0]}?" if near else "a file of your own ends in .yaml, a folder is --include-path."
            )
            raise SettingError(f"there is no task {name!r}; {hint}")
        built += _one(manager, name)
    return built


def _one(manager: Any, name: str) -> list[Any]:
    """Make one task, or all of a group or tag."""
    import datasets
    import jinja2

    try:
        loaded = manager.load(name)
    except (yaml.YAMLError, jinja2.TemplateError, LookupError, TypeError, AttributeError) as error:
        raise NearplaneError(f"task {name} cannot be made of its file ({_said(error)}).") from error
    except (*UNREAD, datasets.exceptions.DatasetsError) as error:
        raise NearplaneError(
            f"the data of task {name} cannot be read ({_said(error)}); fetch it where there is a network "
            "(HF_HOME holds it then), or give a task file with data of your own."
        ) from error
    group = loaded["groups"].get(name)
    return [group] if group is not None else list(loaded["tasks"].values())


def _wrapped(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """Give a loaded model the harness's interface."""
    from lm_eval.models.huggingface import HFLM

    if getattr(tokenizer, "bos_token_id", None) is None and getattr(tokenizer, "eos_token_id", None) is None:
        raise NearplaneError("the tokenizer has neither BOS nor EOS, one of which the harness needs to score a text.")
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _run(harness: ModuleType, lm: Any, built: list[Any], limit: int | None, num_fewshot: int | None) -> dict[str, Any]:
    """Ask the questions."""
    import jinja2

    try:
        found: dict[str, Any] = harness.simple_evaluate(
            model=lm, tasks=list(built), limit=limit, num_fewshot=num_fewshot, log_samples=False
        )
    except (jinja2.TemplateError, *BAD_CONFIG, *UNREAD) as error:
        raise NearplaneError(f"the harness cannot run these tasks ({_said(error)}).") from error
    return found


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _metrics(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Keep the numbers of the harness's results, ``acc`` of ``acc,none``; a filter that is none stays in the name."""
    found: dict[str, dict[str, float | None]] = {}
    for task, entries in results.items():
        kept: dict[str, float | None] = {}
        for key, value in entries.items():
            if "," in key:
                number = isinstance(value, int | float) and isfinite(value)  # where there is none, a word
                kept[key.removesuffix(",none")] = float(value) if number else None
        found[task] = kept
    return found


def _mean(results: dict[str, dict[str, float | None]]) -> float | None:
    """Return the mean over the tasks of ``paper``."""
    scores = [results[name].get("acc_norm", results[name].get("acc")) for name in PAPER]
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if len(known) == len(scores) else None
