"""The same against a real `mlflow server` with an artifact store of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
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
from tests.program import PATIENCE_S, SMALL

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(folder: Path, port: int, store: str | None = None) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store or f"sqlite:///{folder}/server.db", "--serve-artifacts"]
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


@pytest.fixture
def postgresql() -> Iterator[str]:
    """A database of its own, by Debian's package; its server must not be root."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not programs:
        pytest.skip("no PostgreSQL on this machine: apt-get install postgresql")
    pytest.importorskip("psycopg")
    own = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="qvl_hydra_") as place:
        if own:
            shutil.chown(place, "postgres", "postgres")
        data, tools = f"{place}/data", programs[-1].parent

        def call(*command: str) -> None:
            subprocess.run([*own, *command], check=True, cwd=place, stdout=subprocess.DEVNULL)

        call(str(tools / "initdb"), "-D", data, "-U", "tests", "-A", "trust")
        options = f"-p {port} -k {place} -c listen_addresses=127.0.0.1"
        call(str(tools / "pg_ctl"), "-D", data, "-l", f"{place}/log", "-w", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://tests@127.0.0.1:{port}/postgres"
        finally:
            call(str(tools / "pg_ctl"), "-D", data, "-m", "immediate", "stop")


@pytest.mark.parametrize("behind", ["server", "alone"])
def test_eight_jobs_at_once_lose_nothing_in_postgresql(behind: str, postgresql: str, tmp_path: Path) -> None:
    """Behind an MLflow server, and written to by the jobs themselves."""
    jobs, port = tmp_path / "jobs", free_port()
    uri = f"http://127.0.0.1:{port}" if behind == "server" else postgresql
    process = start_server(tmp_path / "server", port, postgresql) if behind == "server" else None
    try:
        seeds = ",".join(map(str, range(8)))
        line = f"-m {SMALL} seed={seeds} strategy.estimator=sketch backend.threads=1 hydra/launcher=joblib"
        line += f" hydra.launcher.n_jobs=8 hydra.sweep.dir={jobs} tracking.enabled=true tracking.uri={uri}"
        done = subprocess.run(
            [sys.executable, "-m", "qvl_hydra", *shlex.split(line)], cwd=tmp_path, timeout=PATIENCE_S,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "not tracked" not in done.stdout + done.stderr
        client = MlflowClient(tracking_uri=uri)
        runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        (parent,) = [run for run in runs if run.data.tags["task"] == "multirun"]
        own = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        below = {run.info.run_name: run for run in own}
        assert set(below) == {f"seed={seed}" for seed in range(8)}
        assert {run.info.status for run in runs} == {"FINISHED"}
        for seed in range(8):
            run, table = below[f"seed={seed}"], pd.read_parquet(jobs / str(seed) / "scores.parquet")
            sent = {key: value for key, value in run.data.metrics.items() if key.startswith("score/")}
            assert sent == pytest.approx(dict(zip("score/" + table["op"], table["score"], strict=True)))
            assert run.data.params["seed"] == str(seed)
            assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {"scores.parquet", "report.html"}
    finally:
        if process is not None:
            stop_server(process)
