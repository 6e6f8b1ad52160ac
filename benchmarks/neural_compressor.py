"""What Neural Compressor costs through `backend=inc_fx`, and how far the native engine agrees with it.

    OMP_NUM_THREADS=1 python -m benchmarks.neural_compressor cost
    OMP_NUM_THREADS=1 python -m benchmarks.neural_compressor agreement

`cost`: two decoder blocks of Qwen2.5-VL-3B's width with a small vocabulary (0.65 GB), one sample of 64 tokens, random
weights. All 15 operators in both directions, in one process, against the limit of 4 GB that 30 operators must stay
under; then two operators by Neural Compressor's own call, which copies the weights for each and keeps the copies.

`agreement`: every third operator of the bundled model's language tower on the same four samples, by Neural Compressor
and by the native engine's `exact` with this project's own observers, in both directions, in one process.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from qvl_hydra.backends import torch as native
from qvl_hydra.backends.neural_compressor import fx as inc_fx

# isort: split
from benchmarks.jobs import (
    SCHEMES,
    Silent,
    bundled_model,
    bundled_samples,
    make_job,
    save_results,
    shaped_model,
    text_samples,
    with_strategy,
)
from qvl_hydra.backends.neural_compressor.adaptor import Batches, open_session
from qvl_hydra.backends.neural_compressor.session import guest
from qvl_hydra.backends.neural_compressor.wrapper import ComponentWrapper, WrapperBatch, wrapper_input
from qvl_hydra.backends.protocol import Engine
from qvl_hydra.estimators.job import EngineReport, SweepJob
from qvl_hydra.models.memory import GIB, peak_memory_bytes
from qvl_hydra.runs.folder import RunFolder

TWO_BLOCKS = {
    "text_config.num_hidden_layers": 2,
    "text_config.vocab_size": 1024,
    "vision_config.depth": 1,
    "vision_config.hidden_size": 320,
    "vision_config.intermediate_size": 480,
    "vision_config.num_heads": 4,
}
TOKENS = 64
LIMIT_GIB = 4.0


def scores_of(engine: Engine, job: SweepJob) -> tuple[pd.DataFrame, EngineReport]:
    """Squared errors, one row an operator and one column a sample, and the engine's report."""
    with tempfile.TemporaryDirectory() as folder:
        kept = RunFolder(Path(folder))
        report = engine(job, kept, Silent())
        frame = kept.frame()
    frame = frame[frame["metric"] == "squared_error"]
    return frame.pivot_table(index="op", columns="sample", values="value", sort=False), report


def through_the_backend(job: SweepJob) -> dict[str, Any]:
    scored, report = scores_of(inc_fx.run, job)
    seconds = report.details["seconds_per_operator"]
    return {
        "operators": len(scored),
        "seconds_per_operator": seconds,
        "forward_s": report.forward_s,
        "forwards_per_operator": seconds / report.forward_s,
        "engine_s": report.engine_s,
        "peak_gib": peak_memory_bytes() / GIB,
    }


class Copying(ComponentWrapper):
    """The wrapper with plain copies, weights and all."""

    __deepcopy__ = None  # type: ignore[assignment]


class Holder:
    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model


def by_its_own_call(job: SweepJob, count: int) -> dict[str, Any]:
    """`calculate_op_sensitivity` on the first operators, as it stands."""
    module = job.model.module
    batch = WrapperBatch([wrapper_input(module, sample, job.component) for sample in job.scored])
    with guest():
        session = open_session(ComponentWrapper(module, job.component), job.operators[:count], job.scheme, batch)
        wrapper = Copying(module, job.component)
        began = time.perf_counter()
        session.adaptor.calculate_op_sensitivity(
            Holder(wrapper), Batches([(batch, 0)], 1), copy.deepcopy(session.tune_cfg), None, 1, fallback=True
        )
        seconds = (time.perf_counter() - began) / count
    return {"operators": count, "seconds_per_operator": seconds, "peak_gib": peak_memory_bytes() / GIB}


def agree(job: SweepJob) -> dict[str, Any]:
    """Neural Compressor's scores beside the native engine's."""
    theirs, their_report = scores_of(inc_fx.run, job)
    ours, our_report = scores_of(native.run, job)
    ours = ours.loc[theirs.index, theirs.columns]
    difference = (theirs - ours).mean(axis=1).abs()
    error = theirs.std(axis=1) / np.sqrt(theirs.shape[1])
    return {
        "operators": len(theirs),
        "samples": theirs.shape[1],
        "rank_correlation": float(spearmanr(theirs.mean(axis=1), ours.mean(axis=1)).statistic),
        "median_relative_difference": float((difference / theirs.mean(axis=1).abs()).median()),
        "within_standard_error": float((difference <= error).mean()),
        "inc_seconds_per_operator": their_report.details["seconds_per_operator"],
        "native_seconds_per_operator": our_report.engine_s / len(ours),
        "ratio": their_report.details["seconds_per_operator"] / (our_report.engine_s / len(ours)),
    }


def agreement() -> None:
    model = bundled_model()
    whole = make_job(model, bundled_samples(model, 4), SCHEMES["inc_static"], estimator="exact")
    job = dataclasses.replace(whole, operators=whole.operators[::3])
    rows = {direction: agree(with_strategy(job, direction=direction)) for direction in ("requantize", "fallback")}
    for direction, row in rows.items():
        print(
            f"{direction:12s} {row['operators']} operators  rank correlation {row['rank_correlation']:.4f}  median "
            f"difference {row['median_relative_difference']:.2%}  within their standard error over {row['samples']} "
            f"samples {row['within_standard_error']:.0%}  {row['inc_seconds_per_operator']:.2f} s against "
            f"{row['native_seconds_per_operator']:.3f} s an operator: {row['ratio']:.0f} times"
        )
    print(f"written to {save_results('neural_compressor_agreement', rows)}")


def cost() -> None:
    model = shaped_model(TWO_BLOCKS)
    job = make_job(model, text_samples(model, 1, TOKENS), SCHEMES["inc_static"], estimator="exact")
    rows = {"weights_gib": model.description.weight_bytes / GIB, "peak_before_gib": peak_memory_bytes() / GIB}
    rows["requantize"] = through_the_backend(job)
    rows["fallback"] = through_the_backend(with_strategy(job, direction="fallback"))
    rows["within_limit"] = rows["fallback"]["peak_gib"] < LIMIT_GIB
    rows["own_call"] = by_its_own_call(job, 2)
    print(f"weights {rows['weights_gib']:.2f} GiB, peak after loading {rows['peak_before_gib']:.2f} GiB")
    for name in ("requantize", "fallback", "own_call"):
        row = rows[name]
        forwards = f"{row['forwards_per_operator']:.1f} forwards" if "forwards_per_operator" in row else ""
        print(
            f"{name:12s} {row['operators']:3d} operators  {row['seconds_per_operator']:.2f} s an operator  "
            f"{forwards:14s}  peak so far {row['peak_gib']:.2f} GiB"
        )
    print(f"30 operators stay under {LIMIT_GIB:.0f} GiB: {rows['within_limit']}")
    print(f"written to {save_results('neural_compressor', rows)}")


if __name__ == "__main__":
    {"cost": cost, "agreement": agreement}[sys.argv[1]]()
