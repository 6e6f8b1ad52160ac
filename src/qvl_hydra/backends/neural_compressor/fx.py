"""Backend `inc_fx`: Neural Compressor's PyTorch FX adaptor on the Hugging Face model, `mse_v2` and `hawq_v2`.

`mse_v2` is asked one operator at a time where its own loop would mix them (docs/neural_compressor.md). The scheme is
always its own: input, weight and output in 8 bits.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qvl_hydra.backends.neural_compressor.session import (  # says what to install when Neural Compressor is missing
    VERSION,
    guest,
)

# isort: split
from qvl_hydra.backends.neural_compressor.adaptor import REDUCED_RANGE, SCHEME, FxSession, open_session, scheme_notes
from qvl_hydra.backends.neural_compressor.hawq import run_hawq
from qvl_hydra.backends.neural_compressor.memory import FLOAT32, inc_extra_bytes
from qvl_hydra.backends.neural_compressor.mse import Metrics, all_quantized, measure, release
from qvl_hydra.backends.neural_compressor.order import FAULTS, inc_order
from qvl_hydra.backends.neural_compressor.wrapper import (
    ComponentWrapper,
    WrapperBatch,
    WrapperInput,
    usable,
    wrapper_input,
)
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import EngineError
from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.estimators.metrics import UNITS, output_metrics
from qvl_hydra.models.memory import GIB, free_memory_bytes
from qvl_hydra.runs.files import write_json
from qvl_hydra.runs.folder import RunFolder, SampleScore

ESTIMATOR = "inc"
ORDER_FILE = "inc_order.json"


@dataclass(frozen=True)
class _Scene:
    """The wrapper with what goes through it: the scored samples together, and batch by batch."""

    wrapper: ComponentWrapper
    inputs: tuple[WrapperInput, ...]
    batches: tuple[WrapperBatch, ...]
    forward_s: float

    @property
    def scored(self) -> WrapperBatch:
        return WrapperBatch(self.inputs)


def run(job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport:
    """Score the job's operators with Neural Compressor; see `backends.protocol.Engine`.

    Raises:
        EngineError: it cannot run on this device or dtype, has no sample to score, or does not fit in memory.
    """
    _check(job)
    hawq = job.strategy.name == "hawq_v2"
    scene = _set_scene(job, "full" if hawq and job.component == "vision" else job.component)
    started = time.perf_counter()
    with guest():
        if hawq:
            report = run_hawq(job, scene.wrapper, scene.inputs, folder, progress)
        else:
            report = _run_mse(job, scene, folder, progress)
    report.forward_s = scene.forward_s
    report.engine_s = time.perf_counter() - started
    report.details["neural_compressor"] = VERSION
    return report


def _kept(job: SweepJob, samples: Sequence[Sample]) -> list[Sample]:
    """The samples that a score can be taken on: the vision tower needs an image, a loss needs an answer.

    A gradient that some weight does not get would put Neural Compressor's trace out of step, so one vision operator is
    enough to need images.
    """
    hawq = job.strategy.name == "hawq_v2"
    image = job.component == "vision" or (hawq and any(op.component == "vision" for op in job.operators))
    reaching = usable(samples, "vision" if image else job.component)
    return [sample for sample in reaching if not hawq or bool((sample.labels[1:] >= 0).any())]


def _check(job: SweepJob) -> None:
    if job.device.type != "cpu":
        raise EngineError(
            f"backend=inc_fx runs on the CPU only, but the model is on {job.device}; set backend.device=cpu"
        )
    dtypes = {parameter.dtype for parameter in job.model.module.parameters()}
    if dtypes != {torch.float32}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise EngineError(f"backend=inc_fx quantizes float32 models, and this one is {names}; set model.dtype=float32")
    if job.fuse:
        raise EngineError("operators.fuse=true, but Neural Compressor scores every operator alone; take backend=torch")
    if job.strategy.name == "mse_v2" and job.strategy.metric not in output_metrics(job.component):
        raise EngineError(
            f"strategy.metric={job.strategy.metric} needs logits, and component={job.component} has none; "
            f"allowed: {', '.join(output_metrics(job.component))}"
        )


def _set_scene(job: SweepJob, component: str) -> _Scene:
    module = job.model.module
    groups = [job.scored[at : at + job.batch_size] for at in range(0, len(job.scored), job.batch_size)]
    made = [tuple(wrapper_input(module, sample, component) for sample in _kept(job, group)) for group in groups]
    batches = tuple(WrapperBatch(inputs) for inputs in made if inputs)
    if not batches:
        raise EngineError(
            f"none of the {len(job.scored)} scored samples can be used: the vision tower needs an image, hawq_v2 an "
            "answer; take other samples (calibration.source, calibration.seed) or more (strategy.confidence_batches)"
        )
    inputs = tuple(item for batch in batches for item in batch.inputs)
    wrapper = ComponentWrapper(module, component)
    _require_memory(job, wrapper, sum(item.rows for item in inputs))
    return _Scene(wrapper, inputs, batches, _forward_seconds(wrapper, WrapperBatch(inputs)))


def _require_memory(job: SweepJob, wrapper: ComponentWrapper, rows: int) -> None:
    need = inc_extra_bytes(job.operators, rows, wrapper.width, job.strategy.name, job.strategy.direction)
    free = free_memory_bytes()
    if need > free:
        raise EngineError(
            f"Neural Compressor needs about {need / GIB:.1f} GiB beside the weights for {len(job.operators)} operators "
            f"and {rows} x {wrapper.width} outputs, and {free / GIB:.1f} GiB are free; take fewer samples "
            "(strategy.confidence_batches, calibration.batch_size), fewer operators (operators.max_ops), backend=torch"
        )


@torch.no_grad()
def _forward_seconds(wrapper: ComponentWrapper, batch: WrapperBatch) -> float:
    wrapper(batch)  # the first pass pays for allocations
    started = time.perf_counter()
    wrapper(batch)
    return time.perf_counter() - started


def _run_mse(job: SweepJob, scene: _Scene, folder: RunFolder, progress: Progress) -> EngineReport:
    session = open_session(scene.wrapper, job.operators, job.scheme, scene.scored)
    for op in job.operators:
        if op.path not in session.names:
            folder.skip(op.path, f"Neural Compressor {VERSION} does not list this {op.kind} as one that it quantizes")
    progress.total(len(session.names), f"Neural Compressor mse_v2, {job.strategy.direction}")
    metrics_of = _measurement(job, session, scene)
    seconds: list[float] = []
    for unit, path in _open_units(job, session, folder, progress):
        started = time.perf_counter()
        try:
            folder.write(unit, _scores(path, scene, metrics_of(path)))
        except Exception as error:  # one operator's trouble is not the run's
            folder.fail(path, f"{type(error).__name__}: {error}")
            release()
        seconds.append(time.perf_counter() - started)
        progress.step()
    notes = _scheme_notes(job, session) + _keep_order(job, session, scene)
    details = {"reduced_range": REDUCED_RANGE, "inc_order": ORDER_FILE, "scheme_measured": SCHEME}
    if seconds:
        details["seconds_per_operator"] = sum(seconds) / len(seconds)
    return EngineReport(ESTIMATOR, job.strategy.metric, UNITS[job.strategy.metric], 0.0, 0.0, notes, details)


def _measurement(job: SweepJob, session: FxSession, scene: _Scene) -> Callable[[str], list[Metrics]]:
    """From an operator to the metrics of its score, one record a scored sample."""
    samples = usable(job.calibration.samples, job.component)
    calibration = [WrapperBatch([wrapper_input(job.model.module, sample, job.component)]) for sample in samples]
    if job.strategy.direction == "requantize":
        return lambda path: measure(session, path, "requantize", calibration, scene.scored)

    @functools.cache
    def everything() -> list[Metrics]:
        return all_quantized(session, calibration, scene.scored)

    def gains(path: str) -> list[Metrics]:
        """The metrics of everything quantized less those of everything but the operator."""
        without = measure(session, path, "fallback", calibration, scene.scored)
        pairs = zip(everything(), without, strict=True)
        return [{name: before[name] - after[name] for name in before} for before, after in pairs]

    return gains


def _open_units(job: SweepJob, session: FxSession, folder: RunFolder, progress: Progress) -> list[tuple[str, str]]:
    """Units of work that are not on disk yet, with their operators."""
    units = [(f"inc_{index:04d}", op.path) for index, op in enumerate(job.operators) if op.path in session.names]
    ended = folder.endings()
    left = [(unit, path) for unit, path in units if not folder.done(unit) and path not in ended]
    progress.step(len(units) - len(left))
    return left


def _scores(path: str, scene: _Scene, found: Sequence[Metrics]) -> list[SampleScore]:
    for metrics in found:
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}")
    return [
        SampleScore(path, item.sample.id, None, value, name, ESTIMATOR, SCHEME)
        for item, metrics in zip(scene.inputs, found, strict=True)
        for name, value in metrics.items()
    ]


def _scheme_notes(job: SweepJob, session: FxSession) -> list[str]:
    notes = scheme_notes(job.scheme)
    if REDUCED_RANGE:
        notes.append("this processor has no VNNI, so Neural Compressor used 7 bits for activations (reduce_range)")
    if job.strategy.direction == "fallback":
        notes.append(f"fallback: all {len(session.names)} operators asked for are quantized, the others stay in float")
    return notes


def _keep_order(job: SweepJob, session: FxSession, scene: _Scene) -> list[str]:
    """Write the order that Neural Compressor itself returns, with its known faults; notes where it could not be had."""
    if not session.names:
        return []
    weights = sum(op.n_params for op in job.operators if op.path in session.names)
    if weights * (1 + FLOAT32) > free_memory_bytes():
        return [f"{ORDER_FILE} is missing: all weights once more in float do not fit in memory"]
    direction = job.strategy.direction
    try:
        order = inc_order(session, scene.batches, direction)
    except Exception as error:  # the scores are on disk; the artifact is no reason to lose the run
        return [f"{ORDER_FILE} is missing: {type(error).__name__}: {error}"]
    content = {
        "order": order,
        "direction": direction,
        "confidence_batches": len(scene.batches),
        "source": "get_fallback_order of Neural Compressor, its errors computed in plain torch with its own scales, "
        "zero points and int8 weights",
        "faults": FAULTS[direction],
    }
    write_json(job.workdir / ORDER_FILE, content)
    return [f"{ORDER_FILE} keeps the order that Neural Compressor itself returns, and what is wrong with it"]
