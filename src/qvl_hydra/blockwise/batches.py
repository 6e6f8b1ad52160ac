"""Samples that walk together: small models and GPUs spend their time between products, not in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn.utils.rnn import pad_sequence

from qvl_hydra.blockwise.walker import Context, Walker
from qvl_hydra.families.stages import State

# Tokens of a batch: beyond them products no longer get faster, and the logits of a batch take memory.
BATCH_TOKENS = {"cpu": 256, "cuda": 4096}


@dataclass(frozen=True)
class Batch:
    """Some samples of a group.

    Attributes:
        places: their places in the group.
        context: of all of them together.
    """

    places: tuple[int, ...]
    context: Context

    @property
    def has_images(self) -> bool:
        """Whether its samples have images: all or none of them do."""
        return self.context.vision is not None

    def slices(self, tokens: int, packed: bool) -> list[slice]:
        """Where each sample's tokens are in the batch, its rows one behind the other.

        Args:
            tokens: in the whole batch; packed ones can be patches or what a merger makes of four, the others tokens or
                the values that each is at a mixture's experts.
        """
        samples = self.context.samples
        if not packed:
            longest = tokens // len(samples)
            values = longest // self.context.text.shape[1]
            return [
                slice(row * longest, row * longest + s.input_ids.numel() * values) for row, s in enumerate(samples)
            ]
        ends = list(accumulate(sample.patches for sample in samples))
        ends = [end * tokens // ends[-1] for end in ends]
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def take_apart(self, states: State, packed: bool) -> list[State]:
        """Each sample's own part, one row."""
        rows = states.flatten(0, 1)
        return [rows[None, tokens] for tokens in self.slices(len(rows), packed)]


def make_batches(walker: Walker, contexts: Sequence[Context]) -> list[Batch]:
    """Samples of like length together, and those with images apart from those without."""
    limit = BATCH_TOKENS[walker.model.device.type]
    found: list[list[int]] = []
    for place in sorted(range(len(contexts)), key=lambda place: _kind(contexts[place])):
        has_images, tokens = _kind(contexts[place])
        batch = found[-1] if found else []
        if batch and _kind(contexts[batch[0]])[0] == has_images and (len(batch) + 1) * tokens <= limit:
            batch.append(place)
        else:
            found.append([place])
    return [_batch(walker, contexts, places) for places in found]


def halved(walker: Walker, contexts: Sequence[Context], batch: Batch) -> list[Batch]:
    """The batch in two, for a device whose memory it does not fit in."""
    middle = len(batch.places) // 2
    return [_batch(walker, contexts, places) for places in (batch.places[:middle], batch.places[middle:])]


def put_together(states: Sequence[State], packed: bool) -> State:
    """States of one row each in one row behind each other, or in a row each, padded."""
    if len(states) == 1:
        return states[0]
    return torch.cat(list(states), dim=1) if packed else pad_sequence([state[0] for state in states], batch_first=True)


def _batch(walker: Walker, contexts: Sequence[Context], places: Sequence[int]) -> Batch:
    members = [contexts[place] for place in places]
    return Batch(tuple(places), members[0] if len(members) == 1 else walker.together(members))


def _kind(context: Context) -> tuple[bool, int]:
    return context.vision is not None, context.sample.longest
