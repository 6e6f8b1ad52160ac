"""One calibration sample as tensors, a batch of them, and the set a run is calibrated on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100  # label of a token that no loss is taken on


@dataclass(frozen=True)
class Sample:
    """One prompt with its answer and images, unpadded: every token is valid.

    Attributes:
        id: name of the sample in its source.
        position_ids: M-RoPE positions: temporal, height, width; for text alone on one axis.
        labels: the token ids of the answer with its end of turn, -100 elsewhere.
        pixel_values: patches of all images in a row; None for a text-only sample.
        image_grid_thw: one row an image: frames, patch rows, patch columns.
    """

    id: str
    input_ids: Int64[Tensor, "token"]
    position_ids: Int64[Tensor, "axis token"]
    labels: Int64[Tensor, "token"]
    pixel_values: Float32[Tensor, "patch value"] | None
    image_grid_thw: Int64[Tensor, "image 3"] | None

    @property
    def patches(self) -> int:
        """Patches of all its images; 0 without one."""
        return 0 if self.pixel_values is None else len(self.pixel_values)

    @property
    def longest(self) -> int:
        """Tokens of its longest state: patches in the vision tower, or text tokens."""
        return max(self.patches, self.input_ids.numel())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        names = ("input_ids", "position_ids", "labels", "pixel_values", "image_grid_thw")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class CalibrationSet:
    """The samples of a run, in their order.

    Attributes:
        source: what they came from.
        sha: hash over every tensor of every sample.
        bad: samples met on the way and skipped.
    """

    samples: tuple[Sample, ...]
    source: str
    sha: str
    bad: tuple[BadSample, ...] = ()


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Pad samples on the right into one batch that the model takes as keyword arguments.

    Args:
        samples: at least one.

    Returns:
        `input_ids`, `attention_mask`, `labels` of (sample, token), `position_ids` of (axis, sample, token), and, when
        any sample has an image, `pixel_values` of (patch, value) and `image_grid_thw` of (image, 3) in sample order.
        Padding has id and positions 0, mask 0, label -100.
    """
    ids = [sample.input_ids for sample in samples]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "position_ids": pad_sequence([sample.position_ids.T for sample in samples]).permute(2, 1, 0),
        "labels": pad_sequence([sample.labels for sample in samples], batch_first=True, padding_value=IGNORED),
    }
    for name in ("pixel_values", "image_grid_thw"):
        parts = [value for sample in samples if (value := getattr(sample, name)) is not None]
        if parts:
            batch[name] = torch.cat(parts)
    return batch


def samples_sha(samples: Sequence[Sample]) -> str:
    """Hash over names, shapes and bytes of all tensors of all samples, in their order."""
    digest = hashlib.sha256()
    for sample in samples:
        for name, tensor in sample.tensors.items():
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
