"""How well the sketch ranks, and what it costs, against the exact estimator, operators on their own.

    python -m benchmarks.sketch

On the bundled model and on a 36-block shape with injected outlier channels; 8 samples; each variant and number of
probes over several seeds, the mean and the worst shown. `auto` is the default estimator, which measures the most
sensitive operators of the `shrunk` sketch exactly; `element` is the elementwise label-gradient score that other tools
use (one backward pass of the task loss, `benchmarks.peers`); `other samples` is the exact score on 8 others, which
shows how much the choice of samples moves a ranking. Writes the figure of docs/estimators.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from benchmarks.jobs import (
    COMPARED,
    SCHEMES,
    bundled_model,
    bundled_samples,
    make_job,
    measure,
    outlier_model,
    save_results,
    text_samples,
    with_strategy,
)
from benchmarks.peers import peer_scores
from qvl_hydra.estimators.job import SweepJob

SAMPLES, TOP = 8, 20
SEEDS = {"bundled": {1: 24, 4: 8, 16: 4}, "36 blocks": {1: 4, 4: 4, 16: 2}}  # fewer probes scatter more
VARIANTS = ("shrunk", "split", "token", "sequence")
PROBES = (1, 4, 16)
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "sketch_rank_correlation.png"


def jobs() -> Iterator[tuple[str, str, SweepJob, SweepJob]]:
    """Model name, metric, a job for each scheme, and the same job on other samples."""
    bundled = bundled_model()
    wide = outlier_model()
    scenes = bundled_samples(bundled, 2 * SAMPLES)
    texts = text_samples(wide, 2 * SAMPLES, 64)
    for scheme in (SCHEMES[name] for name in COMPARED):
        for metric in ("squared_error", "kl"):
            halves = (scenes[:SAMPLES], scenes[SAMPLES:])
            first, other = (make_job(bundled, samples, scheme, metric=metric) for samples in halves)
            yield "bundled", metric, first, other
        first, other = (make_job(wide, samples, scheme) for samples in (texts[:SAMPLES], texts[SAMPLES:]))
        yield "36 blocks", "squared_error", first, other


def compare(exact: Mapping[str, float], sketch: Mapping[str, float]) -> tuple[float, int]:
    """Rank correlation, and how many of the most sensitive operators are the same."""
    names = list(exact)
    rank = spearmanr([exact[op] for op in names], [sketch[op] for op in names]).statistic
    first, second = (set(sorted(names, key=scores.__getitem__)[-TOP:]) for scores in (exact, sketch))
    return float(rank), len(first & second)


def study(model: str, metric: str, job: SweepJob, other: SweepJob) -> list[dict[str, Any]]:
    """One row a variant and number of probes."""
    exact, _ = measure(with_strategy(job, estimator="exact"))
    same = {"model": model, "metric": metric, "scheme": job.scheme.name, "operators": len(exact)}
    rank, top = compare(exact, measure(with_strategy(other, estimator="exact"))[0])
    rows: list[dict[str, Any]] = [
        {**same, "variant": "other samples", "rank_correlation": rank, f"same_of_top_{TOP}": top}
    ]
    settings = [(variant, probes) for variant in VARIANTS for probes in PROBES] + [("auto", 4), ("element", 1)]
    for variant, probes in settings:
        found = []
        for seed in range(1 if variant == "element" else SEEDS[model][probes]):
            if variant == "element":
                found.append((*compare(exact, peer_scores(job, job.scored)["elementwise"]), float("nan"), 0.0))
                continue
            if variant == "auto":
                made = with_strategy(job, estimator="auto", probes=probes)
            else:
                made = with_strategy(job, estimator="sketch", reduction=variant, probes=probes)
            sketch, report = measure(dataclasses.replace(made, seed=seed))
            ratios = [sketch[op] / exact[op] for op in exact if exact[op] > 0 and sketch[op] > 0]
            bias = float(np.median(np.log(ratios)))
            found.append((*compare(exact, sketch), report.engine_s / report.forward_s, bias))
        ranks, tops, costs, biases = (list(column) for column in zip(*found, strict=True))
        rows.append(
            {
                **same, "variant": variant, "probes": probes, "rank_correlation": float(np.mean(ranks)),
                "worst_rank_correlation": min(ranks), f"same_of_top_{TOP}": float(np.mean(tops)),
                "forward_equivalents": float(np.median(costs)), "median_log_bias": float(np.mean(biases)),
            }
        )  # fmt: skip
    return rows


def draw(rows: list[dict[str, Any]]) -> None:
    panels = list(dict.fromkeys((row["model"], row["scheme"], row["metric"]) for row in rows))
    figure, axes = plt.subplots(3, 3, figsize=(11, 9), sharex=True, sharey=True)
    for axis, panel in zip(axes.flat, panels, strict=True):
        inside = [row for row in rows if (row["model"], row["scheme"], row["metric"]) == panel]
        for variant in VARIANTS:
            line = [row for row in inside if row["variant"] == variant]
            axis.plot([row["probes"] for row in line], [row["rank_correlation"] for row in line], "o-", label=variant)
        baseline = next(row for row in inside if row["variant"] == "element")
        axis.axhline(baseline["rank_correlation"], color="grey", ls="--", label="label gradient, elementwise")
        axis.set(title=f"{panel[0]}, {panel[1]}, {panel[2]}", xscale="log", xticks=PROBES, ylim=(0.8, 1.005))
        axis.set_xticklabels([str(k) for k in PROBES])
        axis.title.set_fontsize(9)
    for axis in axes[-1]:
        axis.set_xlabel("probes a sample (8 samples)")
    axes[0, 0].set_ylabel("rank correlation with exact")
    axes[0, 0].legend(fontsize=7)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=90)


def main() -> None:
    rows: list[dict[str, Any]] = []
    columns = ("model", "scheme", "metric", "variant", "K", "rank corr.", "worst", f"top {TOP}", "forwards", "bias")
    table = Table(*columns)
    shown = {
        "model": "", "scheme": "", "metric": "", "variant": "", "probes": "", "rank_correlation": ".3f",
        "worst_rank_correlation": ".3f", f"same_of_top_{TOP}": ".1f", "forward_equivalents": ".1f",
        "median_log_bias": "+.2f",
    }  # fmt: skip
    for arguments in jobs():
        for row in study(*arguments):
            rows.append(row)
            table.add_row(*(format(row[key], form) if key in row else "" for key, form in shown.items()))
    draw(rows)
    Console(width=130).print(table, f"written: {save_results('sketch', rows)} and {FIGURE}")


if __name__ == "__main__":
    main()
