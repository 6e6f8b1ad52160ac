"""A SQLite store whose tables are made once: that takes MLflow seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qvl_hydra.settings import TrackingSettings
from qvl_hydra.tracking.store import open_client


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    open_client(TrackingSettings(uri=f"sqlite:///{path}"))
    return path


@pytest.fixture
def settings(tmp_path: Path, empty_store: Path) -> TrackingSettings:
    """Tracking into a store of the test's own."""
    (tmp_path / "store").mkdir()
    shutil.copy(empty_store, tmp_path / "store" / "mlflow.db")
    return TrackingSettings(uri=f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}", experiment="tests")
