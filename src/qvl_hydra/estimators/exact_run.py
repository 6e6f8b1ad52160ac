"""Runs the exact estimator over a component's targets: a sample and scheme is a unit of work."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qvl_hydra.blockwise.walker import Walker
from qvl_hydra.estimators.bench import Bench, fitting, measuring
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
        exact = Exact(bench, keep=len(job.schemes) > 1)
        for scheme in job.schemes:
            exact.measure(bench.targets, scheme)
    return bench.report


def work(job: SweepJob) -> float:
    """Forwards of one sample that a job costs, about."""
    return len(job.scored) * len(job.schemes) * exact_cost(len(make_targets(job.operators, job.fuse)))


def exact_cost(targets: int) -> float:
    """Forwards of one sample that a wavefront over so many targets costs, about."""
    return targets / 2 + 2


def reference_states(bench: Bench) -> list[list[State]] | None:
    """For each sample the states behind its segments, where the walk that observed ranges went as a reference does.

    It did so in float32 and on a CPU, where samples walk one by one. A sample that passes over a segment has none.
    """
    walker = bench.walker
    if bench.states is None or walker.dtype != torch.float32 or bench.job.device.type != "cpu":
        return None
    passing = [any(walker.skips(segment, context.sample) for segment in walker.segments) for context in bench.contexts]
    return [[] if passes else states[1:] for passes, states in zip(passing, bench.states, strict=True)]


class Exact:
    """Exact scores of a bench's samples, some targets after others.

    All of it is in float32: a difference of two outputs drowns in bfloat16's rounding of both. Weights of another dtype
    are converted segment by segment.

    Args:
        keep: keep the reference's states for further wavefronts where they fit in memory. Those of mixtures are not, of
            which the choices of experts would have to be kept, too.
        known: what `reference_states` gave.
    """

    def __init__(self, bench: Bench, keep: bool, known: list[list[State]] | None = None) -> None:
        self.bench = bench
        self.walker, self.contexts, self.starts = bench.walker, bench.contexts, bench.starts
        if bench.walker.dtype != torch.float32:
            self.walker = Walker(bench.job.model, bench.job.component, torch.float32)
            self.contexts = self.walker.contexts([context.sample for context in bench.contexts])
            self.starts = self.walker.starts(self.contexts)
        keep = keep and all(op.experts == 1 for op in self.walker.operators)
        keep = keep and fitting(bench.job, self.walker, self.starts) >= len(self.contexts)
        self._kept: list[list[State] | None] = [[] if keep else None for _ in self.contexts]
        if keep and known is not None:
            self._kept = list(known)

    def measure(self, targets: Sequence[Target], scheme: Scheme, turn: str = "") -> None:
        """Score targets in a scheme by the wavefront; what is on disk already is not measured again.

        Args:
            turn: names the work items of targets that are measured after others.
        """
        bench, job = self.bench, self.bench.job
        targets = [target for target in targets if bench.offered(target, scheme)]
        if not targets:  # all failed
            return
        base = [op for target in targets for op in target.operators] if job.strategy.direction == "fallback" else []
        label = f"exact scores of {len(targets)} operators" + (f" in {scheme.name}" if len(job.schemes) > 1 else "")
        bench.progress.total(len(self.contexts) * exact_cost(len(targets)), label)
        wave = Wavefront(self.walker, targets, base, bench.quantizer(scheme), bench.chunk, job.strategy.positions)
        samples = zip(self.contexts, self.starts, self._kept, strict=True)
        for index, (context, start, kept) in enumerate(samples, bench.first):
            item = f"exact{turn}-{scheme.name}-{index:05d}"
            if not bench.folder.done(item):
                results = score_sample(wave, context, start, kept)
                bench.folder.write_finite(
                    item,
                    [
                        SampleScore(op, context.sample.id, None, value, metric, "exact", scheme.name)
                        for op, values in results.items()
                        for metric, value in values.items()
                    ],
                )
            bench.progress.step(exact_cost(len(targets)))
