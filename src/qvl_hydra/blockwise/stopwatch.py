"""The one stopwatch: seconds of a plain forward, the unit that every cost is told in.

A forward-equivalent is the seconds that measuring took (`RunFolder.seconds`) divided by those of one plain forward of
the same samples through the same component.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

REPEATS, ENOUGH_S = 7, 1.0  # a forward is timed so often, or for so long


def forward_seconds(
    forward: Callable[[], object], device: torch.device | None = None, warm_up: Callable[[], object] | None = None
) -> float:
    """Seconds of one plain forward of all samples.

    Args:
        forward: runs it, without gradients.
        device: waited for before and after where work on it is queued; None: nothing is.
        warm_up: run once before, untimed: a first pass pays for allocations.

    Returns:
        The median of several, since one can meet a busy machine; of long ones the first.
    """
    if warm_up is not None:
        warm_up()
    seconds: list[float] = []
    while not seconds or (len(seconds) < REPEATS and sum(seconds) < ENOUGH_S):
        synchronize(device)
        began = time.perf_counter()
        forward()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def synchronize(device: torch.device | None) -> None:
    """Wait for what is queued on a CUDA device; nothing elsewhere."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
