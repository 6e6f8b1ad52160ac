"""Hessian traces against the exact Hessian, column by column."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.jobs import Silent, make_job
from qvl_hydra.backends import torch as native
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.estimators import hawq
from qvl_hydra.estimators.job import SweepJob
from qvl_hydra.models.load import LoadedModel, describe_model, load_model
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.operators.targets import make_targets
from qvl_hydra.quantization.qdq import qdq_weight
from qvl_hydra.quantization.scheme import Scheme, WeightFormat
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.settings import ModelSettings, StrategySettings

SCHEME = Scheme("w8", WeightFormat(8), None)
SMALL = {
    "text_config.hidden_size": 16,
    "text_config.intermediate_size": 8,
    "text_config.num_attention_heads": 2,
    "text_config.num_key_value_heads": 1,
    "text_config.num_hidden_layers": 1,
    "text_config.vocab_size": 12,
    "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    "vision_config.depth": 1,
    "vision_config.hidden_size": 16,
    "vision_config.intermediate_size": 16,
    "vision_config.num_heads": 2,
    "vision_config.out_hidden_size": 16,
}


@pytest.fixture(scope="module")
def job() -> SweepJob:
    settings = ModelSettings("qwen2_5_vl_3b", "Qwen/shape", "qwen2_5_vl", weights="random", overrides=SMALL)
    model = load_model(describe_model(settings), torch.device("cpu"), 0)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(20)  # a curved loss: transformers draws weights small
    ids = torch.tensor([1, 5, 3, 7, 2, 9])
    samples = tuple(
        Sample(f"s{shift}", (ids + shift) % 12, torch.arange(6).expand(3, -1), (ids + shift) % 12, None, None)
        for shift in range(2)
    )
    made = make_job(model, samples, SCHEME)
    operators = [op for op in find_operators(model.module, "lm") if op.role in ("k_proj", "down_proj", "lm_head")]
    return dataclasses.replace(made, operators=tuple(operators))


def exact_trace(job: SweepJob, path: str) -> float:
    """Diagonal of the Hessian by one product with each unit vector, over all samples."""
    weight = job.model.module.get_submodule(path).weight
    total = 0.0
    for sample in job.scored:
        weight.requires_grad_(True)
        with sdpa_kernel(SDPBackend.MATH):
            (gradient,) = torch.autograd.grad(hawq.task_loss(job, sample), weight, create_graph=True)
            for index in range(weight.numel()):
                (row,) = torch.autograd.grad(gradient.flatten()[index], weight, retain_graph=True)
                total += float(row.flatten()[index])
        weight.requires_grad_(False)
    return total / len(job.scored)


def strategy(**changes: object) -> StrategySettings:
    given = {"curvature": "hessian", "probes": 64, "max_probes": 2048, "tolerance": 0.02} | changes
    return StrategySettings("hawq_v2", **given)  # type: ignore[arg-type]


def test_traces_are_the_hessians(job: SweepJob, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    report = native.run(dataclasses.replace(job, strategy=strategy()), folder, Silent())
    frame = folder.frame()
    by_probe = frame[frame["metric"] == "trace"].groupby(["op", "probe"])["value"].mean()
    for op in job.operators:
        expected, found = exact_trace(job, op.path), by_probe[op.path]
        error = found.std() / len(found) ** 0.5
        assert abs(found.mean() - expected) < 4 * error, op.path
        assert report.details["relative_standard_error"][op.path] == pytest.approx(error / abs(found.mean()), rel=1e-6)


def test_omega_is_mean_curvature_times_weight_error(job: SweepJob, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    native.run(dataclasses.replace(job, strategy=strategy(max_probes=64)), folder, Silent())
    means = folder.frame().groupby(["metric", "op"])["value"].mean()
    for op in job.operators:
        weight = job.model.module.get_submodule(op.path).weight
        change = float((qdq_weight(weight, WeightFormat(8)) - weight).double().square().sum())
        assert means["omega", op.path] == pytest.approx(means["trace", op.path] / weight.numel() * change, rel=1e-9)


def test_a_format_that_not_all_shapes_take_and_whose_fused_operators_share_a_scale(
    job: SweepJob, tmp_path: Path
) -> None:
    """What cannot have NVFP4 (8 inputs) ended the run, and q, k and v had a scale each."""
    form = WeightFormat(4, number="nvfp4")
    scheme = Scheme("nvfp4", form, None)
    wanted = ("q_proj", "k_proj", "v_proj", "down_proj")
    operators = tuple(op for op in find_operators(job.model.module, "lm") if op.role in wanted)
    own = dataclasses.replace(
        job, schemes=(scheme,), operators=operators, fuse=True, strategy=strategy(probes=2, max_probes=2)
    )
    folder = RunFolder(tmp_path)
    native.run(own, folder, Silent())
    (name,) = folder.frame()["op"].unique()
    assert name.endswith("self_attn.qkv_proj")
    (target,) = (target for target in make_targets(operators, True) if target.name == name)
    weights = {op.path: job.model.module.get_submodule(op.path).weight for op in target.operators}
    largest = torch.cat([weight.flatten() for weight in weights.values()]).abs().max()
    for path, factor in hawq.weight_factors(own, target).items():
        change = (qdq_weight(weights[path], form, largest) - weights[path]).double()
        assert factor == pytest.approx(float(change.square().mean()), rel=1e-9)


def test_stops_at_the_tolerance_or_at_the_last_probe(job: SweepJob, tmp_path: Path) -> None:
    loose = native.run(
        dataclasses.replace(job, strategy=strategy(probes=8, tolerance=1e9)), RunFolder(tmp_path / "a"), Silent()
    )
    assert loose.details["probes"] == 8
    strict = native.run(
        dataclasses.replace(job, strategy=strategy(probes=8, max_probes=20, tolerance=1e-9)),
        RunFolder(tmp_path / "b"),
        Silent(),
    )
    assert strict.details["probes"] == 20
    assert any("max_probes=20" in note for note in strict.notes)


def test_trace_weighting_ranks_by_the_trace_and_weights_stay_frozen(job: SweepJob, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    made = dataclasses.replace(job, strategy=strategy(weighting="trace", max_probes=64))
    report = native.run(made, folder, Silent())
    assert report.metric == "mean_trace"  # Neural Compressor's order: the trace over the number of weights
    means = folder.frame().groupby(["metric", "op"])["value"].mean()
    for op in job.operators:
        weights = job.model.module.get_submodule(op.path).weight.numel()
        assert means["mean_trace", op.path] == pytest.approx(means["trace", op.path] / weights)
    assert not any(parameter.requires_grad for parameter in job.model.module.parameters())


def test_runs_on_images_through_the_vision_tower(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], tmp_path: Path
) -> None:
    made = make_job(tiny_model, tiny_samples[:1], SCHEME, "vision")
    made = dataclasses.replace(made, operators=made.operators[:3], strategy=strategy(probes=2, max_probes=2))
    folder = RunFolder(tmp_path)
    native.run(made, folder, Silent())
    assert set(folder.frame()["op"]) == {op.path for op in made.operators}
