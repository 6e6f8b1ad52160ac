"""Where noise comes from, on values whose variances are known."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from qvl_hydra.scores.spread import sharpening, spreads


def frame(between: float, within: float, samples: int = 400, probes: int = 4) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for op in ("a", "b", "c"):
        for sample in range(samples):
            centre = 10 * (1 + between * rng.normal())
            for probe in range(probes):
                rows.append((op, f"s{sample}", probe, centre + 10 * within * rng.normal(), "kl", "w8"))
    made = pd.DataFrame(rows, columns=["op", "sample", "probe", "value", "metric", "scheme"])
    return made.astype({"probe": "Int64"})


def test_both_spreads_are_told_apart() -> None:
    between, probes = spreads(frame(0.3, 0.6), "kl", "w8")
    assert between == pytest.approx(0.3, rel=0.15)
    assert probes == pytest.approx(0.6, rel=0.05)


def test_what_would_sharpen() -> None:
    assert "more samples (calibration.size, here 400 scored)" in sharpening(frame(0.9, 0.9), "kl", "w8")
    assert re.search(r"strategy\.probes=1\d would", sharpening(frame(0.1, 0.8), "kl", "w8"))
    assert "more samples" in sharpening(frame(0.9, 0.9, probes=1), "kl", "w8")
    assert "more probes (strategy.probes, here 2) would" in sharpening(frame(0.0, 0.8, samples=2, probes=2), "kl", "w8")
    assert sharpening(frame(0.9, 0.9, samples=1), "kl", "w8") == ""
