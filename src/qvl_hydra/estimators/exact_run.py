"""Runs the exact estimator over a component's targets: a sample and scheme is a unit of work; some go together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from qvl_hydra.blockwise.differences import Differences, by_difference
from qvl_hydra.blockwise.walker import Context, Walker
from qvl_hydra.estimators.bench import Bench, measuring
from qvl_hydra.estimators.exact import Kept, Wavefront, score_samples
from qvl_hydra.estimators.groups import fitting
from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.families.stages import State
from qvl_hydra.operators.kinds import outputs, slots
from qvl_hydra.operators.targets import Target, make_targets
from qvl_hydra.quantization.scheme import Scheme
from qvl_hydra.runs.folder import RunFolder, SampleScore

GROUP_BYTES = 1 << 29  # states of all copies of the samples that walk together
STREAMED_BYTES = 1 << 30  # that a streamed run keeps of references


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
    if bench.states is None or len(bench.states) < len(bench.contexts):
        return None
    if walker.dtype != torch.float32 or bench.job.device.type != "cpu":
        return None
    passing = [any(walker.skips(segment, context.sample) for segment in walker.segments) for context in bench.contexts]
    return [[] if passes else states[1:] for passes, states in zip(passing, bench.states, strict=True)]


class Exact:
    """Exact scores of a bench's samples, some targets after others.

    The reference, and of copies all that is no product, is in float32 whatever the model's dtype: a difference of two
    outputs drowns in bfloat16's rounding of both. Weights of another dtype are converted segment by segment, but for
    those of operators whose products are taken as differences, see `differences`.

    Args:
        keep: keep the reference's states for further wavefronts, of as many samples as fit in memory; with differences
            also what its operators gave. Of mixtures in float32 nothing is kept: the choices of experts would have to
            be, too.
        known: what `reference_states` gave.
    """

    def __init__(self, bench: Bench, keep: bool, known: list[list[State]] | None = None) -> None:
        self.bench = bench
        self.walker, self.contexts, self.starts = bench.walker, bench.contexts, bench.starts
        if self.walker.dtype != torch.float32:
            differing: list[str] = []  # none for fallback, whose scores are small differences of large effects
            if bench.job.strategy.direction == "requantize":
                differing = by_difference(self.walker.operators, self.walker.dtype)
            self.walker = Walker(bench.job.model, bench.job.component, torch.float32, differing)
            self.contexts = self.walker.contexts([context.sample for context in bench.contexts])
            if self.walker.prefix:
                bench.progress.total(len(self.walker.prefix), "inputs of exact scores")
            self.starts = self.walker.starts(self.contexts, bench.progress.step)
        keeping = 0
        if keep and (self.walker.kept or all(op.experts == 1 for op in self.walker.operators)):
            most = STREAMED_BYTES if bench.job.model.streamed else None
            keeping = fitting(bench.job, self._kept_bytes(), most)
        self._kept = [Kept() if i < keeping else None for i in range(len(self.contexts))]
        if keeping == len(self.contexts) and known is not None:
            self._kept = [Kept(states) for states in known]
        if self.walker.kept and keeping:
            self._walk_references()

    @torch.no_grad()
    def _walk_references(self) -> None:
        """Keep what references give before copies walk, whose states would leave holes between what is kept."""
        inner, shares = self.walker.segments[:-1], self.bench.plain.shares[:-1]
        self.bench.progress.total(sum(shares), "reference of exact scores")
        differences = Differences(self.walker)
        for segment, share in zip(inner, shares, strict=True):
            with self.walker.weights(segment):
                for kept, context, start in zip(self._kept, self.contexts, self.starts, strict=True):
                    if kept is not None and not self.walker.skips(segment, context.sample):
                        state = kept.states[-1] if kept.states else start
                        kept.states.append(differences.advance(segment, context, state, kept.outputs))
            self.bench.progress.step(share)

    def _kept_bytes(self) -> list[int]:
        """Of each sample's reference: its states, and what it gives at operators whose products are differences."""
        kept = [self.walker.module.get_submodule(path) for path in self.walker.kept]
        values = sum(outputs(module) * slots(module) for module in kept)
        wider = self.walker.dtype.itemsize // self.bench.walker.dtype.itemsize
        return [
            size * wider + 4 * context.sample.longest * values
            for size, context in zip(self.bench.plain.state_bytes, self.contexts, strict=True)
        ]

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
        items = [f"exact{turn}-{scheme.name}-{bench.first + index:05d}" for index in range(len(self.contexts))]
        left = [index for index, item in enumerate(items) if not bench.folder.done(item)]
        bench.progress.step(exact_cost(len(targets)) * (len(items) - len(left)))
        largest = max(start.nbytes for start in self.starts)
        size = max(1, fitting(job, [largest * (len(targets) + 2)] * len(self.starts), most=GROUP_BYTES))
        for group in (left[at : at + size] for at in range(0, len(left), size)):
            contexts, starts, kept = self._of(group)
            found = score_samples(wave, contexts, starts, kept, self._stepping(wave, len(group)))
            for index, results in zip(group, found, strict=True):
                bench.folder.write_finite(
                    items[index],
                    [
                        SampleScore(op, self.contexts[index].sample.id, None, value, metric, "exact", scheme.name)
                        for op, values in results.items()
                        for metric, value in values.items()
                    ],
                )

    def _stepping(self, wave: Wavefront, samples: int) -> Callable[[], None]:
        """Steps of a wavefront, a segment each: as long as a plain forward takes there, for each row that passes."""
        started = accumulate(len(wave.targets_in(segment)) for segment in self.walker.segments)
        spent = [share * (1 + rows) for share, rows in zip(self.bench.plain.shares, started, strict=True)]
        steps = (samples * exact_cost(len(wave.targets)) * share / sum(spent) for share in spent)
        return lambda: self.bench.progress.step(next(steps))

    def _of(self, group: Sequence[int]) -> tuple[list[Context], list[State], list[Kept | None]]:
        """What is known of some samples."""
        return [self.contexts[i] for i in group], [self.starts[i] for i in group], [self._kept[i] for i in group]
