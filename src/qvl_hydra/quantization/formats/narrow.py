"""Rounding to narrow floating-point formats (FP4 E2M1, FP8 E4M3): to the nearest value, ties to the even code."""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor

EXPONENT = 0x7F800000  # of a float32
MANTISSA_BITS = 23


def nearest(
    x: Float32[Tensor, "*shape"], bits: int, smallest: float, largest: float
) -> Float32[Tensor, "*shape"]:
    """The nearest values of a format, in float32; beyond its largest it is that one.

    A number to which 1.5 x 2^(23 - bits) of its own power of two is added has its last bit where the format has its:
    the sum is rounded as the format rounds. On a CPU that is faster than a cast there and back (`benchmarks.rounding`).

    Args:
        bits: of the mantissa.
        smallest: the smallest normal number; below it steps are as wide as above.
        largest: the largest number.
    """
    size = x.abs()
    power = size.clamp(smallest, largest).view(torch.int32).bitwise_and_(EXPONENT).view(torch.float32)
    shift = power.mul_(1.5 * 2.0 ** (MANTISSA_BITS - bits))
    return size.add_(shift).sub_(shift).clamp_(max=largest).copysign_(x)
