"""Compares an exported graph with the model it came from, on real samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qvl_hydra.calibration.sample import Sample, collate
from qvl_hydra.models.forward import reference_output
from qvl_hydra.onnx.export.towers import sample_inputs
from qvl_hydra.onnx.scoring.session import Device, open_session


@dataclass(frozen=True)
class Difference:
    """How far the graph is from the model.

    Attributes:
        largest: largest absolute difference of an output value.
        scale: largest absolute output value.
        samples: ids of the samples compared, each on its own.
        lengths: their lengths in tokens (patches, for the vision tower).
        together: ids of samples that were also run as rows of one batch.
    """

    largest: float
    scale: float
    samples: tuple[str, ...]
    lengths: tuple[int, ...]
    together: tuple[str, ...]

    @property
    def relative(self) -> float:
        return self.largest / self.scale if self.scale else self.largest


@torch.no_grad()
def compare(
    path: Path, model: nn.Module, samples: Sequence[Sample], component: str, free: bool, device: Device
) -> Difference:
    """Run samples through the graph and through the model's own forward.

    Args:
        samples: that suit the graph; each alone, to see free lengths, and two in one batch, to see rows that do not
            disturb each other.
        free: whether the graph's resolution is free.
    """
    session = open_session(path, device)
    references = [reference_output(model, sample, component) for sample in samples]
    largest = 0.0
    for sample, reference in zip(samples, references, strict=True):
        output = session.run(None, as_arrays(sample_inputs(model, sample, component, free)))[0]
        largest = max(largest, _distance(output[0], reference))
    rows = [sample for sample in samples if component == "lm" or _same_grid(sample, samples[0])][:2]
    if len(rows) > 1:
        output = session.run(None, as_arrays(_batch(model, rows, component, free)))[0]
        for row, sample in zip(output, rows, strict=True):
            reference = references[samples.index(sample)]
            largest = max(largest, _distance(row[: len(reference)], reference))
    return Difference(
        largest,
        max(float(reference.abs().max()) for reference in references),
        tuple(sample.id for sample in samples),
        tuple(
            len(sample.input_ids) if component != "vision" else len(reference)
            for sample, reference in zip(samples, references, strict=True)
        ),
        tuple(sample.id for sample in rows) if len(rows) > 1 else (),
    )


def as_arrays(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inputs as ONNX Runtime takes them."""
    return {name: np.ascontiguousarray(value.detach().cpu().numpy()) for name, value in inputs.items()}


def _distance(output: Any, reference: Tensor) -> float:
    difference = torch.from_numpy(output).float() - reference.float().cpu()
    # Not a number is as far away as can be.
    return float(torch.nan_to_num(difference.abs(), nan=float("inf")).max())


def _batch(model: nn.Module, samples: Sequence[Sample], component: str, free: bool) -> dict[str, Tensor]:
    """Several samples as rows, shorter ones padded on the right."""
    alone = [sample_inputs(model, sample, component, free) for sample in samples]
    padded = collate(samples)
    inputs: dict[str, Tensor] = {}
    for name in alone[0]:
        if name == "inputs_embeds":
            rows = [inputs_[name][0] for inputs_ in alone]
            inputs[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        elif name == "pixel_values":
            inputs[name] = torch.cat([inputs_[name] for inputs_ in alone])
        else:
            inputs[name] = padded.get(name, alone[0][name])  # all rows share one grid's layout
    return inputs


def _same_grid(first: Sample, second: Sample) -> bool:
    one, other = first.image_grid_thw, second.image_grid_thw
    return one is not None and other is not None and one.tolist() == other.tolist()
