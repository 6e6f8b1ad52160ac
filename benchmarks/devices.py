"""Whether two devices rank alike, and how much faster the second is.

    python -m benchmarks.devices [--devices cpu cuda]

Exact and sketch, operators on their own, 8 samples, on the bundled model and on a 36-block shape with injected outlier
channels: the same weights and samples on both devices.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table

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
)
from benchmarks.sketch import TOP, compare
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.models.load import LoadedModel

SAMPLES = 8
ESTIMATORS = (("exact", 1), ("sketch", 1), ("sketch", 4))


def models() -> Iterator[tuple[str, LoadedModel, tuple[Sample, ...]]]:
    bundled = bundled_model()
    yield "bundled", bundled, bundled_samples(bundled, SAMPLES)
    wide = outlier_model()
    yield "36 blocks", wide, text_samples(wide, SAMPLES, 64)


def moved(model: LoadedModel, device: str) -> LoadedModel:
    """The same weights on another device."""
    return dataclasses.replace(model, module=copy.deepcopy(model.module).to(device), device=torch.device(device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs=2, default=["cpu", "cuda"])
    names = parser.parse_args().devices
    if "cuda" in {name.partition(":")[0] for name in names} and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device")
    rows = []
    table = Table("model", "scheme", "estimator", "K", "rank corr.", f"top {TOP}", *(f"{n} s" for n in names), "faster")
    for name, model, samples in models():
        placed = [moved(model, device) for device in names]
        for scheme in COMPARED:
            for estimator, probes in ESTIMATORS:
                scores, seconds = [], []
                for there in placed:
                    job = make_job(there, samples, SCHEMES[scheme], estimator=estimator, probes=probes)
                    found, report = measure(job)
                    scores.append(found)
                    seconds.append(report.engine_s)
                rank, top = compare(*scores)
                rows.append(
                    {
                        "model": name, "scheme": scheme, "estimator": estimator, "probes": probes, "devices": names,
                        "rank_correlation": rank, f"same_of_top_{TOP}": top, "engine_s": seconds,
                    }
                )  # fmt: skip
                table.add_row(
                    name, scheme, estimator, str(probes), f"{rank:.4f}", str(top), *(f"{s:.2f}" for s in seconds),
                    f"{seconds[0] / seconds[1]:.1f}",
                )  # fmt: skip
    Console(width=130).print(table, f"written: {save_results('devices', rows)}")


if __name__ == "__main__":
    main()
