"""FP4 E2M1: the values 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign, rounded to the nearest, ties to the even code."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

LARGEST = 6.0


def rounded(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The nearest values of E2M1; beyond 6 it is 6."""
    size = x.abs()
    fine = (size * 2).round_().div_(2)  # steps of a half below 2, of one below 4, of two above
    coarse = torch.where(size < 4, size.round(), (size / 2).round_().mul_(2).clamp_(max=LARGEST))
    return torch.where(size < 2, fine, coarse).copysign_(x)
