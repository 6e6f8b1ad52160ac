"""Backend onnxrt: scores of the native torch engine from a graph; directions, groups, resumption, messages."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.jobs import SCHEMES, Silent, make_job
from qvl_hydra.backends import torch as native
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import EngineError
from qvl_hydra.estimators.job import EngineReport, SweepJob
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.settings import BackendSettings, ExportSettings
from tests.backends.neural_compressor import inc_job

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from qvl_hydra.backends import onnx_graphs, onnxrt
from qvl_hydra.onnx.export.component import export_component
from qvl_hydra.onnx.scoring.session import CPU, CUDA, Device, pick_provider

pytestmark = pytest.mark.onnx
BACKEND = BackendSettings("onnxrt", device="cpu", threads=1)


def on_graph(job: SweepJob, **backend: object) -> SweepJob:
    return dataclasses.replace(job, backend=dataclasses.replace(BACKEND, **backend))  # type: ignore[arg-type]


def scores(run: object, job: SweepJob, path: Path, metric: str = "squared_error") -> tuple[pd.Series, EngineReport]:
    folder = RunFolder(path)
    report = run(job, folder, Silent())  # type: ignore[operator]
    frame = folder.frame()
    assert not folder.endings()
    return frame[frame["metric"] == metric].groupby("op")["value"].mean(), report


def agree(found: pd.Series, expected: pd.Series) -> None:
    """Rank correlation above 0.99 and values within 1 %.

    A value within rounding error of the middle between two integers goes either way in another runtime; where outlier
    channels make one such step visible, a few operators are off by it.
    """
    assert list(found.index) == list(expected.index)
    assert found.corr(expected, method="spearman") >= 0.99
    relative = ((found - expected) / expected).abs()
    assert relative.median() < 1e-3
    assert (relative <= 0.01).mean() >= 0.95


@pytest.mark.parametrize("component", ["lm", "vision", "full"])
def test_scores_are_those_of_the_torch_engine(
    component: str, tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], tmp_path: Path
) -> None:
    job = make_job(tiny_model, tiny_samples[:3], SCHEMES["w8a8_static"], component, estimator="exact")
    expected, _ = scores(native.run, job, tmp_path / "torch")
    found, report = scores(onnxrt.run, on_graph(job), tmp_path / "onnxrt")
    agree(found, expected)
    assert report.estimator == "exact"
    assert report.forward_s > 0
    assert not (tmp_path / "onnxrt" / "parts" / onnx_graphs.GRAPHS).exists()


def test_fallback_and_fused_groups(tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], tmp_path: Path) -> None:
    job = make_job(
        tiny_model, tiny_samples[:2], SCHEMES["w8a8_static"], estimator="exact", direction="fallback"
    )  # fmt: skip
    job = dataclasses.replace(job, fuse=True, operators=job.operators[:14])
    expected, _ = scores(native.run, job, tmp_path / "torch")
    found, _ = scores(onnxrt.run, on_graph(job), tmp_path / "onnxrt")
    assert any(name.endswith("qkv_proj") for name in found.index)
    # Gains are differences of larger errors, so a step between two integers shows more.
    np.testing.assert_allclose(found, expected, atol=0.05 * float(expected.abs().max()))
    assert found.corr(expected, method="spearman") >= 0.95


def test_text_alone_passes_over_the_vision_tower(tmp_path: Path) -> None:
    """`full` with a text-only sample needs a second graph, and vision operators change nothing in it."""
    job = inc_job.make_job(tmp_path, "full", scheme=SCHEMES["w8a16"])
    expected, _ = scores(native.run, dataclasses.replace(job, backend=BackendSettings("torch")), tmp_path / "torch")
    found, report = scores(onnxrt.run, on_graph(job), tmp_path / "onnxrt")
    agree(found, expected)
    assert {"exported_full", "exported_lm"} <= set(report.details)
    frame = RunFolder(tmp_path / "onnxrt").frame()
    alone = frame[(frame["sample"] == "sample1") & frame["op"].str.startswith("model.visual")]
    assert len(alone) > 0
    assert (alone["value"] == 0).all()


class Killed(BaseException):
    """Stands for a kill."""


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = on_graph(inc_job.make_job(tmp_path, "lm", scheme=SCHEMES["w8a8_static"]))
    expected, _ = scores(onnxrt.run, job, tmp_path / "whole")
    write, written = RunFolder.write, []

    def fragile(self: RunFolder, unit: str, *args: object) -> None:
        if written:
            raise Killed
        written.append(unit)
        write(self, unit, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", fragile)
        with pytest.raises(Killed):
            onnxrt.run(job, RunFolder(tmp_path / "killed"), Silent())
    monkeypatch.setattr(onnxrt, "observe", lambda *_: pytest.fail("ranges were on disk already"))
    again, _ = scores(onnxrt.run, job, tmp_path / "killed")
    assert (again == expected).all()


def test_a_graph_that_is_there_is_scored_and_kept(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], tmp_path: Path
) -> None:
    grid = tiny_samples[0].image_grid_thw.tolist()
    fitting = [sample for sample in tiny_samples if sample.image_grid_thw.tolist() == grid]
    assert len(fitting) < len(tiny_samples)
    device = Device(CPU, 0, 1, None)
    done = export_component(tiny_model, "vision", fitting, tmp_path / "vision", ExportSettings(), device)
    job = make_job(tiny_model, tiny_samples, SCHEMES["w8a16"], "vision", estimator="exact")
    found, report = scores(onnxrt.run, on_graph(job, graph=str(tmp_path)), tmp_path / "onnxrt")
    expected, _ = scores(native.run, dataclasses.replace(job, scored=tuple(fitting)), tmp_path / "torch")
    agree(found, expected)
    assert report.notes == [
        f"{len(tiny_samples) - len(fitting)} scored samples were left out: the graph does not take them"
    ]
    assert done.path.exists()


def test_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = on_graph(inc_job.make_job(tmp_path, "vision"))
    hawq = dataclasses.replace(job, strategy=dataclasses.replace(job.strategy, name="hawq_v2"))
    with pytest.raises(EngineError, match=r"strategy=hawq_v2, but a graph has no gradients"):
        onnxrt.run(hawq, RunFolder(tmp_path / "a"), Silent())
    kl = dataclasses.replace(job, strategy=dataclasses.replace(job.strategy, metric="kl"))
    with pytest.raises(EngineError, match=r"strategy.metric=kl needs logits"):
        onnxrt.run(kl, RunFolder(tmp_path / "b"), Silent())
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(EngineError, match=r"backend.device=cuda: onnxruntime .* is a build without CUDA"):
        pick_provider("cuda", None)
    assert "build without CUDA" in (pick_provider("auto", None).note or "")
    assert pick_provider("cpu", None).note is None


def test_cuda_that_does_not_come_up_is_named() -> None:
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime without CUDA")
    device = pick_provider("auto", None)
    if device.provider == CUDA:
        pytest.skip("CUDA is here")
    assert "finds no CUDA device 0" in (device.note or "")
    with pytest.raises(EngineError, match="finds no CUDA device 1"):
        pick_provider("cuda:1", None)
