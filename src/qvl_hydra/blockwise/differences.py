"""Products of copies as what they add to the reference's, for models in bfloat16.

The reference walks in float32. At an operator's output a copy differs from it by the product of what differs at the
input, whether both are in float or both in the operator's scheme:

    y = W x0 + W (x - x0)        y = Q(W) Q(x0) + Q(W) (Q(x) - Q(x0))

What the reference gives is in float32, once for all copies. The difference and the weight beside it are in bfloat16,
each rounded relative to itself, so that an effect loses some thousandths of itself; of a product of all of `x` the
rounding would be as large as the effect. Norms, attention and activations stay in float32. Products in bfloat16 take a
fifth of the time of float32 on a CPU that has them.

In a mixture of experts a copy's token may go to an expert that the reference's does not go to. There `x0` is taken as
0: the expert's whole product is what differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from qvl_hydra.blockwise.walker import Context, Walker
from qvl_hydra.families.experts import ExpertProduct
from qvl_hydra.families.stages import Segment, State
from qvl_hydra.operators.discover import Operator
from qvl_hydra.operators.kinds import apply_operator, going_to, mixture, product
from qvl_hydra.quantization.apply import Compute, Forward, mixed_forward, replaced_forwards
from qvl_hydra.quantization.qdq import OperatorQuantizer, qdq_activation, quantized_operator

CONVERTED = 1 << 26  # weights of an operator that are converted to float32 at once


def by_difference(operators: Sequence[Operator], dtype: torch.dtype) -> list[str]:
    """Paths of the operators whose products can be taken so: none of models in another dtype, and no convolution's."""
    return [op.path for op in operators if op.kind in ("Linear", "Experts")] if dtype == torch.bfloat16 else []


class Differences:
    """What the linear operators of a segment were given by the reference, and what they gave.

    Args:
        walker: in float32; the products of operators whose weights it keeps are differences. Without any, all that
            walks is in float32.
    """

    def __init__(self, walker: Walker) -> None:
        self.walker, self.paths = walker, walker.kept
        self._segment: Segment | None = None
        self._weights: dict[tuple[torch.dtype, int], tuple[Tensor, Tensor]] = {}  # the segment's, in another dtype
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        self._chosen: dict[str, Tensor] = {}  # experts of the same, by mixture
        self._in_scheme: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}  # the same, with the operator in a scheme
        self._last: tuple[Tensor, Tensor] | None = None  # an input, and how it differs: operators that share one follow

    def advance(
        self, segment: Segment, context: Context, state: State, outputs: dict[str, Tensor] | None = None
    ) -> State:
        """Run the reference through a segment; what was seen before is let go.

        Args:
            outputs: what the operators gave, by path, as an earlier walk of the sample left it; what is new is added,
                but for the last segment's, which may be given a part of the tokens at a time.
        """
        self._seen, self._chosen, self._in_scheme, self._last = {}, {}, {}, None
        if segment is not self._segment:
            self._segment, self._weights = segment, {}
        kept = {} if outputs is None or segment is self.walker.segments[-1] else outputs

        def forward_of(path: str) -> Forward:
            def forward(module: nn.Module, x: Tensor) -> Tensor:
                if path not in kept:
                    kept[path] = self._of_reference(module, x)
                self._seen[path] = x.flatten(0, -2), kept[path].flatten(0, -2)
                if own := mixture(module):
                    self._chosen[path] = own.chosen
                return kept[path]

            return forward

        forwards = {path: forward_of(path) for path in filter(segment.holds, self.paths)}
        with replaced_forwards(self.walker.module, forwards):
            return segment.run(state, context)

    def run_copies(
        self,
        segment: Segment,
        context: Context,
        rows: State,
        quantizers: Mapping[str, Sequence[OperatorQuantizer | None]],
    ) -> Tensor:
        """Run copies of the reference through a segment that it has just run through.

        Args:
            quantizers: of some operators, for each copy its quantizer or None for float; the others are in float.
        """
        forwards = {path: mixed_forward(own) for path, own in quantizers.items() if any(own)}
        for path in filter(segment.holds, self.paths):
            forwards[path] = mixed_forward(quantizers.get(path, [None]), self._of_copies(path))
        with replaced_forwards(self.walker.module, forwards):
            return segment.run(rows, context)

    def _of_reference(self, module: nn.Module, x: Tensor) -> Tensor:
        """An operator's own output in float32; a head with a large vocabulary is converted some rows at a time."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        if mixture(module):  # converts an expert's at a time
            return product(module, x, weight)
        if weight.numel() <= CONVERTED:
            return apply_operator(module, x, self._in(torch.float32, weight))
        parts = weight.split(max(1, CONVERTED // weight.shape[1]))
        y = torch.cat([product(module, x, part.float()) for part in parts], dim=-1)
        return y if module.bias is None else y + module.bias.float()  # type: ignore[operator]

    def _of_copies(self, path: str) -> Compute:
        def compute(module: nn.Module, x: Tensor, quantizer: OperatorQuantizer | None) -> Tensor:
            if quantizer is not None and quantizer.scheme.output is not None:  # what is added up is rounded once more
                return quantized_operator(module, x, quantizer)
            given, gave = self._seen[path] if quantizer is None else self._reference_in(path, module, quantizer)
            if own := mixture(module):
                given, gave = by_expert(own, self._chosen[path], given, gave)
            change = self._change(x, given, quantizer)
            if quantizer is not None and not change.any():  # copies that start here
                return gave.repeat(len(change) // len(given), 1).view(*x.shape[:-1], -1)
            weight: Tensor = module.weight  # type: ignore[assignment]
            if quantizer is not None and quantizer.weight is not None:
                weight = self._in(torch.bfloat16, quantizer.weight)
            y = product(module, change, weight).float().view(-1, *gave.shape).add_(gave)
            return y.view(*x.shape[:-1], -1)

        return compute

    def _change(self, x: Tensor, given: Tensor, quantizer: OperatorQuantizer | None) -> Tensor:
        """How copies' input differs from the reference's, as the operator sees both."""
        if quantizer is not None:
            x = qdq_activation(x, quantizer.scheme.input, quantizer.input)
        elif self._last is not None and self._last[0] is x:
            return self._last[1]
        change = (x.reshape(-1, *given.shape) - given).flatten(0, 1).to(torch.bfloat16)
        if quantizer is None:
            self._last = x, change
        return change

    def _reference_in(self, path: str, module: nn.Module, quantizer: OperatorQuantizer) -> tuple[Tensor, Tensor]:
        """The reference's input as an operator in a scheme sees it, and what the operator gives."""
        key = path, id(quantizer)
        if key not in self._in_scheme:
            rounded = qdq_activation(self._seen[path][0], quantizer.scheme.input, quantizer.input)
            with going_to(module, self._chosen.get(path)):
                if quantizer.weight is None:
                    self._in_scheme[key] = rounded, self._of_reference(module, rounded)
                else:
                    self._in_scheme[key] = rounded, apply_operator(module, rounded, quantizer.weight)
        return self._in_scheme[key]

    def _in(self, dtype: torch.dtype, weight: Tensor) -> Tensor:
        """A weight of the segment in a dtype; converted once."""
        key = dtype, id(weight)
        if key not in self._weights:
            self._weights[key] = weight, weight.to(dtype)  # both, so that no other weight gets its id
        return self._weights[key][1]


def by_expert(
    module: ExpertProduct,
    chosen: Int64[Tensor, "slot"],
    given: Float[Tensor, "slot in"],
    gave: Float[Tensor, "slot out"],
) -> tuple[Float[Tensor, "row in"], Float[Tensor, "row out"]]:
    """What the reference's token gave each slot's expert, and got; zeros where it does not go there.

    Args:
        chosen: experts of the reference's slots.
        given: at these slots.

    Returns:
        As `given` and `gave` where all copies choose as the reference does; else of each copy's slots.
    """
    here = module.chosen.view(-1, len(chosen) // module.active, module.active)
    there = chosen.view_as(here[0])
    if bool((here == there).all()):
        return given, gave
    same = here[..., None] == there[:, None]  # copy, token, choice, the reference's choice
    first = torch.arange(0, len(chosen), module.active, device=chosen.device)
    slots = (first[:, None] + same.byte().argmax(-1)).flatten()
    others = ~same.any(-1).flatten()
    return given[slots].masked_fill_(others[:, None], 0), gave[slots].masked_fill_(others[:, None], 0)
