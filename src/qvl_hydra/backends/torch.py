"""The native engine (`backend=torch`): every estimator over the block walker, on CPU and CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.estimators.table import estimator_of, load_estimator
from qvl_hydra.runs.folder import RunFolder


def run(job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport:
    """Measure the job's operators; see `Engine`.

    Raises:
        EngineError: no sample reaches the component.
    """
    with _device_mode(job):
        strategy = job.strategy
        row = estimator_of(strategy.name, strategy.estimator, strategy.direction, strategy.curvature)
        return load_estimator(row)(job, folder, progress)


@contextlib.contextmanager
def _device_mode(job: SweepJob) -> Iterator[None]:
    """TF32 and the thread count as the settings say, for the time of the run."""
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    threads = torch.get_num_threads()
    try:
        torch.backends.cuda.matmul.allow_tf32 = job.backend.tf32
        torch.backends.cudnn.allow_tf32 = job.backend.tf32
        if job.backend.threads is not None:
            torch.set_num_threads(job.backend.threads)
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution
        torch.set_num_threads(threads)
