"""How well runs agree, pair by pair, with intervals over calibration samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from qvl_hydra.comparison.resampling import SampleTable, draw_weights, resampled_scores
from qvl_hydra.comparison.runs import FEWEST, Mapped
from qvl_hydra.comparison.stability import KENDALL_DRAWS, Criterion
from qvl_hydra.comparison.statistics import correlation_interval, kendall, share_interval, spearman, top_overlap

ALL_PAIRS = 12  # runs up to which every pair is compared; beyond, each with the reference


def pairs(runs: Sequence[Mapped], criterion: Criterion, draws: int, seed: int) -> pd.DataFrame:
    """Agreement of every pair of runs, with intervals over calibration samples.

    Samples that two runs share are resampled together; see `resampling`.

    Returns:
        One row a pair: `a`, `b`, `common` operators, `shared_samples`, `top_k` used, then for each of spearman,
        kendall, overlap the value with `_low` and `_high`, `p_stable`, and `note` where a number is missing.
    """
    reference = runs[0]
    couples = itertools.combinations(runs, 2) if len(runs) <= ALL_PAIRS else ((reference, run) for run in runs[1:])
    return pd.DataFrame([pair(a, b, criterion, draws, seed) for a, b in couples])


def pair(
    a: Mapped, b: Mapped, criterion: Criterion, draws: int, seed: int, ops: pd.Index | None = None
) -> dict[str, Any]:
    """Agreement of two runs on the operators both scored (of `ops`, when given)."""
    both = a.scores.notna() & b.scores.notna()
    common = both.index[both] if ops is None else both.index[both].intersection(ops, sort=False)
    row: dict[str, Any] = {"a": a.name, "b": b.name, "common": len(common), "note": ""}
    if len(common) < FEWEST:
        return {**row, "note": f"{len(common)} operators in common, at least {FEWEST} are needed"}
    x, y = a.scores[common].to_numpy(float), b.scores[common].to_numpy(float)
    k = min(criterion.top_k, max(1, len(common) // 2))  # the top of a few is not the top when it is all of them
    tables = a.samples(common), b.samples(common)
    row |= {"shared_samples": len(set(tables[0].samples) & set(tables[1].samples)), "top_k": k}
    row |= {"spearman": float(spearman(x, y)), "kendall": float(kendall(x, y)), "overlap": float(top_overlap(x, y, k))}
    row["note"] = "; ".join(_notes(a, b, x, y, tables))
    if all(table.can_resample for table in tables):
        row |= _intervals(row, tables, criterion, draws, seed)
        told = [(run.run.run.model_sha, run.run.run.scheme) for run in (a, b)]
        if not row["shared_samples"] and told[0] == told[1] and told[0][0] is not None:
            row["p_stable"] = _apart(row, tables, criterion, draws, seed)
    return row


def _apart(
    row: Mapping[str, Any], tables: tuple[SampleTable, SampleTable], criterion: Criterion, draws: int, seed: int
) -> float:
    """P(stable) of two runs of one model on samples of their own.

    Both are drawn about the mean of all samples together: about its own noisy scores, a run's noise would count twice.
    """
    weights = draw_weights(tables[0].samples + tables[1].samples, draws, np.random.default_rng(seed))
    counts = [len(table.samples) for table in tables]
    union = sum(count * table.scores for count, table in zip(counts, tables, strict=True)) / sum(counts)
    drawn = []
    for table in tables:
        with np.errstate(invalid="ignore", divide="ignore"):
            scale = np.where(table.scores * union > 0, union / table.scores, 1.0)
        drawn.append(resampled_scores(table, weights) * scale)
    return float((top_overlap(drawn[0], drawn[1], row["top_k"]) >= criterion.overlap - 1e-9).mean())


def _intervals(
    row: Mapping[str, Any], tables: tuple[SampleTable, SampleTable], criterion: Criterion, draws: int, seed: int
) -> dict[str, float]:
    weights = draw_weights(tables[0].samples + tables[1].samples, draws, np.random.default_rng(seed))
    first, second = (resampled_scores(table, weights) for table in tables)
    found: dict[str, float] = {}
    for name, values in (
        ("spearman", spearman(first, second)),
        ("kendall", kendall(first[:KENDALL_DRAWS], second[:KENDALL_DRAWS])),
    ):
        found[f"{name}_low"], found[f"{name}_high"] = correlation_interval(row[name], values, criterion.confidence)
    overlaps = top_overlap(first, second, row["top_k"])
    found["overlap_low"], found["overlap_high"] = share_interval(row["overlap"], overlaps, criterion.confidence)
    found["p_stable"] = float((overlaps >= criterion.overlap - 1e-9).mean())
    return found


def _notes(
    a: Mapped, b: Mapped, x: np.ndarray, y: np.ndarray, tables: tuple[SampleTable, SampleTable]
) -> Iterator[str]:
    for run, values, table in ((a, x, tables[0]), (b, y, tables[1])):
        if np.ptp(values) == 0:
            yield f"{run.name} scored all operators the same: it ranks nothing"
        if not table.can_resample:
            yield f"{run.name} has {table.values.shape[1]} per-sample scores: no interval"
