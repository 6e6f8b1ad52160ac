"""What a scheme is: the number formats of an operator's weight, input and output.

Formats follow PyTorch's quantization (and so Neural Compressor's): an integer range of `bits`, a scale, a zero point;
symmetric signed weights, asymmetric unsigned static activations.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from qvl_hydra.settings import QuantSettings

Perturb = Literal["both", "weight", "activation"]


@dataclass(frozen=True)
class WeightFormat:
    """Integers for a weight, one scale an output channel or one a group of `group_size` inputs of a channel."""

    bits: int
    symmetric: bool = True
    group_size: int | None = None

    @property
    def limits(self) -> tuple[int, int]:
        return _limits(self.bits, self.symmetric)


@dataclass(frozen=True)
class ActivationFormat:
    """Integers for an activation: one static range a tensor, or one taken from each token at run time."""

    bits: int
    symmetric: bool = False
    dynamic: bool = False

    @property
    def limits(self) -> tuple[int, int]:
        return _limits(self.bits, self.symmetric)


@dataclass(frozen=True)
class Scheme:
    """The formats an operator is put into; `None` stays in float. `observer` sets static ranges."""

    name: str
    weight: WeightFormat | None
    input: ActivationFormat | None
    output: ActivationFormat | None = None
    observer: Literal["minmax", "percentile", "histogram"] = "minmax"
    percentile: float = 99.99

    @property
    def needs_ranges(self) -> bool:
        """Whether static activation ranges have to be observed on calibration samples first."""
        return any(part is not None and not part.dynamic for part in (self.input, self.output))

    def only(self, perturb: Perturb) -> Scheme:
        """The same scheme with just its weight or just its activations quantized."""
        if perturb == "weight":
            return dataclasses.replace(self, input=None, output=None)
        if perturb == "activation":
            return dataclasses.replace(self, weight=None)
        return self


def scheme_from_settings(quant: QuantSettings) -> Scheme:
    """The scheme that the settings describe, with `quant.perturb` applied."""
    weight = None
    if quant.weight_bits is not None:
        weight = WeightFormat(quant.weight_bits, quant.weight_symmetric, quant.weight_group_size)
    inputs = None
    if quant.input_bits is not None:
        inputs = ActivationFormat(quant.input_bits, quant.input_symmetric, quant.input_granularity == "token")
    output = None if quant.output_bits is None else ActivationFormat(quant.output_bits)
    return Scheme(quant.name, weight, inputs, output, quant.observer, quant.percentile).only(quant.perturb)


def _limits(bits: int, symmetric: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
