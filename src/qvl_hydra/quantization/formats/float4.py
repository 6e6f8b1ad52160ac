"""FP4 E2M1: the values 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign, rounded to the nearest, ties to the even code."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from qvl_hydra.quantization.formats.narrow import nearest

LARGEST = 6.0


def rounded(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The nearest values of E2M1; beyond 6 it is 6."""
    return nearest(x, bits=1, smallest=1.0, largest=LARGEST)
