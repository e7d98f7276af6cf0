"""Run one quantization on several processes that torchrun starts: ranks, their exchanges, and what a lost rank leads to.

A lone process is rank 0 of 1 and exchanges nothing. Otherwise tensors of a GPU travel by NCCL, everything else by gloo. Every
exchange on GPUs follows one on gloo, where a rank that died is a closed connection and not a wait. Moments are summed in
float64. A decision of one rank is broadcast to all, so that no two ranks can differ.
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

# Longest wait for a rank that is alive. Ranks wait for each other while one solves, so the timeout must exceed the longest
# stage. A rank that dies is noticed at once.
TIMEOUT = timedelta(hours=6)
# Longest wait for all ranks to begin.
BEGIN = timedelta(minutes=10)
# Seconds in which a living rank notices that another is gone.
GRACE = 5.0
# Elements of a moment that are summed at a time, at eight bytes each of additional memory.
CHUNK = 1 << 24

T = TypeVar("T")


class LostRank(NearplaneError):
    """The end of this rank because another rank is gone or has given up."""


class Ranks:
    """This process among all ranks of the run. All ranks must call an exchanging method alike."""

    def __init__(
        self, rank: int = 0, world: int = 1, machine: int = 1, device: str = "auto", store: Any = None
    ) -> None:
        """Describe this process.

        Args:
            rank: number of this rank.
            world: number of ranks.
            machine: number of ranks on this machine.
            device: device that this rank computes on.
            store: key-value store in which ranks leave notes for each other.
        """
        self.rank, self.world, self.machine, self.device = rank, world, machine, device
        self.bytes = {"reduced": 0, "shared": 0}  # bytes given to all_reduce, and bytes broadcast
        self._store = store

    def part(self, count: int, rank: int | None = None) -> slice:
        """Return the contiguous share of ``count`` items that belongs to a rank, this one by default."""
        rank = self.rank if rank is None else rank
        return slice(count * rank // self.world, count * (rank + 1) // self.world)

    def at(self, where: str) -> None:
        """Note the name of the current work, for the error of other ranks if this one is lost."""
        self._note("at", where)

    def most(self, value: int) -> int:
        """Return the largest of all ranks' values."""
        return max(self.values(value))

    def values(self, value: int) -> list[int]:
        """Gather one value from every rank, in order of ranks."""
        if self.world == 1:
            return [value]
        values = torch.zeros(self.world, dtype=torch.int64)
        values[self.rank] = value
        with self._speaking():
            dist.all_reduce(values)
        return [int(v) for v in values]

    def total(self, values: Tensor) -> Tensor:
        """Sum a float64 tensor on the CPU over all ranks, in place."""
        if self.world > 1:
            with self._speaking():
                dist.all_reduce(values)
        return values

    def tell(self, value: T, owner: int = 0) -> T:
        """Broadcast a picklable value from rank ``owner`` to all ranks."""
        if self.world == 1:
            return value
        box: list[Any] = [value if self.rank == owner else None]
        with self._speaking():
            dist.broadcast_object_list(box, owner, device=torch.device("cpu"))
        result: T = box[0]
        return result

    def first(self, work: Callable[[], T]) -> T | None:
        """Call ``work`` on rank 0 and return its result; None on other ranks. All ranks raise its NearplaneError."""
        result, error = None, None
        if self.rank == 0:
            try:
                result = work()
            except NearplaneError as raised:
                error = raised
        error = self.tell(error)
        if error is not None:
            raise error
        return result

    def reduce(self, moments: Moments) -> Moments:
        """Average moments over the tokens of all ranks, in place, by their weights where they have weights."""
        if self.world == 1:
            return moments
        parts = moments.parts
        totals = torch.tensor([[m.tokens, m.dropped] for m in parts])
        weights = torch.tensor([m.weight for m in parts], dtype=torch.float64)
        with self._speaking():
            dist.all_reduce(totals)
            dist.all_reduce(weights)
        for m, (tokens, dropped), weight in zip(parts, totals.tolist(), weights.tolist(), strict=True):
            share = m.weight / weight if weight else 0.0
            self._mean(m.H, share, symmetric=True)
            for moment in (m.D, m.R, None if m.magnitude is None else m.magnitude[None]):
                if moment is not None:
                    self._mean(moment, share, symmetric=False)
            m.tokens, m.dropped, m.mass = tokens, dropped, None if m.mass is None else weight
        return moments

    def share(self, solved: Quantized | NearplaneError | None, owner: int, device: torch.device) -> Quantized:
        """Broadcast what one rank solved.

        Args:
            solved: on rank ``owner``, the quantized weight, or the error that all ranks will raise; None on other ranks.
            owner: rank that solved.
            device: device of the tensors, on all ranks.
        """
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
        """Tell other ranks why this one ends. Sets ``error.told`` if a rank before this one tells the user."""
        if self.world == 1 or isinstance(error, LostRank):
            return
        self._note("left", str(error))
        _close()  # ranks that wait for this one notice the closed connection
        before = [(kind, r) for kind in ("left", "lost") for r in range(self.rank)]
        error.told = bool(before) and self._wait(lambda: any(self._noted(*note) for note in before))

    def _mean(self, moment: Tensor, share: float, *, symmetric: bool) -> None:
        """Average a moment over ranks, by strips of rows. Of a symmetric moment only the upper half is sent."""
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
        """Guard one exchange: if the exchange fails, another rank is gone."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> LostRank:
        """Name the ranks that are gone, as an error.

        A living rank either notes why it left, or notes that it lost another rank. The rest are gone.
        """
        clear_frames(error.__traceback__)  # frames hold the connections open
        _close()  # ranks that wait for this one notice the closed connection
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
        """Return whether ``done`` comes true within ``GRACE`` seconds."""
        end = time.monotonic() + GRACE
        while not done():
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def _note(self, kind: str, text: str) -> None:
        """Leave a note of this rank in the store."""
        if self._store is not None:
            try:
                self._store.set(f"{kind}/{self.rank}", text or "-")
            except RuntimeError:  # the process that kept the store is gone
                self._store = None

    def _noted(self, kind: str, rank: int) -> bool:
        """Return whether a rank has left a note of this kind."""
        try:
            return self._store is not None and bool(self._store.check([f"{kind}/{rank}"]))
        except RuntimeError:
            self._store = None
            return False

    def _read(self, kind: str, rank: int) -> str:
        """Read a rank's note; empty if there is none."""
        return self._store.get(f"{kind}/{rank}").decode() if self._noted(kind, rank) else ""


ALONE = Ranks()
"""The ranks of a lone process."""


@contextmanager
def together(device: str) -> Iterator[Ranks]:
    """Connect the ranks that torchrun started while inside; a lone process is its only rank.

    Args:
        device: name of a device; with "auto" or "cuda", every rank takes the GPU of its number on the machine.

    Raises:
        SettingError: a process group exists already, or a rank has no device.
        NearplaneError: the ranks could not connect.
    """
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
    """Return a rank's device; for several GPUs the one of its number on this machine."""
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
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
