"""A forward that pauses: the model's own code on one batch, held where a stage begins and let go when it is solved.

Blocks before the open one are stubbed to return the stored hidden state, and the run ends behind the open one. Pausing
in the middle of code that knows nothing of it is what greenlets are for: the forward lives on a stack of its own, and a
hook on the stage's first linear switches back to whoever asked.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from nearplane.calibrate.offload import OnDisk
from nearplane.models import discover
from nearplane.models.discover import Stop
from nearplane.models.experts import Experts


class Stream:
    """One hidden state per batch, advanced block by block."""

    def __init__(self, model: nn.Module, names: list[str], batches: list[Tensor], hidden: OnDisk | None = None) -> None:
        """``hidden``: where the states are kept, if not in memory."""
        self.model, self.names, self.batches = model, names, batches
        self.hidden: list[Tensor | None] | OnDisk = [None] * len(batches) if hidden is None else hidden


class Forward(greenlet):
    """One batch of a stream on its way through block ``k``; ``rests[i]`` is what block i < k returns besides its
    hidden state. Whatever it was shown at its last pause stays in ``input`` and ``points``."""

    def __init__(
        self,
        stream: Stream,
        k: int,
        batch: int,
        rests: list[Any],
        leader: "Callable[[], Forward | None] | None" = None,
    ) -> None:
        """``leader``: the forward of the same batch in the other stream, whose routing says which tokens experts are shown."""
        super().__init__(self._forward)
        self.leader = leader
        self.routes: dict[str, Tensor] = {}  # by the module of experts
        self.stream, self.k, self.batch, self.rests = stream, k, batch, rests
        self.wanted: str | None = None
        self.input: Tensor | None = None  # (tokens, in), of the module it is paused at
        self.points: dict[str, Tensor] = {}  # (tokens, width), inputs of the modules that are watched
        self.output: Tensor | None = None  # of the block, once it is through
        self.caller = getcurrent()

    def until(self, module: str | None) -> Tensor | None:
        """Go on to the input of ``module``, or to the end of the block; None when this batch never gets there."""
        self.wanted, self.input, self.caller = module, None, getcurrent()
        with discover.patched(self.stream.model, self.stream.names, _block):
            self.switch()
        return self.input if module is not None else self.output

    def close(self) -> None:
        """Give up what is left of the run."""
        if self:  # started and not finished
            with discover.patched(self.stream.model, self.stream.names, _block):
                self.throw()

    def _forward(self) -> None:
        try:
            self.stream.model(input_ids=self.stream.batches[self.batch], use_cache=False)
        except Stop:
            pass

    def block(self, i: int, original: Any, *args: Any, **kwargs: Any) -> Any:
        """What stands in for block ``i``."""
        if i < self.k:
            stored = self.stream.hidden[self.batch]
            assert stored is not None
            return discover.with_rest(stored, self.rests[i])
        output = original(*args, **kwargs)
        if i == len(self.rests):
            self.rests.append(discover.output_rest(output))
        self.output = discover.output_hidden(output)
        raise Stop

    def route(self, experts: str, own: Tensor) -> Tensor:
        """The routing by which ``experts`` are shown tokens: one's own, or the leader's."""
        self.routes[experts] = own
        leader = None if self.leader is None else self.leader()
        return own if leader is None else leader.routes.get(experts, own)

    def pause(self, module: str, x: Tensor) -> None:
        """Called by the hook on ``module``."""
        if module == self.wanted:
            self.wanted, self.input = None, x.reshape(-1, x.shape[-1])
            self.caller.switch()


def _block(i: int, original: Any, *args: Any, **kwargs: Any) -> Any:
    current = getcurrent()
    assert isinstance(current, Forward)
    return current.block(i, original, *args, **kwargs)


@contextmanager
def hooked(
    model: nn.Module, pauses: Iterable[str], points: Iterable[str], experts: Mapping[str, Experts]
) -> Iterator[None]:
    """Forwards may pause at the modules ``pauses``, keep what goes into the modules ``points``, and say which tokens
    ``experts`` are shown."""

    def pause(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            current = getcurrent()
            if isinstance(current, Forward):
                current.pause(name, args[0])

        return hook

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            current = getcurrent()
            if isinstance(current, Forward):
                x = discover.hidden_of(args, kwargs)
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
