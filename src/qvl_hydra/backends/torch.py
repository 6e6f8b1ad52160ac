"""The native engine (`backend=torch`): every estimator over the block walker, on CPU and CUDA."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch

from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.estimators.table import load_estimator
from qvl_hydra.models.load import ModelDescription
from qvl_hydra.operators.discover import Operator
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.settings import Settings


def run(job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport:
    """Measure the job's operators; see `Engine`.

    Raises:
        EngineError: no sample reaches the component.
    """
    with _device_mode(job):
        strategy = job.strategy
        row = strategy.row
        return load_estimator(row)(job, folder, progress)


def extra_bytes(settings: Settings, description: ModelDescription, operators: Sequence[Operator]) -> int:
    """Memory needed beside the weights, at least; negative where less than all weights are held."""
    weights = description.weight_bytes
    if settings.model.placement == "streamed":
        segments = description.family.load_stages()(description.skeleton).of("full")
        parts = [description.skeleton.get_submodule(root) for segment in segments for root in segment.roots]
        largest = max(sum(p.numel() for p in part.parameters()) for part in parts)
        text = description.config.get_text_config()
        table = text.vocab_size * text.hidden_size
        # Plans have a block in several schemes at once: in float32, and in bfloat16 for products by difference.
        schemes = 1 if settings.task.name == "sweep" else len(settings.schemes)
        plans = 2 + 6 * schemes if settings.model.dtype == "bfloat16" else 4 + 4 * schemes
        return max(max(3 * torch.float32.itemsize, plans) * largest, 2 * table * torch.float32.itemsize) - weights
    if settings.strategy.name == "hawq_v2":
        return 5 * max(op.n_params for op in operators) * torch.float32.itemsize
    return math.ceil(0.1 * weights)


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
