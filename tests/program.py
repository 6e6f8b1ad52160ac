"""The program as a user runs it: in a process of its own, or in this one where only its end matters."""

from __future__ import annotations

import functools
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from qvl_hydra.entry import app
from qvl_hydra.entry.compose import config_folder, settings_from_config
from qvl_hydra.settings import Settings, TrackingSettings
from qvl_hydra.tracking.store import open_client

SMALL = "operators.max_ops=4 calibration.size=4 strategy.confidence_batches=1"  # a run of about a second
PATIENCE_S = 480  # far beyond what a step takes on a busy machine


def composed(*overrides: str) -> Settings:
    """The settings of a command line."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return settings_from_config(compose("config", overrides=list(overrides)))


@functools.cache
def _empty_store() -> bytes:
    """MLflow's tables, which it takes seconds to make."""
    with tempfile.TemporaryDirectory() as place:
        open_client(TrackingSettings(uri=f"sqlite:///{place}/mlflow.db"))
        return (Path(place) / "mlflow.db").read_bytes()


def with_store(folder: Path) -> Path:
    """The folder, with the tables of a store in it that holds no run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mlflow.db").write_bytes(_empty_store())
    return folder


def start(line: str, folder: Path) -> subprocess.Popen[str]:
    """Start the program in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "qvl_hydra", *shlex.split(line)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell starts what it puts in the background with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the end: exit status, and what was said."""
    text, _ = process.communicate(timeout=PATIENCE_S)
    return process.returncode, text


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until something happened, while the program runs."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, f"the program ended: {process.communicate()[0]}"
        assert time.monotonic() < end
        time.sleep(0.005)


def run_here(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Run the program in this process: exit status, and what was said."""
    GlobalHydra.instance().clear()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["qvl-hydra", *shlex.split(line)])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # the program has its own
    capsys.readouterr()
    polite = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            app.main()
    finally:
        signal.signal(signal.SIGTERM, polite)
    assert isinstance(end.value.code, int)
    return end.value.code, capsys.readouterr().out
