"""Scores at chosen positions against the whole model, one operator at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.jobs import SCHEMES, Silent, make_job, measure
from qvl_hydra.backends import torch as native
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.estimators.metrics import unit_of
from qvl_hydra.estimators.positions import scored_positions
from qvl_hydra.models.forward import logits, text_inputs
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.quantization.qdq import qdq_weight
from qvl_hydra.runs.folder import RunFolder

IMAGE = 99
WEIGHT = SCHEMES["w4a16"].weight


def sample_of(ids: list[int], answer: int) -> Sample:
    tokens = torch.tensor(ids)
    labels = torch.full_like(tokens, -100)
    labels[len(ids) - answer :] = tokens[len(ids) - answer :]
    return Sample("made up", tokens, torch.arange(len(ids)).expand(3, -1), labels, None, None)


@pytest.mark.parametrize(
    ("ids", "answer", "positions", "expected"),
    [
        ([1, IMAGE, IMAGE, 2, 3, 4], 2, "answer", [3, 4]),
        ([1, IMAGE, IMAGE, 2, 3, 4], 2, "text", [2, 3, 4]),
        ([1, IMAGE, IMAGE, 2, 3, 4], 2, "all", [0, 1, 2, 3, 4, 5]),
        ([1, IMAGE, 2, 3], 0, "answer", [1, 2]),  # no answer: the text
        ([5], 1, "answer", [0]),  # a token that nothing comes before or after
    ],
)
def test_positions_by_hand(ids: list[int], answer: int, positions: str, expected: list[int]) -> None:
    sample = sample_of(ids, answer)
    mask = scored_positions(sample, sample.input_ids == IMAGE, positions)
    assert mask.nonzero()[:, 0].tolist() == expected


def whole_model(model: LoadedModel, sample: Sample, path: str, mask: Tensor) -> dict[str, float]:
    """One operator's weight rounded in the whole model: KL and squared error at the positions of the mask."""
    module = model.module.get_submodule(path)
    with torch.no_grad():
        before = logits(model.module, text_inputs(model.module, sample), sample)[0, mask].double()
        kept = module.weight.clone()
        assert WEIGHT is not None
        module.weight.copy_(qdq_weight(kept, WEIGHT))
        after = logits(model.module, text_inputs(model.module, sample), sample)[0, mask].double()
        module.weight.copy_(kept)
    kl = functional.kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return {"kl": float(kl.mean()), "squared_error": float((after - before).square().sum())}


@pytest.mark.parametrize("positions", ["answer", "text"])
def test_exact_scores_are_the_whole_models(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], tmp_path: Path, positions: str
) -> None:
    sample = tiny_samples[0]
    job = make_job(tiny_model, (sample,), SCHEMES["w4a16"], "full", estimator="exact", metric="kl", positions=positions)
    job = dataclasses.replace(job, operators=job.operators[3::16])
    native.run(job, RunFolder(tmp_path), Silent())
    found = RunFolder(tmp_path).frame().set_index(["op", "metric"])["value"]
    mask = scored_positions(sample, sample.input_ids == tiny_model.config.image_token_id, positions)
    assert 0 < int(mask.sum()) < len(mask)
    for op in job.operators:
        for metric, expected in whole_model(tiny_model, sample, op.path, mask).items():
            assert found[op.path, metric] == pytest.approx(expected, rel=2e-2, abs=1e-7), (op.path, metric)


@pytest.mark.parametrize("metric", ["kl", "squared_error"])
@pytest.mark.parametrize("positions", ["answer", "text"])
def test_the_sketch_estimates_what_exact_measures(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], positions: str, metric: str
) -> None:
    made = {"metric": metric, "positions": positions}
    exact, report = measure(make_job(tiny_model, tiny_samples[:2], SCHEMES["w8a16"], estimator="exact", **made))
    assert report.unit == unit_of(metric, positions)
    sketch, _ = measure(
        make_job(
            tiny_model, tiny_samples[:2], SCHEMES["w8a16"], estimator="sketch", reduction="sequence", probes=64, **made
        )
    )
    ratios = torch.tensor([sketch[op] / exact[op] for op in exact]).log()
    assert abs(float(ratios.mean())) < 0.1, "unbiased"
    assert float(ratios.abs().mean()) < 0.25


def test_samples_without_an_answer_are_told(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], tmp_path: Path
) -> None:
    bare = dataclasses.replace(tiny_samples[1], labels=torch.full_like(tiny_samples[1].labels, -100))
    job = make_job(
        tiny_model, (tiny_samples[0], bare), SCHEMES["w8a16"], estimator="sketch", metric="kl", positions="answer"
    )
    report = native.run(job, RunFolder(tmp_path), Silent())
    assert any(note.startswith("1 of 2 scored samples have no answer") for note in report.notes)
    assert report.unit == unit_of("kl", "answer")
    report = native.run(dataclasses.replace(job, scored=(bare,)), RunFolder(tmp_path / "none"), Silent())
    assert report.unit == unit_of("kl", "text")


def test_the_gradient_is_autograds(tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], tmp_path: Path) -> None:
    """The squared first-order change of the answer's loss, by one plain backward pass to the weights."""
    sample = tiny_samples[0]
    job = make_job(tiny_model, (sample,), SCHEMES["w4a16"], "full", estimator="gradient", positions="answer")
    job = dataclasses.replace(job, operators=job.operators[3::16])
    native.run(job, RunFolder(tmp_path), Silent())
    found = RunFolder(tmp_path).frame().set_index("op")["value"]
    module = tiny_model.module
    weights = [module.get_submodule(op.path).weight.requires_grad_() for op in job.operators]
    with torch.enable_grad():
        predicted = logits(module, text_inputs(module, sample), sample)[0, :-1]
        gradients = torch.autograd.grad(functional.cross_entropy(predicted, sample.labels[1:]), weights)
    for op, weight, gradient in zip(job.operators, weights, gradients, strict=True):
        weight.requires_grad_(False)
        assert WEIGHT is not None
        change = qdq_weight(weight, WEIGHT) - weight
        assert found[op.path] == pytest.approx(float((gradient * change).sum()) ** 2, rel=2e-3), op.path
