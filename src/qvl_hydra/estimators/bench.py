"""A prepared measurement over the block walker: what exact, sketch and auto share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from qvl_hydra.blockwise.census import OperatorCensus, warnings
from qvl_hydra.blockwise.plain_forward import PlainForward, plain_forward
from qvl_hydra.blockwise.ranges import NONE, Params, walk
from qvl_hydra.blockwise.stopwatch import synchronize
from qvl_hydra.blockwise.walker import Context, Walker
from qvl_hydra.errors import EngineError
from qvl_hydra.estimators.groups import groups, shard_of
from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.estimators.metrics import unit_of
from qvl_hydra.estimators.positions import scored_positions, without_answer
from qvl_hydra.estimators.rows import RowChunk
from qvl_hydra.families.stages import State
from qvl_hydra.models.memory import free_memory_bytes
from qvl_hydra.operators.discover import Operator
from qvl_hydra.operators.targets import Target, make_targets
from qvl_hydra.quantization.apply import make_quantizer, shared_largest
from qvl_hydra.quantization.formats.record import QuantParams
from qvl_hydra.quantization.formats.table import not_offered
from qvl_hydra.quantization.qdq import OperatorQuantizer
from qvl_hydra.quantization.scheme import Scheme
from qvl_hydra.runs.folder import RunFolder

FORWARD = "forward"  # what a plain forward takes; a merged run has its shards' together
RANGES = "ranges"  # static ranges of all schemes, by operator
CENSUS = "census"  # where a run keeps how large everything gets, by operator
CPU_CHUNK_TOKENS = 4096  # more tokens at a time than this no longer make CPU products faster, and cost memory


@dataclass
class Bench:
    """A prepared measurement.

    Attributes:
        contexts, starts: of the scored samples, of a shard its own.
        states: of the last group of scored samples, kept between segments by the walk that observed ranges; None when
            it kept none.
        plain: what a plain forward of the scored samples takes.
        ranges: scheme name, operator path -> parameters of static activations.
        targets: those that can be scored.
        report: what is said beside the scores; filled in by the estimator.
        first: place of the first of these among all scored samples.
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
    report: EngineReport
    plain: PlainForward
    first: int = 0

    def quantizer(self, scheme: Scheme) -> Callable[[Operator], OperatorQuantizer]:
        """Makes an operator's quantizer while its weights are in memory."""
        module = self.walker.module
        return lambda op: make_quantizer(
            module, op.path, scheme, self.ranges[scheme.name], self.shared_largest(op, scheme)
        )

    def offered(self, target: Target, scheme: Scheme) -> bool:
        """Whether every operator of a target can be put into a scheme."""
        return not_offered(target.operators, scheme) is None

    def shared_largest(self, op: Operator, scheme: Scheme) -> Tensor | None:
        """The largest |weight| of all operators that share a tensor scale with one; None where none does.

        Operators that are scored as one target share what a runtime gives them together.
        """
        own = self._fused.get(op.path)
        return None if own is None else shared_largest(self.walker.module, own.operators, scheme).get(op.group)

    @cached_property
    def _fused(self) -> dict[str, Target]:
        """The target of each operator that is scored with others, by the operator's path."""
        return {op.path: target for target in self.targets if len(target.operators) > 1 for op in target.operators}

    def scored_positions(self, context: Context) -> list[Bool[Tensor, "token"]]:
        """For each sample of a context the positions that count."""
        return [
            scored_positions(sample, image_tokens[: sample.input_ids.numel()], self.job.strategy.positions)
            for sample, image_tokens in zip(context.samples, context.places, strict=True)
        ]


@contextmanager
def measuring(
    job: SweepJob,
    folder: RunFolder,
    progress: Progress,
    estimator: str,
    keep_states: bool,
    logits: bool = False,
) -> Iterator[Bench]:
    """Prepare a measurement, time a plain forward, and count the seconds until the end as measuring.

    Args:
        estimator: what the report says that scores were measured with.
        keep_states: keep the states between segments that the sketch needs, where they fit in memory.
        logits: start from the logits even where the vision tower alone is scored.

    Raises:
        EngineError: no sample reaches the component.
    """
    walker = Walker(job.model, "full" if logits and job.component == "vision" else job.component)
    calibration = [sample for sample in job.calibration.samples if walker.usable(sample)]
    scored = [sample for sample in job.scored if walker.usable(sample)]
    if not scored:
        raise EngineError("none of the scored samples has an image, and the vision tower needs one")
    own = shard_of(len(scored), job.shard)
    if own.start == own.stop:
        raise EngineError(f"shard={job.shard[0]}/{job.shard[1]} has no sample of {len(scored)}; take fewer shards")
    progress.total(len(calibration) * (2 if walker.prefix else 1) + own.stop - own.start, "preparing")
    contexts = walker.contexts(calibration)
    starts = walker.starts(contexts, lambda: progress.step(len(contexts) / len(walker.prefix)))
    every, first, first_starts = contexts[: len(scored)], contexts[own], starts[own]
    scored = scored[own]
    plain = _plain_forward(folder, walker, first, first_starts, progress)
    metric, positions = job.strategy.metric, job.strategy.positions
    lacking = without_answer(scored) if positions == "answer" else 0
    unit = unit_of(metric, "text" if lacking == len(scored) else positions)
    report = EngineReport(estimator, metric, unit, plain.seconds, 0.0)
    if lacking:
        report.notes.append(
            f"{lacking} of {len(scored)} scored samples have no answer: they are judged at all text positions; give "
            "the calibration source answers, or take strategy.positions=text for all alike"
        )
    with folder.measuring():
        kept = slice(*groups(job, folder, plain.state_bytes, own.start)[-1]) if keep_states else NONE
        ranges, states = _observe(job, folder, walker, contexts, starts, kept, progress, plain.shares)
        targets = _scorable(job, folder, every)
        counted = folder.recall(CENSUS, {})
        report.notes += warnings(
            {op.path: OperatorCensus(**counted[op.path]) for op in job.operators if op.path in counted}
        )
        chunk = RowChunk(_row_chunk(job, folder, contexts))
        del starts
        yield Bench(
            job, folder, progress, walker, first, first_starts, states, ranges, targets, chunk, report, plain,
            own.start,
        )  # fmt: skip
        synchronize(job.device)
        report.engine_s = folder.seconds
    report.details["row_chunk"] = chunk.size


def _plain_forward(
    folder: RunFolder, walker: Walker, contexts: Sequence[Context], starts: Sequence[State], progress: Progress
) -> PlainForward:
    """What a plain forward takes; a resumed run keeps what it measured."""
    known = folder.recall(FORWARD)
    if known is not None:
        progress.step(len(contexts))
        return PlainForward(**known)
    plain = plain_forward(walker, contexts, starts, lambda: progress.step(len(contexts) / len(walker.segments)))
    folder.remember(FORWARD, asdict(plain))
    return plain


def _observe(
    job: SweepJob,
    folder: RunFolder,
    walker: Walker,
    contexts: Sequence[Context],
    starts: Sequence[State],
    keep: slice,
    progress: Progress,
    shares: Sequence[float],
) -> tuple[dict[str, dict[str, Params]], list[list[State]] | None]:
    """Static ranges of all schemes, by a walk over the calibration samples, or as an earlier run found them.

    The walk keeps the states of the samples `keep`, so that the sketch need not walk again.
    """
    known = folder.recall(RANGES, {})
    states: list[list[State]] | None = None
    if unknown := [scheme for scheme in job.schemes if scheme.name not in known]:
        steps = (len(contexts) * share for share in shares)
        ranges, states = walk(
            walker, contexts, starts, job.operators, unknown, lambda: progress.step(next(steps)), keep
        )
        states = states or None
        for path, error in ranges.failed.items():
            folder.fail(path, error)
        known |= {
            name: {path: [None if p is None else vars(p) for p in pair] for path, pair in params.items()}
            for name, params in ranges.params.items()
        }
        folder.remember(RANGES, known)
        folder.remember(CENSUS, {path: vars(own) for path, own in ranges.census.found.items()})
    else:
        progress.step(len(contexts))
    found = {
        name: {path: (_params(pair[0]), _params(pair[1])) for path, pair in params.items()}
        for name, params in known.items()
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
        text = config.get_text_config()
        widest = max(text.intermediate_size, text.hidden_size)
        per_row = tokens * widest * 4 * 8  # about eight tensors of that width live inside a block
        if job.device.type == "cuda":
            free = torch.cuda.mem_get_info(job.device)[0]
            fitting = int(free * 0.4) // per_row
        else:
            fitting = min(int(free_memory_bytes() * 0.25) // per_row, CPU_CHUNK_TOKENS // tokens)
        kept = job.backend.row_chunk or max(1, min(fitting, 256))
        folder.remember("row_chunk", kept)
    return int(kept)
