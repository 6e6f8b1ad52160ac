"""At which output positions a sample is judged: those of the answer, of the text, or all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor
from torch.nn import functional

from qvl_hydra.calibration.sample import IGNORED, Sample
from qvl_hydra.estimators.metrics import next_token_labels


def scored_positions(sample: Sample, image_tokens: Bool[Tensor, "token"], positions: str) -> Bool[Tensor, "token"]:
    """Which positions' outputs count, told by the token that each of them predicts.

    Args:
        image_tokens: which tokens of the sample stand for image features.
        positions: `answer`: the next token belongs to the answer; `text`: it is no image token; `all`: every position.
            A sample without an answer takes `text`, and one of a single token, which predicts none, `all`.

    Returns:
        A mask with one position at least.
    """
    everywhere = torch.ones(sample.input_ids.numel(), dtype=torch.bool)
    if positions == "all":
        return everywhere
    answer = next_token_labels(sample.labels) >= 0
    if positions == "answer" and bool(answer.any()):
        return answer
    text = functional.pad(~image_tokens[1:].cpu(), (0, 1), value=False)
    return text if bool(text.any()) else everywhere


IMAGE, TEXT, ANSWER = range(3)  # kinds of token, in the order of `scores.shrink.ORIGINS`


def token_kinds(sample: Sample, image_tokens: Bool[Tensor, "token"]) -> Int64[Tensor, "token"]:
    """Of each token of a sample whether it stands for an image, belongs to the answer, or is other text."""
    kinds = torch.full((sample.input_ids.numel(),), TEXT)
    kinds[sample.labels >= 0] = ANSWER
    kinds[image_tokens.cpu()] = IMAGE
    return kinds


def predicted_kinds(sample: Sample, image_tokens: Bool[Tensor, "token"]) -> Float64[Tensor, "token 3"]:
    """1 for the kind of the token that a position predicts, else 0; the last, which predicts none, is text."""
    kinds = functional.pad(token_kinds(sample, image_tokens)[1:], (0, 1), value=TEXT)
    return functional.one_hot(kinds, 3).double()


def predicted_tokens(sample: Sample) -> Int64[Tensor, "token"]:
    """At each position the token that follows, -100 at the last."""
    return functional.pad(sample.input_ids[1:], (0, 1), value=IGNORED)


def without_answer(samples: Sequence[Sample]) -> int:
    """Samples that have no answer to be judged by."""
    return sum(not bool((next_token_labels(sample.labels) >= 0).any()) for sample in samples)
