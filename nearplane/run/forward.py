"""Forwards that pause: the model's own code runs one batch, waits where a stage begins, and goes on when it is solved.

Blocks before the open one are stubbed: each returns the stored hidden state of its tower, and leaves in dictionaries and lists
among its arguments what it has left there when it ran (``models/handed.py``). The forward ends behind the open block.
A forward is a greenlet: it has a stack of its own. A hook on the stage's first linear switches back to the caller, so the model's
code needs no change.
"""

import itertools
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
from nearplane.models import handed, inputs, record
from nearplane.models.discover import Block, Stop
from nearplane.models.experts import Experts
from nearplane.models.handed import Argument, Watch


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
        self.calls = [block.calls for block in blocks]
        self.options = inputs.options(model)
        self.hidden: dict[str, list[Tensor | None] | OnDisk] = {
            tower: [None] * len(batches) if keep is None else keep(tower) for tower in dict.fromkeys(self.towers)
        }
        self.rests: list[list[Any]] = []  # by block and batch: its outputs besides the hidden state
        self.left = Left(len(batches), keep)

    def remember(self, k: int, batch: int, rest: Any) -> None:
        """Store the other outputs of block ``k``, once where they are equal for every batch."""
        if k == len(self.rests):
            self.rests.append([None] * len(self.batches))
            self.left.begin()
        first = self.rests[k][0]
        self.rests[k][batch] = first if batch and same(first, rest) else rest


class Left:
    """What blocks have left in containers among their arguments: by block, container and batch."""

    def __init__(self, batches: int, keep: Callable[[str], Any] | None) -> None:
        self.batches, self.keep = batches, keep
        self.contents: dict[int, dict[Argument, list[Any]]] = {}
        self.files: dict[tuple[int, Argument, int], OnDisk] = {}
        self.over: set[tuple[int, Argument]] = set()  # what a later block has written anew

    def begin(self) -> None:
        """Drop what no forward reads any more, before the first batch has passed another block."""
        for k, path in self.over:
            self.contents[k].pop(path, None)
            for key in [key for key in self.files if key[:2] == (k, path)]:
                self.files.pop(key).clear()
        self.over = set()

    def store(self, k: int, batch: int, written: dict[Argument, Any], held: dict[tuple[int, Argument], Any]) -> None:
        """Store what block ``k`` has written for a batch.

        Args:
            written: content of the containers, by argument.
            held: containers of this forward, by block and argument.
        """
        for path, slots in self.contents.get(k, {}).items():
            slots[batch] = None if path not in written else slots[batch]
        for path, content in written.items():
            slots = self.contents.setdefault(k, {}).setdefault(path, [None] * self.batches)
            slots[batch] = content if self.keep is None else self._written(k, path, batch, content)
            mine = held[k, path]
            self.over |= {
                (i, other) for i, each in self.contents.items() for other in each if i < k and held[i, other] is mine
            }

    def restore(self, i: int, batch: int, held: dict[Argument, Any]) -> None:
        """Leave in a call's containers what block ``i`` has left there."""
        for path, slots in self.contents.get(i, {}).items():
            if slots[batch] is not None:
                handed.put(held[path], handed.copied(slots[batch], _read))

    def _written(self, k: int, path: Argument, batch: int, content: Any) -> Any:
        """Write the tensors in a container's content to disk, and return the content with the places of their files."""
        count = itertools.count()

        def write(part: Any) -> Any:
            if not isinstance(part, Tensor):
                return part
            assert self.keep is not None
            key = (k, path, next(count))
            if key not in self.files:
                self.files[key] = self.keep("-".join(map(str, ("handed", k, *path, key[2]))))
            self.files[key][batch] = part
            return OnFile(self.files[key], batch)

        return handed.copied(content, write)


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
        self.behind = False  # pause behind that module, not before it
        self.input: Tensor | None = None  # (tokens, in), input of the module where the forward is paused, or its output
        self.inputs: list[Tensor] = []  # the same of every call of the block, where there are several
        self.leading = torch.Size()  # the input's leading dimensions: mostly (sequences, positions)
        self.shape = torch.Size()  # of the hidden state that goes into the block
        self.points: dict[str, Tensor] = {}  # (tokens, width), inputs of the modules that are watched
        self.held: dict[tuple[int, Argument], Any] = {}  # containers that the blocks are given, by block and argument
        self.output: Tensor | None = None  # of the block, once it is through
        self.answer: Any = None  # of the whole model, where the forward passed its last block
        self.calls = 0  # of the block, as far as they are through
        self.caller = getcurrent()

    def until(self, module: str | None, behind: bool = False) -> Tensor | None:
        """Run on to ``module`` and return its input (tokens, in); None where this batch never reaches the module.

        With ``behind`` run the module, too, and return its output (tokens, out). With ``module`` None, run to the end of the
        block and return its hidden state.
        """
        self.wanted, self.behind, self.input, self.caller = module, behind, None, getcurrent()
        with record.patched(self.stream.model, self.stream.names, _block):
            self.switch()
        return self.input if module is not None else self.output

    def reach(self, module: str, behind: bool = False) -> list[Tensor]:
        """Return the inputs (tokens, in) of ``module`` in each call of the block; none where this batch never reaches it.

        With ``behind``, its outputs (tokens, out). A forward through a block that is called once pauses there. Any other runs
        to its end, and is of no more use.
        """
        self.inputs = []
        x = self.until(module, behind)
        return self.inputs or ([] if x is None else [x])

    def close(self) -> None:
        """Abandon the forward."""
        if self:  # started and not finished
            with record.patched(self.stream.model, self.stream.names, _block):
                self.throw()

    def _forward(self) -> None:
        try:
            self.answer = self.stream.model(**self.stream.batches[self.batch], **self.stream.options)
        except Stop:
            pass

    def block(self, i: int, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Run in place of block ``i``: replay a stored output, or run the open block and stop."""
        stream = self.stream
        containers = handed.containers(args, kwargs)
        self.held |= {(i, path): container for path, container in containers.items()}
        if i < self.k:
            stream.left.restore(i, self.batch, containers)
            stored = stream.hidden[stream.towers[i]][self.batch]
            assert stored is not None
            return handed.with_rest(stored, stream.rests[i][self.batch])
        given = handed.hidden_of(args, kwargs)
        assert given is not None
        self.shape, watch = given.shape, Watch(containers)
        output = original(*args, **kwargs)
        self.calls += 1
        if self.calls < stream.calls[i]:
            return output
        stream.remember(i, self.batch, handed.output_rest(output))
        stream.left.store(i, self.batch, watch.written(stream.names[i]), self.held)
        self.output = handed.output_hidden(output)
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
        if module == self.wanted and not self.behind:
            self._stop(x)
        return x

    def passed(self, module: str, output: Tensor) -> None:
        """Pause behind ``module`` if the caller asked for that."""
        if module == self.wanted and self.behind:
            self._stop(output)

    def _stop(self, seen: Tensor) -> None:
        """Keep what is seen, and give control back; in a block that is called several times, go on."""
        self.input, self.leading = seen.reshape(-1, seen.shape[-1]), seen.shape[:-1]
        if self.stream.calls[self.k] > 1:
            # The model goes on at once, and may change an output in place.
            self.inputs.append(self.input.clone() if self.behind else self.input)
        else:
            self.wanted = None
            self.caller.switch()


def same(a: Any, b: Any) -> bool:
    """Tell whether two values are equal; tuples and lists are compared element by element, tensors by their numbers."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, tuple | list) and type(a) is type(b):
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
        pauses: names of modules before and behind which a forward may pause, and whose inputs it rounds.
        points: names of modules whose inputs a forward keeps.
        experts: modules that take their routing from the forward, by name.
    """

    def pause(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            current = getcurrent()
            return (current.pause(name, args[0]), *args[1:]) if isinstance(current, Forward) else None

        return hook

    def passed(name: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            current = getcurrent()
            if isinstance(current, Forward):
                current.passed(name, output)

        return hook

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            current = getcurrent()
            if isinstance(current, Forward):
                x = handed.hidden_of(args, kwargs)
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
    handles += [model.get_submodule(name).register_forward_hook(passed(name)) for name in pauses]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in experts.values():
            module.follow = None


class OnFile:
    """The place of a tensor in files: of a list, one batch's."""

    __slots__ = ("batch", "files")

    def __init__(self, files: "OnDisk", batch: int) -> None:
        self.files, self.batch = files, batch


def _read(part: Any) -> Any:
    """Read a tensor whose place a container's content has."""
    return part.files[part.batch] if isinstance(part, OnFile) else part


class OnDisk:
    """A list of tensors in files, of which one is in memory at a time. NearplaneError where the disk refuses."""

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self.paths = [folder / f"{name}-{number:05}.bin" for number in range(count)]
        self.kinds: list[tuple[torch.Size, torch.dtype, torch.device] | None] = [None] * count

    def __len__(self) -> int:
        return len(self.paths)

    def clear(self) -> None:
        """Remove all files."""
        for number, path in enumerate(self.paths):
            self.kinds[number] = None
            path.unlink(missing_ok=True)

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
