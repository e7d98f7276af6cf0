"""CUDA graphs: a function that runs a thousand times on tensors of the same shapes is recorded once and replayed.

Completing a column takes a dozen operations of a few microseconds each. Launched one by one from Python they leave a GPU
idle most of the time; replayed as one graph they do not. The arithmetic is the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Replay:
    """A function that is replayed as a CUDA graph; tensors on a CPU go straight to the function.

    Args:
        work: Writes to the first ``written`` of its tensors, in place, and reads no value on the CPU.
        written: Number of tensors to copy back.
    """

    def __init__(self, work: Callable[..., None], written: int) -> None:
        self.work, self.written = work, written
        self.graph: torch.cuda.CUDAGraph | None = None
        self.held: list[Tensor] = []  # the tensors that the graph reads and writes

    def __call__(self, *tensors: Tensor) -> None:
        if not tensors[0].is_cuda:
            return self.work(*tensors)
        if self.graph is None:
            self.graph = self._record(tensors)
        elif any(held.shape != given.shape for held, given in zip(self.held, tensors, strict=True)):
            return self.work(*tensors)  # the last leaf of a panel
        for held, given in zip(self.held, tensors, strict=True):
            held.copy_(given)
        self.graph.replay()
        for held, given in zip(self.held[: self.written], tensors, strict=False):
            given.copy_(held)

    def _record(self, tensors: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        self.held = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
        with torch.cuda.device(tensors[0].device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries allocate on their first call, which a graph may not
                self.work(*self.held)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.work(*self.held)
        return graph
