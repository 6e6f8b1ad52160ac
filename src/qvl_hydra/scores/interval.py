"""Intervals of mean scores from few samples, which are far from normal: one sample can be a hundred times another.

Both bounds are factors about the mean, since scores are positive and their errors multiply:

- `mean x exp(-+ t e)` with `e` the relative standard error and `t` Student's quantile. Few samples of a skewed
  distribution seldom hold its tail, and then both the mean and its error come out too small; so `e` is at least the
  root mean square of the errors of all operators.
- No mean of what was drawn knows of the tail that was not, so the upper bound is at least that of Cox for the mean of a
  log-normal distribution (Zhou and Gao 1997, Confidence intervals for the log-normal mean), with the logarithms'
  variance taken from what is above their median alone, since real ones lean upwards:
  `exp(l + v/2 + t sqrt(v/n + 5/4 v^2/(n-1)))` with `l` the mean of the logarithms and `v` twice the mean square of what
  is above their median, whose own variance is `5 v^2/n` where they are normal. `v` is half an operator's own and half
  that of all, since a variance from few samples is noisy.

Scores that can be negative (what an operator gains, a change of the loss) keep Student's interval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64
from scipy.stats import t

CONFIDENCE = 0.95
UNBOUNDED = 1000.0  # times a score: so few samples do not bound its mean from above
FLOOR = 1e-8  # of a sample's value, relative to the mean: a zero has no logarithm
Array = np.ndarray


def intervals(
    values: Sequence[Float[Array, "_sample"]], extra: Float[Array, " op"] | None = None, confidence: float = CONFIDENCE
) -> tuple[Float[Array, " op"], Float[Array, " op"], Float[Array, " op"]]:
    """Intervals for the means of several operators, which share what few samples cannot tell.

    Args:
        values: of each operator, one a sample.
        extra: relative error of each operator's score that its samples do not show (of the factor it was scaled by).
        confidence: with which an interval holds the mean.

    Returns:
        Low, high and standard error of each mean; NaN where an operator has one value.
    """
    count = np.array([len(own) for own in values])
    mean = np.array([own.mean() if len(own) else np.nan for own in values])
    error = np.array([own.std(ddof=1) / len(own) ** 0.5 if len(own) > 1 else np.nan for own in values])
    extra = np.zeros(len(values)) if extra is None else extra
    error = np.hypot(error, extra * mean)
    quantile = t.ppf((1 + confidence) / 2, np.maximum(count - 1, 1))
    if any((own < 0).any() for own in values):
        return mean - quantile * error, mean + quantile * error, error
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        relative = np.where(mean > 0, error / mean, np.nan)
        usual = np.sqrt(np.nanmean(relative**2)) if np.isfinite(relative).any() else np.nan
        factor = np.exp(quantile * np.fmax(relative, usual))
        low, high = mean / factor, np.fmax(mean * factor, _upper_log_normal(values, mean, count, quantile))
    constant = (mean == 0) & (count > 1)
    unknown = count < 2
    low, high = np.where(constant, 0.0, low), np.where(constant, 0.0, high)
    return np.where(unknown, np.nan, low), np.where(unknown, np.nan, high), error


def interval_text(score: float, low: float, high: float, digits: int = 3) -> str:
    """An interval in words; an upper bound that is no bound to anyone is not told. Empty where there is none."""
    if np.isnan(low) or np.isnan(high):
        return ""
    if score > 0 and high > UNBOUNDED * score:
        return f"above {low:.{digits}g}"
    return f"{low:.{digits}g} to {high:.{digits}g}"


def _upper_log_normal(
    values: Sequence[Float[Array, "_sample"]],
    mean: Float[Array, " op"],
    count: Int64[Array, " op"],
    quantile: Float[Array, " op"],
) -> Float[Array, " op"]:
    floors = [FLOOR * max(own_mean, 0.0) for own_mean in np.nan_to_num(mean)]
    logs = [np.log(np.maximum(own, floor)) for own, floor in zip(values, floors, strict=True)]
    centre = np.array([own.mean() if len(own) else np.nan for own in logs])
    spread = np.array([_spread_above(own) if len(own) > 1 else np.nan for own in logs])
    if not np.isfinite(spread).any():
        return mean * np.nan
    spread = 0.5 * spread + 0.5 * np.nanmean(spread)
    reach = quantile * np.sqrt(spread / count + 1.25 * spread**2 / np.maximum(count - 1, 1))
    return np.exp(centre + spread / 2 + reach)


def _spread_above(logs: Float[Array, " sample"]) -> float:
    """The variance as what is above the median shows it: more than it is where a distribution leans upwards."""
    return float(2 * (np.maximum(logs - np.median(logs), 0.0) ** 2).sum() / (len(logs) - 1))
