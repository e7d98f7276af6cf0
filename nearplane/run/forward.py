"""Forwards that pause: the model's own code runs one batch, waits where a stage begins, and goes on when it is solved.

Blocks before the open one are stubbed: each returns the stored hidden state of its tower. The forward ends behind the open
block. A forward is a greenlet: it has a stack of its own. A hook on the stage's first linear switches back to the caller,
so the model's code needs no change.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from nearplane.core.activations import TokenGrid, round_tokens
from nearplane.core.errors import NearplaneError
from nearplane.data.samples import Batch
from nearplane.models import discover, inputs
from nearplane.models.discover import Block, Stop
from nearplane.models.experts import Experts


class Stream:
    """The hidden states of all batches, one per batch and tower, advanced block by block.

    A finished tower keeps its last hidden states: the model goes on from them to the next tower.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        batches: list[Batch],
        keep: Callable[[str], Any] | None = None,
        activations: TokenGrid | None = None,
    ) -> None:
        """Start before the first block.

        Args:
            keep: makes the list of a tower's hidden states where they are not kept in memory.
            activations: how the inputs of sites are rounded.
        """
        self.model, self.batches, self.activations = model, batches, activations
        self.names, self.towers = [block.name for block in blocks], [block.tower for block in blocks]
        self.options = inputs.options(model)
        self.hidden: dict[str, list[Tensor | None] | OnDisk] = {
            tower: [None] * len(batches) if keep is None else keep(tower) for tower in dict.fromkeys(self.towers)
        }
        self.rests: list[list[Any]] = []  # by block and batch: its outputs besides the hidden state

    def remember(self, k: int, batch: int, rest: Any) -> None:
        """Store the other outputs of block ``k``, once where they are equal for every batch."""
        if k == len(self.rests):
            self.rests.append([None] * len(self.batches))
        first = self.rests[k][0]
        self.rests[k][batch] = first if batch and same(first, rest) else rest


class Forward(greenlet):
    """The forward of one batch of a stream through block ``k``.

    The tensors seen at the last pause stay in ``input``, ``leading`` and ``points``.
    """

    def __init__(
        self, stream: Stream, k: int, batch: int, leader: "Callable[[], Forward | None] | None" = None
    ) -> None:
        """Prepare the forward; nothing runs yet. ``leader``: the forward whose routing experts follow, in the other stream."""
        super().__init__(self._forward)
        self.leader = leader
        self.routes: dict[str, Tensor] = {}  # by the module of experts
        self.stream, self.k, self.batch = stream, k, batch
        self.wanted: str | None = None
        self.input: Tensor | None = None  # (tokens, in), input of the module where the forward is paused
        self.leading = torch.Size()  # the input's leading dimensions: mostly (sequences, positions)
        self.shape = torch.Size()  # of the hidden state that goes into the block
        self.points: dict[str, Tensor] = {}  # (tokens, width), inputs of the modules that are watched
        self.output: Tensor | None = None  # of the block, once it is through
        self.caller = getcurrent()

    def until(self, module: str | None) -> Tensor | None:
        """Run on to ``module`` and return its input (tokens, in); None where this batch never reaches the module.

        With ``module`` None, run to the end of the block and return its hidden state.
        """
        self.wanted, self.input, self.caller = module, None, getcurrent()
        with discover.patched(self.stream.model, self.stream.names, _block):
            self.switch()
        return self.input if module is not None else self.output

    def close(self) -> None:
        """Abandon the forward."""
        if self:  # started and not finished
            with discover.patched(self.stream.model, self.stream.names, _block):
                self.throw()

    def _forward(self) -> None:
        try:
            self.stream.model(**self.stream.batches[self.batch], **self.stream.options)
        except Stop:
            pass

    def block(self, i: int, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Run in place of block ``i``: replay a stored output, or run the open block and stop."""
        stream = self.stream
        if i < self.k:
            stored = stream.hidden[stream.towers[i]][self.batch]
            assert stored is not None
            return discover.with_rest(stored, stream.rests[i][self.batch])
        given = discover.hidden_of(args, kwargs)
        assert given is not None
        self.shape = given.shape
        output = original(*args, **kwargs)
        stream.remember(i, self.batch, discover.output_rest(output))
        self.output = discover.output_hidden(output)
        raise Stop

    def route(self, experts: str, own: Tensor) -> Tensor:
        """Return the routing that ``experts`` use: the leader's where there is one, else their own."""
        self.routes[experts] = own
        leader = None if self.leader is None else self.leader()
        return own if leader is None else leader.routes.get(experts, own)

    def pause(self, module: str, x: Tensor) -> Tensor:
        """Round the input of ``module``, pause there if the caller asked for it, and return the input to use."""
        if self.stream.activations is not None:
            x = round_tokens(x, self.stream.activations)
        if module == self.wanted:
            self.wanted, self.input, self.leading = None, x.reshape(-1, x.shape[-1]), x.shape[:-1]
            self.caller.switch()
        return x


def same(a: Any, b: Any) -> bool:
    """Tell whether two values are equal; tuples are compared element by element, tensors by their numbers."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is b


def _block(i: int, original: Any, *args: Any, **kwargs: Any) -> Any:
    current = getcurrent()
    assert isinstance(current, Forward)
    return current.block(i, original, *args, **kwargs)


@contextmanager
def hooked(
    model: nn.Module, pauses: Iterable[str], points: Iterable[str], experts: Mapping[str, Experts]
) -> Iterator[None]:
    """Hook a model for the time inside, so that forwards can pause.

    Args:
        pauses: names of modules where a forward may pause, and whose inputs it rounds.
        points: names of modules whose inputs a forward keeps.
        experts: modules that take their routing from the forward, by name.
    """

    def pause(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            current = getcurrent()
            return (current.pause(name, args[0]), *args[1:]) if isinstance(current, Forward) else None

        return hook

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            current = getcurrent()
            if isinstance(current, Forward):
                x = discover.hidden_of(args, kwargs)
                assert x is not None
                current.points.setdefault(name, x.reshape(-1, x.shape[-1]))

        return hook

    def follow(name: str) -> Any:
        def led(own: Tensor) -> Tensor:
            current = getcurrent()
            return current.route(name, own) if isinstance(current, Forward) else own

        return led

    for name, module in experts.items():
        module.follow = follow(name)
    # Points first: a module may be both, and a paused forward must have kept what it saw.
    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True) for name in points]
    handles += [model.get_submodule(name).register_forward_pre_hook(pause(name)) for name in pauses]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in experts.values():
            module.follow = None


class OnDisk:
    """A list of tensors in files, of which one is in memory at a time. NearplaneError where the disk refuses."""

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self.paths = [folder / f"{name}-{number:05}.bin" for number in range(count)]
        self.kinds: list[tuple[torch.Size, torch.dtype, torch.device] | None] = [None] * count

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Tensor | None:
        kind = self.kinds[number]
        if kind is None:
            return None
        shape, dtype, device = kind
        size, path = shape.numel() * dtype.itemsize, self.paths[number]
        try:
            raw = np.fromfile(path, dtype=np.uint8)
        except OSError as error:
            raise NearplaneError(f"offloaded hidden states cannot be read from {path}: {error}.") from error
        if len(raw) != size:
            raise NearplaneError(f"offloaded hidden states in {path} have {len(raw)} bytes, not {size}; begin again.")
        return torch.from_numpy(raw).view(dtype).reshape(shape).to(device)

    def __setitem__(self, number: int, value: Tensor | None) -> None:
        if value is None:
            self.kinds[number] = None
            return
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        try:
            raw.tofile(self.paths[number])
        except OSError as error:
            raise NearplaneError(
                f"hidden states cannot be offloaded to {self.paths[number]} ({raw.nbytes / 1e9:.3g} GB): {error}."
            ) from error
        self.kinds[number] = (value.shape, value.dtype, value.device)
