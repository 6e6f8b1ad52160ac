"""The curve from everything quantized to everything in high precision, measured, with baselines of the same budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.profiles.baselines import baseline_profiles
from qvl_hydra.profiles.costs import ERROR, LEAVE
from qvl_hydra.profiles.joint import Interactions
from qvl_hydra.profiles.measure import Measurement, measure_profiles
from qvl_hydra.profiles.prices import Terms
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.profiles.select import Budget, left_alone, profile_of
from qvl_hydra.profiles.units import Unit
from qvl_hydra.quantization.qdq import OperatorQuantizer
from qvl_hydra.runs.folder import RunFolder

COLUMNS = (
    "chooser",  # scores, or a baseline
    "budget",
    "value",
    "n_high",
    "share_high",
    "average_bits",
    "weight_bytes",
    "predicted",  # sum of the quantized operators' scores, in the sweep's metric
    "predicted_joint",  # the same with interactions; null where the sweep has no signed sums
    "predicted_low",  # interval of 95 %
    "predicted_high",
    "measured",  # the same quantity measured, all quantized at once; null for a metric that is not measured (omega)
    "squared_error",
    "kl",
    "kl_answer",
    "loss",
    "exact_match",
    "recovered",  # share of the exact match that quantizing everything loses, won back; null where nothing is lost
)


FIGURES = ("cost", "average_bits", "weight_bytes", "predicted", "kl_answer", "kl", "loss", "exact_match")  # of a plan


@dataclass(frozen=True)
class Candidate:
    """A profile and the budget it was chosen for."""

    budget: Budget
    profile: Profile


def spectrum_budgets(units: Sequence[Unit], shares: Sequence[float]) -> list[Budget]:
    """The budgets of a spectrum between its ends: what must stay in high precision anyhow, and everything."""
    return [Budget("share", share) for share in shares if _least(units) < share < 1]


def _least(units: Sequence[Unit]) -> float:
    """The share of operators that must stay in high precision."""
    total = sum(len(unit.members) for unit in units)
    return sum(len(unit.members) for unit in units if unit.stays) / total


def candidates(
    units: Sequence[Unit],
    decided: Mapping[Budget, Profile],
    terms: Terms,
    errors: Mapping[str, float] | None,
    ranges: Mapping[str, float],
) -> list[Candidate]:
    """Every profile to measure: both ends, the one decided on for each budget, and the baselines of each.

    Args:
        terms: what they were decided with; of one scheme.
        errors: weight error of each operator; None leaves all baselines out.
        ranges: width of each operator's input range.
    """
    total = sum(len(unit.members) for unit in units)
    least, all_of_it = _least(units), Budget("share", 1.0)
    (scheme,) = terms.schemes.values()
    quantized = profile_of(units, np.array([unit.stays for unit in units]), scheme, terms.high_bits, "scores")
    in_float = left_alone(units, scheme, terms.high_bits)
    found: list[Candidate] = []
    every = {Budget("share", least): quantized, all_of_it: in_float, **decided}
    for item in sorted(every, key=lambda budget: (budget.kind != "share", budget.value)):
        best = every[item]
        found.append(Candidate(item, best))
        if errors is not None and least * total < len(best.high) < total:
            same = Budget("count", len(best.high)) if item.kind == ERROR else item
            others = baseline_profiles(units, same, terms, errors, ranges)
            found += [Candidate(item, other) for other in others]
    if all(item.profile.low for item in found):  # scores of zero or less do not ask to leave everything
        found.append(Candidate(all_of_it, dataclasses.replace(in_float, chooser="float")))
    return found


def measure_curve(
    model: LoadedModel,
    found: Sequence[Candidate],
    quantizers: Mapping[str, OperatorQuantizer],
    samples: Sequence[Sample],
    component: str,
    metric: str,
    each: Callable[[], None] = lambda: None,
    interactions: Interactions | None = None,
    folder: RunFolder | None = None,
) -> pd.DataFrame:
    """Measure every candidate.

    Args:
        metric: of the scores, which `predicted` is in; `kl_answer` is KL at the answer's positions.
        interactions: of the scores.
        each, folder: as of `measure_profiles`.

    Returns:
        One row a candidate, with the columns of `COLUMNS`: the content of `profiles.parquet`.
    """
    measured = measure_profiles(model, [item.profile for item in found], quantizers, samples, component, each, folder)
    low = measured[0]  # the first candidate quantizes all that may be
    high = next(value for item, value in zip(found, measured, strict=True) if not item.profile.low)
    rows = [
        _row(item, value, low, high, metric) | _joint(item, interactions)
        for item, value in zip(found, measured, strict=True)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def described(found: Sequence[Candidate], table: pd.DataFrame) -> dict[str, Any]:
    """The plans among the candidates, for `plans.json`: what each leaves and puts where, and what it costs.

    Args:
        table: from `measure_curve`, a row a candidate.

    Returns:
        Operators in data order, the choices that occur, and for each plan its figures and the choice of each operator
        by its place among the choices.
    """
    operators = found[0].profile.operators
    choices = list(dict.fromkeys([LEAVE, *(name for item in found for name in item.profile.schemes)]))
    plans: dict[Any, dict[str, Any]] = {}
    for item, row in zip(found, table.to_dict("records"), strict=True):
        profile = item.profile
        if profile.chooser == "scores":
            own = {op.path: choices.index(profile.scheme_of(op).name) for op in profile.low}
            figures = {name: None if pd.isna(row[name]) else row[name] for name in FIGURES if name in row}
            budget = {"kind": item.budget.kind, "value": item.budget.value}
            plans[profile.key] = {"budget": budget, **figures, "of": [own.get(op.path, 0) for op in operators]}
    return {"operators": [op.path for op in operators], "choices": choices, "plans": list(plans.values())}


def best_baseline(table: pd.DataFrame, budget: str, value: float) -> pd.Series | None:
    """The baseline of this budget with the highest exact match (of equals, the lowest KL); None without baselines."""
    same = table[(table["budget"] == budget) & (table["value"] == value) & (table["chooser"] != "scores")]
    if same.empty:
        return None
    return same.sort_values(["exact_match", "kl"], ascending=[False, True]).iloc[0]


def _row(
    item: Candidate, value: Measurement, low: Measurement, high: Measurement, metric: str
) -> dict[str, object]:
    in_metric = dataclasses.asdict(value) | {"loss_change": value.loss - high.loss}
    lost = high.exact_match - low.exact_match
    profile = item.profile
    return {
        "chooser": profile.chooser,
        "budget": item.budget.kind,
        "value": item.budget.value,
        "n_high": len(profile.high),
        "share_high": profile.share_high,
        "average_bits": profile.average_bits,
        "weight_bytes": profile.weight_bytes,
        "predicted": profile.predicted,
        "measured": in_metric.get(metric),
        **dataclasses.asdict(value),
        "recovered": (value.exact_match - low.exact_match) / lost if lost > 0 else None,
    }


def _joint(item: Candidate, interactions: Interactions | None) -> dict[str, float | None]:
    names = ("predicted_joint", "predicted_low", "predicted_high")
    if interactions is None:
        return dict.fromkeys(names)
    low = {name for op in item.profile.low for name in (op.path, op.group)}
    return dict(zip(names, interactions.joint(low), strict=True))
