"""What bfloat16 does to scores and plans of a model.

    python -m benchmarks.precision

Scores of the bundled Qwen2.5-VL in bfloat16 against exact scores of the same model in float32, by rank. Plans of the
three bundled models in bfloat16, measured on samples that their ranges have not seen, against the same plans of a
float32 model with the same weights: how far off KL at the answer is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from benchmarks.against_peers import schemes_of
from benchmarks.jobs import BUNDLED, COMPARED, SCHEMES, bundled_model, bundled_samples, make_job, measure, save_results
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles.apply import Quantizers
from qvl_hydra.profiles.measure import measure_profiles
from qvl_hydra.profiles.profile import Profile

SAMPLES, HELD_OUT, TOP, PLANS = 8, 32, 20, 20
IN_PLANS = ("w4a16", "w8a8_static", "fp8_dynamic")


def ranks() -> list[dict[str, Any]]:
    """One row a scheme and estimator."""
    whole, half = (bundled_model(dtype=dtype) for dtype in ("float32", "bfloat16"))
    samples = bundled_samples(whole, SAMPLES)
    rows = []
    for scheme in COMPARED:
        exact, _ = measure(make_job(whole, samples, SCHEMES[scheme], estimator="exact"))
        for estimator in ("exact", "sketch"):
            found, _ = measure(make_job(half, samples, SCHEMES[scheme], estimator=estimator, probes=16))
            names = list(exact)
            first, second = (set(sorted(names, key=scores.__getitem__)[-TOP:]) for scores in (exact, found))
            rank = spearmanr([exact[op] for op in names], [found[op] for op in names]).statistic
            rows.append(
                {"scheme": scheme, "estimator": estimator, "rank_correlation": float(rank), "same": len(first & second)}
            )
    return rows


@torch.no_grad()
def plans(name: str) -> list[dict[str, Any]]:
    """One row a scheme: random plans that keep nothing to nearly all."""
    half, whole = bundled_model(name, dtype="bfloat16"), bundled_model(name)
    for parameter in whole.module.parameters():
        parameter.copy_(parameter.bfloat16())
    samples = bundled_samples(whole, SAMPLES + HELD_OUT)
    operators = tuple(find_operators(whole.module, "lm"))
    rows = []
    for scheme in schemes_of(IN_PLANS).values():
        draw = np.random.default_rng(0)
        kept = [draw.random(len(operators)) < share for share in np.linspace(0, 0.95, PLANS)]
        high = [frozenset(op.path for op, keep in zip(operators, own, strict=True) if keep) for own in kept]
        profiles = [Profile(scheme, operators, own, 16, "random") for own in high]
        quantizers = Quantizers(whole, operators, samples[:SAMPLES], "lm", [scheme])
        truth, found = (
            [item.kl_answer for item in measure_profiles(model, profiles, quantizers, samples[SAMPLES:], "lm")]
            for model in (whole, half)
        )
        off = np.abs(np.divide(found, truth) - 1)
        rank = float(spearmanr(truth, found).statistic)
        own = {"model": name, "scheme": scheme.name, "rank": rank}
        rows.append(own | {"median": float(np.median(off)), "most": float(off.max())})
    return rows


def main() -> None:
    of_scores, of_plans = ranks(), [row for name in BUNDLED for row in plans(name)]
    scores = Table("scheme", "bfloat16 estimator", "rank correlation with float32 exact", f"same of top {TOP}")
    for row in of_scores:
        scores.add_row(row["scheme"], row["estimator"], f"{row['rank_correlation']:.3f}", str(row["same"]))
    table = Table("model", "scheme", "KL off, median", "most", "rank correlation")
    for row in of_plans:
        table.add_row(row["model"], row["scheme"], f"{row['median']:.2%}", f"{row['most']:.1%}", f"{row['rank']:.3f}")
    Console().print(scores, table, f"written: {save_results('precision', {'scores': of_scores, 'plans': of_plans})}")


if __name__ == "__main__":
    main()
