"""How often intervals of 95 % hold: scores from few samples against the mean of 256, on the bundled models.

python -m benchmarks.coverage
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.jobs import BUNDLED, SCHEMES, Silent, bundled_model, bundled_samples, make_job, save_results
from qvl_hydra.backends.torch import run
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.scores.interval import intervals

SAMPLES, DRAWS, COUNTS = 256, 300, (2, 4, 8, 16, 32)
KINDS = (
    ("exact", "squared_error", "all"), ("exact", "kl", "all"), ("exact", "kl", "answer"),
    ("sketch", "squared_error", "all"), ("sketch", "kl", "answer"), ("gradient", "kl", "answer"),
)  # fmt: skip


def main() -> None:
    rows: list[dict[str, Any]] = []
    table = Table("model", "scheme", "estimator", "metric", "positions", *(f"{count} samples" for count in COUNTS))
    for name in BUNDLED:
        model = bundled_model(name)
        samples = bundled_samples(model, SAMPLES)
        for scheme in ("w8a8_static", "w4a16"):
            for estimator, metric, positions in KINDS:
                job = make_job(
                    model, samples, SCHEMES[scheme], estimator=estimator, metric=metric, positions=positions, probes=1
                )
                with tempfile.TemporaryDirectory() as path:
                    folder = RunFolder(Path(path))
                    report = run(job, folder, Silent())
                    frame = folder.frame()
                values = (
                    frame[frame["metric"] == report.metric]
                    .pivot_table(index="op", columns="sample", values="value", sort=False)
                    .to_numpy()
                )
                truth, rng, held = values.mean(1), np.random.default_rng(0), {}
                for count in COUNTS:
                    inside = []
                    for _ in range(DRAWS):
                        low, high, _ = intervals(list(values[:, rng.permutation(SAMPLES)[:count]]))
                        inside.append(np.mean((low <= truth) & (truth <= high)))
                    held[count] = float(np.mean(inside))
                row = {"model": name, "scheme": scheme, "estimator": estimator, "metric": report.metric}
                rows.append({**row, "positions": positions, "held": held})
                shown = (f"{held[count]:.3f}" for count in COUNTS)
                table.add_row(name, scheme, estimator, report.metric, positions, *shown)
    Console(width=140).print(table, f"written: {save_results('coverage', rows)}")


if __name__ == "__main__":
    main()
