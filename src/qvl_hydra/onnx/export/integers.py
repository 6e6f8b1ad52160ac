"""Weights as the integers and scales behind `quantization.qdq.qdq_weight`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from qvl_hydra.quantization.formats.integer import affine_params
from qvl_hydra.quantization.scheme import WeightFormat


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as integers: `(integers - zero_point) * scale`.

    Attributes:
        integers: (output, input), int8 or uint8.
        scale, zero_point: (output, group), float32.
        group: group of each input, or None where a channel is one group.
    """

    integers: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    group: np.ndarray | None

    @property
    def transposed(self) -> IntegerWeight:
        """The same with inputs first."""
        return IntegerWeight(self.integers.T, self.scale.T, self.zero_point.T, self.group)


def integer_weight(weight: np.ndarray, form: WeightFormat) -> IntegerWeight:
    """Round a weight to a format.

    Args:
        weight: (output, input).
    """
    values = torch.from_numpy(np.array(weight, dtype=np.float32))
    width = values.shape[1]
    size = min(form.group_size or width, width)
    pieces = []
    for part in values.split(size, dim=1):
        low, high = torch.aminmax(part, dim=1)
        scale, zero_point = affine_params(low, high, form.limits, form.symmetric)
        # As torch.fake_quantize: times the inverse scale, rounded half to even.
        integers = torch.round(part * (1.0 / scale)[:, None]) + zero_point[:, None]
        pieces.append((integers.clamp_(*form.limits), scale, zero_point.float()))
    integers = torch.cat([piece[0] for piece in pieces], dim=1).to(torch.int8 if form.symmetric else torch.uint8)
    return IntegerWeight(
        integers.numpy(),
        torch.stack([piece[1] for piece in pieces], dim=1).numpy(),
        torch.stack([piece[2] for piece in pieces], dim=1).numpy(),
        None if len(pieces) == 1 else np.arange(width, dtype=np.int64) // size,
    )
