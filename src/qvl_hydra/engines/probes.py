"""Random probes over the output, whose backward passes sketch every operator's effect at once.

For the squared error a probe is a vector of random signs: identity covariance, so that `E <r, d>^2 = ||d||^2` for an
output change `d` (Hutchinson 1990). For KL it is the score of a label drawn from the model's own distribution,
`onehot(y) - p`, whose covariance is the Fisher information: `E <r, d>^2 = d' F d`, which is twice the divergence to
second order (Martens 2014, New insights and perspectives on the natural gradient method).
"""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional


def seeded(device: torch.device, *names: object) -> torch.Generator:
    """A generator that depends on the names alone, so that any part of the work can be done again by itself."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def sign_probe(output: Float[Tensor, "token value"], generator: torch.Generator) -> Float[Tensor, "token value"]:
    """Random signs of the output's shape, float32."""
    bits = torch.randint(0, 2, output.shape, generator=generator, device=output.device, dtype=torch.int8)
    return bits.mul_(2).sub_(1).float()


def fisher_probe(logits: Float[Tensor, "token vocab"], generator: torch.Generator) -> Float[Tensor, "token vocab"]:
    """`onehot(y) - p` at every token, `y` drawn from the model's own distribution `p`."""
    p = logits.float().softmax(-1)
    drawn = torch.multinomial(p, 1, generator=generator)
    return (-p).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=p.dtype))


def loss_gradient(
    logits: Float[Tensor, "token vocab"], labels: Int64[Tensor, "token"]
) -> Float[Tensor, "token vocab"]:
    """Gradient of the summed loss of the answer tokens; `labels` are those of the next token, -100 where none."""
    chosen = (labels >= 0).float()[:, None]
    onehot = functional.one_hot(labels.clamp(min=0), logits.shape[-1]).float()
    return (logits.float().softmax(-1) - onehot) * chosen
