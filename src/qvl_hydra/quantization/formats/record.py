"""What a number format is: one row of the table of formats, integers and floats alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from qvl_hydra.quantization.scheme import ActivationFormat, WeightFormat


@dataclass(frozen=True)
class QuantParams:
    """Scale and zero point of one static tensor, and the range of what is stored.

    Of NVFP4 `scale` is the tensor's own, which the scales of its groups are multiplied with.
    """

    scale: float
    zero_point: int
    qmin: int
    qmax: int


@dataclass(frozen=True)
class NumberFormat:
    """One number format.

    Attributes:
        name: `quant.weight_format`, `quant.input_format`.
        bits: of a value without its scale; None where the scheme chooses (integers).
        weight: QDQ of some whole rows of a weight in float32, given its format and the largest |value| of the whole
            weight (of all weights that share its scale).
        activation: QDQ of tokens in float32, given the format and the parameters of a static range.
        static: parameters of a static range from the smallest and largest value seen.
        scales: of a whole weight in float32, as checkpoints hold them: (1,) a tensor, (out, 1) a channel,
            (out, in / group) a group, (out / block, in / block) a block; given as `weight` is.
        scale_bits: bits that the scales of a weight take for each of its values, given its inputs.
        rate: what devices multiply it as (`tera_ops` of conf/device/); where they do not, half precision.
        group: values that share a scale always; None where the scheme chooses.
        weights, inputs: what may share a scale, of `quant.weight_granularity` and `quant.input_granularity`.
        weight_groups, token_groups: whether a scheme may choose how many inputs of a channel, or channels of a token,
            share a scale.
        tensor_scale: of formats whose groups' scales are in steps of one scale a tensor, whatever the granularity:
            that scale, from the largest |value|. Fused operators share it.
        rows: of a weight that share scales, so that they are rounded together.
    """

    name: str
    bits: int | None
    weight: Callable[[Float[Tensor, "out in"], WeightFormat, Tensor | None], Float[Tensor, "out in"]]
    activation: Callable[[Float[Tensor, "token in"], ActivationFormat, QuantParams | None], Float[Tensor, "token in"]]
    static: Callable[[Tensor, Tensor, ActivationFormat], QuantParams]
    scales: Callable[[Float[Tensor, "out in"], WeightFormat, Tensor | None], Float[Tensor, "*scale"]]
    scale_bits: Callable[[WeightFormat, int], float]
    rate: str
    group: int | None = None
    weights: tuple[str, ...] = ("channel",)
    inputs: tuple[str, ...] = ("tensor", "token")
    weight_groups: bool = False
    token_groups: bool = False
    tensor_scale: Callable[[Tensor], Tensor] | None = None
    rows: int = 1

    def whole_tensor_of(self, form: WeightFormat) -> bool:
        """Whether a scale depends on all of a weight in this format."""
        return self.tensor_scale is not None or form.granularity == "tensor"

    def refusal(self, inputs: int, group: int | None) -> str | None:
        """Why an operator with so many inputs cannot have the format, or None.

        Args:
            group: inputs that share a scale, where the scheme chooses.
        """
        size = self.group or group
        if size is None or inputs % size == 0:
            return None
        return f"{inputs} inputs are no multiple of the {size} that share a scale in {self.name}"
