"""Backend inc_onnxrt: Neural Compressor's own numbers, taken by operator and sample, against the native ONNX engine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.jobs import Silent
from qvl_hydra.errors import EngineError
from qvl_hydra.estimators.job import SweepJob
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.settings import BackendSettings, StrategySettings
from tests.backends.neural_compressor.inc_job import STATIC, make_job, small_model

pytest.importorskip("neural_compressor.strategy", reason="needs the 2.x API of neural-compressor")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from qvl_hydra.backends import onnxrt
from qvl_hydra.backends.neural_compressor import onnx_adaptor as inc_onnx_adaptor
from qvl_hydra.backends.neural_compressor import onnxrt as inc_onnxrt
from qvl_hydra.backends.neural_compressor.onnx_adaptor import onnx_mapping

pytestmark = [pytest.mark.inc, pytest.mark.onnx, pytest.mark.filterwarnings("ignore")]
MINMAX = dataclasses.replace(STATIC, observer="minmax")


def job_of(tmp_path: Path, component: str = "lm", direction: str = "requantize", **kwargs: Any) -> SweepJob:
    strategy = StrategySettings(name="mse_v2", metric="squared_error", estimator="exact", direction=direction)  # type: ignore[arg-type]
    model = small_model(layers=kwargs.pop("layers", 1))
    job = make_job(tmp_path, component, model, scheme=MINMAX, strategy=strategy, **kwargs)
    return dataclasses.replace(job, backend=BackendSettings("inc_onnxrt", device="cpu", threads=1))


def means(run: Any, job: SweepJob, path: Path) -> Any:
    folder = RunFolder(path)
    run(job, folder, Silent())
    assert not folder.endings()
    frame = folder.frame()
    return frame[frame["metric"] == "squared_error"].groupby("op")["value"].mean()


@pytest.mark.parametrize(("component", "layers"), [("lm", 2), ("vision", 1)])
def test_it_agrees_with_the_native_engine_on_the_same_graph(component: str, layers: int, tmp_path: Path) -> None:
    job = job_of(tmp_path, component, layers=layers)
    found = means(inc_onnxrt.run, job, tmp_path / "inc")
    expected = means(onnxrt.run, job, tmp_path / "native")
    assert set(found.index) == {op.path for op in job.operators}
    assert found.reindex(expected.index).corr(expected, method="spearman") >= 0.9
    # It rounds a product before its bias is added, the native engine after: near, not equal.
    assert abs(np.log(found.reindex(expected.index) / expected)).median() < 0.25


def test_scores_are_what_neural_compressor_orders_by(tmp_path: Path) -> None:
    job = job_of(tmp_path, roles=["q_proj", "down_proj", "lm_head", "up_proj"])
    found = means(inc_onnxrt.run, job, tmp_path / "inc")
    kept = json.loads((tmp_path / inc_onnxrt.ORDER_FILE).read_text())
    # Its error is the mean over a sample's values, ours the sum: with samples of one length the order is the same.
    lengths = {len(sample.input_ids) for sample in job.scored}
    frame = RunFolder(tmp_path / "inc").frame()
    frame = frame[frame["metric"] == "squared_error"]
    sizes = {sample.id: len(sample.input_ids) for sample in job.scored}
    weighted = (frame["value"] / frame["sample"].map(sizes)).groupby(frame["op"]).mean()
    assert kept["order"]["lm"] == list(weighted.sort_values().index)
    assert len(found) == 4
    assert len(lengths) > 1


def test_fallback_is_what_restoring_an_operator_gains(tmp_path: Path) -> None:
    job = job_of(tmp_path, direction="fallback", roles=["down_proj", "lm_head", "o_proj"])
    found = means(inc_onnxrt.run, job, tmp_path / "inc")
    expected = means(onnxrt.run, job, tmp_path / "native")
    assert found.idxmax() == expected.idxmax()
    # It rounds a product before its bias is added: near, not equal.
    np.testing.assert_allclose(found, expected, rtol=0.5)


def test_an_operator_that_fails_leaves_the_others_alone_and_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tmp_path, roles=["q_proj", "k_proj", "lm_head"])
    metrics = inc_onnxrt._Sweep._metrics
    calls: list[int] = []

    def fragile(self: Any, before: Any, after: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("out of luck")
        return metrics(self, before, after)

    folder = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(inc_onnxrt._Sweep, "_metrics", fragile)
        inc_onnxrt.run(job, folder, Silent())
    (failed,) = folder.endings().values()
    assert failed == ("failed", "ValueError: out of luck")
    assert folder.frame()["op"].nunique() == 2
    monkeypatch.setattr(inc_onnxrt._Sweep, "_ask", lambda *_: pytest.fail("all that can be scored is on disk"))
    inc_onnxrt.run(job, folder, Silent())


def test_what_it_is_mended_with_goes_away_again() -> None:
    assert not hasattr(onnx, "mapping")
    with onnx_mapping():
        assert onnx.mapping.NP_TYPE_TO_TENSOR_TYPE[np.dtype("uint8")] == onnx.TensorProto.UINT8
    assert not hasattr(onnx, "mapping")


def test_graphs_that_are_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inc_onnx_adaptor, "PROTOBUF_LIMIT", 1000)
    with pytest.raises(EngineError, match="handles graphs of up to"):
        inc_onnxrt.run(job_of(tmp_path), RunFolder(tmp_path / "run"), Silent())
    with pytest.raises(EngineError, match="scores every operator alone"):
        inc_onnxrt.run(dataclasses.replace(job_of(tmp_path), fuse=True), RunFolder(tmp_path / "run"), Silent())
