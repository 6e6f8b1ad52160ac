"""First-order effects: what an operator's error does to the output, from a gradient at the operator's output.

For a probe `r` over the output, one backward pass of `<r, F>` gives the gradient `g` at every operator's output. If
`delta` is the change of that output when the operator is quantized on its own input, `p_t = <g_t, delta_t>` at token
`t` is the probe's view of the output change, to first order. With `delta` split into what the weight's error and what
the activations' error does,

    weight:      delta_t = (Q(W) - W) x_t         p = <g_t, delta_t>
    input:       delta_t = W (Q(x_t) - x_t)       p = <W' g_t, Q(x_t) - x_t>   (`W' g` is the backward pass's own)
    output:      delta_t = Q(y_t) - y_t           p = <g_t, delta_t>

so that only the weight part costs a product of its own. `combine` turns the `p_t` into one value a sample and probe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvl_hydra.models.memory import row_parts
from qvl_hydra.operators.kinds import as_tokens, mixture, product, slots
from qvl_hydra.operators.targets import Target
from qvl_hydra.quantization.formats.record import QuantParams
from qvl_hydra.quantization.qdq import qdq_activation
from qvl_hydra.quantization.scheme import Scheme
from qvl_hydra.scores.shrink import ORIGINS

Products = Float[Tensor, "*target probe token"]
PARTS = {"sequence": 2, "token": 2, "split": 2, "shrunk": 4}  # numbers that `combine` gives
SamplesOf = Callable[[int], Sequence[slice]]  # from tokens in all, one behind the other, to those of each sample
Kinds = Sequence[Tensor | int]  # of each sample the kind of every token, or the one of all; see `positions`


@dataclass
class OperatorError:
    """What one scheme does to one operator on one sample, and the products with each probe's gradient.

    Attributes:
        weight: change of the output by the weight's error, (token, out); this and the others in the model's dtype.
        input: rounding error of the input, (token, in).
        output: rounding error of the output, (token, out).
        slots: how many of these one token of the sample is; their products add up.
        chosen: of a mixture, the expert of each slot.
        weight_products, activation_products: one (token * slots,) tensor a probe.
        taken: probes so far.
    """

    weight: Tensor | None
    input: Tensor | None
    output: Tensor | None
    slots: int = 1
    chosen: Tensor | None = None
    weight_products: list[Tensor] = field(default_factory=list)
    activation_products: list[Tensor] = field(default_factory=list)
    taken: int = 0

    def take(self, g: Float[Tensor, "token out"], to_input: Float[Tensor, "token in"]) -> None:
        """Take the products with a probe's gradient at the operator's output and input."""
        self.taken += 1
        if self.weight is not None:
            self.weight_products.append(_dot(g, self.weight))
        pairs = ((to_input, self.input), (g, self.output))
        activation = [_dot(gradient, change) for gradient, change in pairs if change is not None]
        if activation:
            found = activation[0] if len(activation) == 1 else activation[0] + activation[1]
            self.activation_products.append(found)

    def joined(self, behind: OperatorError) -> OperatorError:
        """The products of these tokens and of others behind them, without what they were made of."""
        by_weight = zip(self.weight_products, behind.weight_products, strict=True)
        by_activation = zip(self.activation_products, behind.activation_products, strict=True)
        found = OperatorError(None, None, None, self.slots, taken=self.taken)
        found.weight_products = [torch.cat(probe) for probe in by_weight]
        found.activation_products = [torch.cat(probe) for probe in by_activation]
        return found

    def by_token(self, products: Sequence[Tensor], expert: int | None) -> list[Float[Tensor, "token"]]:
        """The products of each probe, summed over the slots of a token, or over those of one expert."""
        if expert is not None:
            assert self.chosen is not None, "no mixture"
            products = [product * (self.chosen == expert) for product in products]
        return [product if self.slots == 1 else product.view(-1, self.slots).sum(-1) for product in products]


def _dot(first: Float[Tensor, "token value"], second: Float[Tensor, "token value"]) -> Float[Tensor, "token"]:
    """Products and sums of a model in bfloat16 are its own, in a fifth of the time; float16 could overflow."""
    if first.dtype == torch.float16:
        first = first.float()
    parts = [(first[rows] * second[rows]).sum(-1) for rows in row_parts(first)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).float()


@dataclass(frozen=True)
class OperatorChange:
    """One operator put into a scheme, as far as first-order effects need it.

    Attributes:
        weight: `Q(W) - W` in the model's dtype, (out, in).
        input, output: parameters of its static activations.
    """

    scheme: Scheme
    weight: Tensor | None
    input: QuantParams | None = None
    output: QuantParams | None = None


def operator_error(module: nn.Module, x: Float[Tensor, "token *in"], change: OperatorChange) -> OperatorError:
    """The error that a scheme makes in one operator on the input given.

    Args:
        x: the operator's float input, tokens first.
    """
    scheme, dtype = change.scheme, x.dtype
    tokens = as_tokens(module, x)
    by_weight = None if change.weight is None else product(module, tokens, change.weight)
    quantized = qdq_activation(tokens.float(), scheme.input, change.input)
    by_input = None if scheme.input is None else (quantized - tokens).to(dtype)
    by_output = None
    if scheme.output is not None:
        weight: Tensor = module.weight.flatten(1).float()  # type: ignore[operator, union-attr]
        rounded = weight if change.weight is None else weight + change.weight.float()
        y = product(module, quantized, rounded)
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        shift = 0.0 if bias is None else bias.float()
        after = qdq_activation(y + shift, scheme.output, change.output)
        by_output = (after - shift - y).to(dtype)
    own = mixture(module)
    return OperatorError(by_weight, by_input, by_output, slots(module), None if own is None else own.chosen)


def combine(
    reduction: str, weight: Products | None, activation: Products | None
) -> Float[Tensor, "*target probe part"]:
    """One value a probe from the products at each token of a sample.

    Args:
        reduction: `sequence`: square of the sum over tokens, an unbiased estimate of the linearised squared error;
            `token`: sum of the squares, without the products between tokens, far less noisy; `split`: the weight's
            error, which is the same at every token, by sequence, the rounding of activations by token; `shrunk`: as
            `token`, with the products between tokens beside it, for `scores.shrink`.
        weight, activation: products by the two kinds of error; None where the scheme has none.

    Returns:
        The sum over tokens as it is, sign and all; the value; and for `shrunk` two more: the products between
        different tokens of the weight's error, and all other products between different tokens.
    """
    total = _total(weight, activation)
    signed, squares = total.sum(-1), total.square().sum(-1)
    sequence = signed.square()
    if reduction == "sequence":
        return torch.stack([signed, sequence], dim=-1)
    if reduction == "token":
        return torch.stack([signed, squares], dim=-1)
    cross = torch.zeros_like(squares) if weight is None else weight.sum(-1).square() - weight.square().sum(-1)
    if reduction == "shrunk":
        return torch.stack([signed, squares, cross, sequence - squares - cross], dim=-1)
    by_weight = torch.zeros_like(squares) if weight is None else weight.sum(-1).square()
    by_activation = torch.zeros_like(squares) if activation is None else activation.square().sum(-1)
    return torch.stack([signed, by_weight + by_activation], dim=-1)


def _total(weight: Products | None, activation: Products | None) -> Products:
    return torch.stack([part for part in (weight, activation) if part is not None]).sum(0)


@dataclass(frozen=True)
class FirstOrder:
    """A reading of the reverse walk: products of gradients with errors.

    Attributes:
        changes: by operator path, one a scheme.
        reduction: how products of tokens are summed, see `combine`.
    """

    changes: Mapping[str, Sequence[OperatorChange]]
    reduction: str

    def tap(self, path: str, module: nn.Module, x: Tensor, samples_of: SamplesOf) -> list[OperatorError]:
        """What the operator's input says before any gradient arrives; one a scheme."""
        return [operator_error(module, x, change) for change in self.changes[path]]

    def joined(self, before: Sequence[OperatorError], behind: Sequence[OperatorError]) -> list[OperatorError]:
        """The taps of all their tokens; of one weight, so no mixture's."""
        return [own.joined(other) for own, other in zip(before, behind, strict=True)]

    def collect(
        self,
        targets: Sequence[Target],
        taps: Mapping[str, Sequence[OperatorError]],
        samples_of: SamplesOf,
        kinds: Kinds | None = None,
    ) -> list[list[Float[Tensor, "target probe part"]]]:
        """Values by scheme and sample; operators quantized together add their products before anything is squared.

        Behind the parts of `combine` stand the squares of the products at each kind of token.
        """
        members = [[taps[op.path] for op in target.operators if op.path in taps] for target in targets]
        schemes = max((len(errors) for target in members for errors in target), default=0)
        found = []
        for index in range(schemes):
            by_target = [
                self._values([errors[index] for errors in own], samples_of, kinds, target.expert)
                for target, own in zip(targets, members, strict=True)
            ]
            found.append([torch.stack(rows) for rows in zip(*by_target, strict=True)])
        return found

    def _values(
        self, errors: Sequence[OperatorError], samples_of: SamplesOf, kinds: Kinds | None, expert: int | None
    ) -> list[Float[Tensor, "probe part"]]:
        """Of one target in one scheme, a sample each."""
        if not any(e.weight_products or e.activation_products for e in errors):  # a scheme that is not offered
            empty = torch.zeros(errors[0].taken, PARTS[self.reduction] + len(ORIGINS))
            return [empty] * len(samples_of(0))
        parts = (
            _summed([e.by_token(e.weight_products, expert) for e in errors]),
            _summed([e.by_token(e.activation_products, expert) for e in errors]),
        )
        tokens = next(part.shape[-1] for part in parts if part is not None)
        squares = _total(*parts).square()
        found = []
        for row, of_sample in enumerate(samples_of(tokens)):
            own = [part if part is None else part[..., of_sample] for part in parts]
            origins = _by_kind(squares[..., of_sample], None if kinds is None else kinds[row])
            found.append(torch.cat([combine(self.reduction, *own), origins], dim=-1))
        return found


def _by_kind(squares: Products, kinds: Tensor | int | None) -> Float[Tensor, "probe origin"]:
    """Sums of squares at each kind of token; zero where the kinds are not known."""
    by_kind = squares.new_zeros(*squares.shape[:-1], len(ORIGINS))
    if isinstance(kinds, int):
        by_kind[..., kinds] = squares.sum(-1)
    elif kinds is not None:
        by_kind.index_add_(-1, kinds.to(squares.device), squares)
    return by_kind


def _summed(products: Sequence[list[Tensor]]) -> Products | None:
    """Products of all operators of a target, (probe, token); None where they have no error of that kind."""
    parts = [torch.stack(found) for found in products if found]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
