"""How far a perturbed output is from the reference: squared error, KL divergence, change of the task loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn import functional

UNITS = {
    "squared_error": "squared output difference a sample",
    "kl": "nats a token",
    "loss_change": "nats an answer token",
    "trace": "trace of the Hessian of the loss",
    "omega": "mean Hessian eigenvalue x squared weight error",
}
TEXT_METRICS = ("squared_error", "kl", "loss_change")


def output_metrics(component: str) -> tuple[str, ...]:
    """Names of the metrics that one pass gives: features have no distribution over tokens."""
    return ("squared_error",) if component == "vision" else TEXT_METRICS


def error_sums(
    reference: Float[Tensor, "token value"],
    outputs: Float[Tensor, "row token value"],
    labels: Int64[Tensor, "token"] | None,
) -> Float64[Tensor, "row metric"]:
    """Sums over tokens of each metric; divided by `error_counts` they are the metrics.

    Args:
        reference: output of the float model.
        outputs: of perturbed copies.
        labels: for logits, the id of the next token where it belongs to the answer, else -100; None for features,
            which have a squared error only.

    Returns:
        One row a copy; columns squared error, and for logits KL(reference || perturbed) and change of the loss.
    """
    reference, outputs = reference.float(), outputs.float()
    squared = (outputs - reference).square().sum((1, 2), dtype=torch.float64)
    if labels is None:
        return squared[:, None]
    log_p, log_q = reference.log_softmax(-1), outputs.log_softmax(-1)
    chosen = labels >= 0
    ids = labels[chosen][:, None]
    before = log_p[chosen].gather(1, ids)[:, 0]
    after = log_q[:, chosen].gather(2, ids.expand(outputs.shape[0], -1, -1))[..., 0]
    loss = (before - after).sum(1, dtype=torch.float64)
    kl = (log_q.neg_().add_(log_p)).mul_(log_p.exp()).sum((1, 2), dtype=torch.float64)
    return torch.stack([squared, kl, loss], dim=1)


def error_counts(tokens: int, labels: Int64[Tensor, "token"] | None) -> list[int]:
    """What the sums of a whole sample are divided by: the squared error by nothing, the others by their tokens."""
    return [1] if labels is None else [1, tokens, max(int((labels >= 0).sum()), 1)]


def next_token_labels(labels: Int64[Tensor, "token"]) -> Int64[Tensor, "token"]:
    """At each position the label of the token that its logits predict."""
    return functional.pad(labels[1:], (0, 1), value=-100)


def token_chunks(tokens: int, bytes_per_token: int, limit: int) -> Iterator[slice]:
    """Slices of tokens whose outputs take at most `limit` bytes, one token at least."""
    size = max(1, limit // max(bytes_per_token, 1))
    for first in range(0, tokens, size):
        yield slice(first, min(first + size, tokens))
