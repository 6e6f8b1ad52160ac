"""The native engine against Neural Compressor: same operators, same samples, same scheme (inc_static), one process.

    python -m benchmarks.against_neural_compressor

Times: Neural Compressor through `backend=inc_fx` on a few operators, scaled to all of them by seconds an operator;
native exact on the same few operators and on all; native sketch on all of 36 blocks. Agreement: values with Neural
Compressor's own scales and zero points, one operator at a time, on the bundled model. Ranks with ranges from our
observers, in both directions: `python -m benchmarks.neural_compressor agreement`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from rich.console import Console

from qvl_hydra.backends.neural_compressor import fx as inc_fx  # before torch's quantization is touched by others

# isort: split
from benchmarks.jobs import (
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
from qvl_hydra.backends.neural_compressor.quantizers import inc_quantizers
from qvl_hydra.estimators.job import SweepJob
from qvl_hydra.models.forward import reference_output
from qvl_hydra.quantization.apply import quantized

CAPPED = 6  # operators that Neural Compressor is timed on


def few(job: SweepJob, count: int) -> SweepJob:
    step = max(1, len(job.operators) // count)
    return dataclasses.replace(job, operators=job.operators[::step][:count])


def times() -> dict[str, Any]:
    model = outlier_model()
    job = make_job(model, text_samples(model, 2, 96), SCHEMES["inc_static"], estimator="exact")
    job = dataclasses.replace(job, schemes=(dataclasses.replace(job.scheme, observer="minmax"),))
    capped = few(job, CAPPED)
    scores, inc = measure(capped, inc_fx.run)
    _, exact_few = measure(capped)
    every, exact = measure(job)
    _, sketch = measure(with_strategy(job, estimator="sketch", probes=1))
    inc_all = inc.engine_s / len(scores) * len(every)
    return {
        "operators": len(every),
        "inc_timed_on": len(scores),
        "inc_s_an_operator": inc.engine_s / len(scores),
        "inc_scaled_to_all_s": inc_all,
        "exact_same_operators_faster": inc.engine_s / exact_few.engine_s,
        "exact_s": exact.engine_s,
        "exact_faster": inc_all / exact.engine_s,
        "sketch_s": sketch.engine_s,
        "sketch_faster": inc_all / sketch.engine_s,
    }


@torch.no_grad()
def own_scales(job: SweepJob) -> dict[str, float]:
    """Largest relative difference of values when we take Neural Compressor's scales, zero points and weights."""
    scores, _ = measure(job, inc_fx.run)
    found = inc_quantizers(job)
    model = job.model.module
    differences = []
    for op, score in scores.items():
        squared = []
        for sample in job.scored:
            reference = reference_output(model, sample, job.component)
            with quantized(model, {op: found[op]}):
                squared.append(float((reference_output(model, sample, job.component) - reference).square().sum()))
        differences.append(abs(np.mean(squared) - score) / score)
    return {"operators": len(scores), "largest": max(differences), "median": float(np.median(differences))}


def main() -> None:
    tiny = bundled_model()
    job = make_job(tiny, bundled_samples(tiny, 4), SCHEMES["inc_static"], estimator="exact")
    result: dict[str, Any] = {"times": times(), "own_scales": own_scales(few(job, 8))}
    console = Console()
    console.print_json(data=result)
    console.print(f"written: {save_results('against_neural_compressor', result)}")


if __name__ == "__main__":
    main()
