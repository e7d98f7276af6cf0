"""Windows of a text that calibration has not used: to check a run by; to tune on, and to judge a tuning by.

Calibration windows lie at random places of a text. Fresh windows are drawn in the same way with other seeds, and kept where
they share almost no run of tokens with the calibration windows or with each other. So any dataset will do. Where a text is
too short to leave a few windows to judge by, calibration windows that overlap with these are drawn anew. For a tuning each
source of a mix gives its share. Where the dataset is ``self``, the model writes the fresh windows, with another seed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.data.files import is_file_name
from nearplane.data.samples import Batch, Samples, gather, longest_input, masks
from nearplane.data.shares import EMBEDDED, SELF, Share, shares_of
from nearplane.data.text import Calibration, opening_of
from nearplane.data.windows import Text, Tokens, digest
from nearplane.models.inputs import DECODER, MEDIA, TEXT, reads
from nearplane.models.source import Source

# Two windows overlap where more than ``SHARED`` of one's runs of ``RUN`` tokens are in the other; runs are a quarter of a
# short window.
RUN, SHARED = 16, 0.1
# Tokens to judge by, and the fewest and most windows that are taken for them.
JUDGED_TOKENS, FEWEST, MOST = 4096, 4, 16
# Times that windows are drawn, each with a seed of its own; windows drawn at a time, for each that is wanted.
DRAWS, TRIED, STRIDE = 6, 4, 1_000_003
# A run is checked on one token for so many that it is calibrated on, within these limits, in windows of at most so many.
SHARE, LEAST_TOKENS, MOST_TOKENS, CHECK_WINDOW = 16, 512, 2048, 512


Window = tuple[Batch, Tensor]
"""A batch of one, and its tokens without padding."""


class Fresh(NamedTuple):
    """Windows that calibration has not used, by the source of their text."""

    held: dict[str, Batch]
    """To judge by: neither calibrated nor tuned on."""
    more: Batch | None
    """To tune on; None: the text has no more."""
    notes: tuple[str, ...] = ()
    """Remarks for the user."""

    @property
    def counts(self) -> tuple[int, int]:
        """Windows to judge by, and to tune on."""
        return sum(map(_number, self.held.values())), 0 if self.more is None else _number(self.more)


def set_aside(
    source: Source,
    calibration: Calibration,
    used: Samples | None,
    more: int,
    write: Callable[[Calibration], Tokens | None] = lambda _: None,
) -> tuple[Samples | None, Fresh]:
    """Draw fresh windows of every source of the dataset.

    Args:
        source: the model.
        calibration: how the calibration windows were drawn.
        used: the calibration windows; None: the method reads none.
        more: the most windows to tune on; each source gives its share.
        write: lets the model write windows, where a source is ``self``.

    Returns:
        The calibration windows, and the fresh ones.

    Raises:
        SettingError: a source leaves no window to judge by, whatever is drawn.
    """
    held, rest, notes, pools = dict[str, Batch](), list[Window](), tuple[str, ...](), list[tuple[_Pool, int]]()
    taken, shares = _taken(calibration, used), [share for share, _, _ in calibration.shares]
    for number, (wanted, most) in enumerate(fresh_shares(calibration, more)):
        alone = calibration.of_source(number)
        if shares[number].own:
            origin, found = _written(write(_again(alone, 1, wanted + most)), used)
            judged, rest = found[:wanted], rest + found[wanted:]
        else:
            origin = "the dataset" if used is None else str(used.data["origin"])
            pool = _Pool(source, alone, most)
            judged = pool.pick(taken, wanted)
            if len(judged) < FEWEST and used is not None and len(shares) == 1:
                used, judged, notes = _make_room(used, pool.seen, taken.length)
                pool.again()
                taken = _taken(calibration, used, judged)
            pools.append((pool, most))
        name = origin if len(shares) == 1 else named(shares, number)
        if len(judged) < FEWEST:
            where = "the dataset" if len(shares) == 1 else f"dataset {name}"
            longer = "a longer --dataset" if len(shares) == 1 else "a longer one, a lower weight"
            raise SettingError(
                f"tune is judged by {FEWEST} windows or more that are neither calibrated nor tuned on, and {where} leaves "
                f"{len(judged)}; give {longer}, or fewer --nsamples."
            )
        held[name] = join([batch for batch, _ in judged])
    for pool, most in pools:  # only now: every source has what judges it
        rest += pool.pick(taken, most)
    if not rest and used is None:
        raise SettingError(
            "tune needs windows to tune on beside those that judge, and the dataset leaves none; give a longer one."
        )
    return used, Fresh(held, join([batch for batch, _ in rest]) if rest else None, notes)


def fresh_shares(calibration: Calibration, more: int) -> list[tuple[int, int]]:
    """Return how many windows of each source judge a tuning, and on how many at most is tuned, by the sources' weights."""
    shares = [share for share, _, _ in calibration.shares]
    whole, judged = sum(share.weight for share in shares), judged_windows(calibration.seqlen)
    parts = [share.weight / whole for share in shares]
    return [(max(FEWEST, ceil(judged * part - 1e-9)), ceil(more * part - 1e-9)) for part in parts]


def written_windows(calibration: Calibration, more: int) -> int:
    """Return how many fresh windows the model writes itself for a tuning on ``more`` windows."""
    pairs = zip(calibration.shares, fresh_shares(calibration, more), strict=True)
    return sum(sum(counts) for (share, _, _), counts in pairs if share.own)


def named(shares: Sequence[Share], number: int) -> str:
    """Return the name of a mix's source, with its place where others have the name, as rows in memory may."""
    name = shares[number].name
    alone = [share.name for share in shares].count(name) == 1
    return name if alone else f"{name}, source {number + 1}"


def _written(own: Tokens | None, used: Samples | None) -> tuple[str, list[Window]]:
    """Return the origin of what the model has written, and of it the windows that differ from all others."""
    known = {tuple(row.tolist()) for row in ([] if used is None else rows_of(used.arguments))}
    if own is None:
        return SELF, []
    found = {tuple(row.tolist()): row for row in own.ids}
    return own.origin, [({TEXT: row[None]}, row) for key, row in found.items() if key not in known]


def _again(calibration: Calibration, draw: int, count: int) -> Calibration:
    """Return the settings of another draw, of ``count`` windows."""
    return replace(calibration, seed=(calibration.seed + STRIDE * draw) % 2**63, nsamples=count)


def _taken(calibration: Calibration, used: Samples | None, held: Sequence[Window] = ()) -> "_Taken":
    """Take the calibration windows, and others."""
    taken = _Taken(min(RUN, max(1, calibration.seqlen // 4)))
    for row in [*([] if used is None else rows_of(used.arguments)), *(row for _, row in held)]:
        taken.add(row)
    return taken


class Checked(NamedTuple):
    """The windows that a run is checked on."""

    batch: Batch
    origin: str
    fresh: bool = True
    """Whether calibration has not used them."""
    unscored: int = 1
    """Tokens at the beginning of each window that no loss counts: BOS, or the first."""

    @property
    def windows(self) -> int:
        """Number of windows."""
        return _number(self.batch)

    @property
    def width(self) -> int:
        """Tokens of a window; of images and recordings, as many as a window of text has at most."""
        found = (value.shape[1] for name, value in self.batch.items() if name in (TEXT, DECODER))
        return max(found, default=CHECK_WINDOW)

    def record(self) -> dict[str, Any]:
        """Return what the report says of the windows."""
        return {"windows": self.windows, "origin": self.origin, "held_out": self.fresh}


def to_check(
    source: Source, calibration: Calibration, used: Samples | None, fresh: Fresh | None
) -> tuple[Checked | None, str | None]:
    """Choose the windows that a run is checked on.

    Args:
        source: the model.
        calibration: how the calibration windows were drawn.
        used: the calibration windows; None: the method reads none.
        fresh: windows that were set aside for a tuning, which will do.

    Returns:
        The windows: fresh ones, or where the dataset leaves none, those of the calibration. None where there is no data. And
        a sentence where they are not fresh.
    """
    if fresh is not None:
        batch = join(list(fresh.held.values()))
        return Checked(batch, ", ".join(fresh.held), unscored=_unscored(source, calibration, batch)), None
    left, asked = texts_of(calibration, used), calibration.dataset is not None
    fewer = len(shares_of(left.dataset)) < len(shares_of(calibration.dataset)) or (asked and left.dataset is None)
    calibration = replace(left, seqlen=min(calibration.seqlen, CHECK_WINDOW))
    width = min(calibration.seqlen, longest_input(source.model) or calibration.seqlen)
    shown = calibration.nsamples * width if used is None else used.number * (used.length or width)
    known = used
    if used is None and calibration.dataset is not None and not MEDIA & set(reads(source.model)):
        known = gather(source, calibration)  # a text that was named and cannot be read is an error of any method
    if MEDIA & set(reads(source.model)):
        found, why = None, "images and recordings are not drawn anew"
    else:
        try:
            found, why = (
                _spare(source, calibration, known, checked_windows(shown, width)),
                "the dataset leaves no others",
            )
        except NearplaneError as error:
            found, why = None, str(error).rstrip(".")
    if found is not None:
        batch, origin = found
        instead = used is None and fewer
        told = (
            f"the run is checked on {origin}: a method that reads no data fetches and writes none" if instead else None
        )
        return Checked(batch, origin, unscored=_unscored(source, calibration, batch)), told
    if used is None:
        return None, f"the run is not checked on held-out windows: {why}"
    some = max(FEWEST, checked_windows(shown, used.length or width))
    batch = {name: value[:some] for name, value in used.arguments.items()}
    told = f"the run is checked on windows of the calibration, where errors are less than elsewhere: {why}"
    unscored = _unscored(source, calibration, batch)
    return Checked(batch, str(used.data["origin"]), fresh=False, unscored=unscored), told


def checked_windows(shown: int, width: int) -> int:
    """Return how many windows of ``width`` tokens a run is checked on that was shown so many tokens."""
    return max(1, min(MOST_TOKENS, max(LEAST_TOKENS, shown // SHARE)) // width)


def at_once(checked: Checked) -> int:
    """Return how many of the checked windows run in one forward."""
    return max(1, CHECK_WINDOW // checked.width)


def texts_of(calibration: Calibration, used: Samples | None) -> Calibration:
    """Return the calibration without what the model writes itself: its samples are all used.

    A run that reads no data is not to fetch any: of names on a hub, none is left.
    """
    shares = [share for share in shares_of(calibration.dataset) if not share.own]
    if used is None:
        shares = [share for share in shares if not isinstance(share.dataset, str) or at_hand(share.dataset)]
    left = [(share.dataset, share.weight) for share in shares]
    if left:
        return replace(calibration, dataset=left if len(left) > 1 else left[0][0])
    return replace(calibration, dataset=None, dataset_split=None, dataset_column=None)


def _spare(source: Source, calibration: Calibration, used: Samples | None, count: int) -> tuple[Batch, str] | None:
    """Draw windows once, and keep those that overlap with no calibration window; None: there is none, and their origin."""
    # Methods that read no data are checked on the windows that others are.
    taken = _taken(calibration, used or gather(source, calibration))
    drawn = gather(source, _again(calibration, 1, TRIED * count))
    chosen: list[Batch] = []
    for number, row in enumerate(rows_of(drawn.arguments)):
        if len(chosen) < count and not taken.holds(row):
            taken.add(row)
            chosen.append({name: value[number : number + 1] for name, value in drawn.arguments.items()})
    origins = [str(row["origin"]) for row in drawn.data.get("sources", ())] or [str(drawn.data["origin"])]
    return (join(chosen), " + ".join(origins)) if chosen else None


def _unscored(source: Source, calibration: Calibration, batch: Batch) -> int:
    """Return how many tokens at the beginning of each window are not scored: those that the tokenizer puts there, or one."""
    if TEXT not in batch or not calibration.bos:
        return 1
    opening = opening_of(source.tokenizer, Text("", ""))
    begun = batch[TEXT][:, : len(opening)]
    return max(1, len(opening) if opening and bool((begun == torch.tensor(opening)).all()) else 0)


def judged_windows(width: int) -> int:
    """Return how many windows of ``width`` tokens a tuning is judged by."""
    return min(MOST, max(FEWEST, -(-JUDGED_TOKENS // width)))


def at_hand(name: str) -> bool:
    """Tell whether a dataset's name means the embedded text or a file, not one of a hub."""
    return name == EMBEDDED or is_file_name(name) or Path(name).expanduser().exists()


def rows_of(batch: Batch) -> Iterator[Tensor]:
    """Yield the tokens of every sample, without padding."""
    ids = batch[TEXT] if TEXT in batch else batch[DECODER]
    found = [mask for mask in masks(batch) if mask.shape == ids.shape]
    for number, row in enumerate(ids):
        yield row[found[0][number].bool()] if found else row


class _Taken:
    """The runs of tokens in some windows, as hashes."""

    def __init__(self, length: int) -> None:
        self.length, self.runs = length, set[int]()

    def add(self, row: Tensor) -> None:
        """Take a window."""
        self.runs |= self._of(row)

    def holds(self, row: Tensor) -> bool:
        """Tell whether a window overlaps with those that are taken."""
        runs = self._of(row)
        return len(runs & self.runs) > SHARED * len(runs)

    def _of(self, row: Tensor) -> set[int]:
        """Return a hash of every run of a window; of a window shorter than a run, of all its tokens."""
        data, size = row.to(torch.int64).contiguous().numpy().tobytes(), 8
        return {hash(data[size * i : size * (i + self.length)]) for i in range(max(1, len(row) - self.length + 1))}


class _Pool:
    """Candidates, each a batch of one with its tokens, drawn when they are asked for."""

    def __init__(self, source: Source, calibration: Calibration, more: int) -> None:
        self.seen: list[Window] = []
        self.next: Iterator[Window] = self._draw(
            source, calibration, TRIED * (more + judged_windows(calibration.seqlen))
        )

    def _draw(self, source: Source, calibration: Calibration, count: int) -> Iterator[Window]:
        for draw in range(1, DRAWS + 1):
            batch = gather(source, _again(calibration, draw, count)).arguments
            for number, row in enumerate(rows_of(batch)):
                yield {name: value[number : number + 1] for name, value in batch.items()}, row

    def again(self) -> None:
        """Ask every window again."""
        self.next = iter(list(self.seen))

    def pick(self, taken: _Taken, most: int) -> list[Window]:
        """Choose windows that overlap with nothing that is taken, and take them; none is asked twice."""
        chosen: list[Window] = []
        while len(chosen) < most and (window := next(self.next, None)) is not None:
            self.seen.append(window)
            if not taken.holds(window[1]):
                taken.add(window[1])
                chosen.append(window)
        return chosen


def _make_room(used: Samples, pool: list[Window], run: int) -> tuple[Samples, list[Window], tuple[str, ...]]:
    """Choose windows to judge by, and draw the calibration windows anew that overlap with them; none is drawn twice."""
    judged, held = _Taken(run), list[Window]()
    for window in pool:
        if len(held) < FEWEST and not judged.holds(window[1]):
            judged.add(window[1])
            held.append(window)
    known = {tuple(row.tolist()) for row in rows_of(used.arguments)}
    others = {tuple(row.tolist()): batch for batch, row in pool if not judged.holds(row)}
    spare = iter([batch for row, batch in others.items() if row not in known])
    arguments = {name: value.clone() for name, value in used.arguments.items()}
    changed = 0
    for number, row in enumerate(rows_of(used.arguments)):
        if not judged.holds(row):
            continue
        other = next(spare, None)
        if other is None or any(other[name].shape[1:] != value.shape[1:] for name, value in arguments.items()):
            return used, [], ()  # too few, or of other lengths: no room can be made
        for name, value in arguments.items():
            value[number] = other[name][0]
        changed += 1
    data = {**used.data, "sha256": digest(arguments[TEXT] if TEXT in arguments else arguments[DECODER])}
    told = (
        f"{changed} of {used.number} calibration windows were drawn anew, so that tune has {len(held)} windows of this text "
        "to judge by that nothing else has seen"
    )
    return Samples(arguments, data, used.notes), held, (told,)


def join(windows: Sequence[Batch]) -> Batch:
    """Join batches to one, padded to the longest; there is a mask where lengths differ, as those of a mix's sources may."""
    found: Batch = {}
    names = {name: None for batch in windows for name in batch}
    ragged = [name for name in (TEXT, DECODER) if len({batch[name].shape[1] for batch in windows if name in batch}) > 1]
    for name in names | {_mask_of(name): None for name in ragged}:
        # Rows of one length have no mask: all their tokens are real.
        ids = next((text for text in (TEXT, DECODER) if _mask_of(text) == name), TEXT)
        values = [batch[name] if name in batch else torch.ones_like(batch[ids]) for batch in windows]
        longest = max(value.shape[1] for value in values)
        found[name] = torch.cat([torch.nn.functional.pad(value, (0, longest - value.shape[1])) for value in values])
    return found


def _number(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _mask_of(name: str) -> str:
    """Return the name of the mask that goes with token ids."""
    return name.replace("input_ids", "attention_mask")
