"""What a scheme is: the number formats of an operator's weight, input and output, and how far a scale reaches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from qvl_hydra.settings import QuantSettings

Perturb = Literal["both", "weight", "activation"]


@dataclass(frozen=True)
class WeightFormat:
    """A weight's number format.

    Attributes:
        bits: of integers; other formats have their own.
        symmetric: no zero point; other formats have none.
        group_size: inputs of a channel that share a scale; None: as `granularity` says.
        number: row of the table of number formats.
        granularity: what shares a scale: `channel` (an output's), `tensor`, `block` of 128 x 128.
        divide: integers are rounded as checkpoints (compressed-tensors) and kernels (vLLM) do, not as PyTorch does.
    """

    bits: int
    symmetric: bool = True
    group_size: int | None = None
    number: str = "int"
    granularity: str = "channel"
    divide: bool = False

    @property
    def limits(self) -> tuple[int, int]:
        return _limits(self.bits, self.symmetric)


@dataclass(frozen=True)
class ActivationFormat:
    """An activation's number format: one static range a tensor, or scales taken at run time.

    Attributes:
        dynamic: scales are taken from each token, or each group of it, at run time.
        group_size: channels of a token that share a scale; None: all.
        number, divide: as of a weight.
    """

    bits: int
    symmetric: bool = False
    dynamic: bool = False
    number: str = "int"
    group_size: int | None = None
    divide: bool = False

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
    weight = inputs = None
    divide = quant.rounding == "runtime"
    if quant.weight_bits is not None:
        weight = WeightFormat(
            quant.weight_bits, quant.weight_symmetric, quant.weight_group_size, quant.weight_format,
            quant.weight_granularity, divide,
        )  # fmt: skip
    if quant.input_bits is not None:
        inputs = ActivationFormat(
            quant.input_bits, quant.input_symmetric, quant.input_granularity == "token", quant.input_format,
            quant.input_group_size, divide,
        )  # fmt: skip
    output = None if quant.output_bits is None else ActivationFormat(quant.output_bits)
    return Scheme(quant.name, weight, inputs, output, quant.observer, quant.percentile).only(quant.perturb)


def _limits(bits: int, symmetric: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
