"""FP8 E4M3 (`torch.float8_e4m3fn`): a scale a tensor, a channel, a token, a group, or a block of 128 x 128.

As compressed-tensors has it: scale `max|x| / 448`, values divided by it, held to +-448 and cast to the nearest, ties to
even. A last, ragged block is filled up with zeros.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from qvl_hydra.quantization.formats.narrow import nearest
from qvl_hydra.quantization.formats.record import NumberFormat, QuantParams
from qvl_hydra.quantization.scheme import ActivationFormat, WeightFormat

LARGEST = 448.0
SMALLEST = 2.0**-6  # normal number
BLOCK = 128
SMALLEST_SCALE = torch.finfo(torch.float32).eps  # what a scale of zero becomes


def scale_of(largest: Tensor) -> Tensor:
    """The scale that a largest |value| asks for."""
    scale = largest / LARGEST
    return torch.where(scale == 0, SMALLEST_SCALE, scale)


def rounded(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The nearest values of E4M3; beyond 448 it is 448."""
    return nearest(x, bits=3, smallest=SMALLEST, largest=LARGEST)


def _at_scale(x: Tensor, scale: Tensor | float) -> Tensor:
    """The nearest values that FP8 has with this scale, which broadcasts."""
    return rounded(x / scale).mul_(scale)


def _weight(x: Float[Tensor, "out in"], form: WeightFormat, largest: Tensor | None) -> Float[Tensor, "out in"]:
    if form.granularity == "tensor":
        assert largest is not None, "a tensor's scale is taken from all of it"
        return _at_scale(x, scale_of(largest))
    if form.granularity == "channel":
        return _at_scale(x, scale_of(x.abs().amax(1, keepdim=True)))
    blocks = _blocks(x)
    scale = scale_of(blocks.abs().amax((1, 3), keepdim=True))
    return _at_scale(blocks, scale).flatten(2).flatten(0, 1)[: x.shape[0], : x.shape[1]].contiguous()


def _scales(x: Float[Tensor, "out in"], form: WeightFormat, largest: Tensor | None) -> Float[Tensor, "*scale"]:
    if form.granularity == "tensor":
        assert largest is not None, "a tensor's scale is taken from all of it"
        return scale_of(largest).reshape(1)
    if form.granularity == "channel":
        return scale_of(x.abs().amax(1, keepdim=True))
    return scale_of(_blocks(x).abs().amax((1, 3)))


def _blocks(x: Float[Tensor, "out in"]) -> Float[Tensor, "down row across column"]:
    """The weight in blocks of 128 x 128, filled up with zeros."""
    padded = functional.pad(x, (0, -x.shape[1] % BLOCK, 0, -x.shape[0] % BLOCK))
    return padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)


def _activation(
    x: Float[Tensor, "token in"], form: ActivationFormat, params: QuantParams | None
) -> Float[Tensor, "token in"]:
    if not form.dynamic:
        assert params is not None, "a static format was used before its range was observed"
        return _at_scale(x, params.scale)
    groups = x if form.group_size is None else x.unflatten(-1, (-1, form.group_size))
    return _at_scale(groups, scale_of(groups.abs().amax(-1, keepdim=True))).view_as(x)


def _static(low: Tensor, high: Tensor, form: ActivationFormat) -> QuantParams:
    return QuantParams(float(scale_of(torch.maximum(low.abs(), high.abs()).float())), 0, -int(LARGEST), int(LARGEST))


def _scale_bits(form: WeightFormat, inputs: int) -> float:
    """Float32 scales of a tensor, half-precision ones of a channel, float32 ones of a block."""
    return {"tensor": 0.0, "channel": 16 / inputs, "block": 32 / BLOCK**2}[form.granularity]


FLOAT8 = NumberFormat(
    "float8_e4m3", 8, _weight, _activation, _static, _scales, _scale_bits, "fp8",
    weights=("channel", "tensor", "block"), token_groups=True, rows=BLOCK,
)  # fmt: skip
