"""ModelOpt's scores against the sums they stand for, written out with plain torch; and what its absence says."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qvl_hydra.backends.protocol import load_engine
from qvl_hydra.errors import EngineError, MissingExtraError
from qvl_hydra.estimators.job import SweepJob
from qvl_hydra.models.forward import reference_output
from qvl_hydra.quantization.apply import replaced_forwards
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.settings import BackendSettings
from tests.backends.neural_compressor.inc_job import Steps, make_job

W8A8 = Scheme("w8a8_static", WeightFormat(8), ActivationFormat(8))
HALF = 127  # ModelOpt's symmetric int8: the largest magnitude is 127


def job_for(tmp_path: Path, method: str, component: str = "lm", scheme: Scheme = W8A8) -> SweepJob:
    job = make_job(tmp_path, component, scheme=scheme)
    return dataclasses.replace(job, backend=BackendSettings(name="modelopt", method=method))  # type: ignore[arg-type]


def rounded(x: Tensor, largest: Tensor) -> Tensor:
    scale = largest / HALF
    return (x / scale).round().clamp(-HALF - 1, HALF) * scale


def ranges(job: SweepJob) -> dict[str, Tensor]:
    """Largest input magnitude of each operator over all calibration samples."""
    found: dict[str, Tensor] = {}

    def watch(path: str):
        def forward(module: nn.Module, x: Tensor) -> Tensor:
            found[path] = torch.maximum(found.get(path, torch.zeros(())), x.abs().max())
            return type(module).forward(module, x)

        return forward

    with torch.no_grad(), replaced_forwards(job.model.module, {op.path: watch(op.path) for op in job.operators}):
        for sample in job.calibration.samples:
            reference_output(job.model.module, sample, "lm")
    return found


def quantized_linear(module: nn.Linear, x: Tensor, largest: Tensor) -> Tensor:
    weight = rounded(module.weight, module.weight.abs().amax(1, keepdim=True))
    return functional.linear(rounded(x, largest), weight, module.bias)


def scores_of(job: SweepJob, folder: Path):
    store = RunFolder(folder)
    progress = Steps()
    report = load_engine("modelopt")(job, store, progress)
    assert progress.done == progress.expected == len(job.scored)
    return store.frame(), report, store


@pytest.fixture
def modelopt() -> None:
    pytest.importorskip("modelopt.torch.quantization", reason="nvidia-modelopt is not installed")


@pytest.mark.modelopt
@pytest.mark.usefixtures("modelopt")
def test_kl_is_that_of_the_group_quantized_together(tmp_path: Path) -> None:
    job = job_for(tmp_path, "kl_div")
    frame, report, _ = scores_of(job, tmp_path / "run")
    assert (report.metric, report.unit) == ("kl_sum", "nats a sample")
    largest, module = ranges(job), job.model.module
    groups: dict[str, list[str]] = {}
    for op in job.operators:
        groups.setdefault(op.group, []).append(op.path)
    for members in groups.values():
        forwards = {path: lambda m, x, p=path: quantized_linear(m, x, largest[p]) for path in members}
        for sample in job.scored:
            with torch.no_grad():
                reference = reference_output(module, sample, "lm").log_softmax(-1)
                with replaced_forwards(module, forwards):
                    output = reference_output(module, sample, "lm").log_softmax(-1)
            expected = float(functional.kl_div(output, reference, reduction="sum", log_target=True))
            for path in members:
                row = frame[(frame["op"] == path) & (frame["sample"] == sample.id)]
                assert row["value"].tolist() == [pytest.approx(expected, rel=1e-3, abs=1e-6)]


@pytest.mark.modelopt
@pytest.mark.usefixtures("modelopt")
def test_gradient_score_is_the_sum_of_squared_products(tmp_path: Path) -> None:
    job = job_for(tmp_path, "gradient")
    frame, report, _ = scores_of(job, tmp_path / "run")
    assert report.details["fused_groups"] == 2
    largest, module = ranges(job), job.model.module
    for sample in job.scored:
        own = squared_products(job, sample, largest, module)
        for op in job.operators:
            rows = frame[(frame["op"] == op.path) & (frame["sample"] == sample.id)].set_index("metric")["value"]
            group = sum(own[other.path] for other in job.operators if other.group == op.group)
            assert rows["gradient_own"] == pytest.approx(own[op.path], rel=1e-3)
            assert rows["gradient"] == pytest.approx(group, rel=1e-3)


def squared_products(job: SweepJob, sample, largest: dict[str, Tensor], module: nn.Module) -> dict[str, float]:
    outputs: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}

    def keep(path: str):
        def forward(target: nn.Module, x: Tensor) -> Tensor:
            y = type(target).forward(target, x)
            deltas[path] = (quantized_linear(target, x, largest[path]) - y).detach()
            outputs[path] = y if y.requires_grad else y.requires_grad_()
            return outputs[path]

        return forward

    with torch.enable_grad(), replaced_forwards(module, {op.path: keep(op.path) for op in job.operators}):
        logits = reference_output(module, sample, "lm")
        loss = functional.cross_entropy(logits[:-1], sample.labels[1:])
        gradients = torch.autograd.grad(loss, list(outputs.values()))
    return {
        path: float((gradient * deltas[path]).square().sum()) for path, gradient in zip(outputs, gradients, strict=True)
    }


@pytest.mark.modelopt
@pytest.mark.usefixtures("modelopt")
def test_model_is_left_as_it_was_and_a_second_run_goes_on(tmp_path: Path) -> None:
    job = job_for(tmp_path, "kl_div", "full", Scheme("w8a16", WeightFormat(8), None))
    before = {name: value.clone() for name, value in job.model.module.state_dict().items()}
    kinds = [type(module) for module in job.model.module.modules()]
    frame, _, store = scores_of(job, tmp_path / "run")
    assert {op.path for op in job.operators} == set(frame["op"])
    assert store.endings() == {}
    assert kinds == [type(module) for module in job.model.module.modules()]
    after = job.model.module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    left = next((tmp_path / "run" / "parts").glob("modelopt_00001*"))
    values = store.frame()
    left.unlink()
    load_engine("modelopt")(job, store, Steps())
    torch.testing.assert_close(
        torch.tensor(store.frame()["value"]), torch.tensor(values["value"]), rtol=1e-5, atol=1e-9
    )


@pytest.mark.modelopt
@pytest.mark.usefixtures("modelopt")
def test_what_it_does_not_do_is_refused(tmp_path: Path) -> None:
    engine, folder = load_engine("modelopt"), RunFolder(tmp_path / "run")
    job = job_for(tmp_path, "gradient")
    fallback = dataclasses.replace(job, strategy=dataclasses.replace(job.strategy, direction="fallback"))
    asymmetric = dataclasses.replace(job, schemes=(Scheme("x", WeightFormat(8, symmetric=False), None),))
    with pytest.raises(EngineError, match=r"strategy\.direction=requantize"):
        engine(fallback, folder, Steps())
    with pytest.raises(EngineError, match="weight_symmetric"):
        engine(asymmetric, folder, Steps())


def test_absence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt", None)
    monkeypatch.delitem(sys.modules, "qvl_hydra.backends.modelopt", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'qvl-hydra\[modelopt\]'"):
        importlib.import_module("qvl_hydra.backends.modelopt")
