"""Memory that Neural Compressor's FX adaptor needs beside the weights; nothing of it is imported, so ask early."""

from __future__ import annotations

from collections.abc import Sequence

from qvl_hydra.models.load import ModelDescription
from qvl_hydra.operators.discover import Operator
from qvl_hydra.settings import Settings

OUTPUT_COPIES = 6  # float and quantized output as tensor and as part of the join, their difference and its square
HAWQ_COPIES = 4  # of each weight: gradient, probe, Hessian product, accumulator
FLOAT32 = 4


def inc_extra_bytes(
    operators: Sequence[Operator], output_rows: int, output_width: int, strategy: str, direction: str
) -> int:
    """Bytes beside the float32 weights (copies of the model share them: `wrapper`).

    Args:
        operators: those to score.
        output_rows: tokens, or merged image features, of all scored samples together.
        output_width: vocabulary, or width of an image feature.
        strategy: `mse_v2` or `hawq_v2`.
        direction: of `mse_v2`; `fallback` has all operators in int8 at once.
    """
    weights = [op.n_params for op in operators]
    outputs = output_rows * output_width * FLOAT32 * OUTPUT_COPIES
    if strategy == "hawq_v2":
        return sum(weights) * FLOAT32 * HAWQ_COPIES + outputs
    held = sum(weights) if direction == "fallback" else max(weights)
    return held + 2 * max(weights) * FLOAT32 + outputs  # one weight under conversion: a float copy and its rounding


def extra_bytes(settings: Settings, description: ModelDescription, operators: Sequence[Operator]) -> int:
    """The same before samples were read: without what outputs take."""
    return inc_extra_bytes(operators, 0, 0, settings.strategy.name, settings.strategy.direction)
