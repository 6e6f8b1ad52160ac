"""Jobs of a multirun in other processes: the same scores, the same end, and what a killed worker leaves."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from tests.program import PATIENCE_S, SMALL, run_here, start, wait_for, with_store

JOBS = f"-m {SMALL} operators.blocks=0,1,99 backend.threads=1 strategy.estimator=sketch tracking.enabled=true"
LAUNCHERS = [
    "joblib",
    pytest.param("submitit_local", marks=[pytest.mark.slow, pytest.mark.submitit]),
    pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.ray]),
]


def run(line: str, folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "qvl_hydra", *shlex.split(line)],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}, capture_output=True, text=True,
        timeout=PATIENCE_S,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_ends_as_hydras_own(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of three jobs fails: status 2, the others whole, their runs under one parent."""
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    own, other = tmp_path / "own", tmp_path / "other"
    here = run_here(f"{JOBS} hydra.sweep.dir=jobs", with_store(own), monkeypatch, capsys)
    there = run(f"{JOBS} hydra.sweep.dir=jobs hydra/launcher={launcher}", with_store(other))
    for status, text in (here, there):
        assert status == 2, text
        assert "no block [99]" in text or launcher == "submitit_local"
        assert "1 of 3 jobs did not finish: 2" in text
        assert "fault of the program" not in text
    for job in ("0", "1"):
        first, second = (pd.read_parquet(folder / "jobs" / job / "scores.parquet") for folder in (own, other))
        pd.testing.assert_frame_equal(first, second, check_exact=True)
    for folder in (own, other):
        client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        (parent,) = [item for item in runs if item.data.tags["task"] == "multirun"]
        below = [item for item in runs if item.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert sorted(item.info.status for item in below) == ["FAILED", "FINISHED", "FINISHED"]
        assert parent.info.status == "FAILED"
        assert sorted(item.info.run_name for item in below) == [f"operators.blocks={block}" for block in (0, 1, 99)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "worker"),
    [
        ("joblib hydra.launcher.n_jobs=2", "popen_loky_posix"),
        pytest.param("submitit_local", "submitit.core._submit", marks=pytest.mark.submitit),
        pytest.param("ray", "ray::", marks=pytest.mark.ray),
    ],
    ids=["joblib", "submitit", "ray"],
)
def test_a_killed_worker_is_told_and_the_same_command_goes_on(launcher: str, worker: str, tmp_path: Path) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition(' ')[0].partition('_')[0]}_launcher")
    line = f"-m hydra/launcher={launcher} hydra.sweep.dir=jobs strategy.estimator=exact calibration.size=200,201"
    process = start(line, tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("jobs/*/parts/exact*.parquet"))) > 20, process)
    found = subprocess.run(["pgrep", "-n", "-f", worker], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    text, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2, text
    assert "the same command goes on" in text
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("jobs/*/parts/exact*.parquet")}
    status, text = run(line, tmp_path)
    assert status == 0, text
    assert all(path.stat().st_mtime_ns == written for path, written in before.items()), "measured twice"


@pytest.mark.slow
@pytest.mark.submitit
def test_a_job_that_is_preempted_is_submitted_again_and_goes_on(tmp_path: Path) -> None:
    """By submitit's own checkpoint, as on a cluster: SIGUSR2 is what SLURM sends before it takes a machine away."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    line = "-m hydra/launcher=submitit_local hydra.sweep.dir=jobs strategy.estimator=exact calibration.size=48,49"
    process = start(f"{line} tracking.enabled=false compare.after=true", tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("jobs/0/parts/exact*.parquet"))) > 3, process)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("jobs/0/parts/exact*.parquet")}
    found = subprocess.run(["pgrep", "-f", f"submitit.core._submit {tmp_path}"], capture_output=True, text=True)
    for worker in found.stdout.split():  # both jobs, since a process does not say which it is
        os.kill(int(worker), signal.SIGUSR2)
    text, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, text
    said = "".join(path.read_text() for path in tmp_path.glob("jobs/.submitit/*/*_log.out"))
    assert said.count("Requeued job") == 2
    assert all(path.stat().st_mtime_ns == written for path, written in before.items()), "measured twice"
    assert (tmp_path / "jobs" / "comparison" / "comparison.parquet").exists()
