"""A forward that pauses: the model's own code on one batch, held where a stage begins and let go when it is solved.

Blocks before the open one are stubbed to return the stored hidden state, and the run ends behind the open one. Pausing
in the middle of code that knows nothing of it is what greenlets are for: the forward lives on a stack of its own, and a
hook on the stage's first linear switches back to whoever asked.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from nearplane.calibrate.offload import OnDisk
from nearplane.core.tokens import TokenGrid, round_tokens
from nearplane.models import discover
from nearplane.models.discover import Stop


class Stream:
    """One hidden state per batch, advanced block by block."""

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        batches: list[Tensor],
        hidden: OnDisk | None = None,
        activations: TokenGrid | None = None,
    ) -> None:
        """``hidden``: where the states are kept, if not in memory; ``activations``: how what goes into a site is rounded."""
        self.model, self.names, self.batches, self.activations = model, names, batches, activations
        self.hidden: list[Tensor | None] | OnDisk = [None] * len(batches) if hidden is None else hidden


class Forward(greenlet):
    """One batch of a stream on its way through block ``k``; ``rests[i]`` is what block i < k returns besides its
    hidden state. Whatever it was shown at its last pause stays in ``input`` and ``points``."""

    def __init__(self, stream: Stream, k: int, batch: int, rests: list[Any]) -> None:
        super().__init__(self._forward)
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

    def pause(self, module: str, x: Tensor) -> Tensor:
        """Called by the hook on ``module`` with its input: what it is to be given instead."""
        if self.stream.activations is not None:
            x = round_tokens(x, self.stream.activations)
        if module == self.wanted:
            self.wanted, self.input = None, x.reshape(-1, x.shape[-1])
            self.caller.switch()
        return x


def _block(i: int, original: Any, *args: Any, **kwargs: Any) -> Any:
    current = getcurrent()
    assert isinstance(current, Forward)
    return current.block(i, original, *args, **kwargs)


@contextmanager
def hooked(model: nn.Module, pauses: Iterable[str], points: Iterable[str]) -> Iterator[None]:
    """Forwards may pause at the modules ``pauses``, whose inputs they round if they round any, and keep what goes into the
    modules ``points``."""

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
                current.points.setdefault(name, x.reshape(-1, x.shape[-1]))

        return hook

    # Points first: a module may be both, and a paused forward must have kept what it saw.
    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True) for name in points]
    handles += [model.get_submodule(name).register_forward_pre_hook(pause(name)) for name in pauses]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
