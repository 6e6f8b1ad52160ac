"""Where the noise of a run's scores comes from, and so what would sharpen its ranking most."""

from __future__ import annotations

import numpy as np
import pandas as pd

BACKWARD, REST = 1.0, 3.0  # forwards of a sample that a probe costs, and all else of a sketch


def spreads(frame: pd.DataFrame, metric: str, scheme: str) -> tuple[float | None, float | None]:
    """Coefficients of variation of one value, medians over operators: between samples, and between a sample's probes.

    Args:
        frame: `sample_scores.parquet`.

    Returns:
        Each None where there are not two of them. The first is what would be left with many probes.
    """
    frame = frame[(frame["metric"] == metric) & (frame["scheme"] == scheme)]
    sketched = frame[frame["probe"].notna()]
    frame = sketched if len(sketched) else frame
    by_sample = frame.groupby(["op", "sample"])["value"].agg(["mean", "var", "size"])
    by_op = by_sample.groupby("op")
    mean = by_op["mean"].mean()
    if by_sample.empty or by_op.size().max() < 2:
        between = None
    else:
        within = by_op.apply(lambda part: (part["var"] / part["size"]).mean()).fillna(0.0)
        variance = (by_op["mean"].var() - within).clip(lower=0.0)
        between = _median(variance**0.5 / mean)
    probes = None if by_sample.empty or by_sample["size"].max() < 2 else _median(by_op["var"].mean() ** 0.5 / mean)
    return between, probes


def _median(values: pd.Series) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.median()) if len(finite) else None


def sharpening(frame: pd.DataFrame, metric: str, scheme: str) -> str:
    """What would sharpen the ranking most; empty where a single sample says nothing of it."""
    between, probes = spreads(frame, metric, scheme)
    if between is None:
        return ""
    samples = frame.loc[frame["metric"] == metric, "sample"].nunique()
    said = f"scores vary by {between:.1f} times their mean from sample to sample"
    more = f"more samples (calibration.size, here {samples} scored) would sharpen the ranking most"
    if probes is None:
        return f"{said}: {more}"
    best = max(1, round((REST / BACKWARD) ** 0.5 * probes / between)) if between > 0 else None
    said += f", and by {probes:.1f} times from probe to probe of a sample"
    own = frame["probe"].max() + 1
    if best is None or best > own:
        wanted = f"more probes (strategy.probes, here {own:.0f})" if best is None else f"strategy.probes={best}"
        return f"{said}: {wanted} would sharpen the ranking most at its cost"
    return f"{said}: {more} at their cost"
