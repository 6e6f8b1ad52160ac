"""Integers with a scale and a zero point: `x = (q - z) s`.

Scales and zero points are PyTorch's (`torch.ao.quantization` min-max observers), which Neural Compressor uses:
a symmetric scale is `max|x| / ((qmax - qmin) / 2)`, an asymmetric range always contains zero. Values are rounded as
PyTorch's `fake_quantize` does, `round(x (1 / s))`, or with `divide` as compressed-tensors does, `round(x / s)`; then
the symmetric scale of a token at run time is `max|x| / 127` of 8 bits, as in vLLM's kernels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qvl_hydra.quantization.formats.record import NumberFormat, QuantParams
from qvl_hydra.quantization.scheme import ActivationFormat, WeightFormat

SMALLEST_SCALE = torch.finfo(torch.float32).eps  # as PyTorch's observers: a constant zero tensor keeps a scale


def affine_params(
    low: Float[Tensor, "*n"], high: Float[Tensor, "*n"], limits: tuple[int, int], symmetric: bool
) -> tuple[Float[Tensor, "*n"], Int[Tensor, "*n"]]:
    """Scale and zero point for values between `low` and `high`.

    Args:
        low, high: smallest and largest value, elementwise; widened to contain zero.
        limits: smallest and largest integer.
        symmetric: zero point 0 and the same range on both sides.

    Returns:
        Scale (float32, above zero) and zero point (int32), of the shape of `low`.
    """
    qmin, qmax = limits
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    if symmetric:
        scale = (torch.maximum(-low, high) / ((qmax - qmin) / 2)).clamp(min=SMALLEST_SCALE)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    scale = ((high - low) / (qmax - qmin)).clamp(min=SMALLEST_SCALE)
    return scale, (qmin - torch.round(low / scale)).clamp(qmin, qmax).to(torch.int32)


def qdq_static(x: Float[Tensor, "*shape"], params: QuantParams) -> Float[Tensor, "*shape"]:
    """QDQ with one scale and zero point for the whole tensor; dtype is kept."""
    limits = (params.qmin, params.qmax)
    if x.is_cuda:
        return torch.fake_quantize_per_tensor_affine(x.float(), params.scale, params.zero_point, *limits).to(x.dtype)
    inverse = 1 / torch.tensor(params.scale)  # as the operator has it, in float32
    return _fake_quantize(x.float(), inverse.item(), params.scale, params.zero_point, limits).to(x.dtype)


def _fake_quantize(
    x: Tensor, inverse: float | Tensor, scale: float | Tensor, zero_point: int | Tensor, limits: tuple[int, int]
) -> Tensor:
    """Bit for bit PyTorch's `fake_quantize` operators, which take three times as long on a CPU."""
    rounded = (x * inverse).round_()
    if isinstance(zero_point, int) and zero_point == 0:
        return rounded.clamp_(*limits).mul_(scale)
    return rounded.add_(zero_point).clamp_(*limits).sub_(zero_point).mul_(scale)


def qdq_rows(
    x: Float[Tensor, "row value"], limits: tuple[int, int], symmetric: bool, divide: bool = False
) -> Float[Tensor, "row value"]:
    """QDQ with a scale and zero point for each row, taken from the row itself; dtype is kept."""
    values = x.float()
    low, high = values.amin(1), values.amax(1)  # `aminmax` of rows takes twenty times as long on a CPU
    scale, zero_point = affine_params(low, high, limits, symmetric)
    if divide and symmetric:
        scale = torch.maximum(-low, high) / ((limits[1] - limits[0]) / 2)
        scale = torch.where(scale == 0, SMALLEST_SCALE, scale)[:, None]
        return (values / scale).clamp_(*limits).round_().mul_(scale).to(x.dtype)
    if divide:
        shift = zero_point[:, None]
        rounded = (values / scale[:, None]).add_(shift).clamp_(*limits).round_()
        return rounded.sub_(shift).mul_(scale[:, None]).to(x.dtype)
    if x.is_cuda:
        return torch.fake_quantize_per_channel_affine(values, scale, zero_point, 0, *limits).to(x.dtype)
    zero = 0 if symmetric else zero_point[:, None]
    return _fake_quantize(values, (1 / scale)[:, None], scale[:, None], zero, limits).to(x.dtype)


def qdq_groups(x: Float[Tensor, "row value"], form: WeightFormat) -> Float[Tensor, "row value"]:
    """QDQ of a weight, one scale a row, or one a group of a row's values; a last, shorter group has its own."""
    size = form.group_size
    if size is None or size >= x.shape[1]:
        return qdq_rows(x, form.limits, form.symmetric, form.divide)
    whole = x.shape[1] // size * size
    parts = [qdq_rows(x[:, :whole].reshape(-1, size), form.limits, form.symmetric, form.divide).view(len(x), whole)]
    if whole < x.shape[1]:
        parts.append(qdq_rows(x[:, whole:].contiguous(), form.limits, form.symmetric, form.divide))
    return torch.cat(parts, dim=1)


def _weight(x: Tensor, form: WeightFormat, largest: Tensor | None) -> Tensor:
    return qdq_groups(x, form)


def _scales(x: Float[Tensor, "out in"], form: WeightFormat, largest: Tensor | None) -> Float[Tensor, "out group"]:
    """As `qdq_groups` takes them; a last, shorter group has its own."""
    parts = x.split(form.group_size or x.shape[1], dim=1)
    low, high = (torch.stack([reach(part, 1) for part in parts], dim=1) for reach in (torch.amin, torch.amax))
    return affine_params(low, high, form.limits, form.symmetric)[0]


def _activation(x: Tensor, form: ActivationFormat, params: QuantParams | None) -> Tensor:
    if form.dynamic and form.divide and form.symmetric:
        largest = form.limits[1]
        scale = (x.float().abs().amax(1, keepdim=True) / largest).clamp(min=SMALLEST_SCALE)
        return ((x / scale).round_().clamp_(-largest, largest) * scale).to(x.dtype)
    if form.dynamic:
        return qdq_rows(x, form.limits, form.symmetric, form.divide)
    assert params is not None, "a static format was used before its range was observed"
    return qdq_static(x, params)


def _static(low: Tensor, high: Tensor, form: ActivationFormat) -> QuantParams:
    scale, zero_point = affine_params(low, high, form.limits, form.symmetric)
    return QuantParams(float(scale), int(zero_point), *form.limits)


def _scale_bits(form: WeightFormat, inputs: int) -> float:
    each = 16 if form.symmetric else 16 + form.bits  # half-precision scales, zero points of the format's width
    return each / min(form.group_size or inputs, inputs)


INTEGER = NumberFormat("int", None, _weight, _activation, _static, _scales, _scale_bits, "int8", weight_groups=True)
