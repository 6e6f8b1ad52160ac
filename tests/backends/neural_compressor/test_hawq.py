"""Neural Compressor's hawq_v2: its own call, the exact Hessian, the noise of its accumulator, resumption."""

from __future__ import annotations

import copy
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.backends.neural_compressor.inc_job import Steps, make_job, make_sample, small_model
from tests.program import composed

pytest.importorskip("neural_compressor.strategy", reason="needs the 2.x API of neural-compressor")

from neural_compressor.adaptor.torch_utils import hawq_metric

from qvl_hydra.backends.neural_compressor import fx as inc_fx
from qvl_hydra.backends.neural_compressor.adaptor import Batches
from qvl_hydra.backends.neural_compressor.hawq import accumulator_noise, open_trace, probe_traces
from qvl_hydra.backends.neural_compressor.session import guest
from qvl_hydra.backends.neural_compressor.wrapper import ComponentWrapper, WrapperBatch, wrapper_input
from qvl_hydra.estimators.metrics import next_token_labels
from qvl_hydra.models.forward import logits, text_inputs
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.screen import Screen
from qvl_hydra.settings import StrategySettings
from qvl_hydra.tasks import sweep

pytestmark = [pytest.mark.inc, pytest.mark.filterwarnings("ignore")]
KEY = "model.language_model.layers.0.self_attn.k_proj"
HEAD = "lm_head"


def test_one_probe_is_what_neural_compressors_own_call_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    inputs = [wrapper_input(model, make_sample(model, seed), "lm") for seed in (0, 2)]
    wrapper = ComponentWrapper(model, "lm")

    class OneProbe(hawq_metric.HessianTrace):
        def get_weight_traces(self, num_samples: int) -> dict[str, float]:
            self.max_iter = 1
            return super().get_weight_traces(num_samples)

    monkeypatch.setattr(hawq_metric, "HessianTrace", OneProbe)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(wrapper)
            for path in (KEY, HEAD):
                self.model.get_parameter(f"{path}.weight").requires_grad_(True)

    pairs = [(WrapperBatch([item]), next_token_labels(item.sample.labels)) for item in inputs]
    torch.manual_seed(7)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = hawq_metric.hawq_top(Model().eval(), nn.Module(), Batches(pairs, 2), None, enable_act=False)
    with guest():
        ours = probe_traces(open_trace(wrapper, [KEY, HEAD], inputs), 7)
    assert ours == pytest.approx([theirs[KEY], theirs[HEAD]], rel=1e-5)


def exact_trace(model: nn.Module, path: str, seeds: tuple[int, ...]) -> float:
    """Trace of the Hessian of the mean answer loss, one second derivative a weight, averaged over samples."""
    weight = model.get_submodule(path).weight.requires_grad_(True)
    total = 0.0
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        for seed in seeds:
            sample = make_sample(model, seed)
            output = logits(model, text_inputs(model, sample), sample)[0, :-1]
            loss = functional.cross_entropy(output, sample.labels[1:])
            gradient = torch.autograd.grad(loss, weight, create_graph=True)[0].flatten()
            for index, entry in enumerate(gradient):
                total += float(torch.autograd.grad(entry, weight, retain_graph=True)[0].flatten()[index])
    weight.requires_grad_(False)
    return total / len(seeds)


def test_the_trace_is_the_hessians(tmp_path: Path) -> None:
    model = small_model()
    exact = exact_trace(model, KEY, (0,))
    weights = model.get_submodule(KEY).weight.numel()
    strategy = StrategySettings(name="hawq_v2", max_probes=96, tolerance=1e-6)
    job = make_job(tmp_path, model=model, roles=["k_proj"], strategy=strategy, scored=1)
    folder, steps = RunFolder(tmp_path), Steps()
    report = inc_fx.run(job, folder, steps)
    values = torch.tensor(folder.frame()["value"].to_numpy())
    error = float(values.std()) / len(values) ** 0.5
    assert len(values) == report.details["probes"] == steps.done == 96
    assert float(values.mean()) == pytest.approx(exact / weights, abs=4 * error)
    assert (report.metric, report.estimator) == ("mean_trace", "inc")
    assert any("random normals" in note for note in report.notes)


def test_the_accumulators_noise_is_as_large_as_reported(tmp_path: Path) -> None:
    """With a head of zeros no weight before it matters: the Hessian is zero, and what is left is the noise."""
    model = small_model()
    model.lm_head.weight.zero_()
    job = make_job(
        tmp_path,
        model=model,
        roles=["k_proj"],
        strategy=StrategySettings(name="hawq_v2", max_probes=150, tolerance=1e-6),
        calibration=2,
    )
    folder = RunFolder(tmp_path)
    inc_fx.run(job, folder, Steps())
    values = torch.tensor(folder.frame()["value"].to_numpy())
    expected = accumulator_noise(model.get_submodule(KEY).weight.numel(), samples=2, probes=1)
    assert float(values.std()) == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("component", ["vision", "full"])
def test_vision_operators_get_traces_from_the_whole_model(component: str, tmp_path: Path) -> None:
    strategy = StrategySettings(name="hawq_v2", probes=1, max_probes=2)
    job = make_job(tmp_path, component, roles=["patch_embed", "merger.2", "lm_head"], strategy=strategy)
    folder = RunFolder(tmp_path)
    inc_fx.run(job, folder, Steps())
    assert set(folder.frame()["op"]) == {op.path for op in job.operators}
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in job.model.module.parameters())


def test_traces_are_scores_whatever_scheme_is_asked_for(tmp_path: Path) -> None:
    """Under the name of another than Neural Compressor's own no table took them, and every operator was skipped."""
    line = ["backend=inc_fx", "strategy=hawq_v2", "strategy.probes=1", "strategy.max_probes=1", "operators.max_ops=2"]
    settings = composed(*line, "calibration.size=2", "strategy.confidence_batches=1")
    assert settings.quant.name == "w8a8_static"
    sweep.run(settings, RunFolder(tmp_path), Screen())
    assert set(pd.read_parquet(tmp_path / "scores.parquet")["status"]) == {"scored"}


def test_a_resumed_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    strategy = StrategySettings(name="hawq_v2", probes=1, max_probes=4, tolerance=1e-6)
    job = make_job(tmp_path, roles=["q_proj", "lm_head"], strategy=strategy)
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")

    class Interrupt(Steps):
        def step(self, steps: int = 1) -> None:
            super().step(steps)
            if self.done == 2:
                raise KeyboardInterrupt

    inc_fx.run(job, whole, Steps())
    with pytest.raises(KeyboardInterrupt):
        inc_fx.run(job, broken, Interrupt())
    assert len(broken.frame()) == 4
    steps = Steps()
    inc_fx.run(job, broken, steps)
    assert steps.done == steps.expected == 4
    assert broken.frame().equals(whole.frame())


def test_their_stop_rule_ends_at_once_when_the_trace_is_negative() -> None:
    """The fault told in docs/neural_compressor.md, on their own function, and why probes are counted here."""

    class Negative(hawq_metric.HessianTrace):
        def __init__(self) -> None:
            self.max_iter, self.tolerance, self.eps = 500, 1e-5, 1e-6
            self.params, self.weight_names, self.weight_to_op = [], ["a.weight"], {"a.weight": "a"}
            self.calls = 0

        def get_vtHv_weight(self, params: list[torch.Tensor], num_samples: int) -> torch.Tensor:
            self.calls += 1
            return torch.tensor([-1.0 - self.calls])  # changes by a third and more each time

    trace = Negative()
    trace.get_weight_traces(1)
    assert trace.calls == 2


def test_probes_end_when_they_agree(tmp_path: Path) -> None:
    strategy = StrategySettings(name="hawq_v2", probes=2, max_probes=40, tolerance=0.5)
    report = inc_fx.run(make_job(tmp_path, roles=["lm_head"], strategy=strategy), RunFolder(tmp_path), Steps())
    assert 2 <= report.details["probes"] < 40
    assert report.details["median_relative_standard_error"] < 0.5
