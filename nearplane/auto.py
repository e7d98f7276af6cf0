"""One class in the form of AutoGPTQ's and GPTQModel's: their quick start with another name, and the same run behind it.

Nothing is done here that ``quantize`` does not do: the class keeps a ``Job`` between the lines of such a script.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sized
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from nearplane.api import load, quantize
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.formats.store import PAGE, REPORT, read_json
from nearplane.models.locate import given_path, locate, refuse_loaded, refuse_missing
from nearplane.page.html import page_or_reason
from nearplane.run.job import Job
from nearplane.run.names import settings_of
from nearplane.run.report import Report, recordable

__all__ = ["NearplaneForCausalLM"]


class NearplaneForCausalLM:
    """A model on its way to a checkpoint: ``from_pretrained``, ``quantize``, ``save_quantized``.

    ``nearplane.quantize(model, out, dataset=examples)`` is the same in one line, for every kind of model, and can be resumed.

    Example:
        >>> config = {"bits": 4, "group_size": 128, "desc_act": False}
        >>> model = NearplaneForCausalLM.from_pretrained("demo", config)
        >>> model.quantize(["A text to calibrate on.", "And another."])  # doctest: +SKIP
        >>> model.save_quantized("out")  # doctest: +SKIP
    """

    def __init__(self, model: str | Path, job: Job) -> None:
        """Keep what is to be quantized, and how; ``from_pretrained`` reads both."""
        self.model, self.job = model, job
        self.report: Report | None = None
        """Of the run, once it is finished."""
        self._work = ExitStack()  # removes the finished checkpoint where it is not saved
        self._made: Path | None = None

    @classmethod
    def from_pretrained(cls, model: str | Path, quantize_config: Any = None, **settings: Any) -> "NearplaneForCausalLM":
        """Name a model and say how to quantize it. No weight is read: the run does so, block by block.

        Args:
            model: a transformers folder, a hub id, or "demo".
            quantize_config: what ``Job.read`` takes: a dict, a file, transformers' GPTQConfig; none: the defaults.
            settings: fields of ``Job`` and its parts that count before these, by name.

        Raises:
            SettingError: a setting without meaning.
            NearplaneError: a model that is not there.
        """
        refuse_loaded(model)
        refuse_missing(str(model))
        job = Job.of(Job.read({} if quantize_config is None else quantize_config), settings_of(settings))
        locate(model, weights=False, revision=job.revision)
        return cls(model, job)

    @staticmethod
    def from_quantized(out: str | Path, **settings: Any) -> nn.Module:
        """Load a checkpoint: what ``nearplane.load`` does, and takes.

        Args:
            out: the folder, or a hub id.
            settings: fields of ``LoadSettings``: device, dtype, packed, arithmetic and others.

        Returns:
            A ``torch.nn.Module``: the model's transformers class, in evaluation mode.

        Raises:
            NearplaneError: a folder that cannot be read, in one sentence.
        """
        return load(out, **settings)

    def quantize(self, examples: Any = None, *, progress: bool = True, **settings: Any) -> Report:
        """Quantize into a temporary folder, which ``save_quantized`` moves to its place.

        Args:
            examples: texts, conversations, lists of token ids or tokenized dicts, a ``datasets.Dataset``, or a file (.txt,
                .jsonl with ``text`` or ``messages``, .parquet); none: the configuration's dataset, or the embedded text. Of
                tokenized examples all are used, unless ``nsamples`` is given.
            progress: show the run on standard error.
            settings: fields of ``Job`` and its parts that count before the configuration's, by name.

        Returns:
            The report of the run.

        Raises:
            NearplaneError: as ``nearplane.quantize``. The temporary folder is removed then; to resume a run, call that.
        """
        settings = settings_of(settings)
        if examples is not None:
            settings["dataset"] = examples
            if _tokenized(examples) and not {"nsamples", "calibration"} & {
                *settings,
                *(self.job.given or ("nsamples",)),
            }:
                settings["nsamples"] = len(examples)
        job = Job.of(self.job, settings)
        self._discard()
        with ExitStack() as work:
            made = Path(work.enter_context(tempfile.TemporaryDirectory(prefix="nearplane-"))) / "out"
            self.report = quantize(self.model, made, job, progress=progress)
            self._work, self._made = work.pop_all(), made
        return self.report

    def save_quantized(self, out: str | Path, use_safetensors: bool = True) -> None:
        """Move the checkpoint to its place, whole or not at all.

        Args:
            out: a folder that does not exist or is empty.
            use_safetensors: True; there is no other kind of file.

        Raises:
            SettingError: nothing was quantized yet, or ``out`` holds something.
            NearplaneError: the disk refuses; the checkpoint stays where it was.
        """
        if not use_safetensors:
            raise SettingError("checkpoints are written as safetensors; leave use_safetensors out.")
        if self._made is None or self.report is None:
            saved = (
                f"is saved already, in {self.report.out}; copy that folder" if self.report else "is not quantized yet"
            )
            raise SettingError(f"{self.model} {saved}; quantize(examples) comes before save_quantized.")
        out = given_path("out", out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise SettingError(f"{out} exists and is not an empty folder; give another.")
        try:
            _say_where(self._made, recordable(str(out), "OUT"))
            out.parent.mkdir(parents=True, exist_ok=True)
            _move(self._made, out)
        except OSError as error:
            raise NearplaneError(f"the checkpoint cannot be moved to {out} ({error}).") from error
        self.report = replace(self.report, out=str(out))
        self._discard()

    def generate(self, *_: Any, **__: Any) -> Any:
        """Refuse: the run keeps no model in memory. ``from_quantized(out)`` has one that generates.

        Raises:
            SettingError: always, and says what to do.
        """
        raise SettingError(
            "the model is not in memory after quantize; call save_quantized(out), then "
            "NearplaneForCausalLM.from_quantized(out).generate(...)."
        )

    def _discard(self) -> None:
        self._work.close()
        self._made = None


def _tokenized(examples: Any) -> bool:
    """Tell whether examples are rows of token ids, each a sample."""
    if not isinstance(examples, Sized) or isinstance(examples, str | bytes | Mapping):
        return False
    first: Any = next(iter(examples), None)  # type: ignore[call-overload]
    return hasattr(first, "keys") and "input_ids" in first


def _say_where(folder: Path, out: str) -> None:
    """Write the report and its page again, with the place that a checkpoint gets; nothing else names the place."""
    content = {**read_json(folder / REPORT), "out": out}
    (folder / REPORT).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    page, _ = page_or_reason(content)
    if page is not None:
        (folder / PAGE).write_text(page, encoding="utf-8")


def _move(folder: Path, out: Path) -> None:
    """Move a folder, by a copy where it goes to another disk; ``out`` is whole or not there."""
    try:
        os.replace(folder, out)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
            shutil.copytree(folder, Path(beside) / "out")
            os.replace(Path(beside) / "out", out)
