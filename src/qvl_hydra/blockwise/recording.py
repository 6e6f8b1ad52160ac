"""What a model gives its blocks beside the hidden state, taken from its own forward with the blocks passed over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context a module computes with another function."""
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


@contextmanager
def recording(blocks: nn.ModuleList, path: str, inputs: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Within the context every block gives its input back and notes its keyword arguments."""

    def recorder(name: str) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            assert not args, "blocks are called with keyword arguments"
            inputs[name] = kwargs
            return hidden_states

        return forward

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(replaced(block, recorder(f"{path}.{index}")))
        yield
