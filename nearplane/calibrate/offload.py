"""Hidden states on disk, for runs whose streams do not fit in memory: one file per batch, written over as blocks go by."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nearplane.core.errors import NearplaneError


class OnDisk:
    """Stands in for a list of tensors, of which one is in memory at a time. NearplaneError where the disk refuses."""

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
