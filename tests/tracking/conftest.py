"""Tracking into a store of a test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvl_hydra.settings import TrackingSettings
from tests.program import with_store


@pytest.fixture
def settings(tmp_path: Path) -> TrackingSettings:
    place = with_store(tmp_path / "store")
    return TrackingSettings(uri=f"sqlite:///{place / 'mlflow.db'}", experiment="tests")
