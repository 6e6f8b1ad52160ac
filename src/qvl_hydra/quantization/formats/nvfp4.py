"""NVFP4: FP4 values in groups of 16, whose scales are FP8, and one float32 scale a tensor.

As compressed-tensors and NVIDIA's kernels have it: tensor scale `448 x 6 / max|x|`; a group's scale is
`tensor scale x max|group| / 6` as FP8, 0.125 where that is zero; values are divided by group scale / tensor scale.
Activations have a static tensor scale and take the groups' at run time. Weights that a runtime fuses share one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from qvl_hydra.quantization.formats import float4, float8
from qvl_hydra.quantization.formats.record import NumberFormat, QuantParams
from qvl_hydra.quantization.scheme import ActivationFormat, WeightFormat

GROUP = 16
ZERO_SCALE = 0.125  # what a group's scale becomes that FP8 rounds to zero


def tensor_scale(largest: Tensor) -> Tensor:
    """The float32 scale of a tensor whose largest |value| is given."""
    scale = float8.LARGEST * float4.LARGEST / largest.float().clamp(min=torch.finfo(torch.float32).tiny)
    return scale.nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)


def _group_scales(groups: Float[Tensor, "row group value"], whole: Tensor) -> Float[Tensor, "row group"]:
    """Of groups, as FP8 numbers: still to be divided by the tensor's scale."""
    scale = float8.rounded(whole * (groups.abs().amax(-1) / float4.LARGEST))
    return torch.where(scale == 0, ZERO_SCALE, scale)


def _rounded(x: Float[Tensor, "row in"], whole: Tensor) -> Float[Tensor, "row in"]:
    groups = x.unflatten(-1, (-1, GROUP))
    scale = _group_scales(groups, whole)[..., None] / whole
    return float4.rounded(groups / scale).mul_(scale).flatten(-2)


def _weight(x: Tensor, form: WeightFormat, largest: Tensor | None) -> Tensor:
    assert largest is not None, "a tensor's scale is taken from all of it"
    return _rounded(x, tensor_scale(largest))


def _scales(x: Tensor, form: WeightFormat, largest: Tensor | None) -> Tensor:
    assert largest is not None, "a tensor's scale is taken from all of it"
    return _group_scales(x.unflatten(-1, (-1, GROUP)), tensor_scale(largest))


def _activation(x: Tensor, form: ActivationFormat, params: QuantParams | None) -> Tensor:
    assert params is not None, "NVFP4 was used before its tensor scale was observed"
    return _rounded(x, torch.tensor(params.scale, dtype=torch.float32, device=x.device))


def _static(low: Tensor, high: Tensor, form: ActivationFormat) -> QuantParams:
    return QuantParams(float(tensor_scale(torch.maximum(low.abs(), high.abs()))), 0, -6, 6)


NVFP4 = NumberFormat(
    "nvfp4", 4, _weight, _activation, _static, _scales, lambda form, inputs: 8 / GROUP, "fp4", group=GROUP,
    inputs=("tensor",), tensor_scale=tensor_scale,
)  # fmt: skip
