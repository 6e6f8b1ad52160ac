"""Which samples walk together: a shard's own, in groups whose states fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from qvl_hydra.estimators.job import SweepJob
from qvl_hydra.models.memory import free_memory_bytes
from qvl_hydra.runs.folder import RunFolder

GROUPS = "groups"  # which samples walked back together


def fitting(job: SweepJob, sizes: Sequence[int], most: int | None = None) -> int:
    """How many samples, from the first on, fit in memory together.

    Args:
        sizes: of each sample what is kept of it, in bytes.
        most: bytes that all may take where more are free.
    """
    limit = free_memory_bytes() // 4
    if job.device.type == "cuda":
        limit = int(torch.cuda.mem_get_info(job.device)[0] * 0.3)
    limit = min(limit, most or limit)
    return sum(size <= limit for size in accumulate(sizes))


def groups(job: SweepJob, folder: RunFolder, sizes: Sequence[int], first: int) -> list[tuple[int, int]]:
    """Groups of neighbours that fit in memory, by their first and last place but one among all scored samples.

    A resumed run keeps its own, so that it rounds alike; a merged one has those of its shards, and one that goes on
    from fewer samples those of that run, too.

    Args:
        sizes: of each sample the bytes of its states between all segments.
        first: its place among all scored samples.
    """
    kept = folder.recall(GROUPS, [])
    begun, end = kept[-1][1] if kept else first, first + len(sizes)
    if begun < end:
        while begun < end:
            size = max(1, fitting(job, sizes[begun - first :]))
            kept.append((begun, begun + size))
            begun += size
        folder.remember(GROUPS, kept)
    return [(int(start), int(end)) for start, end in kept]


def shard_of(count: int, shard: tuple[int, int]) -> slice:
    """The places of a shard's samples among so many: neighbours, and as many as any other shard has, or one more."""
    index, shards = shard
    return slice(count * index // shards, count * (index + 1) // shards)
