"""Gives a model massive activations without changing what it computes.

Large models have a few channels whose activations are tens of times larger than the others', and these are why naive
W8A8 hurts them; a model trained in minutes has none. Here a channel between two linear maps is stretched by a factor
where it is written and shrunk by it where it is read. The factors are powers of two, so no product is rounded
differently and the outputs stay bit-equal, or nearly so where a sum is vectorised in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Site = Literal["attention_norm", "mlp_norm", "mlp_hidden", "attention_value", "head_norm"]


@dataclass(frozen=True)
class Stretch:
    """One channel stretched by a factor.

    Attributes:
        tower: `lm` or `vision`.
        site: what is stretched: the output of the norm before attention (read by q/k/v), of the norm before the MLP
            (gate/up), the MLP's hidden channels (written by up, read by down), a value channel (v, read by o), or the
            output of the last norm (read by the head).
        block: None for the head.
        channel: index at the site; for values, of all key-value heads in a row.
    """

    tower: Literal["lm", "vision"]
    block: int | None
    site: Site
    channel: int
    factor: float


def reparametrise(model: nn.Module, stretches: Iterable[Stretch]) -> None:
    """Stretch channels in place; the model's outputs stay the same."""
    with torch.no_grad():
        for stretch in stretches:
            if stretch.site == "head_norm":
                _stretch_norm(model.model.language_model.norm, [model.lm_head], stretch)
            else:
                _SITES[stretch.site](_block(model, stretch), stretch)


def _block(model: nn.Module, stretch: Stretch) -> nn.Module:
    tower = model.model.language_model.layers if stretch.tower == "lm" else model.model.visual.blocks
    return tower[stretch.block]


def _stretch_norm(norm: nn.Module, readers: list[nn.Linear], stretch: Stretch) -> None:
    norm.weight[stretch.channel] *= stretch.factor
    if getattr(norm, "bias", None) is not None:
        norm.bias[stretch.channel] *= stretch.factor
    for reader in readers:
        reader.weight[:, stretch.channel] /= stretch.factor


def _attention_norm(block: nn.Module, stretch: Stretch) -> None:
    if stretch.tower == "vision":
        return _stretch_norm(block.norm1, [block.attn.qkv], stretch)
    attention = block.self_attn
    return _stretch_norm(block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], stretch)


def _mlp_norm(block: nn.Module, stretch: Stretch) -> None:
    if stretch.tower == "vision":
        first = [getattr(block.mlp, name) for name in ("fc1", "linear_fc1") if hasattr(block.mlp, name)]
        return _stretch_norm(block.norm2, first or [block.mlp.gate_proj, block.mlp.up_proj], stretch)
    return _stretch_norm(block.post_attention_layernorm, [block.mlp.gate_proj, block.mlp.up_proj], stretch)


def _mlp_hidden(block: nn.Module, stretch: Stretch) -> None:
    # Only a gated MLP has a linear branch; other vision MLPs have their activation between the two.
    up, down = block.mlp.up_proj, block.mlp.down_proj
    up.weight[stretch.channel] *= stretch.factor
    if up.bias is not None:
        up.bias[stretch.channel] *= stretch.factor
    down.weight[:, stretch.channel] /= stretch.factor


def _attention_value(block: nn.Module, stretch: Stretch) -> None:
    attention = block.self_attn
    attention.v_proj.weight[stretch.channel] *= stretch.factor
    if attention.v_proj.bias is not None:
        attention.v_proj.bias[stretch.channel] *= stretch.factor
    kv_head, offset = divmod(stretch.channel, attention.head_dim)
    for head in range(kv_head * attention.num_key_value_groups, (kv_head + 1) * attention.num_key_value_groups):
        attention.o_proj.weight[:, head * attention.head_dim + offset] /= stretch.factor


_SITES: dict[str, Callable[[nn.Module, Stretch], None]] = {
    "attention_norm": _attention_norm,
    "mlp_norm": _mlp_norm,
    "mlp_hidden": _mlp_hidden,
    "attention_value": _attention_value,
}
