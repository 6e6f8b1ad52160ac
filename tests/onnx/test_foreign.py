"""Graphs of others: the community's three files, built small; names, inputs, rows and scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from qvl_hydra.errors import ExportError
from qvl_hydra.estimators.job import SweepJob
from qvl_hydra.models.forward import reference_output
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.operators.targets import make_targets
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.settings import ExportSettings
from tests.backends.neural_compressor.inc_job import Steps, make_job, make_sample, small_model
from tests.estimators.slow_loop import loop_scores

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from qvl_hydra.backends import onnxrt
from qvl_hydra.onnx.export.component import export_component
from qvl_hydra.onnx.scoring.foreign import (
    find_graph,
    foreign_scorable,
    graph_model,
    graph_operators,
    is_foreign,
    rows_are_free,
)
from qvl_hydra.onnx.scoring.scorable import repeat_rows
from qvl_hydra.onnx.scoring.session import Device, open_session
from tests.onnx.community_layout import write_layout

pytestmark = pytest.mark.onnx
DEVICE = Device("CPUExecutionProvider", 0, 1, None)
STATIC = Scheme("w8a8_static", WeightFormat(8), ActivationFormat(8))
MODEL = small_model("qwen2_vl", layers=2, depth=2)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("community")
    write_layout(MODEL, folder / "onnx")  # such exports have their files in a folder of that name
    return folder


def job_on(graph: Path, component: str, tmp_path: Path) -> SweepJob:
    """A job over a foreign graph, as the task prepares it: operators from the graph, no weights of the model."""
    job = make_job(tmp_path, component, MODEL, scheme=STATIC)
    skeleton = small_model("qwen2_vl", layers=2, depth=2).to("meta")
    description = dataclasses.replace(job.model.description, skeleton=skeleton)
    return dataclasses.replace(
        job,
        operators=tuple(graph_operators(graph, component, skeleton)),
        model=graph_model(description, graph, component),
        backend=dataclasses.replace(job.backend, name="onnxrt", graph=str(graph), threads=1),
    )


@pytest.mark.parametrize("component", ["lm", "vision"])
def test_operators_get_their_hugging_face_paths(component: str, layout: Path) -> None:
    found = graph_operators(layout, component, MODEL)
    expected = find_operators(MODEL, component)
    assert [op.path for op in found] == [op.path for op in expected]
    kinds = {op.path: op.kind for op in found}
    assert [dataclasses.replace(op, kind=kinds[op.path]) for op in expected] == found


def test_without_a_skeleton_operators_keep_their_node_names(layout: Path) -> None:
    found = graph_operators(layout, "lm")
    assert found[0].path == "/model/layers.0/self_attn/q_proj/MatMul"
    assert (found[0].role, found[0].block, found[0].in_features) == ("q_proj", 0, 48)
    assert found[-1].path == "/lm_head/MatMul"
    biased = MODEL.model.language_model.layers[0].self_attn.q_proj
    assert found[0].n_params == biased.weight.numel() + biased.bias.numel()


@pytest.mark.parametrize("component", ["lm", "vision"])
def test_inputs_are_filled_and_rows_are_free(component: str, layout: Path) -> None:
    path, manifest = find_graph(layout, component)
    assert manifest is None
    graph = foreign_scorable(path, component, MODEL, MODEL.config.image_token_id, DEVICE)
    session = open_session(path, DEVICE)
    for seed in (0, 2):
        sample = make_sample(MODEL, seed)
        output = session.run([graph.output], graph.feeds(sample))[0]
        expected = reference_output(MODEL, sample, component).numpy()
        np.testing.assert_allclose(output.reshape(expected.shape), expected, rtol=1e-3, atol=1e-4)
        feeds = graph.feeds(sample)
        assert rows_are_free(lambda rows, feeds=feeds: session.run([graph.output], repeat_rows(feeds, rows))[0])
    text = make_sample(MODEL, 1, image=False)
    assert graph.takes(text) == (component == "lm")


@pytest.mark.parametrize("component", ["lm", "vision"])
def test_scores_equal_the_loop_over_the_model(component: str, layout: Path, tmp_path: Path) -> None:
    job = job_on(layout, component, tmp_path)
    folder = RunFolder(tmp_path / "run")
    report = onnxrt.run(job, folder, Steps())
    frame = folder.frame()
    frame = frame[frame["metric"] == "squared_error"]
    found = frame.groupby("op")["value"].sum()
    usable = [s for s in job.calibration.samples if component == "lm" or s.pixel_values is not None]
    model = dataclasses.replace(job.model, module=MODEL)
    expected = loop_scores(model, make_targets(job.operators, False), usable, component, STATIC)
    scored = [one for sample, one in zip(usable, expected, strict=True) if sample in job.scored]
    errors = np.array([
        abs(found[op.path] / sum(one[op.path]["squared_error"] for one in scored) - 1) for op in job.operators
    ])  # fmt: skip
    assert np.median(errors) < 2e-3
    assert (errors < 1e-2).mean() >= 0.9  # a value in the middle between two integers may go either way
    assert report.details["exporter"] == "foreign"
    assert set(report.details["rows"]) == {len(job.operators)}


def test_a_graph_with_one_fixed_row_is_scored_row_by_row(layout: Path, tmp_path: Path) -> None:
    fixed = tmp_path / "fixed"
    fixed.mkdir()
    for name in ("embed_tokens.onnx", "vision_encoder.onnx", "decoder_model_merged.onnx"):
        proto = onnx.load(layout / "onnx" / name)
        if name.startswith("decoder"):
            for item in proto.graph.input:
                axis = 1 if item.name == "position_ids" else 0
                item.type.tensor_type.shape.dim[axis].dim_value = 1
        onnx.save(proto, fixed / name)
    found = {}
    for name, folder in (("free", layout), ("fixed", fixed)):
        job = job_on(folder, "lm", tmp_path)
        job = dataclasses.replace(job, operators=job.operators[:5], scored=job.scored[:1])
        store = RunFolder(tmp_path / name)
        report = onnxrt.run(job, store, Steps())
        assert report.details["rows"] == [5 if name == "free" else 1]
        frame = store.frame()
        found[name] = frame[frame["metric"] == "squared_error"].set_index("op")["value"]
    np.testing.assert_allclose(found["free"], found["fixed"], rtol=2e-2)


def test_half_precision_weights_are_scored(layout: Path, tmp_path: Path) -> None:
    """A float16 graph computes its quantized products in float32, and lands near the float32 graph's scores."""
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    weight = draw.normal(size=(8, 6)).astype(np.float16)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input_ids_float", "w"], ["logits"], name="head"),
         helper.make_node("Cast", ["inputs_embeds"], ["input_ids_float"], to=TensorProto.FLOAT16)][::-1],
        "half",
        [helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, ["row", "token", 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT16, ["row", "token", 6])],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    path = tmp_path / "half.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)

    from qvl_hydra.onnx.scoring.graph import read_graph, weighted_nodes
    from qvl_hydra.onnx.scoring.session import open_switched
    from qvl_hydra.onnx.scoring.switched import SWITCH, switched
    from qvl_hydra.quantization.formats.integer import qdq_rows
    from qvl_hydra.quantization.qdq import qdq_weight

    read = read_graph(path)
    scheme = Scheme("dynamic", WeightFormat(8), ActivationFormat(8, dynamic=True))
    session = open_switched(switched(read, [list(weighted_nodes(read))], scheme, {}), DEVICE)
    x = draw.normal(size=(1, 4, 8)).astype(np.float32)
    found = session.run(None, {"inputs_embeds": x, SWITCH: np.ones((1, 1), dtype=bool)})[0]
    rounded = qdq_weight(torch.from_numpy(weight.astype(np.float32)).T.contiguous(), WeightFormat(8)).T
    tokens = qdq_rows(torch.from_numpy(x[0]).half().float(), (0, 255), False)
    np.testing.assert_allclose(found[0].astype(np.float32), (tokens @ rounded).numpy(), rtol=2e-3, atol=2e-3)


def test_an_export_of_this_project_is_no_foreign_graph(layout: Path, tmp_path: Path) -> None:
    model = make_job(tmp_path, model=MODEL).model
    export_component(model, "lm", [make_sample(MODEL, 0)], tmp_path / "onnx" / "lm", ExportSettings(), DEVICE)
    assert not is_foreign(tmp_path / "onnx", "lm")
    assert not is_foreign(tmp_path / "onnx" / "lm" / "lm.onnx", "lm")
    assert is_foreign(layout, "lm")
    with pytest.raises(ExportError, match="an export of component=lm"):
        find_graph(tmp_path / "onnx" / "lm", "vision")


def test_messages_for_graphs_that_cannot_be_scored(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    with pytest.raises(ExportError, match="no such file or folder"):
        graph_operators(tmp_path / "nothing.onnx", "lm")
    with pytest.raises(ExportError, match="none of decoder_model_merged.onnx"):
        graph_operators(tmp_path, "lm")
    empty = tmp_path / "text.onnx"
    empty.write_text("no model")
    with pytest.raises(ExportError, match="no ONNX model"):
        graph_operators(empty, "lm")
    value = helper.make_tensor_value_info("odd", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Neg", ["odd"], ["y"])], "g", [value], [out])
    onnx.save(helper.make_model(graph), tmp_path / "odd.onnx")
    with pytest.raises(ExportError, match="no MatMul, Gemm or Conv with a constant weight"):
        graph_operators(tmp_path / "odd.onnx", "lm")
    with pytest.raises(ExportError, match="cannot fill the inputs odd"):
        foreign_scorable(tmp_path / "odd.onnx", "lm", MODEL, 5, DEVICE)


def test_missing_weights_are_named(layout: Path, tmp_path: Path) -> None:
    proto = onnx.load(layout / "onnx" / "embed_tokens.onnx")
    onnx.save(proto, tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ExportError, match=r"put weights.bin beside it"):
        graph_operators(tmp_path / "model.onnx", "lm")
