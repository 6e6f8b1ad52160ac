"""Exports one component of a model, maps its nodes, checks it against PyTorch, and leaves a manifest beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import ExportError
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.onnx.export import dynamo, torchscript
from qvl_hydra.onnx.export.check import Difference, compare
from qvl_hydra.onnx.export.manifest import Manifest, Product, write_manifest
from qvl_hydra.onnx.export.towers import Exportable, exportable, sample_inputs
from qvl_hydra.onnx.export.weights import data_file
from qvl_hydra.onnx.scoring.graph import WEIGHTED, Graph, read_graph, weighted_nodes
from qvl_hydra.onnx.scoring.session import Device
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.runs.versions import installed_versions
from qvl_hydra.settings import ExportSettings

LOG = logging.getLogger(__name__)
Exporter = Callable[[Exportable, Mapping[str, Tensor], Path, int, bool], dict[str, str]]
EXPORTERS: dict[str, tuple[Exporter, range]] = {
    torchscript.NAME: (torchscript.export, torchscript.OPSETS),
    dynamo.NAME: (dynamo.export, dynamo.OPSETS),
}
PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        path: of the graph.
        tried: exporters that failed before the one that worked, with their errors.
    """

    path: Path
    manifest: Manifest
    difference: Difference
    tried: dict[str, str]


def export_component(
    model: LoadedModel,
    component: str,
    samples: Sequence[Sample],
    folder: Path,
    settings: ExportSettings,
    device: Device,
    free: bool = False,
) -> Exported:
    """Write `<component>.onnx` and its manifest into a folder.

    Args:
        samples: compared with PyTorch; for `vision` and `full` all of one grid, which the graph is fixed to.
        free: leave the resolution of `vision` and `full` free instead, with the grid's layout as further inputs.

    Raises:
        ExportError: no exporter can do it, an operator is missing in the graph, or the graph computes something else.
    """
    if any(parameter.dtype != torch.float32 for parameter in model.module.parameters()):
        raise ExportError(
            f"model.dtype={model.description.settings.dtype}; graphs are exported in float32: set model.dtype=float32"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{component}.onnx"
    grid = None if component == "lm" or free else samples[0].image_grid_thw
    tried: dict[str, str] = {}
    for name in _exporters(settings):
        try:
            modules = _export(model.module, component, samples[0], grid, path, settings, name)
        except Exception as error:  # the exporters raise whatever they stumble on
            tried[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            LOG.warning("exporting %s with %s failed", component, name, exc_info=True)
            continue
        graph = read_graph(path)
        nodes = map_products(graph, modules)
        _require_operators(model.module, component, nodes)
        difference = compare(path, model.module, samples, component, free, device)
        _judge(difference, settings, name, path)  # before the manifest, without which it is nobody's export
        manifest = _manifest(model, component, graph, path, name, nodes, grid, difference, settings)
        write_manifest(folder, manifest)
        return Exported(path, manifest, difference, tried)
    faults = "; ".join(f"{name}: {error}" for name, error in tried.items())
    raise ExportError(
        f"{component} of {model.description.settings.name} does not export with opset {settings.opset}: {faults}"
    )


def _exporters(settings: ExportSettings) -> list[str]:
    # Tracing first: it takes a tenth of the time and of the memory.
    names = list(EXPORTERS) if settings.exporter == "auto" else [str(settings.exporter)]
    able = [name for name in names if settings.opset in EXPORTERS[name][1]]
    if not able:
        allowed = "; ".join(f"{name} {opsets.start} to {opsets.stop - 1}" for name, (_, opsets) in EXPORTERS.items())
        raise ExportError(f"export.opset={settings.opset} with export.exporter={settings.exporter}; allowed: {allowed}")
    return able


def _export(
    module: nn.Module,
    component: str,
    sample: Sample,
    grid: Int64[Tensor, "image 3"] | None,
    path: Path,
    settings: ExportSettings,
    exporter: str,
) -> dict[str, str | None]:
    """Write the graph; for each product's node its Hugging Face module."""
    with exportable(module, component, grid) as target:
        inputs = {
            # Two rows: an exporter may take a dimension of one for constant.
            name: torch.cat([value] * 2, dim=axis) if (axis := _row_axis(target.axes[name])) is not None else value
            for name, value in sample_inputs(module, sample, component, grid is None).items()
        }
        function, _ = EXPORTERS[exporter]
        found = function(target, inputs, path, settings.opset, settings.external_data)
        paths = {id(part): name for name, part in module.named_modules()}
        modules = dict(target.module.named_modules())
        # Some scopes are no module's: the exporters put helpers of their own among them.
        return {node: paths.get(id(modules.get(name))) for node, name in found.items()}


def _row_axis(axes: Mapping[int, str]) -> int | None:
    return next((axis for axis, name in axes.items() if name == "row"), None)


def map_products(graph: Graph, modules: Mapping[str, str | None]) -> dict[str, Product]:
    """Every MatMul, Gemm and Conv node with its module."""
    weighted = {node.name for node in weighted_nodes(graph)}
    return {
        node.name: Product(node.op_type, modules.get(node.name), node.name in weighted)
        for node in graph.proto.graph.node
        if node.op_type in WEIGHTED
    }


def _require_operators(module: nn.Module, component: str, nodes: Mapping[str, Product]) -> None:
    """Every operator of the component is one node of the graph, and every weighted node is an operator."""
    expected = [op.path for op in find_operators(module, component)]
    found = [product.path for product in nodes.values() if product.operator]
    missing = sorted(set(expected) - set(found))
    unknown = sorted(str(path) for path in set(found) - set(expected))
    twice = sorted({str(path) for path in found if found.count(path) > 1})
    if missing or unknown or twice:
        raise ExportError(
            f"the exported graph of {component} does not hold the model's operators one to one: "
            f"missing {missing[:3]}, unknown {unknown[:3]}, more than once {twice[:3]}; take another export.exporter"
        )


def _judge(difference: Difference, settings: ExportSettings, exporter: str, path: Path) -> None:
    LOG.info("%s differs from PyTorch by %.3g at most", path, difference.largest)
    if not difference.relative <= settings.tolerance:
        raise ExportError(
            f"{path}: the graph that {exporter} wrote differs from PyTorch by {difference.largest:.3g}, which is "
            f"{difference.relative:.3g} of the largest output ({difference.scale:.3g}) and above "
            f"export.tolerance={settings.tolerance:g}; take another export.exporter or export.opset"
        )


def _manifest(
    model: LoadedModel,
    component: str,
    graph: Graph,
    path: Path,
    exporter: str,
    nodes: dict[str, Product],
    grid: Int64[Tensor, "image 3"] | None,
    difference: Difference,
    settings: ExportSettings,
) -> Manifest:
    patch = int(model.config.vision_config.patch_size)
    outside = data_file(path).exists()
    return Manifest(
        component=component,
        family=model.family.name,
        model=model.description.source,
        model_sha=model.sha,
        graph=path.name,
        weights=data_file(path).name if outside else None,
        weight_bytes=data_file(path).stat().st_size if outside else path.stat().st_size,
        exporter=exporter,
        opset=graph.opset,
        versions=installed_versions(PACKAGES),
        grid=None if grid is None else grid.tolist(),
        image_size=None if grid is None else [[rows * patch, columns * patch] for _, rows, columns in grid.tolist()],
        inputs=graph.inputs,
        output=graph.outputs[0],
        checked={
            "largest_difference": difference.largest,
            "largest_output": difference.scale,
            "relative_difference": difference.relative,
            "tolerance": settings.tolerance,
            "samples": list(difference.samples),
            "lengths": list(difference.lengths),
            "in_one_batch": list(difference.together),
        },
        nodes=nodes,
    )
