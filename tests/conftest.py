"""What several test files share: the bundled model, a few of its samples, one thread."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import install_import_hook

import tests.typechecker

install_import_hook("qvl_hydra", f"{tests.typechecker.__name__}.typechecked")  # before the package is imported

from qvl_hydra.calibration.encode import Processor, load_processor
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.calibration.sources import load_calibration
from qvl_hydra.models.load import LoadedModel, describe_model, load_model
from qvl_hydra.settings import CalibrationSettings, ModelSettings

torch.set_num_threads(1)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


def load_tiny(name: str = "tiny_qwen2_5_vl", **changes: object) -> LoadedModel:
    """A bundled model, with settings changed."""
    settings = ModelSettings(name=name, path=f"bundled:{name}", family=name.removeprefix("tiny_"), **changes)  # type: ignore[arg-type]
    return load_model(describe_model(settings), torch.device("cpu"), seed=0)


@pytest.fixture(scope="session")
def tiny_model() -> LoadedModel:
    """The bundled Qwen2.5-VL; leave it as it is."""
    return load_tiny()


@pytest.fixture(scope="session")
def tiny_processor(tiny_model: LoadedModel) -> Processor:
    return load_processor(tiny_model.description.folder)


@pytest.fixture(scope="session")
def tiny_samples(tiny_processor: Processor) -> tuple[Sample, ...]:
    """Six bundled calibration samples."""
    return load_calibration(CalibrationSettings(source="bundled", size=6), tiny_processor).samples
