"""Neural Compressor's `hawq_v2`: the mean diagonal of the Hessian of the task loss, operator by operator.

Its class `HessianTrace` (`adaptor/torch_utils/hawq_metric.py`) runs on the wrapper, the scored samples one at a time.
`hawq_top`, which stands around it, is left out: it wants a quantized model as well, for a number it does not use.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from neural_compressor.adaptor.torch_utils import hawq_metric
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qvl_hydra.backends.neural_compressor.adaptor import SCHEME, Batches
from qvl_hydra.backends.neural_compressor.wrapper import ComponentWrapper, WrapperBatch, WrapperInput
from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.estimators.metrics import next_token_labels
from qvl_hydra.operators.discover import Operator
from qvl_hydra.runs.folder import RunFolder, SampleScore

UNIT = "mean diagonal of the Hessian of the loss"


@dataclass(frozen=True)
class _Holder:
    """What `HessianTrace` takes for a Neural Compressor model."""

    model: ComponentWrapper


def open_trace(wrapper: ComponentWrapper, paths: Sequence[str], inputs: Sequence[WrapperInput]) -> Any:
    """Their `HessianTrace` on a copy of the wrapper.

    Args:
        wrapper: gives logits.
        paths: operators to differentiate. Everything else is frozen: Neural Compressor pairs gradients with parameters
            by position and loses step at the first one without a gradient.
        inputs: the samples, one a batch.
    """
    model = copy.deepcopy(wrapper)
    for path in paths:
        model.get_parameter(f"{path}.weight").requires_grad_(True)
    pairs = [(WrapperBatch([item]), next_token_labels(item.sample.labels)) for item in inputs]
    loader = Batches(pairs, len(pairs))  # their loop over samples ends once it has seen `batch_size` of them
    return hawq_metric.HessianTrace(_Holder(model), loader, None)


def probe_traces(trace: Any, seed: int) -> list[float]:
    """One Hutchinson probe: trace / number of weights of each operator, mean over samples."""
    torch.manual_seed(seed)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        values: Float[Tensor, " operator"] = trace.get_vtHv_weight(trace.params, len(trace.dataloader.pairs))
    return [float(value) for value in values]


def parameter_order(wrapper: ComponentWrapper, operators: Sequence[Operator]) -> list[str]:
    """Paths of the operators in the order of the wrapper's parameters."""
    wanted = {op.path for op in operators}
    names = [name.removesuffix(".weight") for name, _ in wrapper.named_parameters()]
    return [name for name in names if name in wanted]


def accumulator_noise(weights: int, samples: int, probes: int) -> float:
    """Standard deviation that the accumulator's random start adds to a trace.

    `get_vtHv_weight` starts the accumulator of H v from standard normals instead of zeros, divides it by the number of
    samples, and takes the mean of its product with the +-1 probe.
    """
    return 1.0 / (samples * math.sqrt(weights * probes))


def relative_error(probes: Sequence[Sequence[float]]) -> float:
    """Median over operators of the standard error of the mean over probes, relative to the mean."""
    if len(probes) < 2:
        return math.inf
    values = torch.tensor(probes, dtype=torch.float64)
    errors = values.std(0) / math.sqrt(len(probes)) / values.mean(0).abs()
    return float(errors.nanmedian())


def run_hawq(
    job: SweepJob,
    wrapper: ComponentWrapper,
    inputs: Sequence[WrapperInput],
    folder: RunFolder,
    progress: Progress,
) -> EngineReport:
    """Score operators by their trace; one unit of work a probe.

    Probes are added until their relative standard error is below `strategy.tolerance` or `strategy.max_probes` are
    spent. Neural Compressor's own rule, a relative change of the summed trace below 1e-5, is met at once when the sum
    is negative, since it is not divided by its absolute value, and hardly ever before 500 probes otherwise.
    """
    paths = parameter_order(wrapper, job.operators)
    strategy = job.strategy
    progress.total(strategy.max_probes, "Neural Compressor hawq_v2, probes")
    trace = open_trace(wrapper, paths, inputs)
    found: list[list[float]] = []
    while len(found) < strategy.max_probes:
        if len(found) >= strategy.probes and relative_error(found) < strategy.tolerance:
            break
        found.append(_probe(job, trace, paths, len(found), folder))
        progress.step()
    means = dict(zip(paths, torch.tensor(found, dtype=torch.float64).mean(0).tolist(), strict=True))
    for path, value in means.items():
        if not math.isfinite(value):
            folder.fail(path, f"its trace is {value}")
    noise = {
        path: accumulator_noise(wrapper.get_parameter(f"{path}.weight").numel(), len(inputs), len(found))
        for path in paths
    }
    drowned = sum(abs(means[path]) < 2 * noise[path] for path in paths)
    details = {
        "probes": len(found),
        "median_relative_standard_error": relative_error(found),
        "accumulator_noise": max(noise.values()),
        "traces_below_noise": drowned,
    }
    notes = [
        "Neural Compressor starts the accumulator of its Hessian products from random normals: a trace carries noise "
        f"of standard deviation up to {max(noise.values()):.2g}, and {drowned} of {len(paths)} traces are below twice "
        "their own",
        "Neural Compressor orders by the trace alone, without the weight error, and always takes the cross entropy, "
        "whatever criterion it is given",
    ]
    return EngineReport("inc", "mean_trace", UNIT, 0.0, 0.0, notes, details)


def _probe(job: SweepJob, trace: Any, paths: Sequence[str], index: int, folder: RunFolder) -> list[float]:
    """A probe's traces, from disk where an earlier run has left them."""
    unit = f"inc_probe_{index:04d}"
    kept: list[float] | None = folder.recall(unit)
    if kept is not None:
        return kept
    values = probe_traces(trace, job.seed + index)
    folder.write(
        unit,
        [
            SampleScore(path, "all", index, value, "mean_trace", "inc", SCHEME)
            for path, value in zip(paths, values, strict=True)
            if math.isfinite(value)
        ],
    )
    folder.remember(unit, values)
    return values
