"""Backend `onnxrt`: exact `mse_v2` scores over ONNX graphs, in ONNX Runtime on CPU or CUDA.

Each graph is prepared once, with quantize-dequantize of every operator behind a switch (`onnx.scoring.switched`); a
call scores as many operators as it has rows. Graphs are exported for the run, or given by `backend.graph`: this
project's own exports, and those of others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qvl_hydra.backends.onnx_graphs import Bundle, check_job, forward_seconds, open_bundle
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.estimators.metrics import error_counts, error_sums, next_token_labels, output_metrics, unit_of
from qvl_hydra.estimators.positions import scored_positions
from qvl_hydra.models.memory import free_memory_bytes
from qvl_hydra.onnx.scoring.foreign import rows_are_free
from qvl_hydra.onnx.scoring.observe import NodeObserver, Params, observe
from qvl_hydra.onnx.scoring.scorable import Arrays, Scorable, repeat_rows, split_rows, units_of
from qvl_hydra.onnx.scoring.session import Device, open_switched, pick_provider
from qvl_hydra.onnx.scoring.switched import SWITCH, switched
from qvl_hydra.operators.targets import Target, make_targets
from qvl_hydra.quantization.formats.record import QuantParams
from qvl_hydra.quantization.scheme import Scheme
from qvl_hydra.runs.folder import RunFolder, SampleScore

ESTIMATOR = "exact"
CALL_TOKENS = 4096  # more tokens a call than this no longer make products faster, and cost memory
OUTPUT_BYTES = 1 << 28  # outputs of one call
LIVE_TENSORS = 8  # of a block's widest activation, while it runs


def run(job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport:
    """Measure the job's operators; see `backends.protocol.Engine`.

    Raises:
        EngineError: the device, metric or model does not fit the backend, or no sample suits the graph.
        ExportError: the model does not export, or the graph given cannot be used.
    """
    check_job(job)
    device = pick_provider(job.backend.device, job.backend.threads)
    targets = make_targets(job.operators, job.fuse)
    progress.total(_work(job, targets), "exporting" if job.backend.graph is None else "opening the graph")
    began = time.perf_counter()
    with open_bundle(job, folder, device) as bundle:
        opened = time.perf_counter()
        forward_s = sum(forward_seconds(graph, samples, device) for graph, samples in bundle.scored(job.scored))
        started = time.perf_counter()
        ranges = _observe(job, folder, bundle, device, progress)
        targets = _scorable(folder, bundle, targets, ranges)
        scorer = _Scorer(job, folder, targets, ranges, device, progress)
        rows = [_score_graph(scorer, graph, samples) for graph, samples in bundle.scored(job.scored)]
        engine_s = time.perf_counter() - started
    notes = bundle.notes + ([] if device.note is None else [device.note])
    details = {**bundle.details, "provider": device.provider, "rows": rows, "graph_s": opened - began}
    metric = job.strategy.metric
    unit = unit_of(metric, job.strategy.positions)
    return EngineReport(ESTIMATOR, metric, unit, forward_s, engine_s, notes, details)


def _work(job: SweepJob, targets: Sequence[Target]) -> float:
    """The whole work in forwards of one sample, for the time left on screen."""
    return len(job.calibration.samples) + len(job.schemes) * len(job.scored) * (len(targets) + 1)


Ranges = dict[str, dict[str, Params]]  # scheme -> operator node -> input, output


def _observe(job: SweepJob, folder: RunFolder, bundle: Bundle, device: Device, progress: Progress) -> Ranges:
    """Static ranges of every operator from the graphs themselves, or as the run being resumed found them."""
    kept = folder.recall("onnxrt_ranges")
    if kept is not None:
        progress.step(len(job.calibration.samples))
        return {
            scheme: {path: (_params(pair[0]), _params(pair[1])) for path, pair in found.items()}
            for scheme, found in kept.items()
        }
    observers = {op.path: [NodeObserver(scheme) for scheme in job.schemes] for op in job.operators}
    for graph, samples in bundle.graphs:
        by_node = {
            node.name: observers[path] for path, nodes in graph.nodes.items() if path in observers for node in nodes
        }
        observe(graph, by_node, samples, device, progress.step)
    ranges: Ranges = {scheme.name: {} for scheme in job.schemes}
    present = {path for graph, _ in bundle.graphs for path in graph.nodes}
    for path, seen in observers.items():
        for scheme, observer in zip(job.schemes, seen, strict=True):
            try:
                ranges[scheme.name][path] = observer.params()
            except ValueError as error:
                if path in present:
                    folder.fail(path, str(error))
    folder.remember(
        "onnxrt_ranges",
        {
            scheme: {path: [None if side is None else vars(side) for side in pair] for path, pair in found.items()}
            for scheme, found in ranges.items()
        },
    )
    return ranges


def _params(kept: dict[str, Any] | None) -> QuantParams | None:
    return None if kept is None else QuantParams(**kept)


def _scorable(folder: RunFolder, bundle: Bundle, targets: Sequence[Target], ranges: Ranges) -> list[Target]:
    """Targets whose operators are all in a graph and have ranges."""
    kept: list[Target] = []
    for target in targets:
        missing = [op.path for op in target.operators if not any(op.path in graph.nodes for graph, _ in bundle.graphs)]
        failed = folder.endings()
        broken = next((op.path for op in target.operators if op.path in failed), None)
        if missing:
            folder.skip(target.name, f"the graph has no node of {missing[0]}")
        elif broken is None:
            kept.append(target)
        elif broken != target.name:
            folder.fail(target.name, f"{broken}: {failed[broken][1]}")
    return kept


@dataclass(frozen=True)
class _Scorer:
    """What all graphs of a run are scored with."""

    job: SweepJob
    folder: RunFolder
    targets: Sequence[Target]
    ranges: Ranges
    device: Device
    progress: Progress


@dataclass(frozen=True)
class _Bench:
    """A prepared graph.

    Attributes:
        targets: those whose operators the graph holds; one line of the switch each.
        rows: of one call.
    """

    job: SweepJob
    graph: Scorable
    session: Any
    targets: Sequence[Target]
    rows: int
    progress: Progress


def _score_graph(scorer: _Scorer, graph: Scorable, samples: Sequence[Sample]) -> int:
    """Score the samples of one graph under every scheme; the rows of a call."""
    job, folder = scorer.job, scorer.folder
    held = [target for target in scorer.targets if any(op.path in graph.nodes for op in target.operators)]
    # A target that the sample passes over (the vision tower without an image) changes nothing in it.
    untouched = {target.name: dict.fromkeys(output_metrics(job.component), 0.0) for target in scorer.targets}
    rows = 0
    for scheme in job.schemes:
        units = {sample.id: f"onnxrt-{scheme.name}-{job.scored.index(sample):05d}" for sample in samples}
        left = [sample for sample in samples if not folder.done(units[sample.id])]
        scorer.progress.step((len(samples) - len(left)) * (len(scorer.targets) + 1))
        if not left:
            continue
        session = _open(graph, held, scheme, scorer.ranges[scheme.name], scorer.device)
        rows = _rows(job, folder, graph, session, len(held), left)
        bench = _Bench(job, graph, session, held, rows, scorer.progress)
        for sample in left:
            _write(folder, units[sample.id], sample, scheme, untouched | _score_sample(bench, sample))
        del session, bench
    return rows


def _open(graph: Scorable, targets: Sequence[Target], scheme: Scheme, ranges: dict[str, Params], device: Device) -> Any:
    units = units_of(graph, [[op.path for op in target.operators] for target in targets])
    by_node = {node.name: ranges.get(path, (None, None)) for path, nodes in graph.nodes.items() for node in nodes}
    return open_switched(switched(graph.graph, units, scheme, by_node), device)


def _rows(
    job: SweepJob, folder: RunFolder, graph: Scorable, session: Any, targets: int, samples: Sequence[Sample]
) -> int:
    """Rows of one call, sized from free memory; a resumed run keeps its own, so that it rounds alike."""
    name = f"onnxrt_rows_{graph.path.stem}"
    kept = folder.recall(name)
    if kept is None:
        kept = graph.rows or min(targets, job.backend.row_chunk or _fitting(job, graph, samples))
        if kept > 1 and job.backend.graph is not None:
            feeds = graph.feeds(samples[0])

            def float_rows(rows: int) -> Any:
                switch = np.zeros((targets, rows), dtype=bool)
                return session.run([graph.output], {**repeat_rows(feeds, rows), SWITCH: switch})[0]

            kept = kept if rows_are_free(float_rows) else 1
        folder.remember(name, kept)
    return int(kept)


def _fitting(job: SweepJob, graph: Scorable, samples: Sequence[Sample]) -> int:
    tokens = max(len(sample.input_ids) for sample in samples)
    patches = max(0 if sample.pixel_values is None else len(sample.pixel_values) for sample in samples)
    longest = tokens if job.component == "lm" else max(tokens, patches)
    text, vision = job.model.config.text_config, job.model.config.vision_config
    widest = max(max(node.features) for nodes in graph.nodes.values() for node in nodes)
    heads = text.num_attention_heads if job.component == "lm" else max(text.num_attention_heads, vision.num_heads)
    per_row = 4 * (longest * widest * LIVE_TENSORS + heads * longest**2 * 3)
    free = int(free_memory_bytes() * 0.25)
    return max(1, min(free // per_row, CALL_TOKENS // longest, OUTPUT_BYTES // (4 * tokens * widest) + 1))


def _score_sample(bench: _Bench, sample: Sample) -> dict[str, dict[str, float]]:
    """Metrics of every target on one sample: what quantizing it does, or (`fallback`) what restoring it gains."""
    job, count = bench.job, len(bench.targets)
    feeds = bench.graph.feeds(sample)
    fallback = job.strategy.direction == "fallback"
    alone = np.eye(count, dtype=bool)  # row, line
    labels: Tensor | None = None
    counted: slice | Tensor = slice(None)
    if job.component != "vision":
        image_tokens = sample.input_ids == job.model.config.image_token_id
        mask = scored_positions(sample, image_tokens, job.strategy.positions)
        labels = next_token_labels(sample.labels)[mask]
        counted = slice(None) if bool(mask.all()) else mask.nonzero()[:, 0]

    def outputs(rows: Any) -> Tensor:
        return _call(bench, feeds, rows)[:, counted]

    reference = outputs(np.zeros((1, count), dtype=bool))[0]
    bench.progress.step()
    parts = []
    for first in range(0, count, bench.rows):
        rows = alone[first : first + bench.rows]
        parts.append(error_sums(reference, outputs(~rows if fallback else rows), labels))
        bench.progress.step(len(rows))
    values = torch.cat(parts)
    if fallback:
        values = error_sums(reference, outputs(np.ones((1, count), dtype=bool)), labels) - values
    values = values / torch.tensor(error_counts(len(reference), labels), dtype=torch.float64)
    names = output_metrics(job.component)
    rows_ = zip(bench.targets, values.tolist(), strict=True)
    return {target.name: dict(zip(names, row, strict=True)) for target, row in rows_}


def _call(bench: _Bench, feeds: Arrays, rows: Any) -> Tensor:
    """Outputs of so many variants of a sample: (row, token, value)."""
    switch = np.ascontiguousarray(rows.T)
    output = bench.session.run([bench.graph.output], {**repeat_rows(feeds, len(rows)), SWITCH: switch})[0]
    return torch.from_numpy(split_rows(output, len(rows)))


def _write(folder: RunFolder, unit: str, sample: Sample, scheme: Scheme, found: dict[str, dict[str, float]]) -> None:
    """Put a sample's scores on disk."""
    folder.write_finite(
        unit,
        [
            SampleScore(op, sample.id, None, value, metric, ESTIMATOR, scheme.name)
            for op, values in found.items()
            for metric, value in values.items()
        ],
    )
