"""The table of estimators: what everybody else must know of each. Nothing here needs torch.

One addition is a module whose function takes `SweepJob`, `RunFolder` and `Progress` and gives an `EngineReport`, and a
row here (docs/extending.md).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Estimator:
    """One way of measuring scores.

    Attributes:
        name: `strategy.estimator`, or what strategy=hawq_v2 measures with.
        run: `module:function`, an engine over the block walker.
        directions: of `strategy.direction` that it measures.
        metrics: of `strategy.metric` that it ranks by; empty: it has a number of its own.
        placements: of `model.placement` that it works with.
        why_resident: what it needs all weights for, where it does not work streamed.
    """

    name: str
    run: str
    directions: tuple[str, ...] = ("requantize", "fallback")
    metrics: tuple[str, ...] = ("squared_error", "kl", "loss_change")
    placements: tuple[str, ...] = ("resident", "streamed")
    why_resident: str = ""


ESTIMATORS = {
    row.name: row
    for row in (
        Estimator("exact", "qvl_hydra.estimators.exact_run:run"),
        Estimator(
            "sketch", "qvl_hydra.estimators.sketch_run:run", ("requantize",), ("squared_error", "kl")
        ),
        Estimator("auto", "qvl_hydra.estimators.auto:run", ("requantize",), ("squared_error", "kl")),
        Estimator(
            "hutchinson", "qvl_hydra.estimators.hawq:run", metrics=(), placements=("resident",),
            why_resident="a Hessian product goes through all blocks",
        ),
    )
}  # fmt: skip


def estimator_of(strategy: str, estimator: str, direction: str) -> Estimator:
    """The row that measures `strategy.name`, `.estimator` and `.direction`.

    What `auto` does for `fallback` is `exact`, which alone can.
    """
    if strategy == "hawq_v2":
        return ESTIMATORS["hutchinson"]
    if estimator == "auto" and direction not in ESTIMATORS["auto"].directions:
        return ESTIMATORS["exact"]
    return ESTIMATORS[estimator]


def load_estimator(row: Estimator) -> Callable[..., Any]:
    """The function that measures, imported now."""
    module, _, function = row.run.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found
