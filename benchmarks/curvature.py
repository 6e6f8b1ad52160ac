"""How well Gauss-Newton curvature ranks what an operator's weight error does, and how steady it is.

    python -m benchmarks.curvature [model ...]     # the bundled models; all without a name

Weights alone, in 4 and 8 bits. Truth is exact KL at the answer on the same 32 samples; the spread is that of seeds, of
each operator's score relative to its mean. Cost is measured, in forwards of the samples.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np
from rich.console import Console
from scipy.stats import spearmanr

from benchmarks.jobs import (
    BUNDLED,
    SCHEMES,
    bundled_model,
    bundled_samples,
    make_job,
    measure,
    save_results,
    with_strategy,
)

SAMPLES, SEEDS, PROBES = 32, 8, (1, 4, 16)


def rows_of(name: str) -> list[dict[str, Any]]:
    """One row a scheme and number of probes."""
    model = bundled_model(name)
    samples = bundled_samples(model, SAMPLES)
    rows = []
    for scheme in ("w4a16", "w8a16"):
        job = make_job(model, samples, SCHEMES[scheme], estimator="exact", metric="kl", positions="answer")
        truth, _ = measure(job)
        for probes in PROBES:
            own = with_strategy(job, name="hawq_v2", estimator="gauss_newton", probes=probes)
            runs = [measure(dataclasses.replace(own, seed=seed)) for seed in range(SEEDS)]
            scores = np.array([[found[op] for op in truth] for found, _ in runs])
            ranks = [spearmanr(list(truth.values()), row).statistic for row in scores]
            spread = scores.std(0, ddof=1) / scores.mean(0)
            rows.append(
                {
                    "model": name, "scheme": scheme, "probes": probes, "rank": float(np.mean(ranks)),
                    "spread": float(np.median(spread)), "most": float(spread.max()),
                    "forwards": float(np.median([report.engine_s / report.forward_s for _, report in runs])),
                }
            )  # fmt: skip
    return rows


def main() -> None:
    console, rows = Console(width=100), []
    console.print(f"{'model':16} {'scheme':7} {'probes':>6} {'rank':>6} {'spread':>7} {'most':>6} {'forwards':>8}")
    for name in sys.argv[1:] or BUNDLED:
        for row in rows_of(name):
            rows.append(row)
            console.print(
                f"{name:16} {row['scheme']:7} {row['probes']:6} {row['rank']:6.3f} {row['spread']:7.1%} "
                f"{row['most']:6.1%} {row['forwards']:8.1f}"
            )
    console.print(f"written: {save_results('curvature', rows)}")


if __name__ == "__main__":
    main()
