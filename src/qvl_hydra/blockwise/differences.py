"""Products of copies as what they add to the reference's, for models in bfloat16.

The reference walks in float32. At an operator's output a copy differs from it by the product of what differs at the
input, and where the operator is quantized in that copy, by what this changes:

    y = y0 + W (x - x0) [+ Q(W) Q(x) - W x]

`W` is in bfloat16 as it is, and the difference is rounded to bfloat16 relative to itself, so that an effect loses some
thousandths of itself; of a product of all of `x` the rounding would be as large as the effect. Norms, attention and
activations stay in float32, as does what a copy's own operator changes. Products in bfloat16 take a fifth of the time
of float32 on a CPU that has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qvl_hydra.blockwise.walker import Context, Walker
from qvl_hydra.families.stages import Segment, State
from qvl_hydra.operators.discover import Operator
from qvl_hydra.operators.kinds import apply_operator, product
from qvl_hydra.quantization.apply import Forward, replaced_forwards
from qvl_hydra.quantization.qdq import OperatorQuantizer, quantized_operator


def by_difference(operators: Sequence[Operator], dtype: torch.dtype, direction: str) -> list[str]:
    """Paths of the operators whose products are taken so; none where all is in float32.

    That is for models of another dtype; for `fallback`, whose scores are small differences of large effects; and for
    mixtures, where a copy's token goes to other experts than the reference's.
    """
    if dtype != torch.bfloat16 or direction == "fallback" or any(op.experts > 1 for op in operators):
        return []
    return [op.path for op in operators if op.kind == "Linear"]


class Differences:
    """What the linear operators of a segment were given by one sample's reference, and what they gave.

    Args:
        paths: of the operators whose products are differences.
        outputs: what they gave, by path, as an earlier walk of the sample left it; what is new is added. None: nothing
            is kept, and each walk of the reference takes its products again.
    """

    def __init__(self, paths: Sequence[str], outputs: dict[str, Tensor] | None = None) -> None:
        self.paths, self.outputs = paths, outputs
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        self._weights: dict[str, Tensor] = {}

    def advance(self, walker: Walker, segment: Segment, context: Context, state: State) -> State:
        """Run the reference through a segment; what was seen in another is let go.

        Of the last segment nothing is kept: it may be given a part of the tokens at a time.
        """
        self._seen, self._weights = {}, {}
        kept = {} if self.outputs is None or segment is walker.segments[-1] else self.outputs

        def forward_of(path: str) -> Forward:
            def forward(module: nn.Module, x: Tensor) -> Tensor:
                if path not in kept:
                    kept[path] = apply_operator(module, x, self._weight(path, module))
                self._seen[path] = x.flatten(0, -2), kept[path].flatten(0, -2)
                return kept[path]

            return forward

        with replaced_forwards(walker.module, {path: forward_of(path) for path in filter(segment.holds, self.paths)}):
            return segment.run(state, context)

    def of_copies(
        self, segment: Segment, count: int, quantized: Mapping[str, tuple[OperatorQuantizer, Tensor]]
    ) -> dict[str, Forward]:
        """Forwards of a segment's operators for so many copies, once the reference has run through it.

        Args:
            quantized: for some paths a quantizer, and bool, one a copy, in which of them it is used.
        """
        last: list[Tensor] = []  # the last input, and how it differs: operators that share an input follow each other

        def forward_of(path: str) -> Forward:
            def forward(module: nn.Module, x: Tensor) -> Tensor:
                weight: Tensor = module.weight  # type: ignore[assignment]
                given, gave = self._seen[path]
                rows = x.reshape(count, *given.shape)
                if not last or last[0] is not x:
                    last[:] = x, (rows - given).flatten(0, 1).to(weight.dtype)
                y = product(module, last[1], weight).to(x.dtype).view(count, *gave.shape).add_(gave)
                if path in quantized:
                    quantizer, mask = quantized[path]
                    chosen = mask.to(x.device)
                    own = rows[chosen].flatten(0, 1)
                    change = quantized_operator(module, own, quantizer)
                    change -= apply_operator(module, own, self._weight(path, module))
                    y[chosen] += change.view(-1, *gave.shape)
                return y.view(*x.shape[:-1], -1)

            return forward

        return {path: forward_of(path) for path in filter(segment.holds, self.paths)}

    def _weight(self, path: str, module: nn.Module) -> Tensor:
        """In float32; converted once while the segment is in memory."""
        if path not in self._weights:
            self._weights[path] = module.weight.float()  # type: ignore[operator, union-attr, assignment]
        return self._weights[path]
