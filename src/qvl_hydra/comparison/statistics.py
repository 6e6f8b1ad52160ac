"""Agreement of two score vectors: Spearman, Kendall, overlap of the top k. Functions take rows of vectors at once.

Scores that are all equal rank nothing: correlations with them are nan, and their top k is an equal share of each.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Real
from scipy import stats

Array = np.ndarray


def spearman(a: Real[Array, "*#row op"], b: Real[Array, "*#row op"]) -> Float[Array, "*#row"]:
    """Rank correlation of scores, ties at their mean rank; nan where one side is constant or has fewer than two values.

    Args:
        a, b: scores of the same operators in the same order, without nan.
    """
    if a.shape[-1] < 2:
        return np.full(np.broadcast_shapes(a.shape[:-1], b.shape[:-1]), np.nan)
    x, y = (stats.rankdata(values, axis=-1) for values in (a, b))
    x, y = (ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (x, y))
    scale = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, (x * y).sum(axis=-1) / scale, np.nan)


def kendall(a: Real[Array, "*#row op"], b: Real[Array, "*#row op"]) -> Float[Array, "*#row"]:
    """Kendall's tau-b; nan where one side is constant or has fewer than two values."""
    a, b = np.broadcast_arrays(a, b)
    shape = a.shape[:-1]
    if a.shape[-1] < 2:
        return np.full(shape, np.nan)
    rows = zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True)
    return np.array([_kendall_row(x, y) for x, y in rows]).reshape(shape)


def _kendall_row(x: Array, y: Array) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(stats.kendalltau(x, y).statistic)


def top_membership(scores: Real[Array, "*row op"], k: int) -> Float[Array, "*row op"]:
    """How much of each operator is among the `k` highest scores: 1, 0, or an equal share of those tied at the border.

    Each row sums to `k`, or to the number of operators when that is smaller.
    """
    k = min(k, scores.shape[-1])
    border = np.partition(scores, -k, axis=-1)[..., -k, None]
    above, tied = scores > border, scores == border
    left = k - above.sum(axis=-1, keepdims=True)
    return above + tied * (left / tied.sum(axis=-1, keepdims=True))


def top_overlap(a: Real[Array, "*#row op"], b: Real[Array, "*#row op"], k: int) -> Float[Array, "*#row"]:
    """Share of the top k that two rankings have in common, 0 to 1.

    Operators tied at the border share the places that are left, so a constant score overlaps as much as chance would.
    """
    k = min(k, a.shape[-1])
    return np.asarray(np.minimum(top_membership(a, k), top_membership(b, k)).sum(axis=-1) / k)


def correlation_interval(estimate: float, resampled: Float[Array, " draw"], confidence: float) -> tuple[float, float]:
    """Interval of a correlation from its resampled values: normal in Fisher's z, so that it holds the estimate.

    The percentiles of the resampled values themselves lie too low: each draw adds the noise of sampling once more.

    Args:
        estimate: the correlation of the scores as they are.
        resampled: its values over draws; nan draws are left out.
        confidence: such as 0.95.

    Returns:
        Low and high end; nan for both when the estimate or all draws are nan.

    Source:
        Fisher's z-transformation with a bootstrap standard error (Efron & Tibshirani 1993, sections 12.6 and 13.2).
    """
    draws = resampled[np.isfinite(resampled)]
    if not np.isfinite(estimate) or len(draws) < 2:
        return float("nan"), float("nan")
    limit = 1 - 1e-9  # z of a correlation of 1 is infinite
    z = np.arctanh(np.clip(estimate, -limit, limit))
    spread = np.std(np.arctanh(np.clip(draws, -limit, limit)), ddof=1)
    if abs(estimate) >= limit:  # equal rankings: only one side is left, and percentiles say where it ends
        low = float(min(estimate, np.quantile(draws, 1 - confidence)))
        return (low, estimate) if estimate > 0 else (estimate, float(max(estimate, np.quantile(draws, confidence))))
    reach = stats.norm.ppf(0.5 + confidence / 2) * spread
    return float(np.tanh(z - reach)), float(np.tanh(z + reach))


def share_interval(estimate: float, resampled: Float[Array, " draw"], confidence: float) -> tuple[float, float]:
    """Interval of a share (an overlap): percentiles of its resampled values, widened to hold the estimate."""
    draws = resampled[np.isfinite(resampled)]
    if not np.isfinite(estimate) or len(draws) < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(min(low, estimate)), float(max(high, estimate))
