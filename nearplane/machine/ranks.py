"""One run on several processes, as torchrun starts them: who is which, what they tell each other, what is said when one
is gone.

A lone process is rank 0 of 1, and nothing here does anything. Otherwise tensors of a GPU travel by NCCL, all else by gloo:
every exchange on GPUs comes after one on gloo, where a rank that has died is a closed connection, not a wait. Moments are
summed in float64; whatever a rank decides for others is sent to all, so that no two ranks can differ.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from traceback import clear_frames
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.core.grid import Certificate, Quantized
from nearplane.core.moments import Moments
from nearplane.machine.signals import Interrupted

# A rank that is alive and silent for longer than this is given up. Ranks wait for each other while one solves, so that it
# must exceed the longest stage; a rank that dies is noticed at once.
TIMEOUT = timedelta(hours=6)
# How long ranks wait for each other to begin.
BEGIN = timedelta(minutes=10)
# Seconds in which a rank that is alive will have noticed that another is gone.
GRACE = 5.0
# Numbers of a moment that are summed at once: what it takes beside the moment is eight bytes each.
CHUNK = 1 << 24

T = TypeVar("T")


class LostRank(NearplaneError):
    """Another rank is gone, or has given up."""


class Ranks:
    """This process among those of the run. Every method that speaks to the others is called by all of them alike."""

    def __init__(
        self, rank: int = 0, world: int = 1, machine: int = 1, device: str = "auto", store: Any = None
    ) -> None:
        """``machine``: ranks on this machine; ``device``: what this rank computes on; ``store``: where ranks leave notes."""
        self.rank, self.world, self.machine, self.device = rank, world, machine, device
        self.bytes = {"reduced": 0, "shared": 0}  # handed to all_reduce, and sent or received by broadcasts
        self._store = store

    def part(self, count: int, rank: int | None = None) -> slice:
        """A rank's contiguous share of ``count`` things."""
        rank = self.rank if rank is None else rank
        return slice(count * rank // self.world, count * (rank + 1) // self.world)

    def at(self, where: str) -> None:
        """Note where this rank has come to, for the others to tell if it is not heard of again."""
        self._note("at", where)

    def most(self, value: int) -> int:
        """The largest of all ranks' values."""
        return max(self.values(value))

    def values(self, value: int) -> list[int]:
        """Every rank's value, in order of ranks."""
        if self.world == 1:
            return [value]
        found = torch.zeros(self.world, dtype=torch.int64)
        found[self.rank] = value
        with self._speaking():
            dist.all_reduce(found)
        return [int(v) for v in found]

    def total(self, values: Tensor) -> Tensor:
        """Sums over the ranks, on all of them; takes ``values`` (float64, on the CPU) over."""
        if self.world > 1:
            with self._speaking():
                dist.all_reduce(values)
        return values

    def tell(self, value: T, owner: int = 0) -> T:
        """What rank ``owner`` calls by that name, on all ranks."""
        if self.world == 1:
            return value
        held: list[Any] = [value if self.rank == owner else None]
        with self._speaking():
            dist.broadcast_object_list(held, owner, device=torch.device("cpu"))
        result: T = held[0]
        return result

    def first(self, work: Callable[[], T]) -> T | None:
        """What only rank 0 does; None for the others. Its NearplaneError is raised by all."""
        result, error = None, None
        if self.rank == 0:
            try:
                result = work()
            except NearplaneError as found:
                error = found
        error = self.tell(error)
        if error is not None:
            raise error
        return result

    def reduce(self, moments: Moments) -> Moments:
        """Moments of all ranks' tokens; takes ``moments`` over."""
        if self.world == 1:
            return moments
        kept = [m for m in (moments, moments.held) if m is not None]
        totals = torch.tensor([[m.tokens, m.dropped] for m in kept])
        with self._speaking():
            dist.all_reduce(totals)
        for m, (tokens, dropped) in zip(kept, totals.tolist(), strict=True):
            share = m.tokens / tokens if tokens else 0.0
            self._mean(m.H, share, symmetric=True)
            for moment in (m.D, m.R):
                if moment is not None:
                    self._mean(moment, share, symmetric=False)
            m.tokens, m.dropped = tokens, dropped
        return moments

    def share(self, solved: Quantized | NearplaneError | None, owner: int, device: torch.device) -> Quantized:
        """What rank ``owner`` solved, on all ranks; its error is raised by all."""
        head: Any = None
        tensors: list[Tensor] = []
        if isinstance(solved, Quantized):
            tensors = [t.contiguous() for t in (*solved[:3], *(solved.certificate or ()))]
            head = solved.course, [(t.shape, t.dtype) for t in tensors]
        head = self.tell(head if tensors else solved, owner)
        if isinstance(head, NearplaneError):
            raise head
        course, kinds = head
        tensors = tensors or [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in kinds]
        for tensor in tensors:
            with self._speaking():
                dist.broadcast(tensor, owner)
            self.bytes["shared"] += tensor.nbytes
        codes, scale, zero, *rest = tensors
        return Quantized(codes, scale, zero, Certificate(*rest) if rest else None, course)

    def leave(self, error: NearplaneError | Interrupted) -> None:
        """Tell the others why this rank ends, and note in ``error.told`` if a rank before it says so to the user."""
        if self.world == 1 or isinstance(error, LostRank):
            return
        self._note("left", str(error))
        _close()  # whoever waits for this rank learns it from that
        before = [(kind, r) for kind in ("left", "lost") for r in range(self.rank)]
        error.told = bool(before) and self._wait(lambda: any(self._noted(*note) for note in before))

    def _mean(self, moment: Tensor, share: float, *, symmetric: bool) -> None:
        """Replace a moment by the mean over ranks, by strips of rows; of a symmetric one only the upper half is sent."""
        step = max(1, CHUNK // moment.shape[1])
        for a in range(0, len(moment), step):
            b = min(a + step, len(moment))
            strip = moment[a:b, a:] if symmetric else moment[a:b]
            whole = torch.mul(strip.double(), share)
            with self._speaking():
                dist.all_reduce(whole)
            self.bytes["reduced"] += whole.nbytes
            strip.copy_(whole)
            if symmetric:
                moment[b:, a:b] = moment[a:b, b:].T
                corner = moment[a:b, a:b]
                corner.copy_(corner.triu() + corner.triu(1).T)

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """Around one exchange and nothing else: what fails in it is that another rank is gone."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> LostRank:
        """Who is gone, as far as can be told: of the others, who neither says why it left nor misses anybody."""
        clear_frames(error.__traceback__)  # they hold the connections open
        _close()  # so that ranks which wait for this one learn of it, too
        self._note("lost", "")
        others = [r for r in range(self.world) if r != self.rank]

        def silent() -> list[int]:
            return [r for r in others if not (self._noted("left", r) or self._noted("lost", r))]

        self._wait(lambda: not silent())
        left, gone = [r for r in others if self._noted("left", r)], silent()
        if left:
            text = f"rank {left[0]} ended the run: {self._read('left', left[0])}"
        elif gone:
            who = " and ".join(f"rank {r} (last seen at {self._read('at', r) or 'the start'})" for r in gone)
            verb = "is gone or does" if len(gone) == 1 else "are gone or do"
            text = f"{who} {verb} not answer; the others have stopped."
        else:
            text = (
                f"the ranks lost touch with each other ({(str(error).splitlines() or ['no reason given'])[0][:200]})."
            )
        lost = LostRank(text)
        lost.told = any(r < self.rank and r not in gone for r in others)
        return lost

    def _wait(self, done: Callable[[], bool]) -> bool:
        """Whether something comes true while others may yet notice."""
        end = time.monotonic() + GRACE
        while not done():
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def _note(self, kind: str, text: str) -> None:
        if self._store is not None:
            try:
                self._store.set(f"{kind}/{self.rank}", text or "-")
            except RuntimeError:  # the store went with the process that kept it
                self._store = None

    def _noted(self, kind: str, rank: int) -> bool:
        try:
            return self._store is not None and bool(self._store.check([f"{kind}/{rank}"]))
        except RuntimeError:
            self._store = None
            return False

    def _read(self, kind: str, rank: int) -> str:
        return self._store.get(f"{kind}/{rank}").decode() if self._noted(kind, rank) else ""


ALONE = Ranks()
"""A lone process."""


@contextmanager
def together(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started, connected while inside; a lone process otherwise."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Ranks(device=device)
        return
    if dist.is_initialized():
        raise SettingError("a process group exists already; call quantize before init_process_group, or without it.")
    own = _own_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    try:
        store, rank, world = next(rendezvous("env://", timeout=BEGIN))
        backend = "cpu:gloo,cuda:nccl" if own.startswith("cuda") else "gloo"
        group = PrefixStore("nearplane/group", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise NearplaneError(
            f"the ranks of this run could not meet ({(str(error).splitlines() or [''])[0]})."
        ) from error
    machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    ranks = Ranks(rank, world, machine, own, PrefixStore("nearplane/notes", store))
    try:
        yield ranks
    except (NearplaneError, Interrupted) as error:
        ranks.leave(error)
        raise
    finally:
        _close()


def _own_device(name: str, local: int) -> str:
    """A rank's device: of the GPUs, the one of its number on this machine."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:"):
        raise SettingError(
            f"device {name} is one GPU, and this run has several ranks; give cuda, and each takes its own."
        )
    if name != "cuda":
        return name
    if local >= torch.cuda.device_count():
        raise SettingError(
            f"rank {local} of this machine has no GPU, there are {torch.cuda.device_count()}; start one rank per GPU, or "
            "give --device cpu."
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def _close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
