"""The gradient estimator: the first-order change of the answer's loss, squared; one backward pass and no probe noise.

With `g` the gradient of a sample's loss (mean over its answer tokens) at an operator's output and `delta` the change of
that output in the scheme, `sum_t <g_t, delta_t>` over the whole sequence is the first-order change of the loss. Its
sign is chance, so its square is the score. What other tools compute from the same pass squares every element by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from qvl_hydra.blockwise.walker import Context
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.estimators.bench import Bench, measuring
from qvl_hydra.estimators.first_order import FirstOrder
from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.estimators.metrics import UNITS
from qvl_hydra.estimators.positions import predicted_tokens
from qvl_hydra.estimators.probes import loss_gradient
from qvl_hydra.estimators.reverse_walk import MakeSampleProbes, cost, reverse_walk
from qvl_hydra.estimators.sketch_run import first_order, first_order_scores
from qvl_hydra.operators.discover import Operator
from qvl_hydra.operators.targets import Target
from qvl_hydra.runs.folder import RunFolder, SampleScore

METRIC = "loss_gradient"


def run(job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport:
    """Score every target; see `Engine`.

    Raises:
        EngineError: no sample reaches the component.
    """
    with measuring(job, folder, progress, "gradient", True, logits=True) as bench:
        reverse_walk(bench, Gradient("gradient", 1, len(job.schemes)))
    bench.report.metric, bench.report.unit = METRIC, UNITS[METRIC]
    return bench.report


def work(job: SweepJob) -> float:
    """Forwards of one sample that a job costs, about."""
    return len(job.scored) * cost(1)


@dataclass(frozen=True)
class Gradient:
    """The plan of the gradient estimator; see `Plan`."""

    name: str
    probes: int
    values: int

    def targets(self, bench: Bench) -> list[Target]:
        return bench.targets

    def probe_maker(self, bench: Bench) -> MakeSampleProbes:
        def gradient(sample: Sample, places: Tensor, output: Tensor, piece: int) -> list[Tensor]:
            return [loss_gradient(output, predicted_tokens(sample)[places].to(output.device))]

        return gradient

    def reading(self, bench: Bench, operators: Sequence[Operator]) -> FirstOrder:
        return first_order(bench, operators, "sequence")

    def scores(
        self, bench: Bench, context: Context, targets: Sequence[Target], values: Sequence[Tensor]
    ) -> Iterator[SampleScore]:
        (mask,) = bench.scored_positions(context)
        tokens = int((predicted_tokens(context.sample)[mask] >= 0).sum())
        return first_order_scores(bench, context.sample, targets, values, "gradient", METRIC, 1 / max(tokens, 1) ** 2)
