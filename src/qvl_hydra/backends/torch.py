"""The native engine (`backend=torch`): exact, sketch, auto and hawq_v2 over the block walker, on CPU and CUDA."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import spearmanr

from qvl_hydra.blockwise.ranges import Params, walk
from qvl_hydra.blockwise.stopwatch import forward_seconds, synchronize
from qvl_hydra.blockwise.walker import Context, State, Walker
from qvl_hydra.errors import EngineError
from qvl_hydra.estimators import hawq, sketch_run
from qvl_hydra.estimators.exact import RowChunk, Wavefront, score_sample
from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.estimators.metrics import UNITS
from qvl_hydra.models.memory import free_memory_bytes
from qvl_hydra.operators.discover import Operator
from qvl_hydra.operators.targets import Target, make_targets
from qvl_hydra.quantization.apply import make_quantizer
from qvl_hydra.quantization.qdq import OperatorQuantizer, QuantParams
from qvl_hydra.quantization.scheme import Scheme
from qvl_hydra.runs.folder import RunFolder, SampleScore

CPU_CHUNK_TOKENS = 4096  # more tokens at a time than this no longer make CPU products faster, and cost memory
FEWEST_EXACT = 30  # auto: at least so many of the most sensitive are measured exactly; the first 20 shall be right
FEWEST_CONTROL = 5  # below this many operators a rank agreement says nothing


@dataclass
class Bench:
    """A prepared measurement: what all estimators share.

    Attributes:
        contexts, starts: of the scored samples.
        states: of the scored samples, kept between segments by the walk that observed ranges; None when it kept none.
        ranges: scheme name, operator path -> parameters of static activations.
        targets: those that can be scored.
    """

    job: SweepJob
    folder: RunFolder
    progress: Progress
    walker: Walker
    contexts: list[Context]
    starts: list[State]
    states: list[list[State]] | None
    ranges: dict[str, dict[str, Params]]
    targets: list[Target]
    chunk: RowChunk

    def quantizer(self, scheme: Scheme) -> Callable[[Operator], OperatorQuantizer]:
        """Makes an operator's quantizer while its weights are in memory."""
        module = self.walker.module
        return lambda op: make_quantizer(module, op.path, scheme, self.ranges[scheme.name])


def run(job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport:
    """Measure the job's operators; see `Engine`.

    Raises:
        EngineError: no sample reaches the component.
    """
    with _device_mode(job):
        if job.strategy.name == "hawq_v2":
            return hawq.run(job, folder, progress)
        return _run_mse(job, folder, progress)


def _run_mse(job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport:
    walker = Walker(job.model, job.component)
    calibration = [sample for sample in job.calibration.samples if walker.usable(sample)]
    scored = [sample for sample in job.scored if walker.usable(sample)]
    if not scored:
        raise EngineError("none of the scored samples has an image, and the vision tower needs one")
    progress.total(_work(job), "preparing")
    contexts = walker.contexts(calibration)
    starts = walker.starts(contexts)
    first, first_starts = contexts[: len(scored)], starts[: len(scored)]
    forward_s = plain_forward_s(walker, first, first_starts)
    with folder.measuring():
        ranges, states = _observe(job, folder, walker, contexts, starts, len(scored), progress)
        targets = _scorable(job, folder, first)
        chunk = RowChunk(_row_chunk(job, folder, contexts))
        bench = Bench(job, folder, progress, walker, first, first_starts, states, ranges, targets, chunk)
        del starts, states
        report = _measure(bench)
        synchronize(job.device)
    report.forward_s = forward_s
    report.engine_s = folder.seconds
    report.details["row_chunk"] = chunk.size
    return report


def _measure(bench: Bench) -> EngineReport:
    strategy = bench.job.strategy
    report = EngineReport(strategy.estimator, strategy.metric, UNITS[strategy.metric], 0.0, 0.0)
    estimator = "exact" if strategy.direction == "fallback" else strategy.estimator
    if estimator == "exact":
        report.estimator = "exact"
        measure_exact(bench, bench.targets)
        return report
    sketch_run.measure(bench)
    if estimator == "auto":
        chosen, controls = _choose(bench)
        measure_exact(bench, chosen)
        _report_agreement(bench, report, chosen, controls)
    return report


def measure_exact(bench: Bench, targets: Sequence[Target]) -> None:
    """Score targets one by one by the wavefront; a sample is a unit of work."""
    job = bench.job
    if not targets:  # all failed
        return
    walker, contexts, starts = _in_float32(bench)
    base = [op for target in targets for op in target.operators] if job.strategy.direction == "fallback" else []
    for scheme in job.schemes:
        wave = Wavefront(walker, targets, base, bench.quantizer(scheme), bench.chunk)
        for index, (context, start) in enumerate(zip(contexts, starts, strict=True)):
            unit = f"exact-{scheme.name}-{index:05d}"
            if not bench.folder.done(unit):
                results = score_sample(wave, context, start)
                bench.folder.write_finite(
                    unit,
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


def _choose(bench: Bench) -> tuple[list[Target], set[str]]:
    """The targets to measure exactly: the most sensitive by sketch, and random others as a control."""
    strategy, scores = bench.job.strategy, sketch_means(bench)
    ranked = sorted((t for t in bench.targets if t.name in scores), key=lambda t: -scores[t.name])
    top = min(len(ranked), max(FEWEST_EXACT, math.ceil(strategy.exact_share * len(ranked))))
    others = [target.name for target in ranked[top:]]
    count = min(len(others), max(FEWEST_CONTROL, math.ceil(strategy.control_share * len(others))))
    if strategy.control_share == 0:
        count = 0
    controls = set(random.Random(bench.job.seed).sample(others, count))
    names = {target.name for target in ranked[:top]} | controls
    return [target for target in bench.targets if target.name in names], controls


def sketch_means(bench: Bench) -> dict[str, float]:
    """Mean sketch value of every target under the scheme that ranks."""
    frame = bench.folder.frame()
    frame = frame[(frame["estimator"] == "sketch") & (frame["scheme"] == bench.job.scheme.name)]
    return {str(op): float(value) for op, value in frame.groupby("op")["value"].mean().items()}


def _report_agreement(bench: Bench, report: EngineReport, chosen: Sequence[Target], controls: set[str]) -> None:
    frame = bench.folder.frame()
    strategy = bench.job.strategy
    frame = frame[(frame["metric"] == strategy.metric) & (frame["scheme"] == bench.job.scheme.name)]
    means = frame.groupby(["estimator", "op"])["value"].mean()
    names = [t.name for t in chosen if ("exact", t.name) in means.index and ("sketch", t.name) in means.index]
    agreement = rank_agreement([means["exact", n] for n in names], [means["sketch", n] for n in names])
    report.details |= {"exact_operators": len(names), "control_operators": len(controls), "agreement": agreement}
    if agreement is not None and agreement < strategy.agreement_warn:
        report.notes.append(
            f"warning: sketch and exact scores agree with a rank correlation of only {agreement:.2f} on the "
            f"{len(names)} operators that both measured; take strategy.estimator=exact, or more strategy.probes"
        )


def rank_agreement(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman correlation, or None where it says nothing (fewer than three values, or constant ones)."""
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return float(spearmanr(first, second).statistic)


def exact_cost(targets: int) -> float:
    """Forwards of one sample that a wavefront over so many targets costs, about."""
    return targets / 2 + 2


def _work(job: SweepJob) -> float:
    """The whole work in forwards of one sample, for the time left on screen."""
    targets = len(make_targets(job.operators, job.fuse))
    strategy, samples = job.strategy, len(job.scored)
    forward = float(len(job.calibration.samples))
    exact = samples * len(job.schemes)
    if strategy.direction == "fallback" or strategy.estimator == "exact":
        return forward + exact * exact_cost(targets)
    sketched = forward + samples * sketch_run.cost(strategy.probes)
    if strategy.estimator == "sketch":
        return sketched
    top = max(FEWEST_EXACT, math.ceil(strategy.exact_share * targets))
    rest = max(0, targets - top)
    measured = min(targets, top + max(FEWEST_CONTROL, math.ceil(strategy.control_share * rest)))
    return sketched + exact * exact_cost(measured)


def plain_forward_s(walker: Walker, contexts: Sequence[Context], starts: Sequence[State]) -> float:
    """Seconds of one plain forward of the samples through the component, by the one stopwatch."""

    @torch.no_grad()
    def forward(count: int) -> None:
        states = list(starts[:count])
        *inner, last = walker.segments
        for segment in inner:
            walker.advance(segment, contexts[:count], states)
        with walker.weights(last):
            for context, state in zip(contexts, states, strict=False):
                last.run(state, context)  # logits of all samples would take more memory than the model

    warm_up = None if walker.model.streamed else lambda: forward(1)
    return forward_seconds(lambda: forward(len(starts)), walker.model.device, warm_up)


def _observe(
    job: SweepJob,
    folder: RunFolder,
    walker: Walker,
    contexts: Sequence[Context],
    starts: Sequence[State],
    scored: int,
    progress: Progress,
) -> tuple[dict[str, dict[str, Params]], list[list[State]] | None]:
    """Static ranges of all schemes, by a walk over the calibration samples, or as the run being resumed found them.

    The walk keeps the states that the sketch needs, where they fit in memory, so that it need not walk again.
    """
    kept = folder.recall("ranges")
    states: list[list[State]] | None = None
    if kept is None:
        sketched = job.strategy.estimator != "exact" and job.strategy.direction == "requantize"
        together = sketched and sketch_run.group_size(job, folder, walker, starts[:scored]) >= scored
        step = len(contexts) / len(walker.segments)
        ranges, states = walk(
            walker, contexts, starts, job.operators, job.schemes, lambda: progress.step(step), scored if together else 0
        )
        states = states if together else None
        for path, error in ranges.failed.items():
            folder.fail(path, error)
        kept = {
            name: {path: [None if p is None else vars(p) for p in pair] for path, pair in params.items()}
            for name, params in ranges.params.items()
        }
        folder.remember("ranges", kept)
    found = {
        name: {path: (_params(pair[0]), _params(pair[1])) for path, pair in params.items()}
        for name, params in kept.items()
    }
    return found, states


def _params(kept: dict[str, float] | None) -> QuantParams | None:
    if kept is None:
        return None
    return QuantParams(float(kept["scale"]), int(kept["zero_point"]), int(kept["qmin"]), int(kept["qmax"]))


def _scorable(job: SweepJob, folder: RunFolder, contexts: Sequence[Context]) -> list[Target]:
    """Targets without an operator that failed or that no sample reaches."""
    failed = folder.endings()
    no_image = all(context.sample.pixel_values is None for context in contexts)
    targets: list[Target] = []
    for target in make_targets(job.operators, job.fuse):
        if no_image and target.operators[0].component == "vision":
            folder.skip(target.name, "no scored sample has an image")
            continue
        broken = next((op.path for op in target.operators if op.path in failed), None)
        if broken is None:
            targets.append(target)
        elif broken != target.name:
            folder.fail(target.name, f"{broken}: {failed[broken][1]}")
    return targets


def _row_chunk(job: SweepJob, folder: RunFolder, contexts: Sequence[Context]) -> int:
    """Rows advanced together, sized from free memory; a resumed run keeps its own, so that it rounds alike."""
    kept = folder.recall("row_chunk")
    if kept is None:
        config = job.model.config
        tokens = max(context.sample.longest for context in contexts)
        widest = max(config.text_config.intermediate_size, config.text_config.hidden_size)
        per_row = tokens * widest * 4 * 8  # about eight tensors of that width live inside a block
        if job.device.type == "cuda":
            free = torch.cuda.mem_get_info(job.device)[0]
            fitting = int(free * 0.4) // per_row
        else:
            fitting = min(int(free_memory_bytes() * 0.25) // per_row, CPU_CHUNK_TOKENS // tokens)
        kept = job.backend.row_chunk or max(1, min(fitting, 256))
        folder.remember("row_chunk", kept)
    return int(kept)


@contextlib.contextmanager
def _device_mode(job: SweepJob) -> Iterator[None]:
    """TF32 and the thread count as the settings say, for the time of the run."""
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    threads = torch.get_num_threads()
    try:
        torch.backends.cuda.matmul.allow_tf32 = job.backend.tf32
        torch.backends.cudnn.allow_tf32 = job.backend.tf32
        if job.backend.threads is not None:
            torch.set_num_threads(job.backend.threads)
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution
        torch.set_num_threads(threads)
