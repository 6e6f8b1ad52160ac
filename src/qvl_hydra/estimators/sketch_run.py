"""Runs the sketch over a whole component: forward walk, reverse walk, scores and state on disk after each segment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qvl_hydra.blockwise.batches import Batch, halved, make_batches, put_together
from qvl_hydra.blockwise.ranges import walk
from qvl_hydra.blockwise.walker import Context, Segment, State
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.estimators.bench import Bench, group_size, measuring
from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.estimators.metrics import next_token_labels
from qvl_hydra.estimators.probes import Signs, fisher_probes, leading_directions, loss_gradient, sign_probes
from qvl_hydra.estimators.sketch import MakeProbes, OperatorChange, SketchSegment, step_back
from qvl_hydra.operators.discover import Operator
from qvl_hydra.operators.targets import Target
from qvl_hydra.quantization.qdq import weight_change
from qvl_hydra.quantization.scheme import Scheme
from qvl_hydra.runs.folder import RunFolder, SampleScore, written_whole

MakeSampleProbes = Callable[[Sample, Tensor], Iterable[Tensor]]  # from a sample's output, (token, value)
FORWARDS = 3  # forward walk, recomputation, products of the weights' errors


def run(job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport:
    """Score every target by the sketch; see `Engine`.

    Raises:
        EngineError: no sample reaches the component.
    """
    work = len(job.scored) * cost(job.strategy.probes)
    with measuring(job, folder, progress, "sketch", work, keep_states=True) as bench:
        measure(bench)
    return bench.report


def cost(probes: int) -> float:
    """Forwards of one sample that the sketch costs, about."""
    return probes + FORWARDS


def measure(bench: Bench) -> None:
    """Score every target on every scored sample; samples go in groups whose states fit in memory together."""
    size = group_size(bench.job, bench.folder, bench.walker, bench.starts)
    for first in range(0, len(bench.contexts), size):
        _measure_group(bench, first, slice(first, first + size))


@dataclass
class Group:
    """Samples whose states fit in memory together.

    Attributes:
        contexts: of each sample.
        batches: which of them walk back together; halved where the device's memory runs out.
    """

    contexts: list[Context]
    batches: list[Batch]


def _measure_group(bench: Bench, first: int, members: slice) -> None:
    segments, contexts = bench.walker.segments, bench.contexts[members]
    units = [f"sketch-{first:05d}-{index:04d}" for index in range(len(segments))]
    left = [index for index, unit in enumerate(units) if not bench.folder.done(unit)]
    step = len(contexts) * cost(bench.job.strategy.probes) / len(segments)
    bench.progress.step(step * (len(segments) - len(left)))
    if not left:
        return
    states, bench.states = bench.states, None  # each segment's state is let go once it was used
    if states is None:
        _, states = walk(bench.walker, contexts, bench.starts[members], (), (), lambda: None, keep=len(contexts))
    gradients = _load(bench, first, left[-1], len(contexts))
    if gradients is None:
        left = list(range(len(segments)))
    for kept in states:
        del kept[left[-1] + 1 :]
    group = Group(contexts, make_batches(bench.walker, contexts))
    for index in reversed(left):
        inputs = [kept.pop() for kept in states]
        scores, gradients = _measure_segment(bench, group, index, inputs, gradients)
        _save(bench, first, index - 1, gradients)
        bench.folder.write_finite(units[index], scores)
        _gradient_path(bench, first, index).unlink(missing_ok=True)
        bench.progress.step(step)
    _gradient_path(bench, first, -1).unlink(missing_ok=True)


def _change(bench: Bench, op: Operator, scheme: Scheme) -> OperatorChange:
    weight: Tensor = bench.walker.module.get_submodule(op.path).weight
    change = None if scheme.weight is None else weight_change(weight, scheme.weight)
    return OperatorChange(scheme, change, *bench.ranges[scheme.name].get(op.path, (None, None)))


def _measure_segment(
    bench: Bench, group: Group, index: int, states: list[State], gradients: list[list[State]] | None
) -> tuple[list[SampleScore], list[list[State]]]:
    """One segment of the reverse walk for all samples of a group; weights are quantized once.

    Args:
        states: the segment's input, by sample.
        gradients: at the segment's output, by sample and probe; None at the last segment, where the probes are made.

    Returns:
        Scores; and the gradients at the segment's input.
    """
    job, segment = bench.job, bench.walker.segments[index]
    targets = [target for target in bench.targets if any(segment.holds(op) for op in target.operators)]
    operators = [op for target in targets for op in target.operators]
    scores: list[SampleScore] = []
    after: dict[int, list[State]] = {}
    with bench.walker.weights(segment):
        changes = {op.path: [_change(bench, op, scheme) for scheme in job.schemes] for op in operators}
        unread = None if gradients is None else _last_linear(bench, segment)  # probes are made from the output
        work = SketchSegment(bench.walker, segment, targets, changes, job.strategy.variant, unread)
        make = _probe_maker(bench) if gradients is None else None

        def entering(batch: Batch) -> list[State] | MakeProbes:
            packed = bench.walker.packed(index + 1)
            if gradients is None:
                assert make is not None
                return partial(_probes, batch, make, packed)
            probes = zip(*(gradients[place] for place in batch.places), strict=True)
            return [put_together(probe, packed) for probe in probes]

        for batch in list(group.batches):
            if segment.vision and not batch.has_images:
                assert gradients is not None, "no sample passes over the last segment"
                nothing = [torch.zeros(len(targets), len(gradients[batch.places[0]]), 1)] * len(job.schemes)
                found = [(place, nothing, gradients[place]) for place in batch.places]
            else:
                found = _walk_back(bench, group, batch, work, states, entering)
            for place, values, gradient in found:
                after[place] = gradient
                if targets:
                    scores += _scores(bench, group.contexts[place], targets, values)
    return scores, [after[place] for place in range(len(states))]


def _last_linear(bench: Bench, segment: Segment) -> str | None:
    """The operator that a segment ends with: its output is the segment's, or is added to it."""
    inside = [op for op in bench.walker.operators if segment.holds(op)]
    return inside[-1].path if inside and inside[-1].kind == "Linear" else None


def _walk_back(
    bench: Bench,
    group: Group,
    batch: Batch,
    work: SketchSegment,
    states: list[State],
    entering: Callable[[Batch], list[State] | MakeProbes],
) -> list[tuple[int, list[Tensor], list[State]]]:
    """One batch through one segment; in halves, and so from then on, when CUDA runs out of memory.

    Returns:
        For each sample its place in the group, its values (target, probe, part) of each scheme, and its gradients.
    """
    packed = work.segment.vision
    state = put_together([states[place] for place in batch.places], packed)
    done = None
    try:
        done = step_back(work, batch.context, state, entering(batch))
    except torch.cuda.OutOfMemoryError:
        if len(batch.places) == 1:
            raise
    if done is None:  # out of the handler, whose exception holds on to the memory
        torch.cuda.empty_cache()
        halves = halved(bench.walker, group.contexts, batch)
        at = group.batches.index(batch)
        group.batches[at : at + 1] = halves
        return [part for half in halves for part in _walk_back(bench, group, half, work, states, entering)]
    products, back = done
    gradients = zip(*(batch.take_apart(gradient, packed) for gradient in back), strict=True)
    values = [[part.values(work.variant, tokens) for tokens in batch.slices(part.tokens, packed)] for part in products]
    return [
        (place, [scheme[row] for scheme in values], list(own))
        for row, (place, own) in enumerate(zip(batch.places, gradients, strict=True))
    ]


def _scores(
    bench: Bench, context: Context, targets: Sequence[Target], values: Sequence[Tensor]
) -> Iterator[SampleScore]:
    metric, sample = bench.job.strategy.metric, context.sample
    scale = 0.5 / sample.input_ids.numel() if metric == "kl" else 1.0
    for scheme, by_target in zip(bench.job.schemes, values, strict=True):
        for target, probes in zip(targets, (by_target.double() * scale).tolist(), strict=True):
            for k, parts in enumerate(probes):
                yield SampleScore(target.name, sample.id, k, parts[0], metric, "sketch", scheme.name, *parts[1:])


def _last_weight(bench: Bench) -> Tensor:
    """Weight of the operator that makes the component's output; its segment's weights are in memory."""
    weight: Tensor = bench.walker.module.get_submodule(bench.walker.operators[-1].path).weight
    return weight


def _probe_maker(bench: Bench) -> MakeSampleProbes:
    """What makes a sample's probes from its output; the last segment's weights are in memory."""
    strategy = bench.job.strategy

    def signs(sample: Sample, device: torch.device) -> list[Signs]:
        names, count = (bench.job.seed, sample.id), strategy.probes
        return [Signs(device, *names, probe=k, probes=count) for k in range(count)]

    if strategy.variant == "element":  # what other tools use: the gradient of the loss, and no probes
        return lambda sample, output: [loss_gradient(output, next_token_labels(sample.labels).to(output.device))]
    if strategy.metric == "kl":
        return lambda sample, output: fisher_probes(output, signs(sample, output.device))
    directions = leading_directions(_last_weight(bench))
    return lambda sample, output: sign_probes(output, directions, signs(sample, output.device))


def _probes(batch: Batch, make: MakeSampleProbes, packed: bool, outputs: State) -> list[State]:
    """Gradients of `<r_k, F>` at the outputs of a batch: the probes themselves."""
    apart = zip(batch.context.samples, batch.take_apart(outputs, packed), strict=True)
    found = [[probe[None] for probe in make(sample, states[0])] for sample, states in apart]
    return [put_together(probe, packed) for probe in zip(*found, strict=True)]


def _gradient_path(bench: Bench, first: int, index: int) -> Path:
    """Where the gradients at the output of segment `index` are kept, for a run that is killed."""
    return bench.folder.parts / f"sketch-{first:05d}-{index:04d}.safetensors"


def _save(bench: Bench, first: int, index: int, gradients: list[list[State]]) -> None:
    path = _gradient_path(bench, first, index)
    tensors = {f"{i}.{k}": g.contiguous() for i, row in enumerate(gradients) for k, g in enumerate(row)}
    with written_whole(path) as beside:
        save_file(tensors, beside)


def _load(bench: Bench, first: int, index: int, samples: int) -> list[list[State]] | None:
    path = _gradient_path(bench, first, index)
    if not path.exists():
        return None
    stored = load_file(path, device=str(bench.job.device))
    return [[stored[f"{i}.{k}"] for k in range(len(stored) // samples)] for i in range(samples)]
