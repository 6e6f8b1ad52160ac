"""The bundled checkpoints' processors, without their weights."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from qvl_hydra.calibration.encode import Processor, load_processor

ASSETS = Path(str(resources.files("qvl_hydra"))) / "assets"
FAMILIES = ("qwen2_5_vl", "qwen2_vl")


@pytest.fixture(scope="session", params=FAMILIES)
def processor(request: pytest.FixtureRequest) -> Processor:
    return load_processor(ASSETS / f"tiny_{request.param}")


@pytest.fixture(scope="session")
def one_processor() -> Processor:
    return load_processor(ASSETS / "tiny_qwen2_5_vl")
