"""Quantize-dequantize (QDQ): float tensors rounded to the values that integers of a format can stand for.

Scales and zero points are PyTorch's (`torch.ao.quantization` min-max observers), which Neural Compressor uses:
a symmetric scale is `max|x| / ((qmax - qmin) / 2)`, an asymmetric range always contains zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from qvl_hydra.models.memory import row_parts
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat

SMALLEST_SCALE = torch.finfo(torch.float32).eps  # as PyTorch's observers: a constant zero tensor keeps a scale


@dataclass(frozen=True)
class QuantParams:
    """Scale and zero point of one static tensor, and the integer range."""

    scale: float
    zero_point: int
    qmin: int
    qmax: int


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
    x: Float[Tensor, "row value"], limits: tuple[int, int], symmetric: bool
) -> Float[Tensor, "row value"]:
    """QDQ with a scale and zero point for each row, taken from the row itself; dtype is kept."""
    values = x.float()
    low, high = values.amin(1), values.amax(1)  # `aminmax` of rows takes twenty times as long on a CPU
    scale, zero_point = affine_params(low, high, limits, symmetric)
    if x.is_cuda:
        return torch.fake_quantize_per_channel_affine(values, scale, zero_point, 0, *limits).to(x.dtype)
    zero = 0 if symmetric else zero_point[:, None]
    return _fake_quantize(values, (1 / scale)[:, None], scale[:, None], zero, limits).to(x.dtype)


def qdq_weight(weight: Float[Tensor, "out *rest"], form: WeightFormat) -> Float[Tensor, "out *rest"]:
    """QDQ of a weight, one scale an output channel, or one a group of inputs.

    A channel whose inputs are no multiple of the group size ends with a shorter group.
    """
    flat = weight.detach().flatten(1)
    size = form.group_size
    if size is None or size >= flat.shape[1]:
        return qdq_rows(flat, form.limits, form.symmetric).view_as(weight)
    whole = flat.shape[1] // size * size
    parts = [qdq_rows(flat[:, :whole].reshape(-1, size), form.limits, form.symmetric).view(flat.shape[0], whole)]
    if whole < flat.shape[1]:
        parts.append(qdq_rows(flat[:, whole:].contiguous(), form.limits, form.symmetric))
    return torch.cat(parts, dim=1).view_as(weight)


def weight_change(weight: Float[Tensor, "out *rest"], form: WeightFormat) -> Float[Tensor, "out rest"]:
    """`Q(W) - W`, flattened to two dimensions, in the weight's dtype.

    The difference is taken in float32, some channels at a time: it is small against both, and a head with a large
    vocabulary has no room for further copies.
    """
    flat = weight.detach().flatten(1)
    change = torch.empty_like(flat)
    for rows in row_parts(flat):
        part = flat[rows].float()
        change[rows] = qdq_weight(part, form) - part
    return change


def qdq_activation(
    x: Float[Tensor, "*shape"], form: ActivationFormat | None, params: QuantParams | None
) -> Float[Tensor, "*shape"]:
    """QDQ of an activation: per token at run time when the format is dynamic, else with static `params`.

    Args:
        x: the last dimension holds a token's channels.
        form: `None` returns `x` as it is.
        params: needed for a static format.
    """
    if form is None:
        return x
    if form.dynamic:
        return qdq_rows(x.reshape(-1, x.shape[-1]), form.limits, form.symmetric).view_as(x)
    assert params is not None, "a static format was used before its range was observed"
    return qdq_static(x, params)


@dataclass(frozen=True)
class OperatorQuantizer:
    """One operator put into a scheme: its QDQ weight (float32) and the parameters of its static activations."""

    scheme: Scheme
    weight: Tensor | None
    input: QuantParams | None = None
    output: QuantParams | None = None


def as_tokens(module: nn.Module, x: Tensor) -> Tensor:
    """The operator's input with a token's values in the last dimension (a convolution's patch is one token)."""
    return x.flatten(1) if isinstance(module, nn.Conv2d | nn.Conv3d) else x


def apply_operator(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The operator's own arithmetic with another weight, in that weight's dtype."""
    own: Tensor | None = module.bias  # type: ignore[assignment]
    bias = None if own is None else own.to(weight.dtype)
    if isinstance(module, nn.Linear):
        return functional.linear(x, weight, bias)
    assert isinstance(module, nn.Conv2d | nn.Conv3d)
    return module._conv_forward(x, weight, bias)


def quantized_operator(module: nn.Module, x: Tensor, quantizer: OperatorQuantizer) -> Tensor:
    """Output of an operator that is put into its scheme, on the input given; the dtype of the input is kept.

    The arithmetic is float32 whatever the model's dtype: integer kernels add up exactly, and rounding QDQ values to
    bfloat16 would add an error as large as that of 8 bits.
    """
    scheme = quantizer.scheme
    inputs = qdq_activation(as_tokens(module, x.float()), scheme.input, quantizer.input).view_as(x)
    weight: Tensor = module.weight if quantizer.weight is None else quantizer.weight  # type: ignore[assignment]
    output = apply_operator(module, inputs, weight.float())
    return qdq_activation(output, scheme.output, quantizer.output).to(x.dtype)
