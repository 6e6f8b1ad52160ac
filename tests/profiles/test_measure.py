"""Measurement against one plain forward a sample, and prediction against what is measured."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from qvl_hydra.calibration.sample import IGNORED, Sample
from qvl_hydra.models.forward import reference_output
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import Operator, find_operators
from qvl_hydra.profiles.apply import Quantizers, applied
from qvl_hydra.profiles.measure import Measurement, measure_profiles, steps
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat

# Four bits, so that answers change and not only their probabilities.
COARSE = Scheme("w4a4", WeightFormat(4), ActivationFormat(4))


def profile_keeping(operators: list[Operator], high: set[str]) -> Profile:
    return Profile(COARSE, tuple(operators), frozenset(high), 16, "test")


@torch.no_grad()
def one_by_one(
    model: LoadedModel, profile: Profile, quantizers: dict, samples: tuple[Sample, ...], component: str
) -> Measurement:
    """The definitions written down plainly."""
    squared, divergences, at_answers, losses, matches = [], [], [], [], []
    for sample in samples:
        reference = reference_output(model.module, sample, "full")
        component_reference = reference_output(model.module, sample, component)
        with applied(model.module, profile, quantizers):
            found = reference_output(model.module, sample, "full")
            component_found = reference_output(model.module, sample, component)
        squared.append(float(((component_found - component_reference) ** 2).sum()))
        p, q = reference.double().softmax(-1), found.double().softmax(-1)
        divergences.append(float((p * (p / q).log()).sum(-1).mean()))
        places = [place - 1 for place in range(1, len(sample.labels)) if int(sample.labels[place]) != IGNORED]
        at_answers.append(float((p * (p / q).log()).sum(-1)[places].mean()))
        right = True
        answer = []
        for place in range(1, len(sample.labels)):
            label = int(sample.labels[place])
            if label != IGNORED:
                answer.append(-float(functional.log_softmax(found[place - 1], -1)[label]))
                right = right and int(found[place - 1].argmax()) == label
        matches.append(right)
        losses.append(sum(answer) / len(answer))
    count = len(samples)
    return Measurement(
        sum(squared) / count, sum(divergences) / count, sum(at_answers) / count, sum(losses) / count,
        sum(matches) / count,
    )  # fmt: skip


@pytest.mark.parametrize("component", ["lm", "vision", "full"])
def test_batches_equal_one_forward_a_sample(
    small_model: LoadedModel, small_samples: tuple[Sample, ...], component: str
) -> None:
    operators = find_operators(small_model.module, component)
    quantizers = Quantizers(small_model, operators, small_samples[:4], component, [COARSE])
    # Labels that the float model gives itself, so that exact match starts at 1 and has something to lose.
    samples = tuple(self_labelled(small_model, sample) for sample in small_samples)
    before = {name: value.clone() for name, value in small_model.module.state_dict().items()}
    profiles = [profile_keeping(operators, set()), profile_keeping(operators, {op.path for op in operators[::2]})]
    floats = profile_keeping(operators, {op.path for op in operators})
    calls: list[int] = []
    measured = measure_profiles(
        small_model, [*profiles, floats, profiles[0]], quantizers, samples, component, lambda: calls.append(1)
    )
    for profile, found in zip(profiles, measured, strict=False):
        expected = one_by_one(small_model, profile, quantizers, samples, component)
        assert found.squared_error == pytest.approx(expected.squared_error, rel=1e-4)
        assert found.kl == pytest.approx(expected.kl, rel=1e-4)
        assert found.kl_answer == pytest.approx(expected.kl_answer, rel=1e-4)
        assert found.loss == pytest.approx(expected.loss, rel=1e-4)
        assert found.exact_match == expected.exact_match
    assert vars(measured[2]) == pytest.approx(vars(Measurement(0.0, 0.0, 0.0, measured[2].loss, 1.0)), abs=1e-12)
    assert measured[0].exact_match < 1.0
    assert measured[3] == measured[0]
    assert len(calls) == steps(small_model, [*profiles, floats, profiles[0]], samples, component)
    after = small_model.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@torch.no_grad()
def self_labelled(model: LoadedModel, sample: Sample) -> Sample:
    best = reference_output(model.module, sample, "full").argmax(-1)
    labels = torch.where(sample.labels == IGNORED, sample.labels, best.roll(1))
    return Sample(
        sample.id, sample.input_ids, sample.position_ids, labels, sample.pixel_values, sample.image_grid_thw
    )
