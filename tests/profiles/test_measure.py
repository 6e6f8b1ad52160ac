"""Measurement against one plain forward a sample, and prediction against what is measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from benchmarks.jobs import bundled_samples, make_job, measure
from qvl_hydra.calibration.encode import load_processor
from qvl_hydra.calibration.sample import IGNORED, Sample
from qvl_hydra.calibration.sources import load_calibration
from qvl_hydra.models.forward import reference_output
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import Operator, find_operators
from qvl_hydra.profiles import apply, walk
from qvl_hydra.profiles.apply import Quantizers, make_quantizer
from qvl_hydra.profiles.losses import Losses
from qvl_hydra.profiles.measure import Measurement, _sums, measure_profiles, steps
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.formats.table import not_offered
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat
from qvl_hydra.settings import CalibrationSettings
from tests.conftest import load_tiny
from tests.profiles.rounding import applied
from tests.profiles.test_compressed_tensors import scheme_named

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
    typical = float(torch.tensor(at_answers, dtype=torch.float64).clamp(min=1e-9).log().mean().exp())
    return Measurement(
        sum(squared) / count, sum(divergences) / count, sum(at_answers) / count, sum(losses) / count,
        sum(matches) / count, typical,
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
    assert vars(measured[2]) == pytest.approx(vars(Measurement(0.0, 0.0, 0.0, measured[2].loss, 1.0, 1e-9)), abs=1e-12)
    assert measured[0].exact_match < 1.0
    assert measured[3] == measured[0]
    assert len(calls) == steps(small_model, [*profiles, floats, profiles[0]], samples, component)
    after = small_model.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_logits_of_some_tokens_are_in_memory_at_a_time(
    small_model: LoadedModel, small_samples: tuple[Sample, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    operators = find_operators(small_model.module, "lm")
    quantizers = Quantizers(small_model, operators, small_samples[:4], "lm", [COARSE])
    profiles = [profile_keeping(operators, set()), profile_keeping(operators, {operators[0].path})]
    whole = measure_profiles(small_model, profiles, quantizers, small_samples[:3], "lm")
    limit, see, seen = 5000, Losses.see, []
    monkeypatch.setattr(walk, "LOGITS", limit)

    def look(self: Losses, tokens: slice, reference: torch.Tensor, p: torch.Tensor, found: torch.Tensor) -> None:
        seen.append(found.numel())
        see(self, tokens, reference, p, found)

    monkeypatch.setattr(Losses, "see", look)
    measured = measure_profiles(small_model, profiles, quantizers, small_samples[:3], "lm")
    for found, expected in zip(measured, whole, strict=True):
        assert vars(found) == pytest.approx(vars(expected), rel=1e-5)
    assert limit // 2 < max(seen) <= limit


def test_samples_without_an_answer_are_judged_at_their_text_where_none_has_one(
    small_model: LoadedModel, small_samples: tuple[Sample, ...]
) -> None:
    """At the positions that their scores are of: those whose next token is no image token."""
    operators = find_operators(small_model.module, "lm")
    quantizers = Quantizers(small_model, operators, small_samples[:4], "lm", [COARSE])
    profile = profile_keeping(operators, {op.path for op in operators[::2]})
    image = small_model.config.image_token_id
    bare = [replace(s, labels=torch.full_like(s.labels, IGNORED)) for s in small_samples[:3]]
    at_text = tuple(replace(s, labels=torch.where(s.input_ids == image, IGNORED, s.input_ids)) for s in bare)
    (found,) = measure_profiles(small_model, [profile], quantizers, bare, "lm")
    assert vars(found) == pytest.approx(vars(one_by_one(small_model, profile, quantizers, at_text, "lm")), rel=1e-4)
    mixed = [*bare, *small_samples[3:5]]
    answered = measure_profiles(small_model, [profile], quantizers, small_samples[3:5], "lm")
    assert measure_profiles(small_model, [profile], quantizers, mixed, "lm") == answered


def test_a_small_divergence_does_not_drown_in_rounding() -> None:
    """The difference of two log-probabilities in float32 is wrong by a tenth here, and now and then negative."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn((2, 5, 5000), generator=draw) * 4
    labels = torch.full((2, 5), IGNORED)
    labels[:, 3:] = 1
    for size in (1e-2, 1e-4):
        found = logits + torch.randn(logits.shape, generator=draw) * size
        p, q = logits.double().log_softmax(-1), found.double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        losses = Losses(labels)
        losses.see(slice(None), logits, logits.softmax(-1), found)
        sums = _sums(losses)
        assert sums.kl == pytest.approx(float(kl.mean(1).sum()), rel=1e-3)
        assert sums.kl_answer == pytest.approx(float(kl[:, 2:4].mean(1).sum()), rel=1e-3)


@torch.no_grad()
def self_labelled(model: LoadedModel, sample: Sample) -> Sample:
    best = reference_output(model.module, sample, "full").argmax(-1)
    labels = torch.where(sample.labels == IGNORED, sample.labels, best.roll(1))
    return Sample(
        sample.id, sample.input_ids, sample.position_ids, labels, sample.pixel_values, sample.image_grid_thw
    )


def in_turn(operators: list[Operator], schemes: list[Scheme], shift: int) -> Profile:
    """Every operator in the next of some schemes that it can have, or in none."""
    choices: list[Scheme | None] = [*schemes, None]
    assigned = {}
    for place, op in enumerate(operators):
        scheme = choices[(place + shift) % len(choices)]
        if scheme is not None and not_offered([op], scheme) is None:
            assigned[op.path] = scheme
    return Profile(
        schemes[0],
        tuple(operators),
        frozenset(op.path for op in operators if op.path not in assigned),
        16,
        "test",
        others={path: scheme for path, scheme in assigned.items() if scheme is not schemes[0]},
    )


@pytest.mark.parametrize("name", ["tiny_qwen2_5_vl", "tiny_qwen3_vl"])
def test_several_schemes_in_one_walk_resident_and_streamed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, streamed = load_tiny(name), load_tiny(name, placement="streamed")
    processor = load_processor(model.description.folder)
    samples = load_calibration(CalibrationSettings(source="bundled", size=6), processor).samples
    operators = find_operators(model.module, "full")
    schemes = [COARSE, scheme_named("w8a8_static"), scheme_named("fp8_dynamic")]
    profiles = [in_turn(operators, schemes, shift) for shift in range(3)]
    last = frozenset(op.path for op in operators[:-4])
    profiles.append(Profile(COARSE, tuple(operators), last, 16, "test"))  # parts from the float model late
    rounded: Counter[str] = Counter()
    monkeypatch.setattr(apply, "make_quantizer", lambda *given: [make_quantizer(*given), rounded.update([given[1]])][0])
    wanted = {(op.path, profile.scheme_of(op).name) for profile in profiles for op in profile.low}
    found = {}
    for own in (model, streamed):
        quantizers = Quantizers(own, operators, samples, "full", schemes)
        found[own.streamed] = measure_profiles(own, profiles, quantizers, samples, "full")
    assert found[True] == found[False]
    expected_counts = {path: 2 * count for path, count in Counter(path for path, _ in wanted).items()}
    del rounded[operators[0].path], expected_counts[operators[0].path]  # beartype looks at a mapping's first item
    assert rounded == expected_counts, "once a walk"
    made = dict(Quantizers(model, operators, samples, "full", schemes))
    for profile, measured in zip(profiles, found[False], strict=True):
        expected = one_by_one(model, profile, made, samples, "full")
        assert vars(measured) == pytest.approx(vars(expected), rel=1e-3)
    assert all(parameter.is_meta for parameter in streamed.module.parameters())


@pytest.mark.parametrize("name", ["w4a16", "w8a8_static", "fp8_dynamic", "inc_static"])
def test_a_profile_of_one_operator_loses_its_exact_score_in_bfloat16_too(name: str) -> None:
    """Of a model in bfloat16: the rounding of two walks in bfloat16 would be several times what most operators lose."""
    model, scheme = load_tiny(dtype="bfloat16"), scheme_named(name)
    samples = bundled_samples(model, 4)
    operators = tuple(find_operators(model.module, "lm"))[::8]
    job = make_job(model, samples, scheme, estimator="exact", metric="kl", positions="answer")
    scores, _ = measure(replace(job, operators=operators))
    quantizers = Quantizers(model, operators, samples, "lm", [scheme])
    profiles = [
        Profile(scheme, operators, frozenset(o.path for o in operators if o is not op), 16, "test") for op in operators
    ]
    measured = measure_profiles(model, profiles, quantizers, samples, "lm")
    assert [found.kl_answer for found in measured] == pytest.approx([scores[op.path] for op in operators], rel=0.02)


def test_groups_of_samples_change_nothing(
    small_model: LoadedModel, small_samples: tuple[Sample, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """States of all samples may take more memory than there is: then some samples walk after the others."""
    operators = find_operators(small_model.module, "full")
    quantizers = Quantizers(small_model, operators, small_samples[:4], "full", [COARSE])
    profiles = [profile_keeping(operators, set()), profile_keeping(operators, {op.path for op in operators[::2]})]
    calls: list[int] = []
    whole = measure_profiles(small_model, profiles, quantizers, small_samples, "full")
    monkeypatch.setattr("qvl_hydra.profiles.measure.STATE_BYTES", 1)
    parts = measure_profiles(small_model, profiles, quantizers, small_samples, "full", lambda: calls.append(1))
    assert len(calls) == steps(small_model, profiles, small_samples, "full")
    assert len(calls) % len(small_samples) == 0  # a sample at a time
    for one, other in zip(whole, parts, strict=True):
        assert vars(one) == pytest.approx(vars(other), rel=1e-5)
