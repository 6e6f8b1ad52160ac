"""How the samples of a batch lie in one state before and behind a segment of the reverse walk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from qvl_hydra.blockwise.batches import Batch, put_together
from qvl_hydra.families.stages import State


@runtime_checkable
class Layout(Protocol):
    """One way of laying samples side by side."""

    def put_together(self, states: Sequence[State]) -> State:
        """One state from those of the samples, one row each."""

    def take_apart(self, states: State) -> list[State]:
        """The samples' own states again, one row each; tokens that were left out are zero."""

    def slices(self, tokens: int) -> list[slice]:
        """Where each sample's tokens are among so many, rows one behind the other."""

    def own(self, states: State) -> list[State]:
        """Of each sample the tokens that are there, one row each."""

    def joined(self, own: Sequence[State]) -> State:
        """The inverse of `own`."""


@dataclass(frozen=True)
class WholeSamples:
    """Every token of every sample: packed in one row, or a row each, padded."""

    batch: Batch
    packed: bool

    def put_together(self, states: Sequence[State]) -> State:
        return put_together(states, self.packed)

    def take_apart(self, states: State) -> list[State]:
        return self.batch.take_apart(states, self.packed)

    def slices(self, tokens: int) -> list[slice]:
        return self.batch.slices(tokens, self.packed)

    def own(self, states: State) -> list[State]:
        return self.take_apart(states)

    def joined(self, own: Sequence[State]) -> State:
        return self.put_together(own)


@dataclass(frozen=True)
class ScoredTokens:
    """Only the positions that count, in one row: for the head, which works on each token by itself.

    Attributes:
        masks: of each sample.
    """

    masks: Sequence[Bool[Tensor, "_token"]]

    @property
    def most(self) -> int:
        """Positions that count in the sample that has most of them."""
        return max(int(mask.sum()) for mask in self.masks)

    def put_together(self, states: Sequence[State]) -> State:
        return torch.cat([state[:, mask.to(state.device)] for state, mask in zip(states, self.masks, strict=True)], 1)

    def take_apart(self, states: State) -> list[State]:
        found = []
        for mask, part in zip(self.masks, self.own(states), strict=True):
            whole = part.new_zeros(1, len(mask), part.shape[-1])
            whole[:, mask.to(part.device)] = part
            found.append(whole)
        return found

    def slices(self, tokens: int) -> list[slice]:
        ends = list(accumulate(int(mask.sum()) for mask in self.masks))
        assert tokens in (0, ends[-1]), "the head is given the positions that count and no others"
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def own(self, states: State) -> list[State]:
        return [states[:, tokens] for tokens in self.slices(states.shape[1])]

    def joined(self, own: Sequence[State]) -> State:
        return torch.cat(list(own), dim=1)
