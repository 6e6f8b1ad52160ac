"""What is to be measured, and what a measurement says beside its scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from qvl_hydra.calibration.sample import CalibrationSet, Sample
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import Operator
from qvl_hydra.quantization.scheme import Scheme
from qvl_hydra.settings import BackendSettings, StrategySettings


@runtime_checkable
class Progress(Protocol):
    """The one progress bar of a run."""

    def total(self, steps: float, label: str) -> None:
        """Set how many steps the work has, and what is being done."""

    def step(self, steps: float = 1) -> None:
        """Say that steps are done."""


@dataclass(frozen=True)
class SweepJob:
    """Everything an engine needs.

    Attributes:
        operators: what to score, in data order; with `fuse`, operators of one group are quantized together.
        calibration: all samples; static activation ranges come from all of them.
        scored: the samples that scores are measured on: the first `confidence_batches` batches.
        batch_size: samples a batch.
        schemes: the scheme to score, then further ones that share its passes.
        single_experts: the experts of a mixture are scored each by itself, too.
        shard: which part of the scored samples is measured in this run, and of how many.
        workdir: folder for the engine's own artifacts, made by the first; everything in it goes to the tracker.
    """

    model: LoadedModel
    component: str
    operators: tuple[Operator, ...]
    calibration: CalibrationSet
    scored: tuple[Sample, ...]
    batch_size: int
    schemes: tuple[Scheme, ...]
    strategy: StrategySettings
    backend: BackendSettings
    fuse: bool
    seed: int
    workdir: Path
    shard: tuple[int, int] = (0, 1)
    single_experts: bool = False

    @property
    def scheme(self) -> Scheme:
        """The scheme that ranks."""
        return self.schemes[0]

    @property
    def device(self) -> torch.device:
        return self.model.device


@dataclass
class EngineReport:
    """What an engine says beside its scores.

    Attributes:
        estimator: what the scores were measured with (`auto`, `exact`, `sketch`, `inc`, ...).
        metric, unit: of the scores that rank.
        forward_s: seconds of one plain forward of the scored samples through the component, in this process.
        engine_s: seconds the measuring took, without loading and reporting.
        notes: sentences for the user: warnings, faults of the backend, what was left out.
        details: further numbers for `run.json` (agreement of two estimators, row chunk, ...).
    """

    estimator: str
    metric: str
    unit: str
    forward_s: float
    engine_s: float
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
