"""The program from end to end on the bundled model: files, resumption, stops, refusals, multiruns, tracking."""

from __future__ import annotations

import errno
import json
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from pandas.testing import assert_frame_equal
from safetensors import SafetensorError

from qvl_hydra.entry import job as one_job
from qvl_hydra.estimators import exact_run
from tests.program import SMALL, finish, run_here, start, wait_for, with_store

# Long enough to be stopped in its exact part, with sketched parts before.
LONGER = "operators.max_ops=24 calibration.size=12 strategy.estimator=exact"
Here = Callable[[str], tuple[int, str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Runs a command in a folder whose store has its tables already."""
    with_store(tmp_path)
    return lambda line: run_here(line, tmp_path, monkeypatch, capsys)


def tracked(folder: Path) -> dict[str, Run]:
    """Runs in a folder's store by name of the folder they measured."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return {Path(run.data.tags["folder"]).name: run for run in client.search_runs(experiments)}


def record(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "run.json").read_text())
    return found


def score_parts(folder: Path) -> dict[str, int]:
    """Names and times of writing of the units of work on disk."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "parts").glob("*.parquet")}


def same_scores(first: Path, second: Path) -> None:
    for name in ("scores.parquet", "sample_scores.parquet"):
        assert_frame_equal(pd.read_parquet(first / name), pd.read_parquet(second / name), check_exact=True)


def test_a_run_leaves_its_files_and_its_settings_repeat_it(here: Here, tmp_path: Path) -> None:
    status, text = finish(start(f"experiment=lm_mse_v2 {SMALL} hydra.run.dir=first", tmp_path))
    assert status == 0, text
    assert "Traceback" not in text
    for said in ("4 scored of 4 operators", f"files: {tmp_path / 'first'}", "mlflow ui --backend-store-uri", "lm_head"):
        assert said in text
    folder = tmp_path / "first"
    files = {path.name for path in folder.iterdir()}
    assert files >= {"scores.parquet", "sample_scores.parquet", "run.json", "config.yaml", "report.html", "mlflow.json"}
    report = (folder / "report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "")  # one page, nothing fetched
    assert "https://" not in report.replace("https://www.w3.org", "")
    (run,) = tracked(tmp_path).values()
    assert run.info.run_id == json.loads((folder / "mlflow.json").read_text())["run_id"]

    status, text = here("--config-dir first --config-name config hydra.run.dir=second cache=off")
    assert status == 0, text
    first, second = ((path / "config.yaml").read_text() for path in (folder, tmp_path / "second"))
    assert first == second.replace("cache: 'off'", "cache: 'on'")
    same_scores(folder, tmp_path / "second")

    status, _ = here("--config-dir first --config-name config hydra.run.dir=third operators.max_ops=2")
    assert status == 0
    assert record(tmp_path / "third")["n_ops"] == 2


def test_a_killed_run_goes_on_with_the_same_command(here: Here, tmp_path: Path) -> None:
    process = start(LONGER, tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("outputs/*/*/parts/exact-*.parquet"))) >= 2, process)
    process.kill()
    finish(process)
    (killed,) = tmp_path.glob("outputs/*/*")
    before = score_parts(killed)
    assert not (killed / "parts" / "exact-w8a8_static-00011.parquet").exists(), "killed too late to show anything"
    assert not (killed / "run.json").exists()

    status, text = here(LONGER)
    assert status == 0, text
    assert f"going on where {killed} stopped" in text
    (resumed,) = (folder for folder in tmp_path.glob("outputs/*/*") if folder != killed)
    after = score_parts(resumed)
    assert len(after) > len(before)
    assert {name: after[name] for name in before} == before  # taken over, not measured again
    assert record(resumed)["status"] == "complete"

    status, text = here(f"{LONGER} resume=never hydra.run.dir=undisturbed")
    assert status == 0
    assert "going on" not in text
    same_scores(resumed, tmp_path / "undisturbed")

    runs = tracked(tmp_path)
    assert runs[resumed.name].info.status == "FINISHED"
    assert runs[killed.name].info.status == "KILLED"
    assert runs[killed.name].data.tags["resumed_as"] == runs[resumed.name].info.run_id


def test_ctrl_c_leaves_what_there_is_and_the_folder_is_taken_up(here: Here, tmp_path: Path) -> None:
    line, folder = f"{LONGER} hydra.run.dir=run", tmp_path / "run"
    process = start(line, tmp_path)
    wait_for(lambda: any(folder.glob("parts/exact-*.parquet")), process)
    # Meanwhile the folder is this run's alone, and a refused one leaves no mark in it.
    process.send_signal(signal.SIGSTOP)
    kept = (folder / "config.yaml").read_bytes()
    for other in (line, f"{line} seed=3"):
        status, text = here(other)
        assert status == 2
        assert f"another run is writing in {folder}" in text
    assert (folder / "config.yaml").read_bytes() == kept
    assert not (folder / "run.json").exists()
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    status, text = finish(process)
    assert status == 130, text
    assert "Traceback" not in text
    assert f"stopped; what was measured is in {folder}" in text
    assert record(folder)["status"] == "partial"
    partial = pd.read_parquet(folder / "scores.parquet")
    assert len(partial) == 24
    assert partial["score"].notna().sum() > 0
    (run,) = tracked(tmp_path).values()
    assert run.info.status == "KILLED"
    assert any(key.startswith("score/") for key in run.data.metrics)
    before = score_parts(folder)

    status, text = here(line)
    assert status == 0, text
    assert record(folder)["status"] == "complete"
    after = score_parts(folder)
    assert {name: after[name] for name in before} == before
    (run,) = tracked(tmp_path).values()
    assert run.info.status == "FINISHED"

    status, text = here(f"{line} operators.max_ops=3")
    assert status == 2
    assert "holds the results of a run with other settings" in text
    (run,) = tracked(tmp_path).values()
    assert run.info.status == "FINISHED"
    status, text = here(f"{line} resume=never")
    assert status == 2
    assert "holds results already" in text


def test_a_multirun_is_one_parent_with_its_jobs_below(here: Here, tmp_path: Path) -> None:
    swept = "strategy.confidence_batches=1,2 operators.max_ops=3 calibration.size=8"
    status, text = here(f"-m experiment=lm_mse_v2 {swept}")
    assert status == 0, text
    (sweep,) = tmp_path.glob("multirun/*/*")
    runs = tracked(tmp_path)
    parent = runs.pop(sweep.name)
    assert set(runs) == {"0", "1"}
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["jobs"] == 2
    assert parent.data.metrics["jobs_failed"] == 0
    for index, run in runs.items():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params["strategy.confidence_batches"] == str(int(index) + 1)
        assert run.data.params["operators.max_ops"] == "3"
        own = swept.replace("1,2", str(int(index) + 1))
        assert set(shlex.split(run.data.tags["command"])[3:]) == {"experiment=lm_mse_v2", *own.split()}
        assert run.info.run_name == f"strategy.confidence_batches={int(index) + 1}"
        for key in ("sweep_id", "model", "component", "strategy", "backend"):
            assert run.data.tags[key]
        assert run.data.tags["sweep_id"] == parent.data.tags["sweep_id"]
        table = pd.read_parquet(sweep / index / "scores.parquet")
        logged = {key: value for key, value in run.data.metrics.items() if key.startswith("score/")}
        assert logged == {f"score/{op}": score for op, score in zip(table["op"], table["score"], strict=True)}
        assert run.inputs.dataset_inputs[0].dataset.name.startswith("bundled")


def test_a_failing_job_does_not_stop_the_others(here: Here, tmp_path: Path) -> None:
    status, text = here(f"-m component=lm,vision operators.include=[*visual*] {SMALL}")
    assert status == 2
    assert text.count("error:") == 1
    assert "'*visual*' matches no operator" in text
    assert "1 of 2 jobs did not finish: 0" in text
    (sweep,) = tmp_path.glob("multirun/*/*")
    assert record(sweep / "0") | {"error": ""} == {
        "task": "sweep", "status": "failed", "error": "", "version": 1,
    }  # fmt: skip
    assert record(sweep / "1")["status"] == "complete"
    ended = {name: run.info.status for name, run in tracked(tmp_path).items()}
    assert ended == {sweep.name: "FAILED", "0": "FAILED", "1": "FINISHED"}


@pytest.mark.parametrize(
    ("lack", "advice"),
    [
        (OSError(errno.ENOSPC, "full"), "no space is left on the disk: make some"),
        (SafetensorError("I/O error: No space left on device"), "no space is left on the disk: make some"),
        (SafetensorError("I/O error: File too large (os error 27)"), "a file became too large (ulimit -f"),
        (OSError(errno.EMFILE, "many"), "too many files are open: raise the limit (ulimit -n)"),
        (OSError(errno.EIO, "broken"), "a disk failed ([Errno 5] broken): see to it"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory ran out: take model.placement"),
        (RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"), "memory ran out: take model.placement"),
        (torch.OutOfMemoryError("made up"),
         "memory ran out: take model.placement=streamed, model.dtype=bfloat16, a smaller backend.row_chunk"),
    ],
    ids=str,
)
def test_a_machine_that_lacks_something_is_told_apart_from_a_fault(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lack: Exception, advice: str
) -> None:
    def measure(*_: object) -> None:
        raise lack

    with monkeypatch.context() as patched:
        patched.setattr(exact_run, "score_samples", measure)
        status, text = here(f"{SMALL} tracking.enabled=false hydra.run.dir=run")
    assert status == 2
    assert f"error: {advice}" in text
    assert "fault of the program" not in text
    assert record(tmp_path / "run")["status"] == "partial"
    status, _ = here(f"{SMALL} tracking.enabled=false hydra.run.dir=run")
    assert (status, record(tmp_path / "run")["status"]) == (0, "complete")


def test_a_disk_on_which_not_even_the_end_can_be_noted(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched:
        patched.setattr(exact_run, "score_samples", full)
        patched.setattr(one_job, "write_json", full)
        status, text = here(f"{SMALL} tracking.enabled=false hydra.run.dir=run")
    assert (status, "Traceback" in text) == (2, False)
    assert "error: no space is left on the disk" in text
    status, _ = here(f"{SMALL} tracking.enabled=false hydra.run.dir=run")
    assert (status, record(tmp_path / "run")["status"]) == (0, "complete")


def test_no_more_threads_than_cores(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's quota of one core, of which torch knows nothing."""
    monkeypatch.setattr("joblib.cpu_count", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    status, text = here(f"{SMALL} tracking.enabled=false hydra.run.dir=run")
    assert (status, asked[0]) == (0, 1), text


@pytest.mark.slow
def test_a_stopped_multirun_goes_on_with_the_same_command(here: Here, tmp_path: Path) -> None:
    line = f"-m seed=0,1 {LONGER}"
    process = start(line, tmp_path)
    wait_for(lambda: any(tmp_path.glob("multirun/*/*/1/parts/exact-*.parquet")), process)
    process.send_signal(signal.SIGTERM)  # a polite kill is as good as Ctrl-C
    status, text = finish(process)
    assert status == 130, text
    (stopped,) = tmp_path.glob("multirun/*/*")
    assert {name: run.info.status for name, run in tracked(tmp_path).items()} == {
        stopped.name: "KILLED", "0": "FINISHED", "1": "KILLED",
    }  # fmt: skip

    status, text = here(line)
    assert status == 0, text
    (again,) = (folder for folder in tmp_path.glob("multirun/*/*") if folder != stopped)
    for job in ("0", "1"):
        assert f"going on where {stopped / job} stopped" in text
        before, after = score_parts(stopped / job), score_parts(again / job)
        assert {name: after[name] for name in before} == before
    same_scores(stopped / "0", again / "0")
    assert record(again / "1")["status"] == "complete"


def test_a_run_can_go_without_tracking(here: Here, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").unlink()
    status, text = here(f"{SMALL} tracking.enabled=false hydra.run.dir=run")
    assert status == 0
    assert "mlflow" not in text
    assert not (tmp_path / "mlflow.db").exists()
    assert record(tmp_path / "run")["status"] == "complete"


def test_a_tracker_that_is_away_costs_no_result(here: Here, tmp_path: Path) -> None:
    status, text = here(f"{SMALL} tracking=server tracking.uri=http://me:secret@127.0.0.1:9 hydra.run.dir=run")
    assert status == 0, text
    assert "not tracked" in text
    assert "secret" not in text
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"secret" in path.read_bytes()]
    assert f"python -m qvl_hydra.tracking.send {tmp_path / 'run'}" in text
    assert "compare runs" not in text
    assert record(tmp_path / "run")["status"] == "complete"
