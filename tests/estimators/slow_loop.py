"""The slow obvious reference: one operator at a time, the whole model for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.models.forward import reference_output
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.targets import Target
from qvl_hydra.quantization.apply import make_quantizer, observe_ranges, quantized
from qvl_hydra.quantization.scheme import Scheme


def output_errors(reference: torch.Tensor, output: torch.Tensor, sample: Sample, component: str) -> dict[str, float]:
    """Squared error, and for logits KL in nats a token and change of the answer's loss."""
    values = {"squared_error": float((output.double() - reference.double()).square().sum())}
    if component != "vision":
        p, q = reference.double().log_softmax(-1), output.double().log_softmax(-1)
        values["kl"] = float(functional.kl_div(q, p, reduction="sum", log_target=True)) / len(p)
        labels = sample.labels[1:]
        loss = [functional.cross_entropy(x[:-1].double(), labels) for x in (reference, output)]
        values["loss_change"] = float(loss[1] - loss[0])
    return values


def split_errors(reference: torch.Tensor, output: torch.Tensor, sample: Sample, image_token: int) -> dict[str, float]:
    """The squared error of logits, each position's under the kind of the token that it predicts."""
    found = dict.fromkeys(("image", "text", "answer"), 0.0)
    for place in range(len(output)):
        kind, after = "text", place + 1
        if after < len(output) and int(sample.input_ids[after]) == image_token:
            kind = "image"
        elif after < len(output) and int(sample.labels[after]) >= 0:
            kind = "answer"
        found[kind] += float((output[place].double() - reference[place].double()).square().sum())
    return {f"squared_error_at_{kind}": value for kind, value in found.items()}


@torch.no_grad()
def loop_scores(
    model: LoadedModel,
    targets: Sequence[Target],
    samples: Sequence[Sample],
    component: str,
    scheme: Scheme,
    direction: str = "requantize",
) -> list[dict[str, dict[str, float]]]:
    """One entry a sample: for each target its metrics."""
    paths = [op.path for target in targets for op in target.operators]
    ranges = observe_ranges(model.module, paths, samples, component, scheme)
    every = {path: make_quantizer(model.module, path, scheme, ranges) for path in paths}
    image_token = getattr(model.config, "image_token_id", -1)

    def errors_of(reference: torch.Tensor, output: torch.Tensor, sample: Sample) -> dict[str, float]:
        errors = output_errors(reference, output, sample, component)
        return errors if component == "vision" else errors | split_errors(reference, output, sample, image_token)

    found = []
    for sample in samples:
        reference = reference_output(model.module, sample, component)
        with quantized(model.module, every):
            everything = errors_of(reference, reference_output(model.module, sample, component), sample)
        scores = {}
        for target in targets:
            own = {op.path for op in target.operators}
            chosen = {path: q for path, q in every.items() if (path in own) == (direction == "requantize")}
            with quantized(model.module, chosen):
                output = reference_output(model.module, sample, component)
            errors = errors_of(reference, output, sample)
            if direction == "fallback":
                errors = {name: everything[name] - value for name, value in errors.items()}
            scores[target.name] = errors
        found.append(scores)
    return found
