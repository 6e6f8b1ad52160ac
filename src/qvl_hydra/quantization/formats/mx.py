"""MXFP4 and MXFP8 (Open Compute's microscaling): groups of 32 that share a power of two.

As compressed-tensors and vLLM's reference have it: the largest |value| of a group is first rounded to a power of two
(up from 1.75 times one), and the exponent is that less the format's own largest, 2 for FP4 and 8 for FP8: 6.5 gives
scale 1 and 7.0 gives 2, where the specification's floor would keep 1 and clip.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from qvl_hydra.quantization.formats import float4, float8
from qvl_hydra.quantization.formats.narrow import EXPONENT
from qvl_hydra.quantization.formats.record import NumberFormat, QuantParams
from qvl_hydra.quantization.scheme import ActivationFormat, WeightFormat

GROUP = 32
HALF_OF_LAST_BIT = 1 << 21  # in a float32's mantissa, of the one bit that E2M1 has
BIAS = 127


def power_of_two(largest: Tensor, offset: int) -> Tensor:
    """The scale of groups with these largest |values|, float32."""
    power = ((largest.float().view(torch.int32) + HALF_OF_LAST_BIT) & EXPONENT).view(torch.float32)
    exponent = (BIAS + torch.floor(torch.log2(power)) - offset).clamp(0, 255)
    return torch.exp2(exponent - BIAS)


def _rounded(x: Float[Tensor, "row in"], offset: int, cast: Callable[[Tensor], Tensor]) -> Float[Tensor, "row in"]:
    groups = x.unflatten(-1, (-1, GROUP))
    scale = power_of_two(groups.abs().amax(-1, keepdim=True), offset)
    return cast(groups / scale).mul_(scale).flatten(-2)


def _weight(
    x: Tensor, form: WeightFormat, largest: Tensor | None, offset: int, cast: Callable[[Tensor], Tensor]
) -> Tensor:
    return _rounded(x, offset, cast)


def _scales(x: Tensor, form: WeightFormat, largest: Tensor | None, offset: int) -> Tensor:
    return power_of_two(x.unflatten(-1, (-1, GROUP)).abs().amax(-1), offset)


def _activation(
    x: Tensor, form: ActivationFormat, params: QuantParams | None, offset: int, cast: Callable[[Tensor], Tensor]
) -> Tensor:
    return _rounded(x, offset, cast)


def _static(low: Tensor, high: Tensor, form: ActivationFormat) -> QuantParams:
    raise AssertionError("microscaling formats take every scale at run time")


def _row(name: str, bits: int, offset: int, cast: Callable[[Tensor], Tensor]) -> NumberFormat:
    own = {"offset": offset, "cast": cast}
    return NumberFormat(
        name, bits, partial(_weight, **own), partial(_activation, **own), _static,  # type: ignore[arg-type]
        partial(_scales, offset=offset), lambda form, inputs: 8 / GROUP, f"fp{bits}", group=GROUP, inputs=("token",),
    )  # fmt: skip


MXFP4 = _row("mxfp4", 4, 2, float4.rounded)
MXFP8 = _row("mxfp8", 8, 8, float8.rounded)
