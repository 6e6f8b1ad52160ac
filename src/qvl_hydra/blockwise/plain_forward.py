"""A plain forward of samples through a component: what it takes of time, and what it keeps between segments."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qvl_hydra.blockwise.stopwatch import forward_seconds, synchronize
from qvl_hydra.blockwise.walker import Context, Walker
from qvl_hydra.families.stages import State


@dataclass(frozen=True)
class PlainForward:
    """What a plain forward takes.

    Attributes:
        seconds: of all samples, by the one stopwatch.
        shares: of each segment in a forward's time; they add up to 1.
        state_bytes: of each sample, of the inputs of all segments together.
    """

    seconds: float
    shares: Sequence[float]
    state_bytes: Sequence[int]


def plain_forward(
    walker: Walker, contexts: Sequence[Context], starts: Sequence[State], step: Callable[[], None] = lambda: None
) -> PlainForward:
    """Take samples through the component as they are, timed.

    Args:
        step: called after each segment the first time that all samples walk.
    """
    segments = walker.segments
    spent = [0.0] * len(segments)
    state_bytes = [0] * len(starts)
    unseen = iter(segments)  # looked at the first time that all samples walk, so that the others are timed undisturbed

    @torch.no_grad()
    def forward(count: int) -> None:
        states = list(starts[:count])
        for index, segment in enumerate(segments):
            looked_at = count == len(starts) and next(unseen, None) is not None
            if looked_at:
                state_bytes[:] = [size + state.nbytes for size, state in zip(state_bytes, states, strict=True)]
            began = time.perf_counter()
            if segment is not segments[-1]:
                walker.advance(segment, contexts[:count], states)
            else:
                with walker.weights(segment):
                    for context, state in zip(contexts, states, strict=False):
                        segment.run(state, context)  # logits of all samples would take more memory than the model
            if looked_at:
                synchronize(walker.model.device)
                spent[index] = time.perf_counter() - began
                step()

    warm_up = None if walker.model.streamed else lambda: forward(1)
    seconds = forward_seconds(lambda: forward(len(starts)), walker.model.device, warm_up)
    return PlainForward(seconds, [share / sum(spent) for share in spent], state_bytes)
