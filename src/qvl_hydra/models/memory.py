"""Memory of this machine: what is free, and what a process has used at most."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

GIB = 1024**3
M_MMAP_THRESHOLD, LARGE_BYTES = -3, 1 << 22  # of glibc's malloc.h


def return_large_allocations() -> None:
    """Have glibc give tensors of some size back to the system when they are freed.

    It raises the size for which it does so while it runs, up to 32 MiB, and then what a block needs for a moment leaves
    holes between the states that are kept: a walk through 36 blocks took 2 GiB for 0.3 GiB of states. Other C
    libraries are left as they are.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def free_memory_bytes() -> int:
    """Bytes this process may still take: the machine's available memory, or less where a control group limits it."""
    available = 8 * GIB
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
