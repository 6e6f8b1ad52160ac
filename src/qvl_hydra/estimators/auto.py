"""The default estimator: the sketch of all operators, then the exact score of the most sensitive and of a control."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from scipy.stats import spearmanr

from qvl_hydra.estimators import sketch_run
from qvl_hydra.estimators.bench import Bench, measuring
from qvl_hydra.estimators.exact_run import exact_cost, measure_exact
from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.estimators.reverse_walk import cost
from qvl_hydra.operators.targets import Target, make_targets
from qvl_hydra.runs.folder import RunFolder

FEWEST_EXACT = 30  # at least so many of the most sensitive are measured exactly; the first 20 shall be right
FEWEST_CONTROL = 5  # below this many operators a rank agreement says nothing


def run(job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport:
    """Score every target; see `Engine`.

    Raises:
        EngineError: no sample reaches the component.
    """
    with measuring(job, folder, progress, "auto", _work(job), keep_states=True) as bench:
        sketch_run.measure(bench)
        chosen, controls = _choose(bench)
        measure_exact(bench, chosen)
        _report_agreement(bench, chosen, controls)
    return bench.report


def _work(job: SweepJob) -> float:
    """The work in forwards of one sample."""
    targets, strategy = len(make_targets(job.operators, job.fuse)), job.strategy
    top = max(FEWEST_EXACT, math.ceil(strategy.exact_share * targets))
    rest = max(0, targets - top)
    measured = min(targets, top + max(FEWEST_CONTROL, math.ceil(strategy.control_share * rest)))
    return len(job.scored) * (cost(strategy.probes) + len(job.schemes) * exact_cost(measured))


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


def _report_agreement(bench: Bench, chosen: Sequence[Target], controls: set[str]) -> None:
    frame, report = bench.folder.frame(), bench.report
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
