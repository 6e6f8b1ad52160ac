"""Measures profiles on held-out samples against the float model.

All profiles walk together through the stages, as rows of one state: what they agree on so far is computed once, so that
ten profiles that differ in their last blocks cost little more than one, and a segment's weights are read and rounded
once for all of them. A model larger than memory is measured streamed. Samples of equal length and positions stand in
one state without padding, so that nothing but the profile differs from the reference.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from qvl_hydra.blockwise.differences import by_difference
from qvl_hydra.blockwise.walker import Walker
from qvl_hydra.calibration.sample import IGNORED, Sample, samples_sha
from qvl_hydra.errors import ProfileError
from qvl_hydra.families.record import HEAD
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.models.memory import free_memory_bytes
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles.losses import Losses
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.profiles.walk import LOGITS, Batch, Parts, walk
from qvl_hydra.quantization.qdq import OperatorQuantizer
from qvl_hydra.runs.folder import RunFolder

SMALLEST_KL = 1e-9  # nats: what is less is no loss
STATE_BYTES = 1 << 30  # of all rows between two segments


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
        kl_typical: `kl_answer` as the geometric mean over samples, none below `SMALLEST_KL`: what a few samples that
            lose much do not decide.
    """

    squared_error: float
    kl: float
    kl_answer: float
    loss: float
    exact_match: float
    kl_typical: float


@dataclass
class _Sums:
    squared: float = 0.0
    kl: float = 0.0
    kl_answer: float = 0.0
    loss: float = 0.0
    right: int = 0
    log_kl: float = 0.0

    def add(self, other: _Sums) -> None:
        """Add another's sums to these."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def measure_profiles(
    model: LoadedModel,
    profiles: Sequence[Profile],
    quantizers: Mapping[str, OperatorQuantizer],
    samples: Sequence[Sample],
    component: str,
    each: Callable[[], None] = lambda: None,
    folder: RunFolder | None = None,
) -> list[Measurement]:
    """Measure every profile; equal ones are measured once.

    Args:
        model: the float model, resident or streamed; it leaves as it came.
        quantizers: of every operator that some profile quantizes, see `quantizer_key`; asked for once a group of
            samples, while the weights are in memory.
        samples: held-out samples. Those without an answer are left out; where none has one, all are judged at their
            text. With `vision` those without an image are left out.
        each: called after each segment of each batch, `steps(...)` times in all.
        folder: where each group of samples is kept as it is measured, for a run that is killed.

    Returns:
        One measurement a profile, in their order.

    Raises:
        ProfileError: no sample can be measured on, or a profile's outputs are not finite.
    """
    kinds = {profile.key: profile for profile in profiles}
    walker = _walker(model)
    totals = {key: _Sums() for key in kinds}
    groups = _groups(model, len(kinds), samples, component)
    for group in groups:
        rows = [sample for batch in group for sample in batch]
        unit = f"profiles-{_named(list(kinds), rows, component)}"
        kept = None if folder is None else folder.recall(unit)
        if kept is None:
            sums = _Eyes(component, len(kinds))
            features = sums.see_features if component == "vision" else None
            walk(walker, group, list(kinds.values()), quantizers, each, features, sums.see_logits)
            kept = [astuple(item) for item in sums.of_profile]
            if folder is not None:
                folder.remember(unit, kept)
        else:
            for _ in range(len(group) * len(walker.segments)):
                each()
        for key, found_here in zip(kinds, kept, strict=True):
            totals[key].add(_Sums(*found_here))
    count = sum(len(batch) for group in groups for batch in group)
    measured = {key: _mean(totals[key], count, kinds[key].chooser) for key in kinds}
    return [measured[profile.key] for profile in profiles]


def steps(model: LoadedModel, profiles: Sequence[Profile], samples: Sequence[Sample], component: str) -> int:
    """How often `measure_profiles` calls `each`."""
    count = len({profile.key for profile in profiles})
    return sum(map(len, _groups(model, count, samples, component))) * len(_walker(model).segments)


def _walker(model: LoadedModel) -> Walker:
    """The whole model in float32, whatever the component: answers are what counts."""
    component = "full" if model.family.visual else "lm"
    differing = by_difference(find_operators(model.module, component), model.dtype)
    return Walker(model, component, torch.float32, differing)


def _named(keys: Sequence[object], rows: Sequence[Sample], component: str) -> str:
    """A name for what is measured of some samples: by the profiles, the samples and the component."""
    content = repr(([_ordered(key) for key in keys], samples_sha(rows), component))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _ordered(key: object) -> str:
    """A profile's key in a text that is the same in every process."""
    if isinstance(key, frozenset | set):
        return repr(sorted(map(_ordered, key)))
    return repr([_ordered(item) for item in key]) if isinstance(key, tuple | list) else repr(key)


def _groups(model: LoadedModel, count: int, samples: Sequence[Sample], component: str) -> list[list[list[Sample]]]:
    """Groups of batches: those of a group walk one beside the other, segment by segment; a batch has one shape."""
    usable = [sample for sample in samples if bool((sample.labels != IGNORED).any())]
    usable = usable or [_by_its_text(sample, model) for sample in samples if len(sample.input_ids) > 1]
    if component == "vision":
        usable = [sample for sample in usable if sample.pixel_values is not None]
    if not usable:
        raise ProfileError(
            "no held-out sample has two tokens (with component=vision: an image, and an answer where any has one); "
            "choose another calibration source"
        )
    vocabulary = model.module.get_submodule(HEAD).get_parameter("weight").shape[0]
    limit = min(STATE_BYTES, free_memory_bytes() // 4)
    shapes: dict[bytes, list[Sample]] = {}
    for sample in usable:
        grid = b"" if sample.image_grid_thw is None else sample.image_grid_thw.numpy().tobytes()
        shapes.setdefault(sample.position_ids.numpy().tobytes() + grid, []).append(sample)
    groups: list[list[list[Sample]]] = [[]]
    taken = 0
    for rows in shapes.values():
        one = state_bytes(model, rows[0], count + 1, component)
        at_once = max(1, min(LOGITS // (rows[0].input_ids.numel() * vocabulary), limit // one))
        for start in range(0, len(rows), at_once):
            batch = rows[start : start + at_once]
            if groups[-1] and taken + len(batch) * one > limit:
                groups.append([])
                taken = 0
            groups[-1].append(batch)
            taken += len(batch) * one
    return groups


def _by_its_text(sample: Sample, model: LoadedModel) -> Sample:
    """A sample without an answer, judged at all text as its scores are: labelled wherever no image token is."""
    at_image = sample.input_ids == getattr(model.config, "image_token_id", IGNORED)  # text alone has no such id
    return replace(sample, labels=sample.input_ids.masked_fill(at_image, IGNORED))


def state_bytes(model: LoadedModel, sample: Sample, branches: int, component: str) -> int:
    """Of one sample in all branches, before and after a segment."""
    text = sample.input_ids.numel() * model.config.get_text_config().hidden_size * branches
    vision = 0
    if sample.pixel_values is not None:
        width = max(model.config.vision_config.hidden_size, sample.pixel_values.shape[1])
        vision = len(sample.pixel_values) * width * (1 if component == "lm" else branches)
    return int(2 * max(text, vision) * torch.float32.itemsize)


class _Eyes:
    """Sums of every profile over the batches of a walk."""

    def __init__(self, component: str, profiles: int) -> None:
        self.component = component
        self.of_profile = [_Sums() for _ in range(profiles)]

    def see_features(self, batch: Batch, output: Callable[[int], Tensor]) -> None:
        """What is scored for the vision tower: the squared change of all that leaves it."""
        self._add(batch, lambda at: _Sums(squared=float((output(at) - output(0)).double().square().sum())))

    def see_logits(self, batch: Batch, parts: Parts) -> None:
        labels = torch.stack([context.sample.labels for context in batch.contexts]).to(batch.state.device)
        seen = {branch: Losses(labels) for branch in batch.branch}
        for tokens, output in parts:
            reference = output(0)
            p = reference.softmax(-1)
            for branch, losses in seen.items():
                losses.see(tokens, reference, p, output(branch) if branch else reference)

        def sums(branch: int) -> _Sums:
            found = _sums(seen[branch])
            if self.component == "vision":
                found.squared = 0.0
            return found

        self._add(batch, sums)

    def _add(self, batch: Batch, of_branch: Callable[[int], _Sums]) -> None:
        for branch in dict.fromkeys(batch.branch):
            found = of_branch(branch)
            for own, at in zip(self.of_profile, batch.branch, strict=True):
                if at == branch:
                    own.add(found)


def _sums(losses: Losses) -> _Sums:
    at_answer = losses.at_answer(losses.kl)
    return _Sums(
        squared=losses.squared,
        kl=float(losses.kl.mean(1).sum()),
        kl_answer=float(at_answer.sum()),
        loss=float(losses.at_answer(losses.surprise).sum()),
        right=int(losses.right.all(1).sum()),
        log_kl=float(at_answer.clamp(min=SMALLEST_KL).log().sum()),
    )


def _mean(sums: _Sums, count: int, chooser: str) -> Measurement:
    result = Measurement(
        squared_error=sums.squared / count,
        kl=sums.kl / count,
        kl_answer=sums.kl_answer / count,
        loss=sums.loss / count,
        exact_match=sums.right / count,
        kl_typical=math.exp(sums.log_kl / count),
    )
    if not all(math.isfinite(value) for value in (result.squared_error, result.kl, result.kl_answer, result.loss)):
        raise ProfileError(f"the model's outputs under the profile of {chooser} are not finite: {result}")
    return result
