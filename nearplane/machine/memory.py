"""What this machine has left: memory, disk, GPU memory; and what this process holds. None where the system does not say."""

import shutil
import sys
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Return the bytes that a new allocation may take without swapping, of the machine or its container."""
    machine = int(psutil.virtual_memory().available)
    container = _of_container()
    return machine if container is None else min(machine, container)


def cuda_memory(device: str) -> int | None:
    """Return the bytes free on a CUDA device."""
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.mem_get_info(torch.device(device))[0])


def free_disk(folder: Path) -> int | None:
    """Return the bytes free where ``folder`` is, or will be."""
    folder = Path(folder).absolute()
    nearest = next((place for place in (folder, *folder.parents) if place.exists()), None)
    try:
        usage = None if nearest is None else shutil.disk_usage(nearest)
        return usage.free if usage and usage.total else None  # /proc and the like have no size
    except OSError:
        return None


def resident() -> int:
    """Return the bytes of this process in memory."""
    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """Return the most bytes that this process has had in memory."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows, where psutil knows
        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gb(size: float) -> str:
    """Return a number of bytes in words."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}" if size < 10 * unit or unit == 1e9 else f"{size / unit:.0f} {name}"
    return f"{size / 1e3:.0f} kB"


def _of_container() -> int | None:
    """Return the limit of a control group (version 2) less its use; psutil knows only the machine.

    File pages that can be given back do not count as used.
    """
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        pairs = [line.split() for line in (CGROUP / "memory.stat").read_text().splitlines()]
        idle = next((int(value) for name, value in pairs if name == "inactive_file"), 0)
        return None if limit == "max" else max(0, int(limit) - used + idle)
    except (OSError, ValueError):
        return None
