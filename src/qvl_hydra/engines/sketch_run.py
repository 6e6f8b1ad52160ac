"""Runs the sketch over a whole component: forward walk, reverse walk, scores and state on disk after each segment."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qvl_hydra.engines.metrics import next_token_labels
from qvl_hydra.engines.probes import Signs, fisher_probe, leading_directions, loss_gradient, sign_probe
from qvl_hydra.engines.protocol import SweepJob
from qvl_hydra.engines.ranges import walk
from qvl_hydra.engines.sketch import MakeProbes, OperatorChange, SketchSegment, step_back
from qvl_hydra.engines.walker import Context, Segment, State, Walker
from qvl_hydra.models.memory import free_memory_bytes
from qvl_hydra.operators.discover import Operator, find_operators
from qvl_hydra.quantizers.qdq import weight_change
from qvl_hydra.quantizers.scheme import Scheme
from qvl_hydra.scores.store import RunFolder, SampleScore

if TYPE_CHECKING:
    from qvl_hydra.engines.native import Bench

STREAMED_STATE_BYTES = 1 << 30  # states between segments that a streamed run keeps in memory
FORWARDS = 3  # forward walk, recomputation, products of the weights' errors


def cost(probes: int) -> float:
    """Forwards of one sample that the sketch costs, about."""
    return probes + FORWARDS


def measure(bench: Bench) -> None:
    """Score every target on every scored sample; samples go in groups whose states fit in memory together."""
    size = group_size(bench.job, bench.folder, bench.walker, bench.starts)
    for first in range(0, len(bench.contexts), size):
        _measure_group(bench, first, slice(first, first + size))


def group_size(job: SweepJob, folder: RunFolder, walker: Walker, starts: Sequence[State]) -> int:
    """Samples whose states between all segments fit in memory together; a resumed run keeps its own."""
    kept = folder.recall("sketch_group")
    if kept is None:
        limit = STREAMED_STATE_BYTES if job.model.streamed else free_memory_bytes() // 4
        if job.device.type == "cuda":
            limit = int(torch.cuda.mem_get_info(job.device)[0] * 0.3)
        largest = max(start.numel() * start.element_size() for start in starts)
        kept = max(1, min(len(starts), limit // (largest * (len(walker.segments) + 1))))
        folder.remember("sketch_group", kept)
    return int(kept)


def _measure_group(bench: Bench, first: int, group: slice) -> None:
    segments, contexts = bench.walker.segments, bench.contexts[group]
    units = [f"sketch-{first:05d}-{index:04d}" for index in range(len(segments))]
    left = [index for index, unit in enumerate(units) if not bench.folder.done(unit)]
    step = len(contexts) * cost(bench.job.strategy.probes) / len(segments)
    bench.progress.step(step * (len(segments) - len(left)))
    if not left:
        return
    states, bench.states = bench.states, None  # each segment's state is let go once it was used
    if states is None:
        _, states = walk(bench.walker, contexts, bench.starts[group], (), (), lambda: None, keep=len(contexts))
    gradients = _load(bench, first, left[-1], len(contexts))
    if gradients is None:
        left = list(range(len(segments)))
    for kept in states:
        del kept[left[-1] + 1 :]
    for index in reversed(left):
        inputs = [kept.pop() for kept in states]
        scores, gradients = _measure_segment(bench, segments[index], contexts, inputs, gradients)
        _save(bench, first, index - 1, gradients)
        bench.folder.write_finite(units[index], scores)
        _gradient_path(bench, first, index).unlink(missing_ok=True)
        bench.progress.step(step)
    _gradient_path(bench, first, -1).unlink(missing_ok=True)


def _change(bench: Bench, op: Operator, scheme: Scheme) -> OperatorChange:
    weight: Tensor = bench.walker.module.get_submodule(op.path).weight
    change = None if scheme.weight is None else weight_change(weight, scheme.weight)
    return OperatorChange(scheme, change, *bench.ranges[scheme.name].get(op.path, (None, None)))


def _last_weight(bench: Bench) -> Tensor:
    """Weight of the operator that makes the component's output; its segment's weights are in memory."""
    last = find_operators(bench.walker.module, bench.walker.component)[-1]
    weight: Tensor = bench.walker.module.get_submodule(last.path).weight
    return weight


def _probes(bench: Bench, directions: Tensor, context: Context, outputs: State) -> list[State]:
    """Gradients of `<r_k, F>` at the output: the probes themselves, one row each."""
    strategy, output = bench.job.strategy, outputs[0]
    if strategy.variant == "element":  # what other tools use: the gradient of the loss, and no probes
        return [loss_gradient(output, next_token_labels(context.sample.labels).to(output.device))[None]]
    found = []
    for k in range(strategy.probes):
        signs = Signs(output.device, bench.job.seed, context.sample.id, probe=k, probes=strategy.probes)
        kl = strategy.metric == "kl"
        found.append((fisher_probe(output, signs) if kl else sign_probe(output, directions, signs))[None])
    return found


def _measure_segment(
    bench: Bench, segment: Segment, contexts: list[Context], states: list[State], gradients: list[list[State]] | None
) -> tuple[list[SampleScore], list[list[State]]]:
    """One segment of the reverse walk for all samples of a group; weights are quantized once.

    Args:
        gradients: at the segment's output, by sample and probe; None at the last segment, where the probes are made.
    """
    job = bench.job
    targets = [target for target in bench.targets if any(segment.holds(op) for op in target.operators)]
    operators = [op for target in targets for op in target.operators]
    scores: list[SampleScore] = []
    after: list[list[State]] = []
    with bench.walker.weights(segment):
        changes = {op.path: [_change(bench, op, scheme) for scheme in job.schemes] for op in operators}
        work = SketchSegment(bench.walker, segment, targets, changes, job.strategy.variant)
        entering: Sequence[list[State] | MakeProbes]
        if gradients is None:
            directions = leading_directions(_last_weight(bench))
            entering = [partial(_probes, bench, directions, context) for context in contexts]
        else:
            entering = gradients
        for context, state, gradient in zip(contexts, states, entering, strict=True):
            if bench.walker.skips(segment, context.sample):
                assert not callable(gradient), "no sample passes over the last segment"
                after.append(gradient)
                values = {(t.name, i): torch.zeros(len(gradient), 1) for t in targets for i in range(len(job.schemes))}
            else:
                values, back = step_back(work, context, state, gradient)
                after.append(back)
            metric = job.strategy.metric
            scale = 0.5 / context.sample.input_ids.numel() if metric == "kl" else 1.0
            sample = context.sample.id
            for (name, index), probes in values.items():
                scheme = job.schemes[index].name
                scores += [
                    SampleScore(name, sample, k, parts[0], metric, "sketch", scheme, *parts[1:])
                    for k, parts in enumerate((probes.double() * scale).tolist())
                ]
    return scores, after


def _gradient_path(bench: Bench, first: int, index: int) -> Path:
    """Where the gradients at the output of segment `index` are kept, for a run that is killed."""
    return bench.folder.parts / f"sketch-{first:05d}-{index:04d}.safetensors"


def _save(bench: Bench, first: int, index: int, gradients: list[list[State]]) -> None:
    path = _gradient_path(bench, first, index)
    beside = path.with_suffix(".tmp")
    save_file({f"{i}.{k}": g.contiguous() for i, row in enumerate(gradients) for k, g in enumerate(row)}, beside)
    beside.replace(path)


def _load(bench: Bench, first: int, index: int, samples: int) -> list[list[State]] | None:
    path = _gradient_path(bench, first, index)
    if not path.exists():
        return None
    stored = load_file(path, device=str(bench.job.device))
    return [[stored[f"{i}.{k}"] for k in range(len(stored) // samples)] for i in range(samples)]
