"""What other tools score an operator by, from one backward pass of the answer's loss: rows of `benchmarks.answer`.

Written on the whole Hugging Face model with plain hooks, so that nothing of the block walk is in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.estimators.job import SweepJob
from qvl_hydra.models.forward import logits, text_inputs
from qvl_hydra.operators.kinds import as_tokens
from qvl_hydra.quantization.apply import make_quantizer, observe_ranges, replaced_forwards
from qvl_hydra.quantization.qdq import qdq_activation, quantized_operator

PEERS = {
    "elementwise": "sum of (gradient x change)^2 over an output's elements (ModelOpt)",
    "L1": "sum of |gradient x change| over an output's elements (AutoRound's delta loss)",
    "FIT": "mean squared gradient x squared error, of weight and input apart (Zandonati et al. 2022)",
    "output error": "squared change of the operator's own output",
}


def peer_scores(job: SweepJob, samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Mean score of every operator by each of `PEERS`; ranges come from the same samples."""
    module, scheme = job.model.module, job.scheme
    paths = [op.path for op in job.operators]
    ranges = observe_ranges(module, paths, samples, job.component, scheme) if scheme.needs_ranges else {}
    quantizers = {path: make_quantizer(module, path, scheme, ranges) for path in paths}
    sums: dict[str, dict[str, float]] = {name: defaultdict(float) for name in PEERS}
    for sample in samples:
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def forward(operator: nn.Module, x: Tensor, path: str, seen: dict[str, tuple[Tensor, Tensor]] = seen) -> Tensor:
            y: Tensor = type(operator).forward(operator, x)
            seen[path] = (x, y)
            return y

        with torch.enable_grad(), replaced_forwards(module, {path: partial(forward, path=path) for path in paths}):
            embeds = text_inputs(module, sample).detach().requires_grad_()
            predicted = logits(module, embeds, sample)[0, :-1]
            loss = functional.cross_entropy(predicted, sample.labels[1:])
            inputs, outputs = zip(*(seen[path] for path in paths), strict=True)
            found = torch.autograd.grad(loss, [*outputs, *inputs])
        gradients = zip(found[: len(paths)], found[len(paths) :], strict=True)
        for path, x, y, (g, to_input) in zip(paths, inputs, outputs, gradients, strict=True):
            operator, quantizer = module.get_submodule(path), quantizers[path]
            x, y = x.detach(), y.detach()
            change = quantized_operator(operator, x, quantizer) - y
            sums["elementwise"][path] += float((g * change).square().sum())
            sums["L1"][path] += float((g * change).abs().sum())
            sums["output error"][path] += float(change.square().sum())
            fit = 0.0
            if quantizer.weight is not None:
                tokens = as_tokens(operator, x).flatten(0, -2)
                gradient = g.flatten(0, -2).T @ tokens
                error = (quantizer.weight - operator.weight).flatten(1)
                fit += float(gradient.square().mean() * error.square().sum())
            if scheme.input is not None:
                rounding = qdq_activation(x, scheme.input, quantizer.input) - x
                fit += float(to_input.square().mean() * rounding.square().sum())
            sums["FIT"][path] += fit
    return {name: {path: value / len(samples) for path, value in scores.items()} for name, scores in sums.items()}
