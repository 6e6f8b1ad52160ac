"""How far the outputs of a tool's model are from those of our QDQ of the same profile.

The float model and QDQ walk side by side, a sample at a time and in the model's own dtype, which gives bit for bit what
the model's own forward does. Rounded weights are in memory for one segment only, and a streamed model will do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qvl_hydra.blockwise.walker import Walker
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.models.memory import free_memory_bytes, row_parts
from qvl_hydra.profiles.apply import quantizer_key
from qvl_hydra.profiles.measure import STATE_BYTES, state_bytes
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.apply import quantized
from qvl_hydra.quantization.qdq import OperatorQuantizer


@dataclass(frozen=True)
class Agreement:
    """A tool's outputs beside those of our QDQ, on held-out samples.

    Attributes:
        n_quantized: operators that are quantized.
        largest_difference: between the tool and QDQ, over all outputs.
        relative_difference: root mean square of that difference, over that of what quantization changes (QDQ - float).
        identical: samples on which both are equal bit for bit. Where they are not, a value lay so near to the middle
            of two integers that the order of operations decided, and what follows differs too.
        samples: compared.
        reload_difference: largest difference between the model as made and as read back; None when it is read back
            only.
    """

    n_quantized: int
    largest_difference: float
    relative_difference: float
    identical: int
    samples: int
    reload_difference: float | None = None


@dataclass
class _Sums:
    largest: float = 0.0
    apart: float = 0.0
    effect: float = 0.0
    identical: int = 0

    def add(self, reference: Tensor, ours: Tensor, theirs: Tensor) -> None:
        """Add the outputs of a sample: (token, value) each."""
        identical = True
        for tokens in row_parts(ours):
            own, other = ours[tokens].float(), theirs[tokens].float()
            apart = other - own
            self.largest = max(self.largest, float(apart.abs().max()))
            self.apart += float(apart.double().square().sum())
            self.effect += float((own - reference[tokens].float()).double().square().sum())
            identical &= torch.equal(other, own)
        self.identical += identical


def compare(
    outputs: Callable[[Sample], Tensor],
    model: LoadedModel,
    profile: Profile,
    quantizers: Mapping[str, OperatorQuantizer],
    samples: Sequence[Sample],
    component: str,
    each: Callable[[], None] = lambda: None,
) -> Agreement:
    """How far a tool's outputs are from those of QDQ.

    Args:
        outputs: the tool's output of a sample, in the shape of `reference_output`.
        model: the float model, resident or streamed.
        quantizers: what QDQ computes with; asked for while the weights of their segment are in memory.
        each: called after each segment of each group of samples, `steps(...)` times in all.
    """
    walker, sums = Walker(model, component), _Sums()
    for group in _groups(model, samples, component):
        _walk(walker, group, profile, quantizers, outputs, sums, each)
    relative = (sums.apart / sums.effect) ** 0.5 if sums.effect else 0.0
    return Agreement(len(profile.low), sums.largest, relative, sums.identical, len(samples))


def steps(model: LoadedModel, samples: Sequence[Sample], component: str) -> int:
    """How often `compare` calls `each`."""
    return len(_groups(model, samples, component)) * len(Walker(model, component).segments)


def _groups(model: LoadedModel, samples: Sequence[Sample], component: str) -> list[Sequence[Sample]]:
    """As many samples at once as have room."""
    limit = min(STATE_BYTES, free_memory_bytes() // 4)
    at_once = max(1, limit // max(state_bytes(model, sample, 2, component) for sample in samples))
    return [samples[first : first + at_once] for first in range(0, len(samples), at_once)]


@torch.no_grad()
def _walk(
    walker: Walker,
    samples: Sequence[Sample],
    profile: Profile,
    quantizers: Mapping[str, OperatorQuantizer],
    outputs: Callable[[Sample], Tensor],
    sums: _Sums,
    each: Callable[[], None],
) -> None:
    """Take some samples through all segments, and add what comes out to the sums."""
    contexts = walker.contexts(samples)
    floats = walker.starts(contexts)
    ours = list(floats)
    for segment in walker.segments:
        with walker.weights(segment):
            low = [op for op in profile.low if segment.holds(op.path)]
            made = {op.path: quantizers[quantizer_key(profile, op, quantizers)] for op in low}
            for index, context in enumerate(contexts):
                if walker.skips(segment, context.sample):
                    continue
                reference = segment.run(floats[index], context)
                with quantized(walker.module, made):
                    own = segment.run(ours[index], context)
                if segment is walker.segments[-1]:
                    sums.add(reference[0], own[0], outputs(context.sample))
                else:
                    floats[index], ours[index] = reference, own
        each()
