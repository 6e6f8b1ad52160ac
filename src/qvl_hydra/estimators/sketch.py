"""The sketch estimator: every operator's score from K backward passes, with no loop over operators.

For a probe `r` over the output, one backward pass of `<r, F>` gives the gradient `g` at every operator's output. If
`delta` is the change of that output when the operator is quantized on its own input, `p_t = <g_t, delta_t>` at token
`t` is the probe's view of the output change, to first order. With `delta` split into what the weight's error and what
the activations' error does,

    weight:      delta_t = (Q(W) - W) x_t         p = <g_t, delta_t>
    input:       delta_t = W (Q(x_t) - x_t)       p = <W' g_t, Q(x_t) - x_t>   (`W' g` is the backward pass's own)
    output:      delta_t = Q(y_t) - y_t           p = <g_t, delta_t>

so that only the weight part costs a product of its own. `combine` turns the `p_t` into one value a sample and probe.

The walk is a forward, then a reverse walk with each segment computed again: memory for the states between segments
and one segment's graph, weights touched twice. Cost: K + 3 forwards (docs/estimators.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from qvl_hydra.blockwise.attention import attention_for_backward
from qvl_hydra.blockwise.walker import Context, Segment, State, Walker
from qvl_hydra.models.memory import row_parts
from qvl_hydra.operators.targets import Target
from qvl_hydra.quantization.apply import replaced_forwards, unread_output
from qvl_hydra.quantization.qdq import QuantParams, apply_operator, as_tokens, qdq_activation
from qvl_hydra.quantization.scheme import Scheme

Products = Float[Tensor, "*target probe token"]
MakeProbes = Callable[[State], Sequence[State]]


@dataclass
class OperatorError:
    """What one scheme does to one operator on one sample, and the products with each probe's gradient.

    Attributes:
        weight: change of the output by the weight's error, (token, out); this and the others in the model's dtype.
        input: rounding error of the input, (token, in).
        output: rounding error of the output, (token, out).
        weight_products, activation_products: one (token,) tensor a probe.
        element: sums of squared elementwise products, one (token,) tensor a probe; only when asked for.
    """

    weight: Tensor | None
    input: Tensor | None
    output: Tensor | None
    whole: Tensor | None = None
    weight_products: list[Tensor] = field(default_factory=list)
    activation_products: list[Tensor] = field(default_factory=list)
    element: list[Tensor] = field(default_factory=list)


class _Tap(torch.autograd.Function):
    """An operator's forward in float whose backward also takes the products with its errors.

    Where nobody reads its output, that is zeros.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, errors: list[OperatorError], read: bool) -> Tensor:
        ctx.module, ctx.errors, ctx.shape = module, errors, x.shape
        return apply_operator(module, x, module.weight) if read else unread_output(module, x)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        weight: Tensor = ctx.module.weight.flatten(1)
        flat = g.reshape(-1, weight.shape[0])
        to_input = flat @ weight
        for error in ctx.errors:
            _take_products(error, flat, to_input)
        return to_input.view(ctx.shape), None, None, None


def _take_products(error: OperatorError, g: Tensor, to_input: Tensor) -> None:
    if error.weight is not None:
        error.weight_products.append(_dot(g, error.weight))
    pairs = ((to_input, error.input), (g, error.output))
    activation = [_dot(gradient, change) for gradient, change in pairs if change is not None]
    if activation:
        error.activation_products.append(activation[0] if len(activation) == 1 else activation[0] + activation[1])
    if error.whole is not None:
        error.element.append((g.float() * error.whole).square().sum(-1))


def _dot(first: Float[Tensor, "token value"], second: Float[Tensor, "token value"]) -> Float[Tensor, "token"]:
    """Products and sums of a model in bfloat16 are its own, in a fifth of the time; float16 could overflow."""
    if first.dtype == torch.float16:
        first = first.float()
    parts = [(first[rows] * second[rows]).sum(-1) for rows in row_parts(first)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).float()


@dataclass(frozen=True)
class OperatorChange:
    """One operator put into a scheme, as far as the sketch needs it.

    Attributes:
        weight: `Q(W) - W` in the model's dtype, (out, in).
        input, output: parameters of its static activations.
    """

    scheme: Scheme
    weight: Tensor | None
    input: QuantParams | None = None
    output: QuantParams | None = None


def operator_error(
    module: nn.Module, x: Float[Tensor, "token *in"], change: OperatorChange, element: bool
) -> OperatorError:
    """The error that a scheme makes in one operator on the input given.

    Args:
        x: the operator's float input, tokens first.
        element: also keep the whole change of the output, for elementwise products.
    """
    scheme, dtype = change.scheme, x.dtype
    tokens = as_tokens(module, x)
    by_weight = None if change.weight is None else tokens @ change.weight.T
    quantized = qdq_activation(tokens.float(), scheme.input, change.input)
    by_input = None if scheme.input is None else (quantized - tokens).to(dtype)
    by_output = whole = None
    if scheme.output is not None or element:
        weight: Tensor = module.weight.flatten(1).float()  # type: ignore[operator, union-attr]
        rounded = weight if change.weight is None else weight + change.weight.float()
        y = functional.linear(quantized, rounded)
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        shift = 0.0 if bias is None else bias.float()
        after = qdq_activation(y + shift, scheme.output, change.output)
        by_output = None if scheme.output is None else (after - shift - y).to(dtype)
        whole = (after - shift - functional.linear(tokens.float(), weight)).to(dtype) if element else None
    return OperatorError(by_weight, by_input, by_output, whole)


def combine(variant: str, weight: Products | None, activation: Products | None) -> Float[Tensor, "*target probe part"]:
    """One value a probe from the products at each token of a sample.

    Args:
        variant: `sequence`: square of the sum over tokens, an unbiased estimate of the linearised squared error;
            `token`: sum of the squares, without the products between tokens, far less noisy; `split`: the weight's
            error, which is the same at every token, by sequence, the rounding of activations by token; `shrunk`: as
            `token`, with the products between tokens beside it, for `scores.shrink`.
        weight, activation: products by the two kinds of error; None where the scheme has none.

    Returns:
        One column; for `shrunk` three: the sum of squares, the products between different tokens of the weight's
        error, and all other products between different tokens.
    """
    total = torch.stack([part for part in (weight, activation) if part is not None]).sum(0)
    squares, sequence = total.square().sum(-1), total.sum(-1).square()
    if variant == "sequence":
        return sequence[..., None]
    if variant == "token":
        return squares[..., None]
    cross = torch.zeros_like(squares) if weight is None else weight.sum(-1).square() - weight.square().sum(-1)
    if variant == "shrunk":
        return torch.stack([squares, cross, sequence - squares - cross], dim=-1)
    by_weight = torch.zeros_like(squares) if weight is None else weight.sum(-1).square()
    by_activation = torch.zeros_like(squares) if activation is None else activation.square().sum(-1)
    return (by_weight + by_activation)[..., None]


@dataclass(frozen=True)
class SketchSegment:
    """One segment's work in the reverse walk.

    Attributes:
        targets: those with operators in the segment.
        changes: by operator path, one a scheme.
        variant: how products of tokens are summed; `element` is the elementwise score of other tools.
        unread: a linear operator whose output only goes into the segment's, which nobody reads a second time.
    """

    walker: Walker
    segment: Segment
    targets: Sequence[Target]
    changes: dict[str, list[OperatorChange]]
    variant: str
    unread: str | None = None


@dataclass(frozen=True)
class SegmentProducts:
    """What one scheme's errors give with the gradients of a segment, targets in the order of `SketchSegment`.

    Attributes:
        weight, activation: products by the two kinds of error; None where the scheme has none.
        element: sums of squared elementwise products, for the variant of that name only.
    """

    weight: Products | None
    activation: Products | None
    element: Products | None

    @property
    def tokens(self) -> int:
        """Tokens that products were taken at, of all samples together."""
        return next(part.shape[-1] for part in (self.weight, self.activation, self.element) if part is not None)

    def values(self, variant: str, tokens: slice) -> Float[Tensor, "target probe part"]:
        """Values of the sample whose tokens are those."""
        if self.element is not None:
            return self.element[..., tokens].sum(-1)[..., None]
        parts = (self.weight, self.activation)
        return combine(variant, *(None if part is None else part[..., tokens] for part in parts))


def step_back(
    work: SketchSegment, context: Context, state: State, gradients: Sequence[State] | MakeProbes
) -> tuple[list[SegmentProducts], list[State]]:
    """Compute a segment again and take every probe's gradient through it.

    Args:
        state: the segment's input: one row, or one a sample.
        gradients: at the segment's output, one a probe; of the last segment a function that makes them from it.

    Returns:
        Products of each scheme; and the gradients at the segment's input.
    """
    errors: dict[str, list[OperatorError]] = {}

    def forward_of(path: str) -> Callable[[nn.Module, Tensor], Tensor]:
        def forward(module: nn.Module, x: Tensor) -> Tensor:
            with torch.no_grad():
                tokens = x.detach().flatten(0, 1) if x.dim() == 3 else x.detach()
                element = work.variant == "element"
                errors[path] = [operator_error(module, tokens, change, element) for change in work.changes[path]]
            result: Tensor = _Tap.apply(x, module, errors[path], path != work.unread)
            return result

        return forward

    taps = {path: forward_of(path) for path in work.changes}
    with torch.enable_grad(), replaced_forwards(work.walker.module, taps):
        start = state.detach().requires_grad_()
        with attention_for_backward(start):
            end = work.segment.run(start, context)
        if callable(gradients):
            gradients = gradients(end.detach())
        back = [
            torch.autograd.grad(end, start, gradient.to(end.dtype), retain_graph=index + 1 < len(gradients))[0]
            for index, gradient in enumerate(gradients)
        ]
    return _products(work, errors), back


def _products(work: SketchSegment, errors: dict[str, list[OperatorError]]) -> list[SegmentProducts]:
    """Operators quantized together add their products before anything is squared."""
    members = [[errors[op.path] for op in target.operators if op.path in errors] for target in work.targets]
    element = work.variant == "element"
    return [
        SegmentProducts(
            None if element else _stacked(members, index, "weight_products"),
            None if element else _stacked(members, index, "activation_products"),
            _stacked(members, index, "element") if element else None,
        )
        for index in range(max((len(schemes) for target in members for schemes in target), default=0))
    ]


def _stacked(members: list[list[list[OperatorError]]], index: int, name: str) -> Products | None:
    """Products of one scheme, (target, probe, token); None where its operators have no error of that kind."""
    found = []
    for target in members:
        parts = [torch.stack(getattr(schemes[index], name)) for schemes in target if getattr(schemes[index], name)]
        if not parts:
            return None
        found.append(parts[0] if len(parts) == 1 else torch.stack(parts).sum(0))
    return torch.stack(found)
