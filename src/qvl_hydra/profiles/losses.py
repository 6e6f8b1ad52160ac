"""What a profile loses at each token of some samples, from its logits and the float model's."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn import functional

from qvl_hydra.calibration.sample import IGNORED
from qvl_hydra.estimators.metrics import divergence, next_token_labels, squared_norms
from qvl_hydra.models.memory import row_parts


class Losses:
    """Filled in some tokens at a time.

    Args:
        labels: of samples of one shape.

    Attributes:
        asked: where the next token belongs to the answer.
        squared: change of all logits.
        kl: KL(float model || profile) in nats.
        surprise: cross-entropy of the next token in nats where `asked`, else 0.
        right: whether the next token is the most likely one where `asked`, else true.
    """

    def __init__(self, labels: Int64[Tensor, "row token"]) -> None:
        self._following = next_token_labels(labels)
        self.asked = self._following != IGNORED
        self.squared = 0.0
        self.kl: Float64[Tensor, "row token"] = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
        self.surprise = torch.zeros_like(self.kl)
        self.right = torch.ones_like(self.asked)

    def see(
        self,
        tokens: slice,
        reference: Float[Tensor, "row token vocab"],
        p: Float[Tensor, "row token vocab"],
        found: Float[Tensor, "row token vocab"],
    ) -> None:
        """Take in the logits at some tokens.

        Args:
            reference: of the float model.
            p: probabilities of the same.
            found: of the profile.
        """
        before, likely, after = (values.flatten(0, 1) for values in (reference, p, found))
        kl = torch.zeros(len(before), dtype=torch.float64, device=before.device)
        for places in row_parts(before):
            change = after[places] - before[places]
            self.squared += float(squared_norms(change).sum())
            kl[places] = divergence(before[places], likely[places], change)[0].double()
        self.kl[:, tokens] = kl.view(len(self.kl), -1)
        asked, following = self.asked[:, tokens], self._following[:, tokens]
        at, right = found[asked], following[asked]
        self.surprise[:, tokens][asked] = functional.cross_entropy(at, right, reduction="none").double()
        self.right[:, tokens][asked] = at.argmax(-1) == right

    def at_answer(self, values: Float64[Tensor, "row token"]) -> Float64[Tensor, "row"]:
        """Mean of each row over its answer's tokens."""
        return (values * self.asked).sum(1) / self.asked.sum(1)
