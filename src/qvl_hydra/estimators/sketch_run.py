"""The sketch: every operator's score from K random probes, one backward pass each, with no loop over operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qvl_hydra.blockwise.walker import Context
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.estimators.bench import Bench, measuring
from qvl_hydra.estimators.first_order import FirstOrder, OperatorChange
from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.estimators.positions import predicted_kinds
from qvl_hydra.estimators.probes import Signs, fisher_probes, leading_directions, sign_probes
from qvl_hydra.estimators.reverse_walk import MakeSampleProbes, cost, reverse_walk
from qvl_hydra.operators.discover import Operator
from qvl_hydra.operators.targets import Target, single_experts
from qvl_hydra.quantization.formats.table import not_offered
from qvl_hydra.quantization.qdq import weight_change
from qvl_hydra.quantization.scheme import Scheme
from qvl_hydra.runs.folder import RunFolder, SampleScore
from qvl_hydra.scores.shrink import ORIGINS, SPLIT


def run(job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport:
    """Score every target by the sketch; see `Engine`.

    Raises:
        EngineError: no sample reaches the component.
    """
    with measuring(job, folder, progress, "sketch", keep_states=True) as bench:
        measure(bench)
    return bench.report


def work(job: SweepJob) -> float:
    """Forwards of one sample that a job costs, about."""
    return len(job.scored) * cost(sketch_of(job).probes)


def measure(bench: Bench) -> None:
    """Sketch every target on every scored sample; what is on disk already is not measured again."""
    reverse_walk(bench, sketch_of(bench.job))


def sketch_of(job: SweepJob) -> Sketch:
    """The sketch that a job asks for."""
    kinds = len(SPLIT) if job.strategy.split_positions else 1
    return Sketch("sketch", job.strategy.probes * kinds, len(job.schemes), kinds)


@dataclass(frozen=True)
class Sketch:
    """The plan of a sketch; see `Plan`.

    Attributes:
        kinds: parts that each probe is taken apart into, by the kind of token that a position predicts; their values
            add up to an estimate of the whole with less noise than the whole probe's.
    """

    name: str
    probes: int
    values: int
    kinds: int = 1

    def targets(self, bench: Bench) -> list[Target]:
        return [*bench.targets, *(single_experts(bench.targets) if bench.job.single_experts else ())]

    def probe_maker(self, bench: Bench) -> MakeSampleProbes:
        strategy = bench.job.strategy

        def signs(sample: Sample, device: torch.device, piece: int) -> list[Signs]:
            names, whole = (bench.job.seed, sample.id, *([piece] if piece else ())), self.probes // self.kinds
            return [Signs(device, *names, probe=k, probes=whole) for k in range(whole)]

        if strategy.metric == "kl":
            return lambda sample, places, output, piece: fisher_probes(output, signs(sample, output.device, piece))
        directions = leading_directions(_last_weight(bench))

        def probes(sample: Sample, places: Tensor, output: Tensor, piece: int) -> Iterator[Tensor]:
            beside = output.shape[-1] - len(directions)  # features that left the vision tower on the way
            drawn = signs(sample, output.device, piece)
            return sign_probes(output, functional.pad(directions, (0, 0, 0, beside)), drawn)

        if self.kinds == 1:
            return probes
        kinds = {context.sample.id: predicted_kinds(context.sample, context.places[0]) for context in bench.contexts}

        def parts(sample: Sample, places: Tensor, output: Tensor, piece: int) -> Iterator[Tensor]:
            own = kinds[sample.id][places].to(output.device, output.dtype)
            for probe in probes(sample, places, output, piece):
                yield from (probe * of_kind[:, None] for of_kind in own.T)

        return parts

    def reading(self, bench: Bench, operators: Sequence[Operator]) -> FirstOrder:
        return first_order(bench, operators, bench.job.strategy.reduction)

    def scores(
        self, bench: Bench, context: Context, targets: Sequence[Target], values: Sequence[Tensor]
    ) -> Iterator[SampleScore]:
        strategy = bench.job.strategy
        scale = 0.5 / int(bench.scored_positions(context)[0].sum()) if strategy.metric == "kl" else 1.0
        apart = [scheme.unflatten(1, (-1, self.kinds)) for scheme in values]
        whole = [scheme.sum(2) for scheme in apart]
        yield from first_order_scores(bench, context.sample, targets, whole, "sketch", strategy.metric, scale)
        if self.kinds > 1:
            for kind, metric in enumerate(SPLIT):
                own = [scheme[:, :, kind] for scheme in apart]
                yield from first_order_scores(bench, context.sample, targets, own, "sketch", metric, scale)


def first_order(bench: Bench, operators: Sequence[Operator], reduction: str) -> FirstOrder:
    """The reading of a segment's operators in every scheme of the job."""
    return FirstOrder(
        {op.path: [_change(bench, op, scheme) for scheme in bench.job.schemes] for op in operators}, reduction
    )


def _change(bench: Bench, op: Operator, scheme: Scheme) -> OperatorChange:
    if not_offered([op], scheme):
        return OperatorChange(Scheme(scheme.name, None, None), None)
    weight: Tensor = bench.walker.module.get_submodule(op.path).weight
    largest = bench.shared_largest(op, scheme)
    change = None if scheme.weight is None else weight_change(weight, scheme.weight, largest)
    return OperatorChange(scheme, change, *bench.ranges[scheme.name].get(op.path, (None, None)))


def _last_weight(bench: Bench) -> Tensor:
    """Weight of the operator that makes the component's output; its segment's weights are in memory."""
    weight: Tensor = bench.walker.module.get_submodule(bench.walker.operators[-1].path).weight
    return weight


def first_order_scores(
    bench: Bench,
    sample: Sample,
    targets: Sequence[Target],
    values: Sequence[Tensor],
    estimator: str,
    metric: str,
    scale: float,
) -> Iterator[SampleScore]:
    """Scores from values (target, probe, part): the sum with its sign, the value, and products between tokens.

    Args:
        scale: of the value in the metric's unit; the signed sum is scaled so that its square is in it, too.
    """  # fmt: skip
    for scheme, by_target in zip(bench.job.schemes, values, strict=True):
        signed = (by_target[..., 0].double() * scale**0.5).tolist()
        scaled = (by_target[..., 1:].double() * scale).tolist()
        for target, sums, probes in zip(targets, signed, scaled, strict=True):
            if not bench.offered(target, scheme):
                continue
            for k, (own, (value, *more)) in enumerate(zip(sums, probes, strict=True)):
                cross, origins = more[: -len(ORIGINS)], more[-len(ORIGINS) :]
                by_weight, by_activation = cross or (None, None)
                yield SampleScore(
                    target.name, sample.id, k, value, metric if target.expert is None else of_expert(metric), estimator,
                    scheme.name, by_weight, by_activation, own, *origins,
                )  # fmt: skip


def of_expert(metric: str) -> str:
    """What the scores of single experts are called, which are no operators of their own."""
    return f"{metric}_of_expert"
