"""Memory of this machine: what is free, and what a process has used at most."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

GIB = 1024**3
KEPT_BYTES = 1 << 28  # that lie together, and in one tensor
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
PART_VALUES = {"cpu": 1 << 20, "cuda": 1 << 26}  # of a large matrix at a time, in `row_parts`


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


def keep_freed_memory() -> None:
    """Let the C library keep memory that was freed for what comes next, some of it.

    By itself glibc hands the pages of every large tensor back to the system, and a walk on a CPU, which makes and frees
    tensors of the same sizes over and over, spends a quarter of its time on getting fresh ones. Other C libraries have
    no such setting.
    """
    if (set_option := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        set_option(M_TRIM_THRESHOLD, KEPT_BYTES)
        set_option(M_MMAP_THRESHOLD, KEPT_BYTES)


def row_parts(matrix: Tensor) -> Iterator[slice]:
    """Some rows of a large matrix at a time.

    What is computed of each in turn takes memory that the heap has at hand: fresh pages for the whole of a large matrix
    cost several times the computation on a CPU.
    """
    step = max(1, PART_VALUES[matrix.device.type] // matrix.shape[1])
    return (slice(first, first + step) for first in range(0, len(matrix), step))


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
