"""Memory of this machine: what is free, and what a process has used at most."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil
from torch import Tensor

GIB = 1024**3
KEPT_BYTES = 1 << 28  # that lie together, and in one tensor
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
GROUP_FILES = {  # the limit and what is used, by controllers as a process's groups name them: of version 2, and of 1
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}
GROUP_CACHE = ("inactive_file", "active_file")
PART_VALUES = {"cpu": 1 << 20, "cuda": 1 << 26}  # of a large matrix at a time, in `row_parts`


def free_memory_bytes() -> int:
    """Bytes this process may still take: the machine's available memory, or less where its limits leave less.

    These are `ulimit -v` and the control groups of a container or a job; what a group holds of files is free, as it is
    in what the machine says.
    """
    room = [psutil.virtual_memory().available, *_group_room()]
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        room.append(most - psutil.Process().memory_info().vms)
    return max(0, min(room))


def _group_room() -> Iterator[int]:
    """What each control group that this process is in leaves, its parents among them."""
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []:
        _, controllers, own = line.split(":", 2)
        if controllers not in GROUP_FILES:
            continue
        limit, used = GROUP_FILES[controllers]
        path = PurePosixPath("." + own)
        for place in (path, *path.parents):  # in a container the outer ones are not seen, or end at its own
            folder = GROUPS / controllers / place
            if (folder / limit).exists() and (folder / used).exists():
                most = (folder / limit).read_text().strip()
                if most != "max":
                    yield int(most) - int((folder / used).read_text()) + _group_cache(folder)


def _group_cache(folder: Path) -> int:
    if not (table := folder / "memory.stat").exists():
        return 0
    told = dict(line.split() for line in table.read_text().splitlines())
    return sum(int(told.get(f"total_{name}", told.get(name, 0))) for name in GROUP_CACHE)  # version 1 has both


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
