"""Static activation ranges and states by one walk: every segment's weights are touched once for all samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qvl_hydra.blockwise.batches import Batch, make_batches, put_together
from qvl_hydra.blockwise.census import Census
from qvl_hydra.blockwise.walker import Context, Walker
from qvl_hydra.families.stages import Segment, State
from qvl_hydra.operators.discover import Operator
from qvl_hydra.operators.kinds import mixture
from qvl_hydra.quantization.apply import Forward, OperatorObserver, replaced_forwards, unread_output
from qvl_hydra.quantization.formats.record import QuantParams
from qvl_hydra.quantization.scheme import Scheme

Params = tuple[QuantParams | None, QuantParams | None]
NONE = slice(0)
SchemeRanges = dict[str, dict[str, Params]]  # scheme name -> operator path -> input, output


class Ranges:
    """Observed ranges of every scheme, and the operators whose range is unusable.

    Attributes:
        params: scheme name, then operator path, to the parameters of input and output.
        failed: operator path to what is wrong with its range.
        census: how large everything gets.
    """

    def __init__(self, schemes: Sequence[Scheme]) -> None:
        self.params: SchemeRanges = {scheme.name: {} for scheme in schemes}
        self.failed: dict[str, str] = {}
        self.census = Census()


@torch.no_grad()
def walk(
    walker: Walker,
    contexts: Sequence[Context],
    starts: Sequence[State],
    operators: Sequence[Operator],
    schemes: Sequence[Scheme],
    step: Callable[[], None],
    keep: slice = NONE,
) -> tuple[Ranges, list[list[State]]]:
    """Walk samples through the component in float; observe ranges and keep the states between segments.

    Args:
        contexts, starts: of the samples, the scored ones first; their inputs to the component.
        operators: observed for each scheme with static ranges, and counted in the census.
        step: called after each segment.
        keep: places of samples, one behind the other, of which the input of each segment is kept.

    Returns:
        Ranges, and the states: one list a kept sample, as long as there are segments, of one row each.
    """
    ranges = Ranges(schemes)
    static = [scheme for scheme in schemes if scheme.needs_ranges]
    states = list(starts)
    # On a CPU one by one: ranges are then bit for bit those of the model's own forward. A last bit can turn a rounding,
    # and in `fallback`, where everything is rounded, a score.
    one_by_one = [Batch((place,), context) for place, context in enumerate(contexts)]
    batches = one_by_one if walker.model.device.type == "cpu" else make_batches(walker, contexts)
    kept: list[list[State]] = [[] for _ in states[keep]]
    for segment in walker.segments:
        for state, inputs in zip(states[keep], kept, strict=True):
            # A copy, made when the memory that the segment needed for a moment is free again: kept where they were
            # made, among it, states leave holes that took six times their own size on 36 blocks.
            inputs.append(state.clone())
        states[keep] = [inputs[-1] for inputs in kept]
        inside = [op for op in operators if segment.holds(op.path)]
        if segment is walker.segments[-1] and not inside:
            break  # nobody needs the outputs
        # Nor what the last operator makes of its input, where only that is observed.
        last = segment is walker.segments[-1] and all(scheme.output is None for scheme in static)
        unread = walker.operators[-1].path if last else None
        observers = {op.path: [OperatorObserver(scheme) for scheme in static] for op in inside}
        with walker.weights(segment):
            for op in inside:
                ranges.census.see_weight(op.path, walker.module.get_submodule(op.path))
            walking = [batch for batch in batches if batch.has_images or not segment.vision]
            for batch in walking:
                _advance(walker, segment, batch, states, observers, unread, ranges.census)
        for path, seen in observers.items() if walking else ():
            for scheme, observer in zip(static, seen, strict=True):
                try:
                    ranges.params[scheme.name][path] = observer.params()
                except ValueError as error:
                    ranges.failed[path] = str(error)
        step()
    return ranges, kept


def _advance(
    walker: Walker,
    segment: Segment,
    batch: Batch,
    states: list[State],
    observers: dict[str, list[OperatorObserver]],
    unread: str | None,
    census: Census,
) -> None:
    """Take a batch's states through a segment, in place; every sample is observed by itself."""

    def forward_of(path: str, seen: list[OperatorObserver]) -> Forward:
        def forward(target: nn.Module, x: Tensor) -> Tensor:
            y: Tensor = unread_output(target, x) if path == unread else type(target).forward(target, x)
            census.see(path, x, None if path == unread else y)
            if own := mixture(target):
                census.see_experts(path, own.chosen, own.experts)
            before, after = (z.flatten(0, 1) if z.dim() == 3 else z for z in (x, y))
            for tokens in batch.slices(len(before), segment.vision):
                for observer in seen:
                    observer.observe(target, before[tokens], after[tokens])
            return y

        return forward

    taps = {path: forward_of(path, seen) for path, seen in observers.items()}
    with replaced_forwards(walker.module, taps):
        output = segment.run(put_together([states[place] for place in batch.places], segment.vision), batch.context)
    index = walker.segments.index(segment)
    if index + 1 < len(walker.segments):  # nobody needs the outputs of the last
        for place, state in zip(batch.places, batch.take_apart(output, walker.packed(index + 1)), strict=True):
            states[place] = state
