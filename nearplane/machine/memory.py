"""What this machine has left: memory, disk, GPU memory. None where it cannot be told, and then nothing is refused."""

import os
import shutil
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
STATM = Path("/proc/self/statm")
CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes that a new allocation may take without swapping, of the machine or of the container, whichever has less."""
    found = [size for size in (_of_machine(), _of_container()) if size is not None]
    return min(found, default=None)


def cuda_memory(device: str) -> int | None:
    """Bytes free on a CUDA device."""
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.mem_get_info(torch.device(device))[0])


def free_disk(folder: Path) -> int | None:
    """Bytes free where ``folder`` is, or will be."""
    folder = Path(folder).absolute()
    nearest = next((place for place in (folder, *folder.parents) if place.exists()), None)
    try:
        usage = None if nearest is None else shutil.disk_usage(nearest)
        return usage.free if usage and usage.total else None  # /proc and the like have no size
    except OSError:
        return None


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def _of_machine() -> int | None:
    try:
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _of_container() -> int | None:
    """The limit of a control group (version 2) less what is used, file pages that can be given back not counted."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        pairs = [line.split() for line in (CGROUP / "memory.stat").read_text().splitlines()]
        idle = next((int(value) for name, value in pairs if name == "inactive_file"), 0)
        return None if limit == "max" else max(0, int(limit) - used + idle)
    except (OSError, ValueError):
        return None
