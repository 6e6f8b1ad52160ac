"""The native ONNX engine against Neural Compressor's, on one graph: at least 20 times faster, ranks agree.

    python -m benchmarks.onnx [--ops N] [--samples N]

The bundled model's language tower, the same exported graph, operators and samples for both, the scheme that Neural
Compressor runs (`inc_static`, smallest and largest value). Seconds count everything after the export: ranges,
preparing graphs, opening sessions, scoring. The torch engine's exact scores of the same job stand beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks.jobs import SCHEMES, Silent, bundled_model, bundled_samples, make_job, save_results
from qvl_hydra.backends.protocol import load_engine
from qvl_hydra.estimators.job import EngineReport, SweepJob
from qvl_hydra.onnx.export.component import export_component
from qvl_hydra.onnx.scoring.session import pick_provider
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.settings import BackendSettings, ExportSettings

REQUIRED_RATIO, REQUIRED_RANK, REQUIRED_TORCH_RANK = 20, 0.9, 0.99


def measure(job: SweepJob, backend: str) -> tuple[pd.Series, EngineReport]:
    """Mean squared error of each operator, and the report."""
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path))
        report = load_engine(backend)(job, folder, Silent())
        frame = folder.frame()
    frame = frame[frame["metric"] == "squared_error"]
    return frame.groupby("op")["value"].mean(), report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ops", type=int, default=None, help="at most so many operators, spread over the model")
    parser.add_argument("--samples", type=int, default=4)
    arguments = parser.parse_args()
    model = bundled_model()
    samples = bundled_samples(model, arguments.samples)
    scheme = dataclasses.replace(SCHEMES["inc_static"], observer="minmax")
    job = make_job(model, samples, scheme, estimator="exact")
    if arguments.ops is not None:
        job = dataclasses.replace(job, operators=job.operators[:: max(1, len(job.operators) // arguments.ops)])
    with tempfile.TemporaryDirectory() as graphs:
        done = export_component(model, "lm", samples[:2], Path(graphs), ExportSettings(), pick_provider("cpu", None))
        backend = BackendSettings("onnxrt", device="cpu", graph=str(done.path))
        job = dataclasses.replace(job, backend=backend)
        native, native_report = measure(job, "onnxrt")
        inc, inc_report = measure(job, "inc_onnxrt")
        torch_exact, torch_report = measure(dataclasses.replace(job, backend=BackendSettings("torch")), "torch")
    count = len(job.operators)
    relative = ((native - torch_exact) / torch_exact).abs()
    result = {
        "operators": count,
        "samples": len(samples),
        "seconds": {
            "onnxrt": native_report.engine_s,
            "inc_onnxrt": inc_report.engine_s,
            "torch_exact": torch_report.engine_s,
        },
        "faster_than_inc_onnxrt": inc_report.engine_s / native_report.engine_s,
        "rank_with_inc_onnxrt": float(native.corr(inc.reindex(native.index), method="spearman")),
        "rank_with_torch_exact": float(native.corr(torch_exact, method="spearman")),
        "median_relative_difference_to_torch": float(relative.median()),
        "share_within_1_percent_of_torch": float((relative <= 0.01).mean()),
    }
    table = Table(title=f"{count} operators, {len(samples)} samples, one graph")
    for column in ("engine", "seconds", "an operator", "rank correlation with onnxrt"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    ranks = {
        "onnxrt": 1.0,
        "inc_onnxrt": result["rank_with_inc_onnxrt"],
        "torch_exact": result["rank_with_torch_exact"],
    }
    for name, seconds in result["seconds"].items():
        table.add_row(name, f"{seconds:.2f}", f"{seconds / count:.4f}", f"{ranks[name]:.4f}")
    console = Console()
    console.print(table)
    checks = [
        (f"{result['faster_than_inc_onnxrt']:.0f} times faster than inc_onnxrt (required {REQUIRED_RATIO})",
         result["faster_than_inc_onnxrt"] >= REQUIRED_RATIO),
        (f"rank correlation with inc_onnxrt {ranks['inc_onnxrt']:.3f} (required {REQUIRED_RANK})",
         ranks["inc_onnxrt"] >= REQUIRED_RANK),
        (f"rank correlation with torch exact {ranks['torch_exact']:.4f} (required {REQUIRED_TORCH_RANK}), "
         f"{result['share_within_1_percent_of_torch']:.0%} of the operators within 1 %",
         ranks["torch_exact"] >= REQUIRED_TORCH_RANK),
    ]  # fmt: skip
    for text, holds in checks:
        console.print(f"{'ok  ' if holds else 'MISS'} {text}")
    console.print(f"written: {save_results('onnx', result)}")


if __name__ == "__main__":
    main()
