"""Mixtures of experts: the products of all experts of a block, as two operators that see tokens in their order.

Transformers holds the weights of a block's experts in two bare parameters, where no search for modules finds them, and
gathers the tokens of each expert, so that it is no longer told which copy of a sample a value belongs to. Here a token
that goes to k experts is k values in the order of the tokens (slots), so that copies, samples and tokens lie as they do
at every other operator, and the arithmetic is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional


class ExpertProduct(nn.Module):
    """One product of all experts of a block.

    Args:
        weight: (expert, out, in), whose memory is shared; held as (expert * out, in), a row an expert's own.
        active: experts that a token goes to.

    Attributes:
        chosen: expert of each slot of the input to come; noted by who calls it, and true of it until the next call.
    """

    chosen: Int64[Tensor, "slot"]

    def __init__(self, weight: Tensor, active: int) -> None:
        super().__init__()
        self.experts, self.active = len(weight), active
        self.weight = nn.Parameter(weight.detach().reshape(-1, weight.shape[-1]), requires_grad=False)
        self.bias = None

    def forward(self, x: Float[Tensor, "slot in"]) -> Float[Tensor, "slot out"]:
        return self.product(x, self.weight)

    def product(self, x: Float[Tensor, "slot in"], weight: Float[Tensor, "row in"]) -> Float[Tensor, "slot out"]:
        """Each slot's product with its expert's rows of a weight, one expert's at a time in the slots' dtype."""
        return self._routed(x, weight.unflatten(0, (self.experts, -1)))

    def back(self, g: Float[Tensor, "slot out"], weight: Float[Tensor, "row in"]) -> Float[Tensor, "slot in"]:
        """From gradients at the output to those at the input."""
        return self._routed(g, weight.unflatten(0, (self.experts, -1)).mT)

    def _routed(self, x: Tensor, matrices: Tensor) -> Tensor:
        order = self.chosen.argsort(stable=True)
        parts = x[order].split(self.chosen.bincount(minlength=self.experts).tolist())
        reached = [(part, own) for part, own in zip(parts, matrices, strict=True) if len(part)]
        return torch.cat([functional.linear(part, own.to(x.dtype)) for part, own in reached])[order.argsort()]


class RoutedExperts(nn.Module):
    """The experts of a block, called as transformers' own are."""

    def __init__(self, experts: Any, active: int) -> None:
        super().__init__()
        self.gate_up_proj = ExpertProduct(experts.gate_up_proj, active)
        self.down_proj = ExpertProduct(experts.down_proj, active)
        self.act_fn = experts.act_fn

    def forward(
        self,
        hidden_states: Float[Tensor, "token width"],
        top_k_index: Int64[Tensor, "token active"],
        top_k_weights: Float[Tensor, "token active"],
    ) -> Float[Tensor, "token width"]:
        self.gate_up_proj.chosen = self.down_proj.chosen = top_k_index.flatten()
        gate, up = self.gate_up_proj(hidden_states.repeat_interleave(top_k_index.shape[1], 0)).chunk(2, dim=-1)
        made: Tensor = self.down_proj(self.act_fn(gate) * up)
        weighted = made.unflatten(0, top_k_index.shape) * top_k_weights[..., None]
        return weighted.sum(1).to(hidden_states.dtype)


def routed(model: Any) -> Any:
    """The model with the experts of each block as operators; its weights stay where they are."""
    active = model.config.get_text_config().num_experts_per_tok
    for layer in model.get_submodule("model.language_model.layers"):
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = RoutedExperts(layer.mlp.experts, active)
    return model
