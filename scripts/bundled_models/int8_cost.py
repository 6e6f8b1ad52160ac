"""What INT8 costs a bundled model: exact match with operators in static W8A8, and which operators are to blame."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from qvl_hydra.calibration.encode import Processor
from qvl_hydra.calibration.sample import IGNORED, Sample, collate
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.quantization.apply import make_quantizer, observe_ranges, quantized
from qvl_hydra.quantization.qdq import OperatorQuantizer
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat

W8A8 = Scheme("w8a8_static", WeightFormat(8), ActivationFormat(8))  # symmetric weights, asymmetric min-max inputs


def w8a8_quantizers(
    model: nn.Module, samples: Sequence[Sample], component: str, scheme: Scheme = W8A8
) -> dict[str, OperatorQuantizer]:
    """Quantizers of every operator of a component, ranges from the samples."""
    paths = [operator.path for operator in find_operators(model, component)]
    ranges = observe_ranges(model, paths, samples, "full", scheme)
    return {path: make_quantizer(model, path, scheme, ranges) for path in paths}


@torch.no_grad()
def answer_logits(
    model: nn.Module, samples: Sequence[Sample], batch_size: int = 32
) -> tuple[list[Tensor], list[Tensor]]:
    """For each sample the logits that decide its answer tokens, and these tokens."""
    logits, answers = [], []
    for start in range(0, len(samples), batch_size):
        batch = collate(samples[start : start + batch_size])
        labels = batch.pop("labels")[:, 1:]
        output = model(**batch, use_cache=False).logits[:, :-1]
        for row, label in zip(output, labels, strict=True):
            logits.append(row[label != IGNORED])
            answers.append(label[label != IGNORED])
    return logits, answers


def exact_match(model: nn.Module, samples: Sequence[Sample]) -> float:
    """Share of answers whose every token is the most likely one after the true ones before it.

    That is the share greedy decoding gets right: both follow the same tokens until the first wrong one.
    """
    logits, answers = answer_logits(model, samples)
    right = [bool((row.argmax(-1) == answer).all()) for row, answer in zip(logits, answers, strict=True)]
    return sum(right) / len(right)


@torch.no_grad()
def generated_match(model: nn.Module, processor: Processor, samples: Sequence[Sample]) -> float:
    """Share of answers that greedy generation gives to the letter."""
    right = 0
    for sample in samples:
        prompt = sample.input_ids[sample.labels == IGNORED][None]
        answer = sample.labels[sample.labels != IGNORED]
        images = (
            {}
            if sample.pixel_values is None
            else {
                "pixel_values": sample.pixel_values,
                "image_grid_thw": sample.image_grid_thw,
                "mm_token_type_ids": (prompt == processor.config.image_token_id).int(),
            }
        )
        output = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24, **images
        )
        right += output[0, prompt.shape[1] :].tolist() == answer.tolist()
    return right / len(samples)


def single_operator_errors(
    model: nn.Module, quantizers: dict[str, OperatorQuantizer], samples: Sequence[Sample]
) -> dict[str, float]:
    """Squared error of the answers' logits when one operator alone is quantized, largest first."""
    reference = torch.cat(answer_logits(model, samples)[0])
    errors = {}
    for path, quantizer in quantizers.items():
        with quantized(model, {path: quantizer}):
            changed = torch.cat(answer_logits(model, samples)[0])
        errors[path] = float((changed - reference).square().sum()) / len(samples)
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def match_without(
    model: nn.Module, quantizers: dict[str, OperatorQuantizer], kept: Collection[str], samples: Sequence[Sample]
) -> float:
    """Exact match with every operator quantized but those kept in float."""
    with ExitStack() as stack:
        stack.enter_context(quantized(model, {path: q for path, q in quantizers.items() if path not in kept}))
        return exact_match(model, samples)
