"""What every backend takes and gives, and the table of backends.

An engine is a function from a `SweepJob` to an `EngineReport`; scores leave it through the run folder as they are
made. Backends are imported when they are asked for: none of their packages is needed to import this one.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from qvl_hydra.calibration.sample import CalibrationSet, Sample
from qvl_hydra.errors import EngineError
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import Operator
from qvl_hydra.quantization.scheme import Scheme
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.settings import BackendSettings, StrategySettings


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


class Engine(Protocol):
    """A backend: measures the job's operators and puts their scores into the folder as they are made."""

    def __call__(self, job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport: ...


ENGINES = {
    "torch": "qvl_hydra.backends.torch:run",
    "inc_fx": "qvl_hydra.backends.neural_compressor.fx:run",
    "onnxrt": "qvl_hydra.backends.onnxrt:run",
    "inc_onnxrt": "qvl_hydra.backends.neural_compressor.onnxrt:run",
    "modelopt": "qvl_hydra.backends.modelopt:run",
}


def load_engine(name: str) -> Engine:
    """The engine of a backend, imported now.

    Raises:
        EngineError: no such backend.
        MissingExtraError: the package it needs is not installed (raised by the engine's module).
    """
    if name not in ENGINES:
        raise EngineError(f"backend.name={name}; allowed: {', '.join(ENGINES)}")
    module, _, function = ENGINES[name].partition(":")
    engine: Engine = getattr(importlib.import_module(module), function)
    return engine


def pick_device(name: str) -> torch.device:
    """The torch device that `backend.device` names; `auto` takes CUDA where it is.

    Raises:
        EngineError: CUDA was asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise EngineError(
            f"backend.device={name}, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "take backend.device=auto or cpu, or install a CUDA build of torch and its driver"
        )
    return device
