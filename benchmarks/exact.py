"""What the exact estimator costs on 36 blocks: at most 0.65 forward-equivalents an operator.

    python -m benchmarks.exact

A shape with 36 decoder blocks and 253 operators, random weights with injected outlier channels, every operator on its
own. The loop over operators one at a time, timed on every 16th of them, stands beside it.
"""

from __future__ import annotations

import time

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.jobs import (
    COMPARED,
    SCHEMES,
    make_job,
    measure,
    outlier_model,
    save_results,
    text_samples,
)
from qvl_hydra.estimators.job import SweepJob
from qvl_hydra.models.forward import reference_output
from qvl_hydra.quantization.apply import make_quantizer, observe_ranges, quantized

SAMPLES, TOKENS, EVERY = 2, 128, 16


@torch.no_grad()
def loop_s(job: SweepJob) -> float:
    """Seconds of the loop over all operators, scaled from every 16th."""
    model, scheme = job.model.module, job.scheme
    ranges = observe_ranges(model, [op.path for op in job.operators], job.scored, job.component, scheme)
    chosen = job.operators[::EVERY]
    began = time.perf_counter()
    for sample in job.scored:
        reference = reference_output(model, sample, job.component)
        for op in chosen:
            with quantized(model, {op.path: make_quantizer(model, op.path, scheme, ranges)}):
                (reference_output(model, sample, job.component) - reference).square().sum()
    return (time.perf_counter() - began) * len(job.operators) / len(chosen)


def main() -> None:
    model = outlier_model()
    samples = text_samples(model, SAMPLES, TOKENS)
    rows = []
    for name in COMPARED:
        job = make_job(model, samples, SCHEMES[name], estimator="exact")
        scores, report = measure(job)
        equivalents = report.engine_s / report.forward_s
        rows.append(
            {
                "scheme": name,
                "operators": len(scores),
                "forward_s": report.forward_s,
                "exact_s": report.engine_s,
                "forward_equivalents": equivalents,
                "per_operator": equivalents / len(scores),
                "loop_s": loop_s(job),
            }
        )
        rows[-1]["faster_than_loop"] = rows[-1]["loop_s"] / rows[-1]["exact_s"]
    table = Table("scheme", "operators", "forward s", "exact s", "forward-eq.", "per op (<= 0.65)", "loop / exact")
    for row in rows:
        table.add_row(
            row["scheme"], str(row["operators"]), f"{row['forward_s']:.2f}", f"{row['exact_s']:.1f}",
            f"{row['forward_equivalents']:.0f}", f"{row['per_operator']:.3f}", f"{row['faster_than_loop']:.1f}",
        )  # fmt: skip
    Console(width=110).print(table, f"written: {save_results('exact', rows)}")


if __name__ == "__main__":
    main()
