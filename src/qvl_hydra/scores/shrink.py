"""Brings a sketch's products between tokens into its values, as far as they stand out from their noise.

The sum over tokens of squares leaves the products between different tokens out. Their mean is what that sum is biased
by, and they are what makes the square of the sum noisy. So their ratio to the sum of squares is shrunk: operators share
a mean ratio, and an operator's own ratio departs from it by the share of the spread between operators that sampling
noise does not explain (empirical Bayes; Morris 1983, Parametric Empirical Bayes Inference). With few probes that is
the sum of squares times a common factor, with many it is the unbiased square of the sum. No ratio is moved further than
noise reaches, so that an operator unlike all others keeps what is its own (Efron and Morris 1972, Limiting the Risk of
Bayes and Empirical Bayes Estimators). Products of the weights' error and those of the activations' are shrunk apart,
since only the first is the same error at every token.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

CROSS = ("weight_cross", "activation_cross")
ORIGINS = ("from_image", "from_text", "from_answer")  # columns of what comes in at each kind of token
SPLIT = ("squared_error_at_image", "squared_error_at_text", "squared_error_at_answer")  # by the kind that is predicted
REACH = 0.95  # one-sided confidence with which noise does not reach further than a ratio may be moved
SMALLEST_FACTOR = 0.05  # the squared length of a sum is not negative, whatever noise makes of its products


def shrunk(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with sketch values combined and the columns of products taken away.

    Args:
        frame: columns of `SampleScore`; rows without products stay as they are.
    """
    has = frame["weight_cross"].notna() | frame["activation_cross"].notna()
    if has.any():
        frame = frame.copy()
        for _, part in frame[has].groupby(["scheme", "metric"]):
            factors = _factors(part)
            frame.loc[part.index, "value"] = part["value"] * part["op"].map(factors)
    return frame.drop(columns=list(CROSS))


def _factors(part: pd.DataFrame) -> pd.Series:
    """For each operator what its sum of squares is multiplied with."""
    by_op = part.groupby("op", sort=False)
    squares = by_op["value"].mean()
    factor = pd.Series(1.0, index=squares.index)
    for name in CROSS:
        ratio = (by_op[name].mean() / squares).replace([np.inf, -np.inf], np.nan).fillna(0.0)
        error = (by_op[name].std(ddof=1) / by_op[name].count() ** 0.5 / squares).fillna(0.0)
        factor += shrink_ratios(ratio.to_numpy(), error.to_numpy(), int(by_op.size().max()))
    return factor.clip(lower=SMALLEST_FACTOR)


def shrink_ratios(ratios: NDArray[np.float64], errors: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Ratios drawn towards their mean by the share of their variance that their standard errors explain.

    Args:
        count: values that each standard error is from; from one it is not known, and all ratios become their mean.
    """
    mean = ratios.mean()
    if count < 2:
        return np.full_like(ratios, mean)
    noise = float(np.mean(errors**2))
    spread = max(0.0, float(ratios.var()) - noise)
    kept = spread / (spread + noise) if spread + noise > 0 else 0.0
    reach = stats.t.ppf(REACH, count - 1) * noise**0.5
    return np.clip(mean + kept * (ratios - mean), ratios - reach, ratios + reach)
