"""What bfloat16 does to the order: scores of a bfloat16 model against exact scores of the same model in float32.

    python -m benchmarks.precision
"""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from benchmarks.jobs import COMPARED, SCHEMES, bundled_model, bundled_samples, make_job, measure, save_results
from qvl_hydra.models.load import describe_model, load_model
from qvl_hydra.settings import ModelSettings

SAMPLES, TOP = 8, 20


def main() -> None:
    whole = bundled_model()
    name = whole.description.settings.name
    settings = ModelSettings(name, f"bundled:{name}", "qwen2_5_vl", dtype="bfloat16")
    half = load_model(describe_model(settings), torch.device("cpu"), 0)
    samples = bundled_samples(whole, SAMPLES)
    rows: list[dict[str, Any]] = []
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
    table = Table("scheme", "bfloat16 estimator", "rank correlation with float32 exact", f"same of top {TOP}")
    for row in rows:
        table.add_row(row["scheme"], row["estimator"], f"{row['rank_correlation']:.3f}", str(row["same"]))
    Console().print(table, f"written: {save_results('precision', rows)}")


if __name__ == "__main__":
    main()
