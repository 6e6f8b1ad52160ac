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
from qvl_hydra.settings import QuantSettings

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


def format_faults(quant: QuantSettings) -> list[str]:
    """What a scheme's settings ask of their number formats that these have not, and would not read."""
    found = []
    for part, bits, name, granularity, size in (
        ("weight", quant.weight_bits, quant.weight_format, quant.weight_granularity, quant.weight_group_size),
        ("input", quant.input_bits, quant.input_format, quant.input_granularity, quant.input_group_size),
    ):
        row = FORMATS.get(name)
        if row is None:
            found.append(f"quant.{part}_format={name}; allowed: {', '.join(FORMATS)}")
        elif bits is not None:
            able = row.weights if part == "weight" else row.inputs
            if granularity not in able:
                found.append(f"quant.{part}_granularity={granularity}, but {name} has {', '.join(able)}")
            chosen = row.weight_groups if part == "weight" else row.token_groups and granularity == "token"
            if size not in (None, row.group) and not chosen:
                has = f"groups of {row.group}" if row.group else f"none with {part}_granularity={granularity}"
                found.append(f"quant.{part}_group_size={size}, but {name} has {has}; take null")
    return found


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
