"""Kinds of operator: where the weight of each is, what a token is to it, and what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from qvl_hydra.families.experts import ExpertProduct


@dataclass(frozen=True)
class Kind:
    """One kind of operator; its module has a `weight` (out, *in) and a `bias` or None.

    Attributes:
        name: what scores and profiles call it.
        tokens: from the operator's input to the same with a token's values in the last dimension.
        apply: its arithmetic on an input with a weight and a bias.
        product: from tokens to their products with the rows of a weight, flattened to two dimensions.
        back: from gradients at the products to those at the tokens.
    """

    name: str
    tokens: Callable[[Tensor], Tensor]
    apply: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]
    product: Callable[[Any, Tensor, Tensor], Tensor] = lambda module, tokens, weight: tokens @ weight.T
    back: Callable[[Any, Tensor, Tensor], Tensor] = lambda module, g, weight: g @ weight


def _linear(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, bias)


def _convolution(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = module._conv_forward(x, weight, bias)
    return y


def _experts(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = module.product(x, weight)
    return y


def _patch(x: Tensor) -> Tensor:
    """A convolution's patch is one token."""
    return x.flatten(1)


KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: Kind("Linear", lambda x: x, _linear),
    nn.Conv2d: Kind("Conv2d", _patch, _convolution),
    nn.Conv3d: Kind("Conv3d", _patch, _convolution),
    ExpertProduct: Kind("Experts", lambda x: x, _experts, ExpertProduct.product, ExpertProduct.back),
}


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module, or None for one that is no operator."""
    return next((kind for owner, kind in KINDS.items() if isinstance(module, owner)), None)


def _known(module: nn.Module) -> Kind:
    kind = kind_of(module)
    assert kind is not None, f"{type(module).__name__} is no operator"
    return kind


def as_tokens(module: nn.Module, x: Tensor) -> Tensor:
    """An operator's input with a token's values in the last dimension."""
    return _known(module).tokens(x)


def apply_operator(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """An operator's own arithmetic with another weight, in that weight's dtype."""
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    return _known(module).apply(module, x, weight, None if bias is None else bias.to(weight.dtype))


def product(module: nn.Module, tokens: Tensor, weight: Tensor) -> Tensor:
    """An operator's product of tokens with another weight (row, in), without bias."""
    return _known(module).product(module, tokens, weight)


def input_gradient(module: nn.Module, g: Tensor) -> Tensor:
    """From gradients at an operator's output, (token, out), to those at its input, (token, in)."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return _known(module).back(module, g, weight.flatten(1))


def mixture(module: nn.Module) -> ExpertProduct | None:
    """The operator as a product of several experts; None where it has one weight for all tokens."""
    return module if isinstance(module, ExpertProduct) else None


def outputs(module: nn.Module) -> int:
    """Width of what an operator makes of a token."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    own = mixture(module)
    return len(weight) // (own.experts if own else 1)


def slots(module: nn.Module) -> int:
    """How many values of its input one token is, one behind the other: as many as it goes to experts."""
    own = mixture(module)
    return own.active if own else 1


@contextmanager
def some_copies(module: nn.Module, chosen: Tensor | Sequence[int], copies: int) -> Iterator[None]:
    """Within it the operator is given only the chosen ones of the copies that its input held, one behind the other."""
    own = mixture(module)
    with going_to(module, None if own is None else own.chosen.view(copies, -1)[chosen].flatten()):
        yield


@contextmanager
def going_to(module: nn.Module, chosen: Tensor | None) -> Iterator[None]:
    """Within it slots go to other experts; None for an operator that has one weight for all tokens."""
    own = mixture(module)
    if own is None or chosen is None:
        yield
        return
    before, own.chosen = own.chosen, chosen
    try:
        yield
    finally:
        own.chosen = before
