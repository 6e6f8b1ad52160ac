"""Exports of all three components of both families: equal to PyTorch, mapped node by node, refused when wrong."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import ExportError
from qvl_hydra.models.forward import reference_output
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.settings import ExportSettings
from tests.backends.neural_compressor.inc_job import make_job, make_sample, small_model
from tests.conftest import load_tiny

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from qvl_hydra.onnx.export import component as exporting
from qvl_hydra.onnx.export.check import as_arrays
from qvl_hydra.onnx.export.component import export_component
from qvl_hydra.onnx.export.manifest import read_manifest
from qvl_hydra.onnx.export.towers import sample_inputs
from qvl_hydra.onnx.export.weights import data_file
from qvl_hydra.onnx.scoring.graph import read_graph, weighted_nodes
from qvl_hydra.onnx.scoring.session import Device, open_session

pytestmark = pytest.mark.onnx
DEVICE = Device("CPUExecutionProvider", 0, 1, None)


def small(family: str = "qwen2_5_vl") -> LoadedModel:
    return make_job(Path("unused"), model=small_model(family, layers=2, depth=2)).model


def same_size(model: LoadedModel, count: int) -> list[Sample]:
    """Samples with images of one size and texts of different length."""
    samples = [make_sample(model.module, 3 * index) for index in range(count)]
    assert len({len(sample.input_ids) for sample in samples}) > 1
    return samples


def largest_difference(path: Path, model: LoadedModel, sample: Sample, component: str, free: bool) -> float:
    session = open_session(path, DEVICE)
    output = session.run(None, as_arrays(sample_inputs(model.module, sample, component, free)))[0][0]
    return float(np.abs(output - reference_output(model.module, sample, component).numpy()).max())


@pytest.mark.parametrize("component", ["lm", "vision", "full"])
@pytest.mark.parametrize("name", ["tiny_qwen2_5_vl", "tiny_qwen2_vl"])
def test_bundled_models_export_within_1e_4(
    name: str, component: str, tiny_samples: tuple[Sample, ...], tmp_path: Path
) -> None:
    model = load_tiny(name)
    grid = tiny_samples[0].image_grid_thw.tolist()
    samples = [s for s in tiny_samples if component == "lm" or s.image_grid_thw.tolist() == grid]
    done = export_component(model, component, samples[:2], tmp_path, ExportSettings(), DEVICE)
    for sample in samples:  # further lengths (lm, full) than the two that the export itself compared
        scale = float(reference_output(model.module, sample, component).abs().max())
        assert largest_difference(done.path, model, sample, component, False) <= 1e-4 * scale
    assert done.manifest.exporter == "torchscript"
    assert done.manifest.opset == 18
    assert done.manifest.grid == (None if component == "lm" else grid)


@pytest.mark.parametrize("component", ["vision", "full"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_a_free_resolution_takes_images_of_more_than_one_size(family: str, component: str, tmp_path: Path) -> None:
    model = small(family)
    samples = [make_sample(model.module, seed) for seed in (0, 1, 2)]
    assert len({str(sample.image_grid_thw.tolist()) for sample in samples}) == 3
    done = export_component(model, component, samples[:1], tmp_path, ExportSettings(), DEVICE, free=True)
    for sample in samples:
        assert largest_difference(done.path, model, sample, component, True) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("component", ["lm", "vision", "full"])
def test_the_new_exporter_exports_all_three(component: str, tmp_path: Path) -> None:
    model = small()
    samples = same_size(model, 3)
    settings = ExportSettings(exporter="dynamo")
    done = export_component(model, component, samples[:2], tmp_path, settings, DEVICE)
    assert largest_difference(done.path, model, samples[2], component, False) < 1e-4
    assert set(done.manifest.operator_nodes()) == {op.path for op in find_operators(model.module, component)}


@pytest.mark.parametrize("component", ["lm", "full"])
def test_every_product_is_mapped_and_operators_carry_their_weight(component: str, tmp_path: Path) -> None:
    model = small()
    done = export_component(model, component, same_size(model, 2), tmp_path, ExportSettings(), DEVICE)
    manifest = read_manifest(tmp_path)
    assert manifest == done.manifest
    graph = read_graph(done.path)
    products = [node for node in graph.proto.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    assert {node.name for node in products} == set(manifest.nodes)
    assert all(product.path is not None for name, product in manifest.nodes.items() if "rotary" not in name)
    attention = {product.path for product in manifest.nodes.values() if not product.operator}
    assert "model.language_model.layers.1.self_attn" in attention
    paths = {name: path for path, (name,) in manifest.operator_nodes().items()}
    assert set(paths.values()) == {op.path for op in find_operators(model.module, component)}
    for node in weighted_nodes(graph):
        stored = torch.from_numpy(np.array(graph.array(node.weight)))
        held = model.module.get_submodule(paths[node.name]).weight
        assert torch.equal(stored if node.output_first else stored.T, held)


def test_external_data_is_one_file_and_gives_the_same_outputs(tmp_path: Path) -> None:
    model = small()
    samples = same_size(model, 2)
    inside = export_component(model, "lm", samples, tmp_path / "inside", ExportSettings(), DEVICE)
    outside = export_component(model, "lm", samples, tmp_path / "outside", ExportSettings(external_data=True), DEVICE)
    assert sorted(path.name for path in (tmp_path / "outside").iterdir()) == [
        "lm.onnx",
        "lm.onnx.data",
        "manifest.json",
    ]
    assert outside.manifest.weights == "lm.onnx.data"
    assert outside.path.stat().st_size < inside.path.stat().st_size / 2
    onnx.checker.check_model(str(outside.path))
    for sample in samples:
        feeds = as_arrays(sample_inputs(model.module, sample, "lm", False))
        results = [open_session(done.path, DEVICE).run(None, feeds)[0] for done in (inside, outside)]
        assert np.array_equal(*results)


def test_weights_behind_links_are_found_as_in_the_cache_of_a_hub(tmp_path: Path) -> None:
    model = small()
    sample = make_sample(model.module, 0)
    done = export_component(model, "lm", [sample], tmp_path / "plain", ExportSettings(external_data=True), DEVICE)
    blobs, linked = tmp_path / "cache/blobs", tmp_path / "cache/snapshots/main/onnx"
    blobs.mkdir(parents=True)
    linked.mkdir(parents=True)
    for number, path in enumerate(done.path.parent.iterdir()):
        shutil.copy(path, blobs / f"{number:x}")
        (linked / path.name).symlink_to(blobs / f"{number:x}")
    feeds = as_arrays(sample_inputs(model.module, sample, "lm", False))
    results = [open_session(path, DEVICE).run(None, feeds)[0] for path in (done.path, linked / "lm.onnx")]
    assert np.array_equal(*results)
    graphs = [read_graph(path) for path in (done.path, linked / "lm.onnx")]
    weights = [[graph.array(node.weight) for node in weighted_nodes(graph)] for graph in graphs]
    assert all(np.array_equal(one, other) for one, other in zip(*weights, strict=True))


@pytest.mark.parametrize("location", ["../lm.onnx.data", "/etc/hostname"])
def test_weights_named_outside_of_the_folder_are_refused(location: str, tmp_path: Path) -> None:
    model = small()
    done = export_component(
        model, "lm", [make_sample(model.module, 0)], tmp_path / "inside", ExportSettings(external_data=True), DEVICE
    )
    proto = onnx.load(done.path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for item in tensor.external_data:
            item.value = location if item.key == "location" else item.value
    onnx.save(proto, tmp_path / "inside/wrong.onnx")
    with pytest.raises(ExportError, match="named outside of its folder"):
        read_graph(tmp_path / "inside/wrong.onnx")


def test_weights_beyond_what_a_message_holds_go_outside_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvl_hydra.onnx.export.weights.PROTOBUF_LIMIT", 1000)
    done = export_component(small(), "lm", [make_sample(small().module, 0)], tmp_path, ExportSettings(), DEVICE)
    assert data_file(done.path).exists()


def test_a_wrong_graph_fails_and_leaves_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    other = small()
    with torch.no_grad():
        other.module.model.language_model.layers[1].mlp.up_proj.weight[3, 5] += 0.5
    right = exporting._export
    monkeypatch.setattr(exporting, "_export", lambda module, *args: right(other.module, *args))
    with pytest.raises(ExportError, match="differs from PyTorch by"):
        export_component(model, "lm", [make_sample(model.module, 0)], tmp_path, ExportSettings(), DEVICE)
    assert read_manifest(tmp_path) is None


def test_auto_goes_on_to_the_next_exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> dict[str, str]:
        raise RuntimeError("cannot trace this")

    table = exporting.EXPORTERS
    monkeypatch.setitem(table, "dynamo", table["torchscript"])
    monkeypatch.setitem(table, "torchscript", (broken, table["torchscript"][1]))
    model = small()
    done = export_component(model, "vision", [make_sample(model.module, 0)], tmp_path, ExportSettings(), DEVICE)
    assert done.manifest.exporter == "dynamo"
    assert done.tried == {"torchscript": "RuntimeError: cannot trace this"}
    settings = ExportSettings(exporter="torchscript")
    with pytest.raises(ExportError, match="cannot trace this"):
        export_component(model, "vision", [make_sample(model.module, 0)], tmp_path, settings, DEVICE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opset": 9}, "torchscript 14 to 20; dynamo 18 to 23"),
        ({"opset": 15, "exporter": "dynamo"}, "export.opset=15 with export.exporter=dynamo"),
    ],
)
def test_opsets_that_no_exporter_has(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    model = small()
    settings = dataclasses.replace(ExportSettings(), **changes)
    with pytest.raises(ExportError, match=message):
        export_component(model, "lm", [make_sample(model.module, 0)], tmp_path, settings, DEVICE)


def test_half_precision_is_refused(tmp_path: Path) -> None:
    model = small()
    model.module.to(torch.bfloat16)
    with pytest.raises(ExportError, match=r"model.dtype=float32"):
        export_component(model, "lm", [make_sample(model.module, 0)], tmp_path, ExportSettings(), DEVICE)
