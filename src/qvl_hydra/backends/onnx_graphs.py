"""The graphs that a job is measured on: exported for it, or given by `backend.graph`."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import EngineError
from qvl_hydra.estimators.job import SweepJob
from qvl_hydra.estimators.metrics import output_metrics
from qvl_hydra.models.load import ModelDescription
from qvl_hydra.onnx.export.component import export_component
from qvl_hydra.onnx.scoring.foreign import find_graph, foreign_scorable
from qvl_hydra.onnx.scoring.scorable import Scorable, own_scorable
from qvl_hydra.onnx.scoring.session import Device, open_session
from qvl_hydra.operators.discover import Operator
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.settings import ExportSettings, Settings

LOG = logging.getLogger(__name__)
GRAPHS = "graphs"  # in the folder of parts: a run's working files, which are not sent to the tracker
SAMPLES_CHECKED = 2


@dataclass
class Bundle:
    """The graphs of one job.

    Attributes:
        graphs: each with the calibration samples that it takes, in their order.
        notes: for the user.
        details: for `run.json`.
    """

    graphs: list[tuple[Scorable, list[Sample]]]
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def scored(self, samples: tuple[Sample, ...]) -> list[tuple[Scorable, list[Sample]]]:
        """The graphs with those of the given samples that they take."""
        wanted = {sample.id for sample in samples}
        return [(graph, [sample for sample in taken if sample.id in wanted]) for graph, taken in self.graphs]


def extra_bytes(settings: Settings, description: ModelDescription, operators: Sequence[Operator]) -> int:
    """Memory needed beside the weights, at least: the graph with its own copy of them, and a session's."""
    return 2 * sum(p.numel() for p in description.skeleton.parameters()) * 4


def check_job(job: SweepJob) -> None:
    """Refuse what no graph can do.

    Raises:
        EngineError: gradients are asked for, or a metric that the component's output has not.
    """
    if job.strategy.name == "hawq_v2":
        raise EngineError(f"strategy={job.strategy.name}, but a graph has no gradients; take backend=torch or inc_fx")
    if job.strategy.metric not in output_metrics(job.component):
        raise EngineError(
            f"strategy.metric={job.strategy.metric} needs logits, and component={job.component} has none; "
            f"allowed: {', '.join(output_metrics(job.component))}"
        )


def forward_seconds(graph: Scorable, samples: Sequence[Sample], device: Device) -> float:
    """Seconds of one plain forward of the samples, after one to warm up."""
    if not samples:
        return 0.0
    session = open_session(graph.path, device)
    feeds = [graph.feeds(sample) for sample in samples]
    session.run([graph.output], feeds[0])
    began = time.perf_counter()
    for inputs in feeds:
        session.run([graph.output], inputs)
    return time.perf_counter() - began


@contextmanager
def open_bundle(job: SweepJob, folder: RunFolder, device: Device) -> Iterator[Bundle]:
    """The job's graphs. Those exported for it live in the run's folder and go with the context.

    Raises:
        EngineError: no sample that is scored suits a graph.
        ExportError: an export failed, or the graph given cannot be read.
    """
    scratch = folder.parts / GRAPHS
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    try:
        bundle = _given(job, device) if job.backend.graph else _exported(job, scratch, device)
        scored = {sample.id for _, taken in bundle.scored(job.scored) for sample in taken}
        if not scored:
            raise EngineError(
                f"none of the {len(job.scored)} scored samples suits the graph of component={job.component}: "
                "images are missing, or of another size than the graph's; see the manifest beside it"
            )
        if len(scored) < len(job.scored):
            bundle.notes.append(
                f"{len(job.scored) - len(scored)} scored samples were left out: the graph does not take them"
            )
        yield bundle
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _given(job: SweepJob, device: Device) -> Bundle:
    """The graph of `backend.graph`."""
    assert job.backend.graph is not None
    path, manifest = find_graph(job.backend.graph, job.component)
    if manifest is not None:
        graph = own_scorable(path, manifest, job.model.module)
    else:
        graph = foreign_scorable(path, job.component, job.model.module, job.model.config.image_token_id, device)
    taken = [sample for sample in job.calibration.samples if graph.takes(sample)]
    return Bundle(
        [(graph, taken)], details={"graph": str(path), "exporter": manifest.exporter if manifest else "foreign"}
    )


def _exported(job: SweepJob, scratch: Path, device: Device) -> Bundle:
    """Graphs exported for this run: one, with free lengths and resolution; and for `full` one more for text alone."""
    samples = job.calibration.samples
    seen = [sample for sample in samples if sample.pixel_values is not None]
    parts = [("lm", list(samples))] if job.component == "lm" else [(job.component, seen)]
    if job.component == "full" and len(seen) < len(samples):
        parts.append(("lm", [sample for sample in samples if sample.pixel_values is None]))
    bundle = Bundle([])
    for component, taken in parts:
        if taken:
            done = export_component(
                job.model, component, taken[:SAMPLES_CHECKED], scratch / component, ExportSettings(), device, free=True
            )
            graph = own_scorable(done.path, done.manifest, job.model.module)
            bundle.graphs.append((graph, taken))
            bundle.details[f"exported_{component}"] = {
                "exporter": done.manifest.exporter,
                "opset": done.manifest.opset,
                "largest_difference": done.difference.largest,
            }
    return bundle
