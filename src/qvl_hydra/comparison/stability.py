"""How many samples are enough: the agreement of small runs with a large one, measured and predicted.

A size is stable when, with the stated confidence, a ranking from so many samples has the stated share of the
reference's top k; and every larger size on the list is stable too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from qvl_hydra.comparison.resampling import (
    SampleTable,
    draw_means,
    draw_weights,
    nested_means,
    resampled_scores,
)
from qvl_hydra.comparison.statistics import kendall, spearman, top_membership, top_overlap

KENDALL_DRAWS = 200  # tau-b is the slow one, and its interval needs no more
Array = np.ndarray


@dataclass(frozen=True)
class Criterion:
    """What counts as stable: `overlap` of the top `top_k` is reached with probability `confidence`."""

    top_k: int = 10
    overlap: float = 0.9
    confidence: float = 0.95


def predicted_curve(
    table: SampleTable, sizes: Sequence[int], criterion: Criterion, draws: int, seed: int, nested: bool
) -> pd.DataFrame:
    """Agreement with a run of this run's size that runs of other sizes would show, from this run's samples alone.

    Args:
        table: per-sample scores with at least two samples.
        sizes: numbers of samples to predict for.
        nested: the smaller set is part of the larger one, as `calibration.size` draws them under one seed; else
            both are drawn apart, which is what "another set of so many samples" would give.

    Returns:
        One row a size: `size`, for each of spearman, kendall, overlap its mean, `_low` and `_high` (the central
        `confidence` of draws), and `p_stable`, the share of draws that reach the overlap asked for.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for size in sizes:
        small, full = (nested_means if nested else draw_means)(table, size, draws, rng)
        found = {
            "spearman": spearman(small, full),
            "kendall": kendall(small[:KENDALL_DRAWS], full[:KENDALL_DRAWS]),
            "overlap": top_overlap(small, full, criterion.top_k),
        }
        row: dict[str, float] = {"size": size}
        for name, values in found.items():
            row |= _summary(name, values, criterion.confidence)
        row["p_stable"] = float((found["overlap"] >= criterion.overlap - 1e-9).mean())
        rows.append(row)
    return pd.DataFrame(rows)


def _summary(name: str, values: Float[Array, " draw"], confidence: float) -> dict[str, float]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return {name: np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan}
    low, high = np.quantile(finite, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {name: float(finite.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}


def smallest_stable_size(curve: pd.DataFrame, confidence: float) -> int | None:
    """The smallest size from which on every row's mean `p_stable` reaches the confidence; None when the largest fails.

    Args:
        curve: rows with `size` and `p_stable`; several rows of one size (seeds) are averaged.
    """
    means = curve.groupby("size")["p_stable"].mean().sort_index(ascending=False)
    stable: int | None = None
    for size, share in means.items():
        if not share >= confidence:
            break
        stable = int(size)  # type: ignore[call-overload]
    return stable


def top_probability(table: SampleTable, k: int, draws: int, seed: int) -> Float[Array, " op"]:
    """Probability of each operator to be among the `k` most sensitive; nan when one sample is all there is."""
    if not table.can_resample:
        return np.full(len(table.scores), np.nan)
    weights = draw_weights(table.samples, draws, np.random.default_rng(seed))
    return top_membership(resampled_scores(table, weights), k).mean(axis=0)


def measured_curve(
    agreement: pd.DataFrame, sizes: Mapping[str, int], seeds: Mapping[str, int], reference: str
) -> pd.DataFrame:
    """Agreement of runs of different calibration sizes with the reference, from the table of pairs.

    Args:
        agreement: `agreement.pairs`.
        sizes, seeds: calibration size and seed of each run, by name.

    Returns:
        One row a run other than the reference: the columns of `predicted_curve`, `run`, `seed`, and `shared`, the
        samples it has in common with the reference.
    """
    rows = []
    for row in agreement.to_dict("records"):
        if reference not in (row["a"], row["b"]):
            continue
        name = row["b"] if row["a"] == reference else row["a"]
        values = {key: row.get(key, np.nan) for key in _CURVE}
        rows.append(
            {"run": name, "size": sizes[name], "seed": seeds[name], "shared": row.get("shared_samples"), **values}
        )
    return pd.DataFrame(rows).sort_values(["size", "seed"], ignore_index=True)


_CURVE = [f"{name}{end}" for name in ("spearman", "kendall", "overlap") for end in ("", "_low", "_high")] + ["p_stable"]
