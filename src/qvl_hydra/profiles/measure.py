"""Measures profiles on held-out samples against the float model.

Samples of equal length and positions go through the model as rows of one batch: no padding, so that nothing but the
profile differs from the reference. All profiles are measured on a batch before the next one, so that only one batch's
reference logits are in memory; image features of a tower that is not quantized are computed once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from qvl_hydra.calibration.sample import IGNORED, Sample, samples_sha
from qvl_hydra.errors import ProfileError
from qvl_hydra.models.forward import logits, text_inputs, vision_features
from qvl_hydra.profiles.apply import applied
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.qdq import OperatorQuantizer
from qvl_hydra.runs.folder import RunFolder

BATCH_LOGITS = 2**26  # numbers in one batch's logits at most: 256 MiB in float32, and a few copies of it


@dataclass(frozen=True)
class Measurement:
    """What a model does on the held-out samples.

    Attributes:
        squared_error: mean over samples of the squared change of the component's output (logits at every position, or
            merged image features), the quantity that `squared_error` scores are about.
        kl: KL(float model || this model) in nats a token: mean over all positions of a sample, then over samples.
        kl_answer: the same at the positions whose next token belongs to the answer, in nats an answer token.
        loss: cross-entropy in nats an answer token: mean over the answer of a sample, then over samples.
        exact_match: share of samples whose every answer token (its end of turn included) is the most likely one given
            the image, the question and the right answer up to it: what greedy decoding gets right in full.
    """

    squared_error: float
    kl: float
    kl_answer: float
    loss: float
    exact_match: float


@dataclass
class _Sums:
    squared: float = 0.0
    kl: float = 0.0
    kl_answer: float = 0.0
    loss: float = 0.0
    right: int = 0

    def add(self, other: _Sums) -> None:
        """Add another's sums to these."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class _Reference:
    """Samples of one shape, and what the float model makes of them."""

    samples: tuple[Sample, ...]
    labels: Int64[Tensor, "row token"]
    embeds: Float[Tensor, "row token hidden"] | None  # None: the vision tower is quantized, and features change
    logits: Float[Tensor, "row token vocab"]
    features: tuple[Float[Tensor, "image_token hidden"], ...] | None  # component=vision: what is scored


def measure_profiles(
    module: nn.Module,
    profiles: Sequence[Profile],
    quantizers: Mapping[str, OperatorQuantizer],
    samples: Sequence[Sample],
    component: str,
    each: Callable[[], None] = lambda: None,
    folder: RunFolder | None = None,
) -> list[Measurement]:
    """Measure every profile; equal ones are measured once.

    Args:
        module: the float model; it leaves as it came.
        quantizers: of every operator that some profile quantizes.
        samples: held-out samples with answers; with `vision` those without an image are left out.
        each: called after each profile on each batch, `steps(...)` times in all.
        folder: where each batch is kept as it is measured, for a run that is killed.

    Returns:
        One measurement a profile, in their order.

    Raises:
        ProfileError: no sample can be measured on, or a profile's outputs are not finite.
    """
    batches = _batches(module, samples, component)
    kinds = {profile.key: profile for profile in profiles}
    totals = {low: _Sums() for low in kinds}
    count = 0
    with torch.no_grad():
        for rows in batches:
            count += len(rows)
            unit = f"profiles-{_named(list(kinds), rows, component)}"
            kept = None if folder is None else folder.recall(unit)
            if kept is None:
                kept = []
                batch = _reference(module, rows, component)
                for profile in kinds.values():
                    sums = _Sums()
                    with applied(module, profile, quantizers):
                        _add(sums, module, batch)
                    kept.append(astuple(sums))
                    each()
                if folder is not None:
                    folder.remember(unit, kept)
            else:
                for _ in kinds:
                    each()
            for low, found_here in zip(kinds, kept, strict=True):
                totals[low].add(_Sums(*found_here))
    found = {low: _mean(totals[low], count, kinds[low].chooser) for low in kinds}
    return [found[profile.key] for profile in profiles]


def _named(keys: Sequence[object], rows: Sequence[Sample], component: str) -> str:
    """A name for what is measured of some samples: by the profiles, the samples and the component."""
    content = repr(([_ordered(key) for key in keys], samples_sha(rows), component))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _ordered(key: object) -> str:
    """A profile's key in a text that is the same in every process."""
    if isinstance(key, frozenset | set):
        return repr(sorted(map(_ordered, key)))
    return repr([_ordered(item) for item in key]) if isinstance(key, tuple | list) else repr(key)


def steps(module: nn.Module, profiles: Sequence[Profile], samples: Sequence[Sample], component: str) -> int:
    """How often `measure_profiles` calls `each`."""
    return len(_batches(module, samples, component)) * len({profile.key for profile in profiles})


def _batches(module: nn.Module, samples: Sequence[Sample], component: str) -> list[list[Sample]]:
    usable = [sample for sample in samples if bool((sample.labels != IGNORED).any())]
    if component == "vision":
        usable = [sample for sample in usable if sample.pixel_values is not None]
    if not usable:
        raise ProfileError(
            "no held-out sample has an answer (with component=vision: an image and an answer); "
            "choose a calibration source with answers or captions"
        )
    vocabulary = module.get_submodule("lm_head").get_parameter("weight").shape[0]
    shapes: dict[bytes, list[Sample]] = {}
    for sample in usable:
        shapes.setdefault(sample.position_ids.numpy().tobytes(), []).append(sample)
    batches = []
    for rows in shapes.values():
        at_once = max(1, BATCH_LOGITS // (rows[0].input_ids.numel() * vocabulary))
        batches += [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
    return batches


def _reference(module: nn.Module, rows: Sequence[Sample], component: str) -> _Reference:
    embeds = _embeds(module, rows)
    features = tuple(vision_features(module, row) for row in rows) if component == "vision" else None
    labels = torch.stack([row.labels for row in rows]).to(embeds.device)
    found = logits(module, embeds, rows[0]).float()
    return _Reference(tuple(rows), labels, embeds if component == "lm" else None, found, features)


def _embeds(module: nn.Module, rows: Sequence[Sample]) -> Float[Tensor, "row token hidden"]:
    return torch.cat([text_inputs(module, row) for row in rows])


def _add(sums: _Sums, module: nn.Module, batch: _Reference) -> None:
    """Run the model, as it is now, over one batch."""
    embeds = _embeds(module, batch.samples) if batch.embeds is None else batch.embeds
    found = logits(module, embeds, batch.samples[0]).float()
    if batch.features is None:
        sums.squared += float((found - batch.logits).double().square().sum())
    else:
        for row, reference in zip(batch.samples, batch.features, strict=True):
            sums.squared += float((vision_features(module, row) - reference).double().square().sum())
    divergence = _kl(batch.logits, found)
    asked = functional.pad(batch.labels[:, 1:] != IGNORED, (0, 1))
    sums.kl += float(divergence.mean(1).sum())
    sums.kl_answer += float(((divergence * asked).sum(1) / asked.sum(1)).sum())
    losses, hits = _answers(found, batch.labels)
    sums.loss += float(losses.sum())
    sums.right += int(hits.sum())


def _kl(
    reference: Float[Tensor, "row token vocab"], found: Float[Tensor, "row token vocab"]
) -> Float[Tensor, "row token"]:
    """At each token, in nats."""
    log_p, log_q = reference.log_softmax(-1), found.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(2, dtype=torch.float64)


def _answers(
    found: Float[Tensor, "row token vocab"], labels: Int64[Tensor, "row token"]
) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
    """Mean loss over the answer tokens of each row, and which rows have every answer token right."""
    asked = labels[:, 1:] != IGNORED
    before = found[:, :-1].transpose(1, 2)
    losses = functional.cross_entropy(before, labels[:, 1:], ignore_index=IGNORED, reduction="none")
    hits = (found[:, :-1].argmax(-1) == labels[:, 1:]) | ~asked
    return losses.sum(1) / asked.sum(1), hits.all(1)


def _mean(sums: _Sums, count: int, chooser: str) -> Measurement:
    sums_of = (sums.squared, sums.kl, sums.kl_answer, sums.loss, sums.right)
    result = Measurement(*(value / count for value in sums_of))
    if not all(math.isfinite(value) for value in (result.squared_error, result.kl, result.kl_answer, result.loss)):
        raise ProfileError(f"the model's outputs under the profile of {chooser} are not finite: {result}")
    return result
