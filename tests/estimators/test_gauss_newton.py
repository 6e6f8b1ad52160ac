"""Gauss-Newton traces against the matrix itself, column by column."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks.jobs import SCHEMES, Silent, make_job
from qvl_hydra.backends import torch as native
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.estimators.gauss_newton import _squared_norm
from qvl_hydra.estimators.positions import scored_positions
from qvl_hydra.models.forward import logits, text_inputs
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.quantization.qdq import weight_change
from qvl_hydra.runs.folder import RunFolder


def exact_trace(model: LoadedModel, sample: Sample, path: str, leading: int = 12) -> float:
    """`Tr(J' F J)` of the mean loss of the answer: one backward pass a column of the root of the Fisher information.

    Args:
        leading: eigenvectors that count; of a model that is sure of its answers the others are below 1e-4 of 12.
    """
    weight = model.module.get_submodule(path).weight.requires_grad_()
    mask = scored_positions(sample, sample.input_ids == model.config.image_token_id, "answer")
    with torch.enable_grad():
        output = logits(model.module, text_inputs(model.module, sample), sample)[0, mask]
    p = output.detach().softmax(-1)
    total = 0.0
    for token, chances in enumerate(p):
        fisher = torch.diag(chances) - chances[:, None] * chances[None]
        values, vectors = torch.linalg.eigh(fisher.double())
        for value, vector in zip(values[-leading:], vectors.T[-leading:], strict=True):
            seed = torch.zeros_like(output)
            seed[token] = (value.clamp(min=0).sqrt() * vector).float()
            (gradient,) = torch.autograd.grad(output, weight, seed, retain_graph=True)
            total += float(gradient.double().square().sum())
    weight.requires_grad_(False)
    return total / int(mask.sum())


@pytest.mark.parametrize("component", ["lm", "vision"])
def test_traces_are_the_matrix(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], tmp_path: Path, component: str
) -> None:
    sample = tiny_samples[0]
    job = make_job(
        tiny_model, (sample,), SCHEMES["w8a16"], component, name="hawq_v2", positions="answer", probes=32
    )
    job = dataclasses.replace(job, operators=job.operators[2::20])
    report = native.run(job, RunFolder(tmp_path), Silent())
    frame = RunFolder(tmp_path).frame()
    assert (report.metric, report.estimator) == ("omega", "gauss_newton")
    means = frame.groupby(["metric", "op"])["value"].mean()
    for op in job.operators:
        values = frame[(frame["metric"] == "trace") & (frame["op"] == op.path)]["value"]
        expected = exact_trace(tiny_model, sample, op.path)
        assert abs(values.mean() - expected) < 4 * values.std() / len(values) ** 0.5 + 0.02 * expected, op.path
        weight = tiny_model.module.get_submodule(op.path).weight
        error = float(weight_change(weight, SCHEMES["w8a16"].weight).double().square().mean())  # type: ignore[arg-type]
        assert means["omega", op.path] == pytest.approx(means["trace", op.path] * error, rel=1e-6)


@pytest.mark.parametrize(("tokens", "width"), [(3, 40), (50, 6)])  # by Gram matrices, by the product itself
def test_the_cheaper_way_gives_the_same(tokens: int, width: int) -> None:
    g, x = torch.randn(tokens, width), torch.randn(tokens, width + 1)
    expected = torch.einsum("to,ti->oi", g.double(), x.double()).square().sum()
    torch.testing.assert_close(_squared_norm(g, x), expected, rtol=1e-5, atol=0)
