"""Plain attention against the fused operator, with its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qvl_hydra.blockwise import attention
from qvl_hydra.blockwise.attention import attention_for_backward, plain_attention

BATCH, HEADS, TOKENS, WIDTH = 2, 6, 7, 8
LOWER = torch.ones(1, 1, TOKENS, TOKENS).tril().bool()


def inputs(kv_heads: int = HEADS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(BATCH, n, TOKENS, WIDTH, dtype=dtype, requires_grad=True) for n in (HEADS, kv_heads, kv_heads)]


@pytest.mark.parametrize(
    ("kv_heads", "options"),
    [
        (HEADS, {}),
        (HEADS, {"is_causal": True}),
        (HEADS, {"scale": 0.7, "attn_mask": LOWER.expand(BATCH, -1, -1, -1)}),
        (2, {"enable_gqa": True, "is_causal": True}),
        (1, {"enable_gqa": True, "attn_mask": LOWER.mT}),
    ],
)
def test_plain_attention_is_the_fused_operators(kv_heads: int, options: dict[str, Any]) -> None:
    given = inputs(kv_heads)
    expected, found = functional.scaled_dot_product_attention(*given, **options), plain_attention(*given, **options)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    for mine, its in zip(*(torch.autograd.grad(y, given, gradient) for y in (found, expected)), strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize(
    ("dtype", "largest", "plain"),
    [
        (torch.bfloat16, BATCH * HEADS * TOKENS**2, True),
        (torch.bfloat16, BATCH * HEADS * TOKENS**2 - 1, False),
        (torch.float32, 1 << 25, False),
    ],
)
def test_it_replaces_the_fused_operator_where_that_is_slower(
    dtype: torch.dtype, largest: int, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def spy(*args: Any, **options: Any) -> Tensor:
        calls.append(options)
        return plain_attention(*args, **options)

    monkeypatch.setattr(attention, "LARGEST", largest)
    monkeypatch.setattr(attention, "plain_attention", spy)
    given = inputs(dtype=dtype)
    with attention_for_backward(given[0]):
        found = functional.scaled_dot_product_attention(*given, is_causal=True)
    assert calls == [{"is_causal": True}] * plain
    expected = functional.scaled_dot_product_attention(*given, is_causal=True)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
