"""The range census: how large an operator's input, weight and output get, told by the walk that observes ranges.

A runtime computes in half precision, and some formats have no scale: what lies beyond 65,504 becomes infinite in
float16, and beyond 448 is clipped in FP8 without a scale. One row of a weight far above the others is where such an
output comes from, and it can be seen from the weights alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qvl_hydra.models.memory import row_parts
from qvl_hydra.quantization.qdq import largest_value

FLOAT16 = 65504.0
FLOAT8 = 448.0


@dataclass
class OperatorCensus:
    """What was seen of one operator.

    Attributes:
        input_max, output_max: largest |value| on the calibration samples; of finite values.
        weight_max: largest |weight|.
        row_ratio: norm of the weight's largest row over that of its median row.
        largest_row: which row that is.
        nonfinite: values of input and output that are not finite.
        tokens: of a mixture, how many each expert was given.
    """

    input_max: float = 0.0
    weight_max: float = 0.0
    output_max: float = 0.0
    row_ratio: float = 0.0
    largest_row: int = 0
    nonfinite: int = 0
    tokens: list[int] = field(default_factory=list)


class Census:
    """The census of the operators of a walk, by module path."""

    def __init__(self) -> None:
        self.found: dict[str, OperatorCensus] = {}

    @torch.no_grad()
    def see_weight(self, path: str, module: nn.Module) -> None:
        """Take in an operator's weight, while it is in memory."""
        weight: Tensor = module.weight.detach().flatten(1)  # type: ignore[operator, union-attr]
        own = self.found.setdefault(path, OperatorCensus())
        norms = torch.cat([weight[rows].float().norm(dim=1) for rows in row_parts(weight)])
        median = float(norms.median())
        own.weight_max = float(largest_value([weight]))
        own.largest_row = int(norms.argmax())
        own.row_ratio = float(norms.amax()) / median if median > 0 else 0.0

    def see_experts(self, path: str, chosen: Tensor, experts: int) -> None:
        """Take in which expert each value of an operator's input goes to."""
        own = self.found.setdefault(path, OperatorCensus())
        counts = chosen.bincount(minlength=experts).tolist()
        own.tokens = [before + count for before, count in zip(own.tokens or [0] * experts, counts, strict=True)]

    @torch.no_grad()
    def see(self, path: str, x: Tensor, y: Tensor | None) -> None:
        """Take in an operator's input and output; None where the output was not computed."""
        own = self.found.setdefault(path, OperatorCensus())
        own.input_max = max(own.input_max, self._largest(own, x))
        if y is not None:
            own.output_max = max(own.output_max, self._largest(own, y))

    def _largest(self, own: OperatorCensus, values: Tensor) -> float:
        largest = float(largest_value([values]))
        if largest < float("inf"):  # and so not a nan
            return largest
        finite = values.isfinite()
        own.nonfinite += int((~finite).sum())
        return float(values[finite].abs().amax()) if bool(finite.any()) else 0.0


def warnings(found: dict[str, OperatorCensus]) -> list[str]:
    """Sentences for a user about what a runtime's dtype cannot hold."""
    said = []
    beyond = {path: own for path, own in found.items() if max(own.input_max, own.output_max) > FLOAT16}
    if beyond:
        path, own = max(beyond.items(), key=lambda item: max(item[1].input_max, item[1].output_max))
        said.append(
            f"warning: float16 holds up to {FLOAT16:,.0f}, and {len(beyond)} operators exceed it, {path} the furthest "
            f"({max(own.input_max, own.output_max):,.0f}; row {own.largest_row} of its weight has {own.row_ratio:.1f} "
            "times the median row's norm): serve this model in bfloat16"
        )
    unused = {path: own.tokens.count(0) for path, own in found.items() if 0 in own.tokens}
    if unused:
        worst = max(unused, key=lambda path: unused[path])
        said.append(
            "experts that no calibration token reached are scored with the rest as if they lost nothing: "
            f"{worst} has {unused[worst]} of {len(found[worst].tokens)}, the most of {len(unused)} operators "
            "(experts.parquet); take more samples (calibration.size)"
        )
    broken = [path for path, own in found.items() if own.nonfinite]
    if broken:
        said.append(f"warning: {len(broken)} operators saw values that are not finite, first {broken[0]}")
    return said
