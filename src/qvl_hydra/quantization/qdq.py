"""Quantize-dequantize (QDQ): float tensors rounded to the values that a number format can stand for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvl_hydra.models.memory import row_parts
from qvl_hydra.operators.kinds import apply_operator, as_tokens
from qvl_hydra.quantization.formats.record import QuantParams
from qvl_hydra.quantization.formats.table import FORMATS
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat


def largest_value(weights: Iterable[Tensor]) -> Tensor:
    """The largest |value| of all weights together, float32."""
    ends = [weight.detach().aminmax() for weight in weights]  # of bfloat16 five times as fast as amax and amin
    return torch.stack([torch.maximum(end.max, -end.min).float() for end in ends]).amax()


def qdq_weight(
    weight: Float[Tensor, "out *rest"],
    form: WeightFormat,
    largest: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "out *rest"]:
    """QDQ of a weight, rounded in float32, some channels at a time: of a large head there is no room for copies.

    Args:
        largest: |value| of the weight, or of all weights that share a tensor scale with it; None: its own.
        dtype: of the result; None: the weight's.
    """
    rounded = torch.empty_like(weight.detach().flatten(1), dtype=dtype or weight.dtype)
    for rows, _, part in _rounded_parts(weight, form, largest):
        rounded[rows] = part
    return rounded.view_as(weight)


def weight_scales(
    weight: Float[Tensor, "out *rest"], form: WeightFormat, largest: Tensor | None = None
) -> Float[Tensor, "*scale"]:
    """The scales that `qdq_weight` rounds with, as checkpoints hold them (`NumberFormat.scales`); float32."""
    flat, row = weight.detach().flatten(1), FORMATS[form.number]
    largest = largest_value([flat]) if largest is None and row.whole_tensor_of(form) else largest
    parts = (row.scales(flat[rows].float(), form, largest) for rows in _aligned(flat, row.rows))
    return next(parts) if form.granularity == "tensor" else torch.cat(list(parts))


def weight_change(
    weight: Float[Tensor, "out *rest"], form: WeightFormat, largest: Tensor | None = None
) -> Float[Tensor, "out rest"]:
    """`Q(W) - W`, flattened to two dimensions, in the weight's dtype.

    The difference is taken in float32, some channels at a time: it is small against both, and a head with a large
    vocabulary has no room for further copies.

    Args:
        largest: see `qdq_weight`.
    """
    change = torch.empty_like(weight.detach().flatten(1))
    for rows, part, rounded in _rounded_parts(weight, form, largest):
        change[rows] = rounded.sub_(part)
    return change


def mean_weight_error(
    weight: Float[Tensor, "out *rest"], form: WeightFormat, largest: Tensor | None = None
) -> float:
    """`||Q(W) - W||^2 / n`, added up in float64.

    Args:
        largest: see `qdq_weight`.
    """
    parts = _rounded_parts(weight, form, largest)
    return sum(float((rounded - part).double().square().sum()) for _, part, rounded in parts) / weight.numel()


def _rounded_parts(
    weight: Tensor, form: WeightFormat, largest: Tensor | None
) -> Iterator[tuple[slice, Float[Tensor, "row in"], Float[Tensor, "row in"]]]:
    """Some rows of a weight at a time, in float32, and their QDQ."""
    flat, row = weight.detach().flatten(1), FORMATS[form.number]
    largest = largest_value([flat]) if largest is None and row.whole_tensor_of(form) else largest
    for rows in _aligned(flat, row.rows):
        part = flat[rows].float()
        yield rows, part, row.weight(part, form, largest)


def _aligned(matrix: Tensor, together: int) -> Iterator[slice]:
    """As `row_parts`, with each part a multiple of the rows that share scales."""
    step = next(row_parts(matrix)).stop
    step = max(together, step // together * together)
    return (slice(first, first + step) for first in range(0, len(matrix), step))


def qdq_activation(
    x: Float[Tensor, "*shape"], form: ActivationFormat | None, params: QuantParams | None
) -> Float[Tensor, "*shape"]:
    """QDQ of an activation: scales from the values at run time, or with static `params`.

    Args:
        x: the last dimension holds a token's channels.
        form: `None` returns `x` as it is.
        params: needed for a static format.
    """
    if form is None:
        return x
    flat = x.reshape(-1, x.shape[-1])
    return FORMATS[form.number].activation(flat, form, params).view_as(x)


@dataclass(frozen=True)
class OperatorQuantizer:
    """One operator put into a scheme: its QDQ weight (float32) and the parameters of its static activations."""

    scheme: Scheme
    weight: Tensor | None
    input: QuantParams | None = None
    output: QuantParams | None = None


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
