"""The per-operator table: means, intervals and ranks from per-sample scores."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qvl_hydra.operators.discover import Operator
from qvl_hydra.scores.interval import CONFIDENCE, intervals
from qvl_hydra.scores.shrink import ORIGINS, SPLIT

SKETCH = "sketch"  # the estimator whose scores are scaled to the exact ones
MEDIAN_NOISE = 1.2533  # standard error of a median in that of a mean, of normal values
FEWEST_FOR_SCALE = 4  # operators seen by both estimators below which the sketch is not rescaled
CENSUS_COLUMNS = ("input_max", "weight_max", "output_max", "row_ratio", "nonfinite")
COLUMNS = (
    "op", "component", "block", "role", "group", "n_params", "status", "reason", "score", "score_low", "score_high",
    "standard_error", "rank", "metric", "unit", "estimator", "n_samples", "steady_score",
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
        controls: operators drawn at random to be measured exactly, too.
        census: largest values of each operator, by module path; of a fused one its members' largest are taken.
        not_offered: gives the reason why operators cannot have the scheme, or None.
    """

    operators: Sequence[Operator]
    frame: pd.DataFrame
    endings: Mapping[str, tuple[str, str]]
    metric: str
    unit: str
    scheme: str
    fuse: bool = False
    controls: Collection[str] = ()
    census: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    not_offered: Callable[[Sequence[Operator]], str | None] = lambda operators: None


def score_table(scored: Scored) -> tuple[pd.DataFrame, float | None]:
    """One row an operator.

    Where an operator was measured exactly that is its score; sketched ones are scaled by the median ratio of both
    estimators on the operators that both saw, so that one order holds all.

    Returns:
        The table (columns `COLUMNS`, then a column of means for each further metric), and the factor of the sketch.
    """
    frame = scored.frame[scored.frame["scheme"] == scored.scheme]
    frame = frame[frame["op"].isin([name for name, _ in _units(scored)])]  # without single experts
    ranking = frame[frame["metric"] == scored.metric]
    values = {
        (str(estimator), str(op)): _by_sample(part)
        for (estimator, op), part in ranking.groupby(["estimator", "op"], sort=False)
    }
    factor, doubt = _sketch_factor(values, scored.controls)
    samples = ranking.groupby(["estimator", "op"])["sample"].nunique().to_dict()
    found = [_found(scored, name, values, factor) for name, _ in _units(scored)]
    rows = [_row(scored, name, members, own) for (name, members), own in zip(_units(scored), found, strict=True)]
    _add_intervals(rows, [own[1] for own in found], doubt)
    for row in rows:
        if row["status"] == "scored":
            row["n_samples"] = int(samples[row["estimator"], row["op"]])
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table["block"] = table["block"].astype("Int64")
    table["rank"] = _ranks(table)
    table["steady_score"] = _steady(scored, ranking, table, factor)
    if scored.census:
        members = [[scored.census[op.path] for op in own if op.path in scored.census] for _, own in _units(scored)]
        for name in CENSUS_COLUMNS:
            table[name] = [max((float(own[name]) for own in row), default=np.nan) for row in members]
    _add_origins(table, ranking)
    for metric, part in frame[frame["metric"] != scored.metric].groupby("metric"):
        sketched = part["estimator"] == SKETCH
        means = part[~sketched].groupby("op")["value"].mean()
        means = means.combine_first(part[sketched].groupby("op")["value"].mean() * (factor or 1.0))
        table[str(metric)] = table["op"].map(means).astype("float64")
    return table, factor


def _steady(scored: Scored, ranking: pd.DataFrame, table: pd.DataFrame, factor: float | None) -> pd.Series:
    """Scores with samples weighed by the inverse root of what quantizing loses on them, for KL; else none.

    What answers lose differs by orders of magnitude from sample to sample, so that a mean is that of a few samples. The
    weights leave the sum over all operators as it is.
    """
    none = pd.Series(np.nan, index=table.index, dtype="float64")
    if scored.metric != "kl" or ranking.empty:
        return none
    wide = ranking.pivot_table(index=["estimator", "op"], columns="sample", values="value").clip(lower=0)
    values, estimators = wide.to_numpy(dtype=np.float64), wide.index.get_level_values("estimator")
    totals = np.nansum(values[estimators == estimators.value_counts().idxmax()], axis=0)
    if not (totals > 0).any():
        return none
    weights = np.divide(1.0, np.sqrt(totals), out=np.zeros_like(totals), where=totals > 0)
    weights *= totals.sum() / (totals * weights).sum()
    steady = dict(zip(wide.index, np.nanmean(values * weights, axis=1), strict=True))
    scale = {SKETCH: factor or 1.0}
    rows = zip(table["estimator"], table["op"], strict=True)
    return pd.Series([steady.get(row, np.nan) * scale.get(row[0], 1.0) for row in rows], table.index, dtype="float64")


def _add_origins(table: pd.DataFrame, ranking: pd.DataFrame) -> None:
    """Shares of an operator's effect that come in at image, text and answer tokens, where a sketch has told them."""
    if not ranking[list(ORIGINS)].notna().any(axis=None):
        return
    sums = ranking.groupby("op")[list(ORIGINS)].sum()
    totals = sums.sum(axis=1)
    for name in ORIGINS:
        table[name] = table["op"].map(sums[name] / totals.where(totals > 0)).astype("float64")


def origins(table: pd.DataFrame) -> dict[str, float]:
    """The same of all of the language tower's operators together, each weighed by its score; empty where not told."""
    sums = origins_by_role(table).sum()
    return {name.removeprefix("from_"): float(sums[name] / sums["score"]) for name in ORIGINS} if len(sums) else {}


def changes(table: pd.DataFrame) -> dict[str, float]:
    """Shares of the squared error at positions that predict each kind of token, of all operators where it is told."""
    sums = changes_by_role(table).sum()
    return {name.rpartition("_")[2]: float(sums[name] / sums["score"]) for name in SPLIT} if len(sums) else {}


def changes_by_role(table: pd.DataFrame) -> pd.DataFrame:
    """Squared errors by role, and how much of them is where each kind of token is predicted; the highest first."""
    if SPLIT[0] not in table:
        return pd.DataFrame()
    own = table[(table["status"] == "scored") & table[SPLIT[0]].notna()]
    parts = own[list(SPLIT)].clip(lower=0)
    return _by_role(own["role"], parts, parts.sum(axis=1))


def origins_by_role(table: pd.DataFrame) -> pd.DataFrame:
    """The language tower's scores by role, and what of them comes in at each kind of token; the highest first."""
    if ORIGINS[0] not in table:
        return pd.DataFrame()
    own = table[(table["component"] == "lm") & (table["status"] == "scored") & table[ORIGINS[0]].notna()]
    score = own["score"].astype(float).clip(lower=0)
    return _by_role(own["role"], own[list(ORIGINS)].mul(score, axis=0), score)


def _by_role(roles: pd.Series, parts: pd.DataFrame, score: pd.Series) -> pd.DataFrame:
    """Sums of scores and of their parts by role; empty where there is only one part, or nothing at all."""
    if (parts > 0).any().sum() < 2:
        return pd.DataFrame()
    sums = parts.assign(score=score).groupby(roles.to_numpy()).sum().sort_values("score", ascending=False)
    sums = sums[sums["score"] > 0]
    return sums if len(sums) else pd.DataFrame()


def _add_intervals(rows: list[dict[str, object]], values: list[NDArray[np.float64]], doubt: float) -> None:
    """Intervals of the scored rows; those of one estimator share what few samples cannot tell."""
    for estimator in {row["estimator"] for row in rows if row["status"] == "scored"}:
        own = [index for index, row in enumerate(rows) if row["estimator"] == estimator and row["status"] == "scored"]
        extra = np.full(len(own), doubt if estimator == SKETCH else 0.0)
        found = intervals([values[index] for index in own], extra, CONFIDENCE)
        for index, low, high, error in zip(own, *found, strict=True):
            rows[index] |= {"score_low": float(low), "score_high": float(high), "standard_error": float(error)}


def _units(scored: Scored) -> list[tuple[str, list[Operator]]]:
    groups: dict[str, list[Operator]] = {}
    for op in scored.operators:
        groups.setdefault(op.group if scored.fuse else op.path, []).append(op)
    return list(groups.items())


def _by_sample(part: pd.DataFrame) -> NDArray[np.float64]:
    """One mean a sample; of a single sample, its probes."""
    means = part.groupby("sample", sort=False)["value"].mean().to_numpy(dtype=np.float64)
    return part["value"].to_numpy(dtype=np.float64) if len(means) == 1 else means


def _sketch_factor(
    values: Mapping[tuple[str, str], NDArray[np.float64]], controls: Collection[str]
) -> tuple[float | None, float]:
    """What brings sketched scores to exact ones, and its relative standard error.

    From the operators drawn at random for it, where there are enough: those that were measured because they are
    sensitive are not like the rest.
    """
    ratios = {
        op: found.mean() / sketched.mean()
        for (estimator, op), found in values.items()
        if estimator == "exact" and (sketched := values.get((SKETCH, op))) is not None
        if found.mean() > 0 and sketched.mean() > 0
    }
    drawn = [ratio for op, ratio in ratios.items() if op in controls]
    logs = np.log(drawn if len(drawn) >= FEWEST_FOR_SCALE else list(ratios.values()))
    if len(logs) < FEWEST_FOR_SCALE:
        return None, 0.0
    return float(np.exp(np.median(logs))), float(MEDIAN_NOISE * logs.std(ddof=1) / len(logs) ** 0.5)


def _found(
    scored: Scored, name: str, values: Mapping[tuple[str, str], NDArray[np.float64]], factor: float | None
) -> tuple[str, NDArray[np.float64]]:
    """The estimator that a row's score is by, and its values in the unit of the exact ones."""
    estimator = next((kind for kind, op in values if op == name and kind != SKETCH), SKETCH)
    own = values.get((estimator, name), np.empty(0))
    return estimator, own * ((factor or 1.0) if estimator == SKETCH else 1.0)


def _row(
    scored: Scored, name: str, members: Sequence[Operator], found: tuple[str, NDArray[np.float64]]
) -> dict[str, object]:
    first, (estimator, values) = members[0], found
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
    if reason := scored.not_offered(members):
        row["status"], row["reason"] = "skipped", reason
    elif name in scored.endings:
        row["status"], row["reason"] = scored.endings[name]
    elif not len(values):
        row["status"], row["reason"] = "skipped", "the run ended before it was scored"
    else:
        row |= {"status": "scored", "score": float(values.mean()), "estimator": estimator}
    return row


def _ranks(table: pd.DataFrame) -> pd.Series:
    """1 = most sensitive; equal scores rank in data order."""
    scores = pd.to_numeric(table["score"])
    return scores.where(table["status"] == "scored").rank(ascending=False, method="first").astype("Int64")
