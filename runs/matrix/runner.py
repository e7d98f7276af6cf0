"""Make the checkpoints of cases, and give each to the runner of an engine, in the engine's own environment."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import gguf
import gguf_templates
import numpy as np
import torch
import transformers
from matrix.cases import LLAMA, ONNX, Case
from matrix.models import DEMO, build, tokens
from matrix.rows import EXACT, row_of, scored

import nearplane
from nearplane import RTN, Grid

ROOT = Path(__file__).resolve().parents[2]
RUNNERS = ROOT / "runs" / "engines"
# Names of environments and runners, where they are not the engine's own.
ENVIRONMENTS = {LLAMA: "llama", ONNX: "onnxruntime"}
# An engine is imported once for so many checkpoints; after them the record is written.
BATCH = 30


def python_of(engine: str) -> Path | None:
    """Find the interpreter of an engine's environment; None: there is none."""
    name = ENVIRONMENTS.get(engine, engine)
    found = Path(os.environ.get("NEARPLANE_ENGINES", ROOT / ".engines")) / name / "bin" / "python"
    return found if found.exists() else None


class Workshop:
    """A folder in which models and checkpoints are made, each once for all engines."""

    def __enter__(self) -> Self:
        self._place = tempfile.TemporaryDirectory(prefix="engines-")
        self.folder = Path(self._place.name)
        self._made: dict[str, Path | None] = {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._place.cleanup()

    def source(self, case: Case) -> Path:
        """Build the model of a case, if need be."""
        return build(case.model, self.folder / case.model.replace(" ", "_"))

    def ids(self, case: Case) -> Path:
        """Write the tokens that a model of a case is given."""
        path = self.folder / f"{case.model.replace(' ', '_')}.json"
        path.write_text(json.dumps(tokens(case.model, self.source(case))))
        return path

    def checkpoint(self, case: Case) -> Path | None:
        """Quantize the model of a case, if need be; None where nearplane refuses to."""
        if case.name not in self._made:
            out = self.folder / str(len(self._made))
            settings: dict[str, Any] = {"method": RTN(), "format": case.format, "progress": False}
            if case.format != "gguf":
                settings["grid"] = Grid(case.bits, case.group, case.sym)
            elif case.model != DEMO:  # whose template the package holds
                settings["template"] = self.template(case)
            source = "demo" if case.model == DEMO else self.source(case)
            try:
                nearplane.quantize(source, out, **settings, **case.settings)
            except nearplane.NearplaneError as error:
                print(f"left out: {case.name}: {str(error).replace(str(self.folder), '')[:150]}", flush=True)
                out = None
            self._made[case.name] = out
        return self._made[case.name]

    def template(self, case: Case) -> Path:
        """Write the GGUF of a model, and run it in llama.cpp as it is: what a checkpoint is compared with must be right."""
        source, ids = self.source(case), self.ids(case)
        file, out = self.folder / f"{source.name}.gguf", self.folder / "plain.npz"
        if not file.exists():
            gguf_templates.of_folder(source, file)
            asked(LLAMA, "{}", [(file, ids, out)], self.folder / "plain.log")
            with np.load(out) as answer:
                logprobs = answer["logprobs"]
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
            off = float(np.abs(scored(model, json.loads(ids.read_text())) - logprobs).mean())
            assert off <= EXACT, f"the template of {source.name} differs from its model by {off}"
            out.unlink()
        return file

    def tried(self, engine: str, cases: list[Case]) -> Iterator[dict[str, Any]]:
        """Run an engine on the checkpoints of cases, and give a row for each."""
        groups: dict[str, list[Case]] = {}
        for case in cases:
            if case.given_to(engine):
                groups.setdefault(case.options_of(engine), []).append(case)
        for options, some in groups.items():
            once = _once(some)
            for at in range(0, len(once), BATCH):
                batch = once[at : at + BATCH]
                made = [(case, out) for case in batch if (out := self.checkpoint(case)) is not None]
                yield from self._rows(engine, options, made)

    def _rows(self, engine: str, options: str, made: list[tuple[Case, Path]]) -> Iterator[dict[str, Any]]:
        triples = []
        for case, checkpoint in made:
            answer = checkpoint.with_suffix(f".{engine}.npz")
            triples.append((file_of(checkpoint), self.ids(case), answer))
            if engine == LLAMA and (wide := widened(case, checkpoint)):
                triples.append((wide, self.ids(case), answer.with_suffix(".wide.npz")))
        asked(engine, options, triples, self.folder / f"{engine}.log")
        for case, checkpoint in made:
            yield row_of(engine, case, checkpoint, checkpoint.with_suffix(f".{engine}.npz"), self.ids(case))


def _once(cases: list[Case]) -> list[Case]:
    """Drop cases of the same name."""
    return list({case.name: case for case in reversed(cases)}.values())[::-1]


def asked(engine: str, options: str, triples: list[tuple[Path, Path, Path]], log: Path) -> None:
    """Call the runner of an engine."""
    runner = RUNNERS / f"{ENVIRONMENTS.get(engine, engine)}.py"
    with log.open("ab") as file:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        words = [str(word) for triple in triples for word in triple]
        command = [str(python_of(engine)), str(runner), "--options", options, *words]
        subprocess.run(command, stdout=file, stderr=file, check=False, env=environment)


def file_of(checkpoint: Path) -> Path:
    """Give what an engine opens: the .gguf file of a folder that has one, else the folder."""
    return next(checkpoint.glob("*.gguf"), checkpoint)


def widened(case: Case, checkpoint: Path) -> Path | None:
    """Write a GGUF checkpoint again in float32; None where the package gguf does not know its type, as Q2_0."""
    if case.settings["gguf_type"] not in gguf.GGMLQuantizationType.__members__:
        return None
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    return gguf_templates.widened(config, file_of(checkpoint), checkpoint.with_suffix(".wide.gguf"))
