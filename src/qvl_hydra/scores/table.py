"""The per-operator table: means, intervals and ranks from per-sample scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm, t

from qvl_hydra.operators.discover import Operator

RESAMPLES = 1000
CONFIDENCE = 0.95
FEWEST_FOR_SCALE = 4  # operators seen by both estimators below which the sketch is not rescaled
COLUMNS = (
    "op", "component", "block", "role", "group", "n_params", "status", "reason", "score", "score_low", "score_high",
    "standard_error", "rank", "metric", "unit", "estimator", "n_samples",
)  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """What a table is made of.

    Attributes:
        operators: everything asked for, in data order; fused groups are one row under the group's name.
        frame: per-sample scores (`RunFolder.frame`).
        endings: status and reason of operators that were not scored.
        metric, unit: of the scores that rank.
        scheme: which scheme's scores to take.
    """

    operators: Sequence[Operator]
    frame: pd.DataFrame
    endings: Mapping[str, tuple[str, str]]
    metric: str
    unit: str
    scheme: str
    fuse: bool = False
    seed: int = 0


def score_table(scored: Scored) -> tuple[pd.DataFrame, float | None]:
    """One row an operator.

    Where an operator was measured exactly that is its score; sketched ones are scaled by the median ratio of both
    estimators on the operators that both saw, so that one order holds all.

    Returns:
        The table (columns `COLUMNS`, then a column of means for each further metric), and the factor of the sketch.
    """
    frame = scored.frame[scored.frame["scheme"] == scored.scheme]
    ranking = frame[frame["metric"] == scored.metric]
    values = {
        (str(estimator), str(op)): _by_sample(part)
        for (estimator, op), part in ranking.groupby(["estimator", "op"], sort=False)
    }
    factor = _sketch_factor(values)
    samples = ranking.groupby(["estimator", "op"])["sample"].nunique().to_dict()
    rows = [_row(scored, name, members, values, factor) for name, members in _units(scored)]
    for row in rows:
        if row["status"] == "scored":
            row["n_samples"] = int(samples[row["estimator"], row["op"]])
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table["block"] = table["block"].astype("Int64")
    table["rank"] = _ranks(table)
    for metric, part in frame[frame["metric"] != scored.metric].groupby("metric"):
        means = part.groupby("op")["value"].mean()
        table[str(metric)] = table["op"].map(means).astype("float64")
    return table, factor


def _units(scored: Scored) -> list[tuple[str, list[Operator]]]:
    groups: dict[str, list[Operator]] = {}
    for op in scored.operators:
        groups.setdefault(op.group if scored.fuse else op.path, []).append(op)
    return list(groups.items())


def _by_sample(part: pd.DataFrame) -> NDArray[np.float64]:
    """One mean a sample; of a single sample, its probes."""
    means = part.groupby("sample", sort=False)["value"].mean().to_numpy(dtype=np.float64)
    return part["value"].to_numpy(dtype=np.float64) if len(means) == 1 else means


def _sketch_factor(values: Mapping[tuple[str, str], NDArray[np.float64]]) -> float | None:
    ratios = [
        found.mean() / sketched.mean()
        for (estimator, op), found in values.items()
        if estimator == "exact" and (sketched := values.get(("sketch", op))) is not None
        if found.mean() > 0 and sketched.mean() > 0
    ]
    return float(np.exp(np.median(np.log(ratios)))) if len(ratios) >= FEWEST_FOR_SCALE else None


def _row(
    scored: Scored,
    name: str,
    members: Sequence[Operator],
    values: Mapping[tuple[str, str], NDArray[np.float64]],
    factor: float | None,
) -> dict[str, object]:
    first = members[0]
    row: dict[str, object] = dict.fromkeys(COLUMNS)
    row |= {
        "op": name,
        "component": first.component,
        "block": first.block,
        "role": first.role if len(members) == 1 else name.rsplit(".", 1)[-1],
        "group": first.group,
        "n_params": sum(op.n_params for op in members),
        "metric": scored.metric,
        "unit": scored.unit,
        "reason": "",
    }
    estimator = next((kind for kind, op in values if op == name and kind != "sketch"), "sketch")
    found = values.get((estimator, name))
    if name in scored.endings:
        row["status"], row["reason"] = scored.endings[name]
    elif found is None or not len(found):
        row["status"], row["reason"] = "skipped", "the run ended before it was scored"
    else:
        scale = (factor or 1.0) if estimator == "sketch" else 1.0
        low, high, error = bootstrap_interval(found * scale, scored.seed)
        row |= {
            "status": "scored",
            "score": float(found.mean() * scale),
            "score_low": low,
            "score_high": high,
            "standard_error": error,
            "estimator": estimator,
        }
    return row


def _ranks(table: pd.DataFrame) -> pd.Series:
    """1 = most sensitive; equal scores rank in data order."""
    scores = pd.to_numeric(table["score"])
    return scores.where(table["status"] == "scored").rank(ascending=False, method="first").astype("Int64")


def bootstrap_interval(
    values: NDArray[np.float64], seed: int, confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    """Interval for the mean of independent values, and its standard error.

    Bootstrap percentiles, taken further out as a t quantile is further out than a normal one, without which few samples
    give too short an interval (Hesterberg 2015, What Teachers Should Know About the Bootstrap, section 3.3).

    Args:
        values: one a sample; the resampling unit.
        seed: of the resampling.

    Returns:
        Low, high, standard error; all NaN for a single value.
    """
    count = len(values)
    if count < 2:
        return float("nan"), float("nan"), float("nan")
    outside = norm.cdf(np.sqrt(count / (count - 1)) * t.ppf((1 - confidence) / 2, count - 1))
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    means = weights @ values / count
    low, high = np.quantile(means, [outside, 1 - outside])
    return float(low), float(high), float(values.std(ddof=1) / np.sqrt(count))
