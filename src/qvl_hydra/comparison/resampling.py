"""Resampled scores: what the score vector might have been with other calibration samples.

The Bayesian bootstrap (Rubin 1981): each sample gets an exponential weight instead of a count. The weight belongs to
the sample, not to the run, so runs that share samples move together and runs that share none move apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

Array = np.ndarray


@dataclass(frozen=True)
class SampleTable:
    """Per-sample scores of one run.

    Attributes:
        scores: the run's score of each operator, shape (op,).
        values: one row an operator, one column a sample, each the mean over its probes; nan where not measured.
        samples: ids of the columns.
    """

    scores: Float[Array, " op"]
    values: Float[Array, "op sample"]
    samples: tuple[str, ...]

    @property
    def can_resample(self) -> bool:
        """Whether there are two samples at least; one says nothing about others."""
        return self.values.shape[1] >= 2


def sample_table(scores: pd.Series, sample_scores: pd.DataFrame) -> SampleTable:
    """Per-sample scores as a matrix, operators in the order of `scores`.

    Values are scaled to the operator's score, which a run may have rescaled (sketched scores beside exact ones).

    Args:
        scores: score of each operator, indexed by its path.
        sample_scores: rows with `op`, `sample`, `value`, already of one metric and scheme.
    """
    wide = sample_scores.pivot_table(index="op", columns="sample", values="value", aggfunc="mean", sort=False)
    found, values = scores.to_numpy(float), wide.reindex(scores.index).to_numpy(float)
    means = np.nansum(values, axis=1) / np.maximum(np.isfinite(values).sum(axis=1), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.where(found * means > 0, found / means, 1.0)
    return SampleTable(found, values * scale[:, None], tuple(map(str, wide.columns)))


def draw_weights(samples: Sequence[str], draws: int, rng: np.random.Generator) -> dict[str, Float[Array, " draw"]]:
    """An exponential weight for each distinct sample and draw."""
    return {name: rng.exponential(size=draws) for name in dict.fromkeys(samples)}


def resampled_scores(table: SampleTable, weights: dict[str, Float[Array, " draw"]]) -> Float[Array, "draw op"]:
    """Score vectors under the weights, around the run's own scores.

    Deviations are widened by sqrt((n + 1) / (n - 1)), which makes their variance that of a mean of n samples: the
    weights alone fall short of it, at n = 4 by a quarter.
    """
    draws = len(next(iter(weights.values())))
    if not table.can_resample:
        return np.broadcast_to(table.scores, (draws, len(table.scores))).copy()
    weight = np.stack([weights[name] for name in table.samples])  # sample, draw
    measured = np.isfinite(table.values)
    values = np.where(measured, table.values, 0.0)
    count = measured.sum(axis=1)
    total = measured.astype(float) @ weight  # op, draw
    with np.errstate(invalid="ignore", divide="ignore"):
        moved = (values @ weight) / total - (values.sum(axis=1) / count)[:, None]
        widen = np.where(count > 1, np.sqrt((count + 1) / (count - 1)), 0.0)
    return (table.scores[:, None] + np.nan_to_num(moved) * widen[:, None]).T


def draw_means(
    table: SampleTable, size: int, draws: int, rng: np.random.Generator
) -> tuple[Float[Array, "draw op"], Float[Array, "draw op"]]:
    """Scores from `size` samples and from as many as the run has, twice over: what a smaller run would have given.

    Both are drawn from the run's samples with replacement. The first pair shares no draw; see `nested_means` for sets
    where the smaller is part of the larger.

    Returns:
        Scores of the small sets and of the full sets.
    """
    return _means(table, size, draws, rng), _means(table, table.values.shape[1], draws, rng)


def nested_means(
    table: SampleTable, size: int, draws: int, rng: np.random.Generator
) -> tuple[Float[Array, "draw op"], Float[Array, "draw op"]]:
    """As `draw_means`, with the small set being the first `size` samples of the full one."""
    full = table.values.shape[1]
    chosen = rng.integers(full, size=(draws, max(size, full)))
    return _mean_of(table, chosen[:, :size]), _mean_of(table, chosen[:, :full])


def _means(table: SampleTable, size: int, draws: int, rng: np.random.Generator) -> Float[Array, "draw op"]:
    return _mean_of(table, rng.integers(table.values.shape[1], size=(draws, size)))


def _mean_of(table: SampleTable, chosen: Array) -> Float[Array, "draw op"]:
    """Mean scores over chosen samples; spread widened by sqrt(n / (n - 1)) to that of the population."""
    full = table.values.shape[1]
    counts = np.zeros((len(chosen), full))
    np.add.at(counts, (np.arange(len(chosen))[:, None], chosen), 1.0)
    measured = np.isfinite(table.values)
    values = np.where(measured, table.values, 0.0)
    centre = values.sum(axis=1) / np.maximum(measured.sum(axis=1), 1)
    total = counts @ measured.T
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(total > 0, counts @ values.T / total, centre)
    return table.scores + (means - centre) * np.sqrt(full / max(full - 1, 1))
