"""How far a perturbed output is from the reference: squared error, KL divergence, change of the task loss."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn import functional

from qvl_hydra.models.memory import row_parts

UNITS = {
    "squared_error": "squared output difference a sample",
    "kl": "nats a token",
    "loss_change": "nats an answer token",
    "loss_gradient": "squared first-order loss change, nats^2 an answer token",
    "trace": "trace of the loss's curvature",
    "mean_trace": "mean eigenvalue of the loss's curvature",
    "omega": "mean eigenvalue of the loss's curvature x squared weight error",
}
AT_POSITIONS = {
    "text": {"squared_error": "squared output difference at text positions, a sample", "kl": "nats a text token"},
    "answer": {"squared_error": "squared output difference at the answer, a sample", "kl": "nats an answer token"},
}
TEXT_METRICS = ("squared_error", "kl", "loss_change")


def unit_of(metric: str, positions: str) -> str:
    """What one is of, for scores of a metric at the positions of `strategy.positions`."""
    return AT_POSITIONS.get(positions, {}).get(metric, UNITS.get(metric, ""))


def output_metrics(component: str) -> tuple[str, ...]:
    """Names of the metrics that one pass gives: features have no distribution over tokens."""
    return ("squared_error",) if component == "vision" else TEXT_METRICS


def error_sums(
    reference: Float[Tensor, "token value"],
    outputs: Float[Tensor, "row token value"],
    labels: Int64[Tensor, "token"] | None,
    kinds: Float64[Tensor, "token kind"] | None = None,
) -> Float64[Tensor, "row metric"]:
    """Sums over tokens of each metric; divided by `error_counts` they are the metrics.

    Args:
        reference: output of the float model.
        outputs: of perturbed copies.
        labels: for logits, the id of the next token where it belongs to the answer, else -100; None for features,
            which have a squared error only.
        kinds: 1 where a position is of a kind, else 0; for logits.

    Returns:
        One row a copy; columns squared error, and for logits KL(reference || perturbed) and change of the loss, then
        the squared error at the positions of each kind.
    """
    sums = []
    for tokens in row_parts(reference):
        here = reference[tokens].float()
        p = None if labels is None else here.softmax(-1)
        own = [None if all_of is None else all_of[tokens] for all_of in (labels, kinds)]
        parts = row_parts(here.flatten().expand(len(outputs), -1))  # a row is a copy's values at these tokens
        sums.append(torch.cat([_sums_of_some(here, p, outputs[rows, tokens].float(), *own) for rows in parts]))
    return torch.stack(sums).sum(0)


def _sums_of_some(
    reference: Float[Tensor, "token value"],
    p: Float[Tensor, "token value"] | None,
    outputs: Float[Tensor, "row token value"],
    labels: Int64[Tensor, "token"] | None,
    kinds: Float64[Tensor, "token kind"] | None,
) -> Float64[Tensor, "row metric"]:
    change = outputs - reference
    squares = squared_norms(change)
    squared = squares.sum(1)
    if labels is None or p is None:
        return squared[:, None]
    chosen = labels >= 0
    of_answer = change[:, chosen].gather(2, labels[chosen][None, :, None].expand(len(change), -1, -1))[..., 0]
    kl, mean = divergence(reference, p, change)
    loss = kl[:, chosen] + mean[:, chosen] - of_answer
    sums = [squared, kl.sum(1, dtype=torch.float64), loss.sum(1, dtype=torch.float64)]
    return torch.stack(sums if kinds is None else [*sums, *(squares @ kinds).unbind(1)], dim=1)


def squared_norms(values: Float[Tensor, "*row value"]) -> Float64[Tensor, "*row"]:
    """Sums of squares over the last dimension; a norm takes them in one pass over the values, a twentieth of the time.

    Args:
        values: in float32.
    """
    return torch.linalg.vector_norm(values, dim=-1).double().square()


def divergence(
    reference: Float[Tensor, "token value"], p: Float[Tensor, "token value"], change: Float[Tensor, "*row token value"]
) -> tuple[Float[Tensor, "*row token"], Float[Tensor, "*row token"]]:
    """KL(reference || perturbed) at each token in nats, never negative, and the mean change of the logits.

    With the change `c` less its mean under `p` it is `log sum p e^c`, a sum of terms never negative: the difference of
    two log-probabilities would lose a small divergence in rounding.

    Args:
        reference: logits.
        p: their probabilities.
        change: of the logits; used up.
    """
    mean = (change * p).sum(-1, keepdim=True)
    centred = change.sub_(mean)
    kl = centred.expm1().sub_(centred).mul_(p).sum(-1).log1p()
    if not kl.isfinite().all():  # the change overflows an exponential: rare, and then nothing cancels
        perturbed = (reference + centred).log_softmax(-1)
        kl = functional.kl_div(perturbed, reference.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return kl, mean[..., 0]


def error_counts(tokens: int, labels: Int64[Tensor, "token"] | None) -> list[int]:
    """What the sums of a whole sample are divided by: the squared error by nothing, the others by their tokens."""
    return [1] if labels is None else [1, tokens, max(int((labels >= 0).sum()), 1)]


def next_token_labels(labels: Int64[Tensor, "*row token"]) -> Int64[Tensor, "*row token"]:
    """At each position the label of the token that its logits predict."""
    return functional.pad(labels[..., 1:], (0, 1), value=-100)
