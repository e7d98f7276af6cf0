"""The record of a run: settings, versions, hashes, and the errors of every linear."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nearplane.core.errors import SettingError, plain
from nearplane.formats.store import REPORT, read_json
from nearplane.machine.devices import environment
from nearplane.page.html import page_or_reason
from nearplane.run.events import BlockDone, Compared, Event, Noted, Solved, StageDone
from nearplane.run.measure import BlockRow, LinearRow

# Share of a weight's squares below which a change of it is float32's rounding: 8 bits change 1e-5 of them.
EXACT = 1e-11


class Mark(NamedTuple):
    """The lengths of a report's lists at one moment."""

    linears: int
    events: int
    rounds: dict[str, int]
    bytes: int
    seconds: dict[str, float]
    blocks: int


@dataclass(repr=False)
class Report:
    """The record of one run, written as ``report.json`` beside the checkpoint."""

    model: str
    settings: dict[str, Any]
    out: str = ""
    versions: dict[str, str] = field(default_factory=environment)
    data: dict[str, Any] = field(default_factory=dict)
    linears: list[LinearRow] = field(default_factory=list)
    rounds: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("kept", "rejected"), 0)
    )  # one count per input
    events: list[str] = field(default_factory=list)
    dense: list[dict[str, Any]] = field(default_factory=list)  # large parameters not quantized, with the reason
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("before", "after", "quantized", "dense"), 0))
    seconds: dict[str, float] = field(default_factory=dict)
    revision: str | None = None  # of a model from the hub, as it was asked for
    commit: str | None = None  # of a model from the hub, whose files were read
    resumed: int = 0  # times the run went on after it was ended
    memory: dict[str, Any] = field(default_factory=dict)  # bytes: the most held (peak), and what was counted on
    tuning: dict[str, Any] | None = None  # what a tuning did (run/tune.py); None: there was none
    blocks: list[BlockRow] = field(default_factory=list)  # errors behind each block, on the checked windows
    check: dict[str, Any] | None = None  # the whole model against its original (run/check.py); None: it was not checked
    config: dict[str, Any] | None = None  # what repeats the run (run/names.py)

    def __str__(self) -> str:
        totals, size, check = self.totals, self.bytes, self.check or {}
        error = "" if totals["mean_error"] is None else f", mean error of linears {totals['mean_error']:.4f}"
        error = f", error {check['error']:.4f} behind the last block" if check.get("error") is not None else error
        error += f", KL {check['kl']:.4f}" if "kl" in check else ""
        kept = f"{totals['linears']} linears at {totals['bits_per_weight']:.2f} bits per weight{error}"
        spent = f"{size['before'] / 1e6:.1f} MB -> {size['after'] / 1e6:.1f} MB in {totals['seconds']:.0f} s"
        return f"{self.model} -> {self.out}: {kept}; {spent}; {len(self.events)} notes in events"

    __repr__ = __str__

    def _repr_html_(self) -> str | None:
        """Return the page of the run in a frame, as notebooks show it; None where there is no page, and its text is shown.

        The report in ``out`` knows the engines, too.
        """
        written = Path(self.out) / REPORT
        content = read_json(written) if self.out and written.is_file() else self.as_dict()
        made, _ = page_or_reason(content)
        style = "width: 100%; height: 40em; border: 0"
        return None if made is None else f'<iframe srcdoc="{escape(made)}" style="{style}"></iframe>'

    @classmethod
    def read(cls, out: str | Path) -> "Report":
        """Read the report beside a finished checkpoint. NearplaneError where there is none."""
        stored: dict[str, Any] = dict(read_json(Path(out) / REPORT))
        # reports of earlier versions lack them
        later = ("revision", "commit", "tuning", "blocks", "check", "memory", "config")
        known = {f.name: stored[f.name] for f in fields(cls) if f.name in stored or f.name not in later}
        blocks = [BlockRow(**row) for row in known.get("blocks", ())]
        return cls(**{**known, "linears": [_row(row) for row in known["linears"]], "blocks": blocks})

    def mark(self) -> "Mark":
        """Return where the record stands."""
        counts = len(self.linears), len(self.events), dict(self.rounds), self.bytes["quantized"]
        return Mark(*counts, dict(self.seconds), len(self.blocks))

    def since(self, mark: "Mark") -> dict[str, Any]:
        """Return the entries added after a mark, for JSON."""
        return {
            "linears": [asdict(row) for row in self.linears[mark.linears :]],
            "events": self.events[mark.events :],
            "rounds": {key: count - mark.rounds[key] for key, count in self.rounds.items()},
            "bytes": self.bytes["quantized"] - mark.bytes,
            "seconds": {key: value - mark.seconds.get(key, 0.0) for key, value in self.seconds.items()},
            "resumed": self.resumed,
            "blocks": [asdict(row) for row in self.blocks[mark.blocks :]],
            **({"check": self.check} if self.checked else {}),
        }

    def extend(self, part: dict[str, Any]) -> None:
        """Add entries that ``since`` returned."""
        self.linears += [_row(row) for row in part["linears"]]
        self.events += part["events"]
        for key, count in part["rounds"].items():
            self.rounds[key] += count
        self.bytes["quantized"] += part["bytes"]
        self.spend(part["seconds"])
        self.resumed = part["resumed"]
        self.blocks += [BlockRow(**row) for row in part.get("blocks", ())]
        self.check = part.get("check", self.check)

    def take(self, event: Event) -> None:
        """Add an event of the walk."""
        match event:
            case Noted():
                self.events.append(event.text)
            case Solved():
                self.linears.append(event.row)
                self.bytes["quantized"] += event.nbytes
            case StageDone():
                self.rounds["kept"] += sum(course.rounds for course in event.courses)
                self.rounds["rejected"] += sum(course.rejected for course in event.courses)
            case Compared():
                self.check = event.record
            case BlockDone():
                self.spend(event.seconds)
                self.blocks += [event.behind] if event.behind is not None and not event.replayed else []

    def spend(self, seconds: dict[str, float]) -> None:
        """Add seconds to their phases."""
        for phase, more in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + more

    def conclude(self) -> None:
        """Add what only all linears tell: that their weights lay on the grid already; drop a check that was not made."""
        if self.check is not None and not self.checked:
            self.events.append(
                "the run is not checked: an earlier session, which did not check, had finished all blocks"
            )
            self.check = None
        exact, count = [row.name for row in self.linears if row.weight_error <= EXACT], len(self.linears)
        if exact:
            told = (
                f"all {count} linears"
                if len(exact) == count
                else f"{len(exact)} of {count} linears, the first {exact[0]},"
            )
            self.events.append(
                f"{told} have weights that lie on this grid already, as those of a model that was quantized to it: they are "
                "kept as they are, and their errors of 0 measure no grid and no method"
            )

    @property
    def checked(self) -> bool:
        """Whether the whole model was compared with its original; before that, ``check`` names the windows."""
        return self.check is not None and "tokens" in self.check

    @property
    def totals(self) -> dict[str, Any]:
        """The figures a person asks for first: errors, bits per weight, fallbacks, seconds."""
        errors = [row.error for row in self.linears if row.error is not None]
        weights = sum(row.shape[0] * row.shape[1] for row in self.linears)
        return {
            "linears": len(self.linears),
            "weights_quantized": weights,
            "mean_error": sum(errors) / len(errors) if errors else None,
            "mean_rtn_error": sum(row.rtn_error or 0.0 for row in self.linears) / len(errors) if errors else None,
            "mean_weight_error": sum(r.weight_error for r in self.linears) / max(1, len(self.linears)),
            "clipped": sum(row.clipped or 0 for row in self.linears),
            "damp_raised": sum(row.damp_raised for row in self.linears),
            "rounds": self.rounds["kept"],
            "rejected_rounds": self.rounds["rejected"],
            "rounded_linears": sum(row.rounded for row in self.linears),
            "dropped_tokens": sum(row.dropped for row in self.linears),
            "bits_per_weight": 8 * self.bytes["quantized"] / weights if weights else 0.0,
            "seconds": sum(self.seconds.values()),
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the record and its totals, for JSON."""
        return {**asdict(self), "totals": self.totals}


def _row(stored: dict[str, Any]) -> LinearRow:
    """Return a row as it comes back from JSON."""
    return LinearRow(**{**stored, "shape": tuple(stored["shape"])})


def recordable(value: Any, name: str) -> Any:
    """Return a setting as ``report.json`` and the records of a run hold it.

    Args:
        value: numbers, words, paths, dtypes, and lists, tuples and mappings of these.
        name: the setting's name, for errors.

    Raises:
        SettingError: a value that JSON cannot hold.
    """
    value = plain(value)
    if isinstance(value, Enum):
        return recordable(value.value, name)
    if isinstance(value, Mapping):
        return {str(key): recordable(part, f"{name}.{key}") for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [recordable(part, name) for part in value]
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, str) and value.encode("utf-8", "replace").decode() != value:
        raise SettingError(
            f"{name} is {value!r}, which is not UTF-8, so that report.json cannot hold it; rename that file."
        )
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and isfinite(value)):
        return value
    shown = repr(value) if isinstance(value, float) else f"a {type(value).__name__}"
    raise SettingError(
        f"{name} is {shown}, which report.json cannot hold; settings are finite numbers, words, paths, and lists of these."
    )
