"""Profiles walk together through the stages, as rows of one state: what they agree on so far is computed once.

As exact scores are, they are measured in float32 whatever the model's dtype, and products of models in bfloat16 are
taken by difference: in bfloat16 the rounding of two walks alone is as large as what a good profile loses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qvl_hydra.blockwise.differences import Differences
from qvl_hydra.blockwise.walker import Context, Walker
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.families.stages import Segment, State
from qvl_hydra.profiles.apply import quantizer_key
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.qdq import OperatorQuantizer

ROW_TOKENS = {"cpu": 2048, "cuda": 32768}  # advanced together; beyond them products no longer get faster
LOGITS = 1 << 26  # numbers of one branch of a batch at a time: 256 MiB in float32, and a few copies of it
Output = Callable[[int], Float[Tensor, "sample token value"]]  # of each branch; 0 is the float model's
SeeFeatures = Callable[["Batch", Output], None]
Parts = Iterator[tuple[slice, Output]]  # some tokens after others
SeeLogits = Callable[["Batch", Parts], None]


@dataclass
class Batch:
    """Samples of one shape on their way, in rows: for each branch one a sample.

    Attributes:
        state: (branch * sample, token, width), branch by branch; branch 0 is the float model.
        branch: of each profile; those that have quantized the same so far share one.
    """

    contexts: Sequence[Context]
    state: State
    branch: list[int]

    @property
    def branches(self) -> int:
        return len(self.state) // len(self.contexts)

    def of(self, branch: int) -> State:
        """The rows of one branch."""
        return self.state[branch * len(self.contexts) : (branch + 1) * len(self.contexts)]


@torch.no_grad()
def walk(
    walker: Walker,
    group: Sequence[Sequence[Sample]],
    profiles: Sequence[Profile],
    quantizers: Mapping[str, OperatorQuantizer],
    each: Callable[[], None],
    see_features: SeeFeatures | None,
    see_logits: SeeLogits,
) -> None:
    """Take a group of batches through the whole model, in the float model and in every profile.

    Args:
        walker: see `Differences`.
        group: of each batch its samples, all of one shape.
        quantizers: see `quantizer_key`; asked for while the weights of their segment are in memory.
        each: called after each segment of each batch.
        see_features: given a batch and what leaves the vision tower.
        see_logits: given a batch and the logits.
    """
    batches = []
    for rows in group:
        contexts = walker.contexts(rows)
        batches.append(Batch(contexts, torch.cat(walker.starts(contexts)), [0] * len(profiles)))
    differences = Differences(walker)
    for segment in walker.segments:
        plans = [
            tuple((op.path, quantizer_key(profile, op, quantizers)) for op in profile.low if segment.holds(op.path))
            for profile in profiles
        ]
        with walker.weights(segment):
            made = {key: quantizers[key] for key in {key for plan in plans for _, key in plan}}
            for batch in batches:
                if walker.skips(segment, batch.contexts[0].sample):
                    pass
                elif segment is walker.segments[-1]:
                    see_logits(batch, _logits(differences, segment, batch, _branch_out(batch, plans), made))
                else:
                    batch.state = _advance(differences, segment, batch, _branch_out(batch, plans), made)
                    if see_features is not None and segment is walker.stages.vision[-1]:
                        see_features(batch, batch.of)
                each()


def _logits(
    differences: Differences,
    segment: Segment,
    batch: Batch,
    of_branch: Sequence[Mapping[str, str]],
    made: Mapping[str, OperatorQuantizer],
) -> Parts:
    """Some tokens after others, and the logits of each branch at them: those of a whole sample can take gigabytes."""
    most = max(1, LOGITS // (len(batch.contexts) * differences.walker.module.lm_head.out_features))
    for first in range(0, batch.state.shape[1], most):
        tokens = slice(first, first + most)
        part = Batch(batch.contexts, batch.state[:, tokens], batch.branch)

        def output(branch: int, part: Batch = part) -> Tensor:
            if branch == 0:
                return differences.advance(segment, part.contexts[0], part.of(0))
            return _run(differences, segment, part, of_branch[branch : branch + 1], made, branch)

        yield tokens, output


def _branch_out(batch: Batch, plans: Sequence[tuple[tuple[str, str], ...]]) -> list[dict[str, str]]:
    """Split the branches whose profiles part here.

    Args:
        plans: of each profile, path and key of the quantizer of what it quantizes in the segment.

    Returns:
        The same of each branch.
    """
    places: dict[tuple[int, tuple[tuple[str, str], ...]], int] = {(0, ()): 0}
    branch = [places.setdefault((old, plan), len(places)) for old, plan in zip(batch.branch, plans, strict=True)]
    parents = [parent for parent, _ in places]
    if parents != list(range(batch.branches)):
        batch.state = batch.state.unflatten(0, (batch.branches, -1))[parents].flatten(0, 1)
    batch.branch = branch
    return [dict(plan) for _, plan in places]


def _advance(
    differences: Differences,
    segment: Segment,
    batch: Batch,
    of_branch: Sequence[Mapping[str, str]],
    made: Mapping[str, OperatorQuantizer],
) -> State:
    """Every branch behind the segment."""
    if segment in differences.walker.stages.join:  # each sample has tokens of its own
        rows = batch.state.unflatten(0, (len(of_branch), -1))
        joined = [segment.run(rows[:, at], context) for at, context in enumerate(batch.contexts)]
        return torch.stack(joined, dim=1).flatten(0, 1)
    count = len(batch.contexts)
    at_once = max(1, ROW_TOKENS[batch.state.device.type] // (count * batch.state.shape[1]))
    outputs = [differences.advance(segment, batch.contexts[0], batch.of(0))]
    for first in range(1, len(of_branch), at_once):
        outputs.append(_run(differences, segment, batch, of_branch[first : first + at_once], made, first))
    return torch.cat(outputs)


def _run(
    differences: Differences,
    segment: Segment,
    batch: Batch,
    of_branch: Sequence[Mapping[str, str]],
    made: Mapping[str, OperatorQuantizer],
    first: int,
) -> Tensor:
    """Some branches behind a segment that the float model has just run through, each with its operators quantized."""
    count = len(batch.contexts)
    rows = batch.state[first * count : (first + len(of_branch)) * count]
    paths = dict.fromkeys(path for plan in of_branch for path in plan)
    wanted = {path: [made[plan[path]] if path in plan else None for plan in of_branch] for path in paths}
    return differences.run_copies(segment, batch.contexts[0], rows, wanted)
