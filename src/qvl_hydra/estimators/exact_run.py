"""Runs the exact estimator over a component's targets: a sample and scheme is a unit of work."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qvl_hydra.blockwise.walker import Context, Walker
from qvl_hydra.estimators.bench import Bench, measuring
from qvl_hydra.estimators.exact import Wavefront, score_sample
from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.families.stages import State
from qvl_hydra.operators.targets import Target, make_targets
from qvl_hydra.quantization.scheme import Scheme
from qvl_hydra.runs.folder import RunFolder, SampleScore


def run(job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport:
    """Score every target by the wavefront; see `Engine`.

    Raises:
        EngineError: no sample reaches the component.
    """
    with measuring(job, folder, progress, "exact", keep_states=False) as bench:
        for scheme in job.schemes:
            measure_exact(bench, bench.targets, scheme)
    return bench.report


def work(job: SweepJob) -> float:
    """Forwards of one sample that a job costs, about."""
    return len(job.scored) * len(job.schemes) * exact_cost(len(make_targets(job.operators, job.fuse)))


def exact_cost(targets: int) -> float:
    """Forwards of one sample that a wavefront over so many targets costs, about."""
    return targets / 2 + 2


def measure_exact(bench: Bench, targets: Sequence[Target], scheme: Scheme, turn: str = "") -> None:
    """Score targets in a scheme by the wavefront; what is on disk already is not measured again.

    Args:
        turn: names the work items of targets that are measured after others.
    """
    job = bench.job
    targets = [target for target in targets if bench.offered(target, scheme)]
    if not targets:  # all failed
        return
    walker, contexts, starts = _in_float32(bench)
    base = [op for target in targets for op in target.operators] if job.strategy.direction == "fallback" else []
    label = f"exact scores of {len(targets)} operators" + (f" in {scheme.name}" if len(job.schemes) > 1 else "")
    bench.progress.total(len(contexts) * exact_cost(len(targets)), label)
    wave = Wavefront(walker, targets, base, bench.quantizer(scheme), bench.chunk, job.strategy.positions)
    for index, (context, start) in enumerate(zip(contexts, starts, strict=True), bench.first):
        item = f"exact{turn}-{scheme.name}-{index:05d}"
        if not bench.folder.done(item):
            results = score_sample(wave, context, start)
            bench.folder.write_finite(
                item,
                [
                    SampleScore(op, context.sample.id, None, value, metric, "exact", scheme.name)
                    for op, values in results.items()
                    for metric, value in values.items()
                ],
            )
        bench.progress.step(exact_cost(len(targets)))


def _in_float32(bench: Bench) -> tuple[Walker, list[Context], list[State]]:
    """Walker, contexts and inputs in float32: a difference of two outputs drowns in bfloat16's rounding of both.

    Weights of another dtype are converted segment by segment.
    """
    if bench.walker.dtype == torch.float32:
        return bench.walker, bench.contexts, bench.starts
    walker = Walker(bench.job.model, bench.job.component, torch.float32)
    contexts = walker.contexts([context.sample for context in bench.contexts])
    return walker, contexts, walker.starts(contexts)
