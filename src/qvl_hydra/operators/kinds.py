"""Kinds of operator: where the weight of each is, what a token is to it, and what it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Kind:
    """One kind of operator; its module has a `weight` (out, *in) and a `bias` or None.

    Attributes:
        name: what scores and profiles call it.
        tokens: from the operator's input to the same with a token's values in the last dimension.
        apply: its arithmetic on an input with a weight and a bias.
    """

    name: str
    tokens: Callable[[Tensor], Tensor]
    apply: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]


def _linear(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, bias)


def _convolution(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = module._conv_forward(x, weight, bias)
    return y


def _patch(x: Tensor) -> Tensor:
    """A convolution's patch is one token."""
    return x.flatten(1)


KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: Kind("Linear", lambda x: x, _linear),
    nn.Conv2d: Kind("Conv2d", _patch, _convolution),
    nn.Conv3d: Kind("Conv3d", _patch, _convolution),
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
