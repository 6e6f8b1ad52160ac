"""The table of number formats."""

from __future__ import annotations

from collections.abc import Iterable

from qvl_hydra.operators.discover import Operator
from qvl_hydra.quantization.formats.float8 import FLOAT8
from qvl_hydra.quantization.formats.integer import INTEGER
from qvl_hydra.quantization.formats.mx import MXFP4, MXFP8
from qvl_hydra.quantization.formats.nvfp4 import NVFP4
from qvl_hydra.quantization.formats.record import NumberFormat
from qvl_hydra.quantization.scheme import Scheme

FORMATS: dict[str, NumberFormat] = {row.name: row for row in (INTEGER, FLOAT8, NVFP4, MXFP4, MXFP8)}


def refusal(scheme: Scheme, kind: str, inputs: int, outputs: int) -> str | None:
    """Why an operator cannot be put into a scheme ("not offered"), or None.

    Args:
        kind: of the operator: Linear, Conv2d, Conv3d, Experts.
        inputs, outputs: values of a token before and after it.
    """
    parts = ((scheme.weight, inputs), (scheme.input, inputs), (scheme.output, outputs))
    for form, width in parts:
        if form is None:
            continue
        row = FORMATS[form.number]
        if row is not INTEGER and kind.startswith("Conv"):
            return f"{kind} has no {row.name}: runtimes have it for linear operators"
        group = None if row is INTEGER else form.group_size
        if reason := row.refusal(width, group):
            return reason
    return None


def not_offered(operators: Iterable[Operator], scheme: Scheme) -> str | None:
    """Why operators that get one scheme cannot have this one, or None."""
    for op in operators:
        if reason := refusal(scheme, op.kind, op.in_features, op.out_features):
            return f"not offered: {reason}"
    return None


def weight_bits(scheme: Scheme, inputs: int, high_bits: float) -> float:
    """Bits that a weight takes for each of its values in a scheme, scales included.

    Args:
        inputs: of a channel.
        high_bits: of a weight that the scheme leaves alone.
    """
    if scheme.weight is None:
        return high_bits
    row = FORMATS[scheme.weight.number]
    return (row.bits or scheme.weight.bits) + row.scale_bits(scheme.weight, inputs)
