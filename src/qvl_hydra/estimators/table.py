"""The table of estimators: what everybody else must know of each. Nothing here needs torch.

One addition is a module whose function takes `SweepJob`, `RunFolder` and `Progress` and gives an `EngineReport`, and a
row here (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qvl_hydra.reference import load

BOTH = ("requantize", "fallback")


@dataclass(frozen=True)
class Estimator:
    """One way of measuring scores.

    Attributes:
        name: `strategy.estimator`, or with strategy=hawq_v2 `strategy.curvature`.
        run: `module:function`, an engine over the block walker.
        directions: of `strategy.direction` that it measures.
        metrics: of `strategy.metric` that it ranks by; empty: it has a metric of its own.
        metric: that one; `{weighting}` in it stands for what `strategy.weighting` makes of it.
        approximate: its scores are estimates, which are scaled to the exact ones where a run has both.
        weighs_errors: it multiplies with the weight's error, unless `strategy.weighting` is `trace`.
        several: it scores several schemes in one run.
        sketches: it has a gradient at every token, which tells squared errors apart by the kind of token that is
            predicted (`strategy.split_positions`) and scores single experts (`operators.experts`).
        shards: its samples can be measured in several runs and merged.
        why_resident: what it needs all weights in memory for; empty: it works streamed, too.
        work: `module:function`, from a `SweepJob` to the forwards of one sample that it costs, about; empty: it stops
            when its results are good enough.
        races: beyond `work` it goes on for as long as the top of the ranking is in doubt.
    """

    name: str
    run: str
    directions: tuple[str, ...] = BOTH
    metrics: tuple[str, ...] = ()
    metric: str = ""
    approximate: bool = False
    weighs_errors: bool = False
    several: bool = True
    sketches: bool = False
    shards: bool = True
    why_resident: str = ""
    work: str = ""
    races: bool = False

    def faults(self, direction: str, metric: str, placement: str) -> list[str]:
        """What of the settings it cannot do."""
        found = []
        if direction not in self.directions:
            found.append(
                f"strategy.estimator={self.name} measures direction={self.directions[0]}; take exact for {direction}"
            )
        if self.metrics and metric not in (*self.metrics, "auto"):
            able = ", ".join(row.name for row in ESTIMATORS.values() if metric in row.metrics)
            found.append(f"strategy.metric={metric} needs strategy.estimator={able}, not {self.name}")
        if self.why_resident and placement == "streamed":
            found.append(f"strategy with {self.name} needs model.placement=resident: {self.why_resident}")
        return found


_OWN = "qvl_hydra.estimators"
ESTIMATORS = {
    row.name: row
    for row in (
        Estimator(
            "auto", f"{_OWN}.auto:run", ("requantize",), ("squared_error", "kl"), approximate=True,
            sketches=True, work=f"{_OWN}.auto:work", races=True,
        ),
        Estimator(
            "exact", f"{_OWN}.exact_run:run", metrics=("squared_error", "kl", "loss_change"),
            work=f"{_OWN}.exact_run:work",
        ),
        Estimator(
            "sketch", f"{_OWN}.sketch_run:run", ("requantize",), ("squared_error", "kl"), approximate=True,
            sketches=True, work=f"{_OWN}.sketch_run:work",
        ),
        Estimator(
            "gradient", f"{_OWN}.gradient:run", ("requantize",), metric="loss_gradient", approximate=True,
            work=f"{_OWN}.gradient:work",
        ),
        Estimator(
            "gauss_newton", f"{_OWN}.gauss_newton:run", metric="curvature", weighs_errors=True,
            work=f"{_OWN}.sketch_run:work",
        ),
        Estimator(
            "hessian", f"{_OWN}.hawq:run", metric="curvature", weighs_errors=True, several=False,
            shards=False, why_resident="a Hessian product goes through all blocks",
        ),
    )
}  # fmt: skip
CURVATURE_METRICS = {"weight_error": "omega", "trace": "mean_trace"}  # by strategy.weighting


def of_curvature() -> tuple[str, ...]:
    """What `strategy.curvature` can be."""
    return tuple(row.name for row in ESTIMATORS.values() if row.metric == "curvature")


def of_outputs() -> tuple[str, ...]:
    """What `strategy.estimator` can be."""
    return tuple(row.name for row in ESTIMATORS.values() if row.metric != "curvature")


def estimator_of(strategy: str, estimator: str, direction: str, curvature: str) -> Estimator:
    """The row that measures `strategy.name`, `.estimator`, `.direction` and `.curvature`.

    What `auto` does for `fallback` is `exact`, which alone can.
    """
    if strategy == "hawq_v2":
        return ESTIMATORS[curvature]
    if estimator == "auto" and direction not in ESTIMATORS["auto"].directions:
        return ESTIMATORS["exact"]
    return ESTIMATORS[estimator]


def load_estimator(row: Estimator) -> Callable[..., Any]:
    """The function that measures, imported now."""
    return load(row.run)


def work_of(row: Estimator) -> Callable[..., float] | None:
    """The function that knows what a job costs, imported now."""
    return load(row.work) if row.work else None


def ranking_metric(row: Estimator, metric: str, weighting: str) -> str:
    """The metric that a run's scores will be in: `strategy.metric`, or the estimator's own."""
    if row.metrics:
        return metric
    return CURVATURE_METRICS[weighting] if row.metric == "curvature" else row.metric
