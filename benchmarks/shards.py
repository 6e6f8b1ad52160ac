"""One sweep in one process, and in two shards side by side: wall time on this machine's cores.

    python -m benchmarks.shards [--estimator exact|sketch] [--samples 128] [--repeats 3]

Both are the program as a user runs it, from its start to its end, with as many threads in all. The ratio is what two
processes take of the time of one; starting, loading and observing ranges are done by each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.jobs import save_results


def seconds(arguments: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "qvl_hydra", *arguments], cwd=folder, check=True, capture_output=True)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimator", default="exact")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    cores = os.cpu_count() or 1
    common = [f"strategy.estimator={given.estimator}", f"calibration.size={given.samples}", "tracking.enabled=false"]
    two = ["-m", "shard=0/2,1/2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    found: dict[str, list[float]] = {"one process": [], "two shards": []}
    for _ in range(given.repeats):
        found["one process"].append(seconds([*common, f"backend.threads={cores}"]))
        found["two shards"].append(seconds([*two, *common, f"backend.threads={max(1, cores // 2)}"]))
    ratio = statistics.median(b / a for a, b in zip(*found.values(), strict=True))
    title = f"{given.estimator}, {given.samples} samples, {cores} cores, torch {torch.__version__}"
    table = Table("", "seconds", title=title)
    for name, times in found.items():
        table.add_row(name, ", ".join(f"{value:.1f}" for value in times))
    Console().print(table)
    Console().print(f"two shards take {ratio:.2f} of the time of one process")
    save_results("shards", {"cores": cores, **vars(given), **found, "ratio": ratio})


if __name__ == "__main__":
    main()
