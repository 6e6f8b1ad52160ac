"""The default estimator: the sketch of all operators, then exact scores where they decide.

Measured exactly are the few operators that the sketch puts first, a control drawn at random, and then, in rounds, those
most likely to be on the wrong side of the border of the top k: half of those whose scores it would take for the others
to be sure, since what is measured also says how good the sketch is. An unmeasured operator with the sketch `s` is on
the wrong side with probability `Phi(-|log(s f / border)| / tau)`, where `f` brings the sketch to the exact scores and
`tau` is the spread of their log ratio, both from what has been measured: the median, and a quartile that a few outliers
do not move, since the largest effects are measured first, and of them a first-order sketch is wrong as of no others.
The race ends when the sum of these probabilities, the expected number of operators that are wrongly in or out, is below
`strategy.missed`. Where the errors are too large for a first-order effect, `tau` is large, and more is measured.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, spearmanr

from qvl_hydra.estimators import sketch_run
from qvl_hydra.estimators.bench import Bench, measuring
from qvl_hydra.estimators.exact_run import Exact, exact_cost, reference_states
from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.estimators.reverse_walk import cost
from qvl_hydra.operators.targets import make_targets
from qvl_hydra.quantization.scheme import Scheme
from qvl_hydra.runs.folder import RunFolder

CONTROLS = "controls"  # where a run keeps which operators were drawn, by scheme
RACES = "races"  # where it keeps how each scheme's race ended
FIRST = 6  # operators that the sketch puts first, whose scores decide most and whose errors are largest
ROUND = 4  # operators measured together at least, where as many are wanted
QUARTILE = 1.1503  # that of the distances of normal values from their median which three in four are below
LEAST_SPREAD = 0.05  # of the log ratio of exact and sketch, which a few ratios can make look like nothing
USUAL = 16  # operators that are measured mostly


def run(job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport:
    """Score every target; see `Engine`.

    Raises:
        EngineError: no sample reaches the component.
    """
    with measuring(job, folder, progress, "auto", keep_states=True) as bench:
        known = reference_states(bench)
        sketch_run.measure(bench)
        if job.shard[1] > 1:
            bench.report.notes.append("the operators that decide are measured exactly when the shards are merged")
            return bench.report
        wavefronts = Exact(bench, keep=True, known=known)
        for scheme in job.schemes:
            _race(bench, wavefronts, scheme)
    bench.report.details |= folder.recall(RACES)[job.scheme.name]
    return bench.report


def work(job: SweepJob) -> float:
    """Forwards of one sample that a job costs, about."""
    measured = min(len(make_targets(job.operators, job.fuse)), USUAL)
    return len(job.scored) * (cost(sketch_run.sketch_of(job).probes) + len(job.schemes) * exact_cost(measured))


def _race(bench: Bench, wavefronts: Exact, scheme: Scheme) -> None:
    strategy = bench.job.strategy
    sketched = _means(bench, scheme, "sketch")
    names = [target.name for target in bench.targets if sketched.get(target.name, 0.0) > 0]
    names.sort(key=lambda name: -sketched[name])
    k = min(strategy.top_k, len(names) // 2)
    others = sorted(names[FIRST:])
    controls = random.Random(bench.job.seed).sample(others, min(strategy.controls, len(others)))
    bench.folder.remember(CONTROLS, bench.folder.recall(CONTROLS, {}) | {scheme.name: controls})
    chosen = {*names[:FIRST], *controls}
    turn, missed = 0, 0.0
    measured: set[str] = set()
    exact: dict[str, float] = {}
    while chosen:
        together = [target for target in bench.targets if target.name in chosen]
        wavefronts.measure(together, scheme, f"{turn:02d}")
        turn += 1
        measured |= chosen  # a run that was killed may have left more, which must not change what follows
        exact = {name: value for name, value in _means(bench, scheme, "exact").items() if name in measured}
        wrong = wrong_side({name: sketched[name] for name in names}, exact, k)
        missed = sum(wrong.values())
        surest = sorted(wrong, key=lambda name: wrong[name])
        sure = int(np.searchsorted(np.cumsum([wrong[name] for name in surest]), strategy.missed, side="right"))
        wanted = len(surest) - sure
        chosen = set(surest[len(surest) - max(min(ROUND, wanted), math.ceil(wanted / 2)) :])
    ended = _ended(sketched, exact, controls, k, missed)
    bench.folder.remember(RACES, bench.folder.recall(RACES, {}) | {scheme.name: ended})


def wrong_side(sketched: Mapping[str, float], exact: Mapping[str, float], k: int) -> dict[str, float]:
    """For each operator without an exact score the probability that it is on the wrong side of the top k's border.

    Args:
        sketched: scores above zero of all operators.
        exact: of those that were measured exactly.
    """
    both = [name for name in sketched if exact.get(name, 0.0) > 0]
    unmeasured = [name for name in sketched if name not in exact]
    if not unmeasured or not both or not 0 < k < len(sketched):
        return dict.fromkeys(unmeasured, 0.0)
    ratios = np.log([exact[name] / sketched[name] for name in both])
    factor = float(np.median(ratios))
    spread = max(float(np.quantile(np.abs(ratios - factor), 0.75)) / QUARTILE, LEAST_SPREAD)
    logs = {name: math.log(exact[name]) for name in both} | {
        name: math.log(sketched[name]) + factor for name in unmeasured
    }
    order = sorted(logs.values(), reverse=True)
    border = (order[min(k, len(order)) - 1] + order[min(k, len(order) - 1)]) / 2
    return {name: float(norm.cdf(-abs(logs[name] - border) / spread)) for name in unmeasured}


def _means(bench: Bench, scheme: Scheme, estimator: str) -> dict[str, float]:
    """Mean value of every target under a scheme, as far as it has been measured."""
    frame = bench.folder.frame()
    frame = frame[
        (frame["estimator"] == estimator)
        & (frame["scheme"] == scheme.name)
        & (frame["metric"] == bench.job.strategy.metric)
    ]
    return {str(op): float(value) for op, value in frame.groupby("op")["value"].mean().items()}


def _ended(
    sketched: Mapping[str, float], exact: Mapping[str, float], controls: Sequence[str], k: int, missed: float
) -> dict[str, float | None]:
    drawn = [name for name in controls if name in exact]
    return {
        "exact_operators": len(exact),
        "control_operators": len(drawn),
        "agreement": rank_agreement([exact[name] for name in drawn], [sketched[name] for name in drawn]),
        "top_k": k,
        "expected_wrong_in_top_k": missed,
    }


def doubts(details: Mapping[str, Any], warn: float) -> list[str]:
    """What a report's details say against its sketch, where it agrees with exact scores less than `warn`."""
    agreement = details.get("agreement")
    if agreement is None or agreement >= warn:
        return []
    return [
        f"warning: sketch and exact scores agree with a rank correlation of only {agreement:.2f} on the "
        f"{details['control_operators']} operators drawn at random for it; take strategy.estimator=exact, or more "
        "samples"
    ]


def rank_agreement(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman correlation, or None where it says nothing (fewer than three values, or constant ones)."""
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return float(spearmanr(first, second).statistic)
