"""The same against a real `mlflow server` with an artifact store of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from qvl_hydra.settings import TrackingSettings
from qvl_hydra.tracking import record, send
from tests.made_up_runs import write_run

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--serve-artifacts"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return process
        except OSError:
            assert process.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.5)
    raise AssertionError((folder / "server.log").read_text())


def stop_server(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=30)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes], Path]]:
    port = free_port()
    process = start_server(tmp_path / "server", port)
    try:
        yield f"http://127.0.0.1:{port}", process, tmp_path / "server"
    finally:
        stop_server(process)


def test_server_keeps_runs_and_artifacts_and_gets_later_what_it_missed(
    server: tuple[str, subprocess.Popen[bytes], Path], tmp_path: Path
) -> None:
    uri, process, folder = server
    settings = TrackingSettings(uri=uri, experiment="tests")
    first = write_run(tmp_path / "first")
    run_id = record.open_run(settings, first, name="first", tags={"sweep_id": "s"}, sweep=None)
    assert record.send_run(first, settings) == run_id == record.send_run(first, settings)
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(run_id)
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    assert list((folder / "artifacts").rglob("scores.parquet")), "the server keeps the artifacts itself"
    loaded = pd.read_parquet(client.download_artifacts(run_id, "scores.parquet", str(tmp_path)))
    pd.testing.assert_frame_equal(loaded, pd.read_parquet(first / "scores.parquet"))
    row = loaded.iloc[0]
    assert run.data.metrics[f"score/{row.op}"] == pytest.approx(row.score)

    stop_server(process)
    second = write_run(tmp_path / "second", seed=1)
    started = time.monotonic()
    assert record.open_run(settings, second, name="second", tags={}, sweep=None) is None
    assert send.main([str(second)]) == 2
    assert time.monotonic() - started < 60, "a server that is away must not hold a run up"
    again = start_server(folder, int(uri.rpartition(":")[2]))
    try:
        assert send.main([str(second)]) == 0
        runs = client.search_runs([run.info.experiment_id])
        assert {item.info.run_name for item in runs} == {"first", "second"}
    finally:
        stop_server(again)
