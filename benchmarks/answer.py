"""How well each estimator ranks what the answer loses: against exact KL at the answer on samples it has not seen.

    python -m benchmarks.answer [model ...]     # tiny_qwen2_5_vl, tiny_qwen2_vl, 36_blocks; all without a name

Bundled models and 36 blocks with injected outlier channels; W8A8 static and dynamic, W4A16; the language tower, every
operator on its own. Truth is the exact score on 128 samples; estimators see others. Cost is told in forwards of a
sample. `exact, other samples` is what no estimator of that many samples can beat by more than luck.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
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
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.estimators.job import SweepJob
from qvl_hydra.models.load import LoadedModel

UNSEEN, SPLITS, TOP = 128, 2, 20
ANSWER = {"metric": "kl", "positions": "answer"}


def models(wanted: Sequence[str]) -> Iterator[tuple[str, LoadedModel, tuple[Sample, ...], int]]:
    """Name, model, samples (the unseen last), and how many of them truth is measured on."""
    for name in ("tiny_qwen2_5_vl", "tiny_qwen2_vl"):
        if wanted and name not in wanted:
            continue
        model = bundled_model(name)
        yield name, model, bundled_samples(model, 2 * UNSEEN), UNSEEN
    if not wanted or "36_blocks" in wanted:
        wide = outlier_model()
        yield "36_blocks", wide, text_samples(wide, 64, 32), 32


def designs(job: SweepJob, samples: tuple[Sample, ...]) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Name, cost in forwards of a sample, and scores, at about equal cost: 32 and 128 forwards."""
    for cost in (32, 128):
        few, more = samples[: cost // 8], samples[: cost // 4]

        def on(chosen: tuple[Sample, ...], column: str = "score", **strategy: Any) -> dict[str, float]:
            calibration = dataclasses.replace(job.calibration, samples=chosen)
            own = dataclasses.replace(job, calibration=calibration, scored=chosen)
            return measure(with_strategy(own, **strategy), column=column)[0]

        yield "sketch, 1 probe", cost, on(more, estimator="sketch", probes=1)
        yield "sketch, 1 probe, steady", cost, on(more, "steady_score", estimator="sketch", probes=1)
        yield "sketch, 5 probes", cost, on(few, estimator="sketch", probes=5)
        yield "gradient", cost, on(more, estimator="gradient")
        if job.scheme.weight is not None:
            yield "gauss_newton", cost, on(more, name="hawq_v2", probes=1)
        for name, scores in peer_scores(job, more).items():
            yield name, cost, scores


def judged(truth: dict[str, float], scores: dict[str, float]) -> tuple[float, int]:
    """Rank correlation with the truth, and how many of the most sensitive are the same."""
    names = list(truth)
    best, found = (set(sorted(names, key=given.__getitem__)[-TOP:]) for given in (truth, scores))
    return float(spearmanr([truth[op] for op in names], [scores[op] for op in names]).statistic), len(best & found)


def study(name: str, model: LoadedModel, samples: tuple[Sample, ...], unseen: int) -> Iterator[dict[str, Any]]:
    """One row a scheme, design and cost."""
    seen, held = samples[:-unseen], samples[-unseen:]
    for scheme in (SCHEMES[scheme] for scheme in COMPARED):
        truth, _ = measure(make_job(model, held, scheme, estimator="exact", **ANSWER))
        names = list(truth)
        found: dict[tuple[str, float], list[tuple[float, int]]] = defaultdict(list)
        for split in range(SPLITS):
            drawn = tuple(seen[index] for index in np.random.default_rng(split).permutation(len(seen)))
            job = make_job(model, drawn, scheme, **ANSWER)
            for design, cost, scores in designs(job, drawn):
                found[design, cost].append(judged(truth, scores))
        others, _ = measure(make_job(model, seen[:unseen], scheme, estimator="exact", **ANSWER))
        found[f"exact, {unseen} other samples", unseen * len(names) / 2].append(judged(truth, others))
        for (design, cost), values in found.items():
            rank, same = np.mean(values, axis=0)
            yield {"model": name, "scheme": scheme.name, "design": design, "forwards": cost, "rank": rank, "top": same}


def main() -> None:
    rows: list[dict[str, Any]] = []
    console = Console(width=110)
    console.print(f"{'model':16} {'scheme':13} {'design':28} {'forwards':>8} {'rank corr.':>10} {f'top {TOP}':>7}")
    for arguments in models(sys.argv[1:]):
        for row in study(*arguments):
            rows.append(row)
            console.print(
                f"{row['model']:16} {row['scheme']:13} {row['design']:28} {row['forwards']:8.0f} {row['rank']:10.3f} "
                f"{row['top']:7.1f}"
            )
    console.print(f"written: {save_results('answer', rows)}")


if __name__ == "__main__":
    main()
