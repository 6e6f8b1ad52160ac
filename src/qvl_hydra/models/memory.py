"""Memory of this machine: what is free, and what a process has used at most."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

GIB = 1024**3
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
