"""The reverse walk over a whole component: one backward pass a probe, with scores and state on disk after each segment.

A forward walk, then a reverse walk with each segment computed again: memory for the states between segments and one
segment's graph (of the head's, for some tokens), weights touched twice. Cost: K + 3 forwards for K probes
(docs/estimators.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qvl_hydra.blockwise.batches import Batch, halved, make_batches
from qvl_hydra.blockwise.ranges import walk
from qvl_hydra.blockwise.walker import Context
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.estimators.bench import Bench
from qvl_hydra.estimators.groups import groups
from qvl_hydra.estimators.layout import Layout, ScoredTokens, WholeSamples
from qvl_hydra.estimators.positions import IMAGE, token_kinds
from qvl_hydra.estimators.reverse import Part, Reading, ReverseSegment, step_back
from qvl_hydra.families.stages import Segment, State
from qvl_hydra.operators.discover import Operator
from qvl_hydra.operators.targets import Target
from qvl_hydra.runs.files import written_whole
from qvl_hydra.runs.folder import SampleScore
from qvl_hydra.scores.shrink import ORIGINS

# From a sample, positions that count, the output at those (token, value), and which piece of the sample they are;
# features come whole.
MakeSampleProbes = Callable[[Sample, Tensor, Tensor, int], Iterable[Tensor]]
MakeParts = Callable[[Batch, State, Layout], list[Part]]  # from a batch, its state, and its layout behind the segment
PIECE_TOKENS = 256  # of a sample that the head is given at a time: their logits, probabilities and probes are in memory
FORWARDS = 3  # forward walk, recomputation, products of the weights' errors


@runtime_checkable
class Plan(Protocol):
    """What an estimator does on a reverse walk."""

    @property
    def name(self) -> str:
        """Of its work items on disk."""

    @property
    def probes(self) -> int:
        """Backward passes a sample."""

    @property
    def values(self) -> int:
        """How many schemes, or other columns, its reading gives values for."""

    def targets(self, bench: Bench) -> list[Target]:
        """What gets a score."""

    def probe_maker(self, bench: Bench) -> MakeSampleProbes:
        """What makes a sample's probes from its output at the scored positions; the last segment is in memory."""

    def reading(self, bench: Bench, operators: Sequence[Operator]) -> Reading:
        """What is read in a segment whose weights are in memory."""

    def scores(
        self, bench: Bench, context: Context, targets: Sequence[Target], values: Sequence[Tensor]
    ) -> Iterable[SampleScore]:
        """Scores of a sample from its values (target, probe, part) of each scheme."""


def cost(probes: int) -> float:
    """Forwards of one sample that a reverse walk costs, about."""
    return probes + FORWARDS


def reverse_walk(bench: Bench, plan: Plan) -> None:
    """Score every target on every scored sample; samples go in groups whose states fit in memory together."""
    of_all = len(bench.contexts) * cost(plan.probes)
    bench.progress.total(of_all, f"{plan.name} of {len(bench.targets)} operators")
    # The last group first: its states were kept, if any were.
    for first, end in reversed(groups(bench.job, bench.folder, bench.plain.state_bytes, bench.first)):
        _measure_group(bench, plan, first, slice(first - bench.first, end - bench.first))


@dataclass
class Group:
    """Samples whose states fit in memory together.

    Attributes:
        contexts: of each sample.
        batches: which of them walk back together; halved where the device's memory runs out.
    """

    contexts: list[Context]
    batches: list[Batch]


def _measure_group(bench: Bench, plan: Plan, first: int, members: slice) -> None:
    segments, contexts = bench.walker.segments, bench.contexts[members]
    units = [f"{plan.name}-{first:05d}-{index:04d}" for index in range(len(segments))]
    left = [index for index, unit in enumerate(units) if not bench.folder.done(unit)]
    steps = [len(contexts) * cost(plan.probes) * share for share in bench.plain.shares]
    bench.progress.step(sum(steps) - sum(steps[index] for index in left))
    states, bench.states = bench.states, None  # each segment's state is let go once it was used
    if not left:
        return
    if states is None:
        _, states = walk(bench.walker, contexts, bench.starts[members], (), (), lambda: None, keep=slice(len(contexts)))
    gradients = _load(bench, plan, first, left[-1], len(contexts))
    if gradients is None:
        left = list(range(len(segments)))
    for kept in states:
        del kept[left[-1] + 1 :]
    group = Group(contexts, make_batches(bench.walker, contexts))
    for index in reversed(left):
        inputs = [kept.pop() for kept in states]
        scores, gradients = _measure_segment(bench, plan, group, index, inputs, gradients)
        _save(bench, plan, first, index - 1, gradients)
        bench.folder.write_finite(units[index], scores)
        _gradient_path(bench, plan, first, index).unlink(missing_ok=True)
        bench.progress.step(steps[index])
    _gradient_path(bench, plan, first, -1).unlink(missing_ok=True)


def _measure_segment(
    bench: Bench, plan: Plan, group: Group, index: int, states: list[State], gradients: list[list[State]] | None
) -> tuple[list[SampleScore], list[list[State]]]:
    """One segment of the reverse walk for all samples of a group; weights are quantized once.

    Args:
        states: the segment's input, by sample.
        gradients: at the segment's output, by sample and probe; None at the last segment, where the probes are made.

    Returns:
        Scores; and the gradients at the segment's input.
    """
    segment = bench.walker.segments[index]
    targets = [target for target in plan.targets(bench) if any(segment.holds(op.path) for op in target.operators)]
    operators = list(dict.fromkeys(op for target in targets for op in target.operators))
    scores: list[SampleScore] = []
    after: dict[int, list[State]] = {}
    with bench.walker.weights(segment):
        unread = None if gradients is None else _last_linear(bench, segment)  # probes are made from the output
        work = ReverseSegment(bench.walker, segment, targets, plan.reading(bench, operators), unread)
        parts = _parts(bench, plan, work, gradients)
        for batch in list(group.batches):
            if segment.vision and not batch.has_images:
                assert gradients is not None, "no sample passes over the last segment"
                nothing = [torch.zeros(len(targets), len(gradients[batch.places[0]]), 2 + len(ORIGINS))] * plan.values
                found = [(place, nothing, gradients[place]) for place in batch.places]
            else:
                found = _walk_back(bench, group, batch, work, states, parts)
            for place, values, gradient in found:
                after[place] = gradient
                if targets:
                    scores += plan.scores(bench, group.contexts[place], targets, values)
    return scores, [after[place] for place in range(len(states))]


def _last_linear(bench: Bench, segment: Segment) -> str | None:
    """The operator that a segment ends with: its output is the segment's, or is added to it."""
    inside = [op for op in bench.walker.operators if segment.holds(op.path)]
    return inside[-1].path if inside and inside[-1].kind == "Linear" else None


def _parts(bench: Bench, plan: Plan, work: ReverseSegment, gradients: list[list[State]] | None) -> MakeParts:
    """What walks back together of a batch, with the gradients at the output, or what makes them there."""
    make = plan.probe_maker(bench) if gradients is None else None

    def parts(batch: Batch, state: State, behind: Layout) -> list[Part]:
        if gradients is not None:
            of_batch = zip(*(gradients[place] for place in batch.places), strict=True)
            return [Part(state, [behind.put_together(list(probe)) for probe in of_batch])]
        assert make is not None
        if not isinstance(behind, ScoredTokens) or work.reading.joined is None or behind.most <= PIECE_TOKENS:
            return [Part(state, partial(_probes, bench, batch, make, behind))]
        pieces = []
        for sample, mask, own in zip(batch.context.samples, behind.masks, behind.own(state), strict=True):
            places = mask.nonzero().flatten().split(PIECE_TOKENS)
            for piece, (at, tokens) in enumerate(zip(places, own.split(PIECE_TOKENS, 1), strict=True)):
                pieces.append(Part(tokens, partial(_probes_of_piece, make, sample, at, piece)))
        return pieces

    return parts


def _walk_back(
    bench: Bench,
    group: Group,
    batch: Batch,
    work: ReverseSegment,
    states: list[State],
    parts: MakeParts,
) -> list[tuple[int, list[Tensor], list[State]]]:
    """One batch through one segment; in halves, and so from then on, when CUDA runs out of memory.

    Returns:
        For each sample its place in the group, its values (target, probe, part) of each scheme, and its gradients.
    """
    before, behind = _layouts(bench, work.segment, batch)
    done = None
    try:
        state = before.put_together([states[place] for place in batch.places])
        done = step_back(work, batch.context, parts(batch, state, behind), before.slices, _kinds(batch, before))
    except torch.cuda.OutOfMemoryError:
        if len(batch.places) == 1:
            raise
    if done is None:  # out of the handler, whose exception holds on to the memory
        torch.cuda.empty_cache()
        halves = halved(bench.walker, group.contexts, batch)
        at = group.batches.index(batch)
        group.batches[at : at + 1] = halves
        return [part for half in halves for part in _walk_back(bench, group, half, work, states, parts)]
    values, back = done
    gradients = zip(*(before.take_apart(gradient) for gradient in back), strict=True)
    return [
        (place, [scheme[row] for scheme in values], list(own))
        for row, (place, own) in enumerate(zip(batch.places, gradients, strict=True))
    ]


def _kinds(batch: Batch, layout: Layout) -> list[Tensor | int]:
    """Of each sample the kind of its tokens in a layout; the vision tower's are all an image's."""
    context = batch.context
    if isinstance(layout, WholeSamples) and layout.packed:
        return [IMAGE] * len(context.samples)
    kinds = [
        token_kinds(sample, places[: sample.input_ids.numel()])
        for sample, places in zip(context.samples, context.places, strict=True)
    ]
    if isinstance(layout, ScoredTokens):
        kinds = [own[mask] for own, mask in zip(kinds, layout.masks, strict=True)]
    return list(kinds)


def _layouts(bench: Bench, segment: Segment, batch: Batch) -> tuple[Layout, Layout]:
    """How the samples of a batch lie before a segment and behind it; the head only takes the positions that count."""
    walker = bench.walker
    index = walker.segments.index(segment)
    if index + 1 == len(walker.segments) and not segment.vision:
        scored = ScoredTokens(bench.scored_positions(batch.context))
        return scored, scored
    return WholeSamples(batch, walker.packed(index)), WholeSamples(batch, walker.packed(index + 1))


def _probes(bench: Bench, batch: Batch, make: MakeSampleProbes, layout: Layout, outputs: State) -> list[State]:
    """Gradients of `<r_k, F>` at the outputs of a batch: the probes themselves."""
    masks = bench.scored_positions(batch.context)
    apart = zip(batch.context.samples, masks, layout.own(outputs), strict=True)
    found = [_probes_of_piece(make, sample, mask, 0, own) for sample, mask, own in apart]
    return [layout.joined(list(probe)) for probe in zip(*found, strict=True)]


def _probes_of_piece(
    make: MakeSampleProbes, sample: Sample, places: Tensor, piece: int, output: State
) -> list[State]:
    return [probe[None] for probe in make(sample, places, output[0], piece)]


def _gradient_path(bench: Bench, plan: Plan, first: int, index: int) -> Path:
    """Where the gradients at the output of segment `index` are kept, for a run that is killed."""
    return bench.folder.parts / f"{plan.name}-{first:05d}-{index:04d}.safetensors"


def _save(bench: Bench, plan: Plan, first: int, index: int, gradients: list[list[State]]) -> None:
    path = _gradient_path(bench, plan, first, index)
    tensors = {f"{i}.{k}": g.contiguous() for i, row in enumerate(gradients) for k, g in enumerate(row)}
    with written_whole(path) as beside:
        save_file(tensors, beside)


def _load(bench: Bench, plan: Plan, first: int, index: int, samples: int) -> list[list[State]] | None:
    path = _gradient_path(bench, plan, first, index)
    if not path.exists():
        return None
    stored = load_file(path, device=str(bench.job.device))
    return [[stored[f"{i}.{k}"] for k in range(len(stored) // samples)] for i in range(samples)]
