"""What every backend is to its callers.

An engine is a function from a `SweepJob` to an `EngineReport`; scores leave it through the run folder as they are
made. Backends are imported when they are asked for: none of their packages is needed to import this one.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from qvl_hydra.backends.table import BACKENDS
from qvl_hydra.errors import EngineError
from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.reference import load
from qvl_hydra.runs.folder import RunFolder


@runtime_checkable
class Engine(Protocol):
    """A backend: measures the job's operators and puts their scores into the folder as they are made."""

    def __call__(self, job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport: ...


def load_engine(name: str) -> Engine:
    """The engine of a backend, imported now.

    Raises:
        EngineError: no such backend.
        MissingExtraError: the package it needs is not installed (raised by the engine's module).
    """
    if name not in BACKENDS:
        raise EngineError(f"backend.name={name}; allowed: {', '.join(BACKENDS)}")
    engine: Engine = load(BACKENDS[name].run)
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
