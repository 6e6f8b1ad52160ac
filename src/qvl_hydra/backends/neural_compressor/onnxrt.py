"""Backend `inc_onnxrt`: Neural Compressor's ONNX Runtime adaptor on exported graphs, `mse_v2` in both directions.

Its `calculate_op_sensitivity` returns an order; the scores behind it pass through `_calculate_mse`, operator by
operator, and are taken there, sample by sample. Unlike its PyTorch loop, this one puts each operator back before the
next. The scheme is always its own: input, weight and output in 8 bits. docs/onnx.md says more.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qvl_hydra.backends.neural_compressor.session import (  # says what to install when Neural Compressor is missing
    VERSION,
    guest,
)

# isort: split
from qvl_hydra.backends.neural_compressor.adaptor import SCHEME, scheme_notes
from qvl_hydra.backends.neural_compressor.onnx_adaptor import Key, OnnxSession, onnx_mapping, open_session
from qvl_hydra.backends.onnx_graphs import check_job, forward_seconds, open_bundle
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import EngineError
from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.estimators.metrics import UNITS, error_counts, error_sums, next_token_labels, output_metrics
from qvl_hydra.onnx.scoring.scorable import Scorable, split_rows
from qvl_hydra.onnx.scoring.session import Device, pick_provider, quiet_runtime
from qvl_hydra.runs.files import write_json
from qvl_hydra.runs.folder import RunFolder, SampleScore

ESTIMATOR = "inc"
ORDER_FILE = "inc_order.json"
ORDER_MEANING = {
    "requantize": "smallest error first, so the least sensitive operator first",
    "fallback": "smallest error of all others first, so the most sensitive operator first",
}


def run(job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport:
    """Score the job's operators with Neural Compressor; see `backends.protocol.Engine`.

    Raises:
        EngineError: the device, metric or a fused group does not fit, the graph is too large, or no sample suits it.
        ExportError: the model does not export, or the graph given cannot be used.
    """
    check_job(job)
    if job.fuse:
        raise EngineError("operators.fuse=true, but Neural Compressor scores every operator alone; take backend=onnxrt")
    device = pick_provider(job.backend.device, job.backend.threads)
    direction = job.strategy.direction
    progress.total(len(job.operators), f"Neural Compressor mse_v2, {direction}")
    orders: dict[str, list[str]] = {}
    reduced = False
    with open_bundle(job, folder, device) as bundle:
        forward_s = sum(forward_seconds(graph, samples, device) for graph, samples in bundle.scored(job.scored))
        started = time.perf_counter()
        with guest(), onnx_mapping(), quiet_runtime():
            for (graph, calibration), (_, scored) in zip(bundle.graphs, bundle.scored(job.scored), strict=True):
                feeds = [graph.feeds(sample) for sample in calibration]
                session = open_session(graph, job.scheme, feeds, device)
                reduced = reduced or bool(session.adaptor.reduce_range)
                orders[graph.path.stem] = _Sweep(job, folder, progress, graph, session, scored).run()
        engine_s = time.perf_counter() - started
    write_json(job.workdir / ORDER_FILE, {"order": orders, "direction": direction, "meaning": ORDER_MEANING[direction]})
    notes = [*bundle.notes, *_scheme_notes(job, device, reduced)]
    details = {**bundle.details, "provider": device.provider, "neural_compressor": VERSION, "scheme_measured": SCHEME}
    details |= {
        "inc_order": ORDER_FILE,
        "reduced_range": reduced,
        "seconds_per_operator": engine_s / len(job.operators),
    }
    return EngineReport(ESTIMATOR, job.strategy.metric, UNITS[job.strategy.metric], forward_s, engine_s, notes, details)


def _scheme_notes(job: SweepJob, device: Device, reduced: bool) -> list[str]:
    notes = [] if device.note is None else [device.note]
    notes += scheme_notes(job.scheme)
    if reduced:
        notes.append("this processor has no VNNI, so Neural Compressor used 7 bits (reduce_range)")
    return notes


@dataclass
class _Sweep:
    """One graph under Neural Compressor.

    Attributes:
        scored: samples that are measured, the first of those that ranges come from.
        keys: Neural Compressor's name of each operator that it can quantize, in the order of its loop.
        coming: operators whose scores its loop will give, in that order.
        base: metrics of everything quantized, (sample, metric) (`fallback`).
    """

    job: SweepJob
    folder: RunFolder
    progress: Progress
    graph: Scorable
    session: OnnxSession
    scored: Sequence[Sample]
    keys: dict[str, Key] = field(default_factory=dict)
    coming: list[str] = field(default_factory=list)
    base: Tensor | None = None

    def run(self) -> list[str]:
        """Score every operator that is not on disk; the order that Neural Compressor returns, as paths."""
        self._name_operators()
        ended = self.folder.endings()
        left = [path for path in self.keys if not self.folder.done(self._unit(path)) and path not in ended]
        self.progress.step(len(self.keys) - len(left))
        if not left:
            return []
        if self.job.strategy.direction == "fallback":
            self.base = self._all_quantized()
            left = list(self.keys)  # its loop goes through all that are quantized
        original = self.session.adaptor._calculate_mse

        def take(before: Sequence[Any], after: Sequence[Any]) -> Any:
            metrics = self._metrics(before, after)
            self._write(self.coming.pop(0), metrics)
            return original(before, after)

        self.session.adaptor._calculate_mse = take
        order: list[Key] = []
        while left:
            self.coming = list(left)
            try:
                order += self._ask(left)
                left = []
            except Exception as error:  # one operator's trouble is not the run's
                left = self._after_failure(error)
        paths = {key: path for path, key in self.keys.items()}
        return [paths[key] for key in order]

    def _ask(self, paths: Sequence[str]) -> list[Key]:
        """Neural Compressor's sensitivity call; scores are taken on the way, its order is the result."""
        session, fallback = self.session, self.job.strategy.direction == "fallback"
        asked = [self.keys[path] for path in paths]
        order: list[Key] = session.adaptor.calculate_op_sensitivity(
            session.model,
            session.loader,
            session.tune_cfg(asked if fallback else ()),
            session.adaptor.get_output_op_names(session.model),
            len(self.scored),
            fallback=fallback,
            requantize_cfgs=None if fallback else {key: session.configs[key] for key in asked},
        )
        return order

    def _all_quantized(self) -> Tensor:
        session = self.session
        tune_cfg = session.tune_cfg(list(self.keys.values()))
        names = session.adaptor.get_output_op_names(session.model)
        run = session.adaptor._inference_model_on_batches
        before = run(session.model, tune_cfg, session.loader, names, len(self.scored))
        quantized = session.adaptor.quantize(tune_cfg, session.model, session.loader)
        return self._metrics(before, run(quantized, tune_cfg, session.loader, names, len(self.scored)))

    def _name_operators(self) -> None:
        """Find Neural Compressor's names; an operator that this graph does not hold changes nothing in its samples."""
        names = {}
        for op in self.job.operators:
            nodes = self.graph.nodes.get(op.path, ())
            key = (nodes[0].name, nodes[0].node.op_type) if len(nodes) == 1 else None
            if key in self.session.configs:
                names[op.path] = key
            elif nodes:
                self.folder.skip(op.path, f"Neural Compressor {VERSION} does not list its node as one it quantizes")
            else:
                self._write(op.path, torch.zeros(len(self.scored), len(output_metrics(self.job.component))))
        self.keys = dict(sorted(names.items(), key=lambda item: self.session.every.index(item[1])))

    def _unit(self, path: str) -> str:
        index = next(index for index, op in enumerate(self.job.operators) if op.path == path)
        return f"inc_{self.graph.path.stem}_{index:04d}"

    def _metrics(self, before: Sequence[Any], after: Sequence[Any]) -> Tensor:
        """Metrics of every sample, (sample, metric), from all outputs of all samples in turn."""
        names = self.graph.graph.outputs
        place, step = names.index(self.graph.output), len(names)
        found = []
        for sample, one, other in zip(self.scored, before[place::step], after[place::step], strict=True):
            reference, output = (torch.from_numpy(split_rows(value, 1)) for value in (one, other))
            labels = None if self.job.component == "vision" else next_token_labels(sample.labels)
            counts = torch.tensor(error_counts(reference.shape[1], labels), dtype=torch.float64)
            found.append(error_sums(reference[0], output, labels)[0] / counts)
        return torch.stack(found)

    def _write(self, path: str, values: Tensor) -> None:
        unit = self._unit(path)
        if self.base is not None:
            values = self.base - values
        if not bool(values.isfinite().all()):
            self.folder.fail(path, "a metric is not finite")
        elif not self.folder.done(unit):
            names = output_metrics(self.job.component)
            self.folder.write(
                unit,
                [
                    SampleScore(path, sample.id, None, value, name, ESTIMATOR, SCHEME)
                    for sample, row in zip(self.scored, values.tolist(), strict=True)
                    for name, value in zip(names, row, strict=True)
                ],
            )
        self.progress.step()

    def _after_failure(self, error: Exception) -> list[str]:
        """Note the operator whose turn it was; those that can still be asked."""
        if not self.coming:
            raise EngineError(f"Neural Compressor failed: {type(error).__name__}: {error}") from error
        failed, *rest = self.coming
        self.folder.fail(failed, f"{type(error).__name__}: {error}")
        if self.job.strategy.direction == "requantize":
            return rest
        for path in rest:
            self.folder.skip(path, f"Neural Compressor's loop stopped at {failed}")
        return []
