"""hawq_v2: the curvature of the task loss at every operator's weight, times what quantization does to that weight.

`Omega_i = Tr(H_i) / n_i * ||Q(W_i) - W_i||^2` (Dong et al. 2020, HAWQ-V2, equation 8), `H_i` the Hessian of the mean
loss of the answer tokens with respect to `W_i`. Traces by Hutchinson's estimator with random signs `v`: one
Hessian-vector product with probes on all weights at once gives `v_i' (H v)_i` for every operator, unbiased for
`Tr(H_i)` since probes of different operators are independent. Probes are added until the median relative standard
error is below `strategy.tolerance`, or `strategy.max_probes` are spent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import EngineError
from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.estimators.metrics import UNITS
from qvl_hydra.estimators.probes import random_signs, seeded
from qvl_hydra.models.forward import logits, text_inputs
from qvl_hydra.models.memory import free_memory_bytes
from qvl_hydra.operators.discover import Operator
from qvl_hydra.operators.targets import Target, make_targets
from qvl_hydra.quantization.apply import shared_largest
from qvl_hydra.quantization.formats.table import not_offered
from qvl_hydra.quantization.qdq import mean_weight_error
from qvl_hydra.runs.folder import RunFolder, SampleScore

COPIES = 5  # a weight's gradient, probe, product, and what autograd holds of them


def run(job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport:
    """Score the job's operators; see `Engine`.

    Raises:
        EngineError: no scored sample has an answer to take the loss of.
    """
    samples = [sample for sample in job.scored if (sample.labels >= 0).any()]
    if not samples:
        raise EngineError("strategy=hawq_v2 takes the loss of the answer tokens, and no scored sample has an answer")
    strategy = job.strategy
    targets = _reachable(job, folder, samples)
    operators = [op for target in targets for op in target.operators]
    metric = "mean_trace" if strategy.weighting == "trace" else "omega"
    report = EngineReport("hessian", metric, UNITS[metric], 0.0, 0.0)
    report.forward_s = _forward_s(job, samples)
    began = time.perf_counter()
    weights_of = {op.path: weight_of(job, op) for op in operators}
    factors: dict[str, float] = {}
    if metric == "omega":
        for target in targets:
            factors |= weight_factors(job, target)
    chunks = list(_chunks(job, targets))
    progress.total(strategy.max_probes * len(samples) * len(chunks), "Hessian traces")
    done, error = 0, math.inf
    while done < strategy.max_probes and error > strategy.tolerance:
        until = min(strategy.max_probes, max(strategy.probes, done * 2))
        for index, sample in enumerate(samples):
            for part, chunk in enumerate(chunks):
                unit = f"hawq-{done:04d}-{index:05d}-{part:04d}"
                if not folder.done(unit):
                    products = trace_products(job, sample, chunk, weights_of, range(done, until))
                    _write(job, folder, unit, sample, targets, products, weights_of, factors, done)
                progress.step(until - done)
        done = until
        errors = _standard_errors(folder)
        if not errors:  # all failed
            break
        error = sorted(errors.values())[len(errors) // 2]
    report.engine_s = time.perf_counter() - began
    report.details = {"probes": done, "median_relative_standard_error": error, "relative_standard_error": errors}
    if errors and error > strategy.tolerance:
        report.notes.append(
            f"stopped at strategy.max_probes={done} with a median relative standard error of {error:.3f}, above "
            f"strategy.tolerance={strategy.tolerance}"
        )
    if job.model.dtype != torch.float32:
        report.notes.append("second derivatives in less than float32 are noisy; take model.dtype=float32 for hawq_v2")
    return report


def weight_factors(job: SweepJob, target: Target) -> dict[str, float]:
    """`||Q(W) - W||^2 / n` of each operator of a target, by path: what its trace is weighed with."""
    assert job.scheme.weight is not None, "the settings refuse a scheme without a weight format"
    together, form = shared_largest(job.model.module, target.operators, job.scheme), job.scheme.weight
    return {op.path: mean_weight_error(weight_of(job, op), form, together.get(op.group)) for op in target.operators}


def weight_of(job: SweepJob, op: Operator) -> Tensor:
    """The operator's weight."""
    weight: Tensor = job.model.module.get_submodule(op.path).weight  # type: ignore[assignment]
    return weight


def task_loss(job: SweepJob, sample: Sample) -> Tensor:
    """Mean cross-entropy of the answer tokens of a sample, end to end, in nats."""
    module = job.model.module
    predicted = logits(module, text_inputs(module, sample), sample)[0, :-1].float()
    return functional.cross_entropy(predicted, sample.labels[1:].to(predicted.device))


def trace_products(
    job: SweepJob, sample: Sample, operators: Sequence[Operator], weights_of: dict[str, Tensor], probes: range
) -> dict[str, list[float]]:
    """`v' H v` of every operator for each probe on one sample.

    Args:
        operators: differentiated together; the Hessian's blocks between them only add noise.
        probes: indices of the probes; a probe depends on its index, the sample and the operator alone.
    """
    weights = [weights_of[op.path] for op in operators]
    found: dict[str, list[float]] = {op.path: [] for op in operators}
    # Only the plain attention kernel has second derivatives.
    with _differentiable(weights), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        gradients = torch.autograd.grad(task_loss(job, sample), weights, create_graph=True)
        for index in probes:
            signs = [_signs(job, op, sample, index, weight) for op, weight in zip(operators, weights, strict=True)]
            products = torch.autograd.grad(
                gradients, weights, signs, retain_graph=index + 1 < probes.stop, materialize_grads=True
            )
            for op, sign, product in zip(operators, signs, products, strict=True):
                found[op.path].append(float((sign * product).sum(dtype=torch.float64)))
    return found


def _signs(job: SweepJob, op: Operator, sample: Sample, index: int, weight: Tensor) -> Tensor:
    generator = seeded(job.seed, op.path, sample.id, index)
    return random_signs(weight.numel(), generator, weight.device, weight.dtype).view(weight.shape)


@contextmanager
def _differentiable(weights: Sequence[Tensor]) -> Iterator[None]:
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def _chunks(job: SweepJob, targets: Sequence[Target]) -> Iterator[list[Operator]]:
    """Operators whose gradients and probes fit in memory together; those of one target stay together."""
    free = free_memory_bytes()
    if job.device.type == "cuda":
        free = torch.cuda.mem_get_info(job.device)[0]
    limit = free // 2 // (COPIES * job.model.dtype.itemsize)
    chunk: list[Operator] = []
    for target in targets:
        if chunk and sum(op.n_params for op in (*chunk, *target.operators)) > limit:
            yield chunk
            chunk = []
        chunk += target.operators
    if chunk:
        yield chunk


def _reachable(job: SweepJob, folder: RunFolder, samples: Sequence[Sample]) -> list[Target]:
    """Targets that can have the scheme, and that the loss of some sample depends on."""
    images = any(sample.pixel_values is not None for sample in samples)
    kept: list[Target] = []
    for target in make_targets(job.operators, job.fuse):
        if not_offered(target.operators, job.scheme):
            continue  # the table of scores says why
        if target.operators[0].component == "vision" and not images:
            folder.skip(target.name, "no scored sample has an image")
        else:
            kept.append(target)
    return kept


def _write(
    job: SweepJob,
    folder: RunFolder,
    unit: str,
    sample: Sample,
    targets: Sequence[Target],
    products: dict[str, list[float]],
    weights_of: dict[str, Tensor],
    factors: dict[str, float],
    first: int,
) -> None:
    scores: list[SampleScore] = []
    for target in targets:
        members = [op for op in target.operators if op.path in products]
        for k in range(len(products[members[0].path]) if members else 0):
            trace = sum(products[op.path][k] for op in members)
            values = {"trace": trace}
            if not factors:
                values["mean_trace"] = trace / sum(weights_of[op.path].numel() for op in members)
            else:
                values["omega"] = sum(products[op.path][k] * factors[op.path] for op in members)
            scores += [
                SampleScore(target.name, sample.id, first + k, value, metric, "hessian", job.scheme.name)
                for metric, value in values.items()
            ]
    folder.write_finite(unit, scores)


def _standard_errors(folder: RunFolder) -> dict[str, float]:
    """Relative standard error of each trace over its probes, the samples given."""
    frame = folder.frame()
    frame = frame[frame["metric"] == "trace"]
    by_probe = frame.groupby(["op", "probe"])["value"].mean().unstack("probe")
    errors = by_probe.std(axis=1, ddof=1) / by_probe.shape[1] ** 0.5 / by_probe.mean(axis=1).abs()
    return {str(op): float(value) if math.isfinite(value) else math.inf for op, value in errors.items()}


def _forward_s(job: SweepJob, samples: Sequence[Sample]) -> float:
    with torch.no_grad():
        task_loss(job, samples[0])
        began = time.perf_counter()
        for sample in samples:
            task_loss(job, sample)
    return time.perf_counter() - began
