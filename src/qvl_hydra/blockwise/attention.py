"""Attention by plain matrix products, for backward passes in bfloat16 on a CPU.

The fused operator's backward pass there computes the attention weights anew and takes three times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LARGEST = 1 << 25  # attention weights of one call; of more the memory would count


def attention_for_backward(state: Tensor) -> AbstractContextManager[object]:
    """Within it attention is computed in the way whose backward pass takes less time, for states like this one."""
    slow = state.device.type == "cpu" and state.dtype == torch.bfloat16
    return _PlainAttention() if slow else nullcontext()


class _PlainAttention(TorchFunctionMode):

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        attends = func is functional.scaled_dot_product_attention
        if attends and args[0].shape[:-1].numel() * args[1].shape[-2] <= LARGEST:
            func = plain_attention
        return func(*args, **(kwargs or {}))


def plain_attention(
    query: Float[Tensor, "batch head query width"],
    key: Float[Tensor, "batch kv_head token width"],
    value: Float[Tensor, "batch kv_head token width"],
    attn_mask: Bool[Tensor, "_batch _head query token"] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch head query width"]:
    """What `torch.nn.functional.scaled_dot_product_attention` computes of the same arguments, without dropout.

    Heads that share their keys are rows of one product.
    """
    assert dropout_p == 0, "models are in evaluation mode"
    assert enable_gqa or query.shape[1] == key.shape[1]
    (batch, heads, queries, width), tokens = query.shape, key.shape[2]
    scale = 1 / math.sqrt(width) if scale is None else scale
    rows = (query * scale).reshape(batch, key.shape[1], -1, width)
    weights = (rows @ key.mT).view(batch, heads, queries, tokens)
    if is_causal:
        attn_mask = torch.ones(queries, tokens, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        weights = weights.masked_fill(~attn_mask, -torch.inf)
    return (weights.softmax(-1).view(batch, key.shape[1], -1, tokens) @ value).view(query.shape)
