"""task=export_onnx: writes a component as an ONNX graph, checked against PyTorch on calibration samples."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from qvl_hydra.calibration.encode import EncodingError, Processor, encode, with_pixel_limits
from qvl_hydra.calibration.record import read_image
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.calibration.sources import SOURCES
from qvl_hydra.errors import ExportError
from qvl_hydra.models.load import BUNDLED, describe_model, require_memory
from qvl_hydra.models.memory import GIB, peak_memory_bytes
from qvl_hydra.onnx.export.component import Exported, export_component
from qvl_hydra.onnx.scoring.session import pick_provider
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.runs.record import RunRecord, write_record
from qvl_hydra.screen import Screen
from qvl_hydra.settings import Settings
from qvl_hydra.tasks.prepare import Prepared, prepare

REAL_SIZE = 672  # pixels a side: the default resolution for real models
COPIES = 2  # of the weights beside the model's own: the session that is compared, and the exporter's at worst


def run(settings: Settings, folder: RunFolder, screen: Screen) -> None:
    """Export, check, write, show.

    Raises:
        QvlHydraError: the model or samples cannot be had, no exporter can do it, or the graph computes something else.
    """
    began = time.perf_counter()
    description = describe_model(settings.model)
    require_memory(description, COPIES * description.weight_bytes, "task=export_onnx")
    prepared = prepare(settings)
    device = pick_provider(settings.backend.device, settings.backend.threads)
    component = settings.component.name
    target = Path(settings.export.folder) if settings.export.folder else folder.path / "onnx"
    samples = _samples(settings, prepared)
    with screen.working(1, f"exporting {component}"):
        exported = export_component(prepared.model, component, samples, target / component, settings.export, device)
    _write(settings, folder, prepared, exported, time.perf_counter() - began)
    _show(settings, exported, screen)


def _samples(settings: Settings, prepared: Prepared) -> list[Sample]:
    """Calibration samples that the graph is compared on; all of the graph's resolution."""
    count, samples = settings.export.check_samples, prepared.calibration.samples
    if settings.component.name == "lm":
        return list(samples[:count])
    height, width = settings.export.image_height, settings.export.image_width
    if height is None and not settings.model.path.startswith(BUNDLED):
        height = width = REAL_SIZE
    if height is None or width is None:
        first = next((sample for sample in samples if sample.image_grid_thw is not None), None)
        if first is None or first.image_grid_thw is None:
            raise ExportError(
                f"component={settings.component.name} is exported for an image size, and no calibration sample has an "
                "image; give export.image_height and export.image_width, or samples with images"
            )
        grid = first.image_grid_thw.tolist()
        alike = [one for one in samples if one.image_grid_thw is not None and one.image_grid_thw.tolist() == grid]
        return alike[:count]
    side = prepared.processor.token_side
    if side is not None and (height % side or width % side):
        raise ExportError(
            f"export.image_height={height}, export.image_width={width}: an image token of this model covers "
            f"{side} x {side} pixels; give multiples of {side}"
        )
    resized = _resized(settings, prepared.processor, height, width)
    found = [sample for sample, _ in zip(resized, range(count), strict=False)]
    if not found:
        raise ExportError(f"calibration={settings.calibration.source} has no sample with one image to resize")
    return found


def _resized(settings: Settings, processor: Processor, height: int, width: int) -> Iterator[Sample]:
    """Calibration samples with their image brought to a size, whatever its own proportions."""
    exact = with_pixel_limits(processor, height * width, height * width)
    for record in SOURCES[settings.calibration.source].read(settings.calibration, processor.token_side):
        if record.fault is None and len(record.images) == 1:
            try:
                image = read_image(record.images[0]).resize((width, height))
                yield encode(exact, record.name, record.prompt, record.answer, [image])
            except (OSError, EncodingError):
                continue


def _write(settings: Settings, folder: RunFolder, prepared: Prepared, exported: Exported, wall_s: float) -> None:
    manifest, difference = exported.manifest, exported.difference
    write_record(
        folder.path,
        RunRecord(
            task="export_onnx",
            status="complete",
            component=manifest.component,
            model=settings.model.name,
            n_ops=sum(product.operator for product in manifest.nodes.values()),
            n_samples=len(difference.samples),
            wall_s=wall_s,
            peak_memory_bytes=peak_memory_bytes(),
            versions=dict(manifest.versions),
            model_sha=prepared.model.sha,
            calibration_sha=prepared.calibration.sha,
            notes=[f"{name} failed: {error}" for name, error in exported.tried.items()],
            further={
                "graph": str(exported.path),
                "exporter": manifest.exporter,
                "opset": manifest.opset,
                "grid": manifest.grid,
                "image_size": manifest.image_size,
                "weight_bytes": manifest.weight_bytes,
                "external_data": manifest.weights,
                "n_products": len(manifest.nodes),
                "largest_difference": difference.largest,
                "largest_output": difference.scale,
                "relative_difference": difference.relative,
            },
        ),
    )


def _show(settings: Settings, exported: Exported, screen: Screen) -> None:
    manifest, difference = exported.manifest, exported.difference
    for name, error in exported.tried.items():
        screen.say(f"exporter {name} failed ({error}); {manifest.exporter} was taken")
    size = (
        ""
        if manifest.image_size is None
        else " for images of " + ", ".join(f"{h} x {w}" for h, w in manifest.image_size)
    )
    operators = sum(product.operator for product in manifest.nodes.values())
    screen.say(
        f"{settings.model.name} {manifest.component}{size}: {operators} operators, opset {manifest.opset}, by "
        f"{manifest.exporter}, {manifest.weight_bytes / GIB:.2f} GiB\n"
        f"largest difference to PyTorch {difference.largest:.2g} (outputs up to {difference.scale:.3g}) on "
        f"{len(difference.samples)} calibration samples\n"
        f"graph: {exported.path}"
    )
