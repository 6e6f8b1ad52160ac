"""A run folder becomes exactly one MLflow run that says what the folder's files say."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient

from qvl_hydra.errors import TrackingError
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.settings import TrackingSettings
from qvl_hydra.tracking import content, record, send, store
from tests.made_up_runs import write_run


def client_of(settings: TrackingSettings) -> MlflowClient:
    return MlflowClient(tracking_uri=store.tracking_uri(settings))


def runs_of(settings: TrackingSettings) -> list:
    client = client_of(settings)
    return client.search_runs([client.get_experiment_by_name(settings.experiment).experiment_id])


def test_run_holds_what_the_files_hold(settings: TrackingSettings, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", failed=1, skipped=1)
    run_id = record.open_run(settings, folder, name="one", tags={"sweep_id": "s1"}, sweep=None)
    assert run_id is not None
    assert client_of(settings).get_run(run_id).info.status == "RUNNING"
    assert record.send_run(folder, settings) == run_id
    run = client_of(settings).get_run(run_id)
    scores = pd.read_parquet(folder / "scores.parquet")
    scored = scores[scores["status"] == "scored"]
    expected = dict(zip("score/" + scored["op"], scored["score"], strict=True))
    sent = {key: value for key, value in run.data.metrics.items() if key.startswith("score/")}
    assert sent == pytest.approx(expected)
    totals = json.loads((folder / "run.json").read_text())
    assert run.data.metrics["forward_equivalents"] == totals["forward_equivalents"]
    assert run.data.params["calibration.size"] == "16"
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "one"
    assert run.data.tags["sweep_id"] == "s1"
    assert run.data.tags["component"] == "lm"
    top = scored.sort_values("rank")["op"].iloc[0]
    assert f"`{top}`" in run.data.tags["mlflow.note.content"]
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == totals["calibration_sha"]
    shown = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/scores.json")
    table = pd.DataFrame(shown["data"], columns=shown["columns"])
    assert table["op"].tolist() == scores["op"].tolist()
    assert table.loc[scored.index, "score"].tolist() == pytest.approx(scored["score"].tolist())
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "scores.json", "type": "table"}]
    names = {item.path for item in client_of(settings).list_artifacts(run_id)}
    assert {"scores.parquet", "sample_scores.parquet", "run.json", "config.yaml", "figures"} <= names
    assert not names & {"parts", "mlflow.json", "run.lock"}
    assert run.info.artifact_uri.startswith((tmp_path / "store").as_uri())


def test_by_block_curve_has_one_step_a_block(settings: TrackingSettings, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    run_id = record.send_run(folder, settings)
    history = client_of(settings).get_metric_history(run_id, "by_block/lm.down_proj")
    scores = pd.read_parquet(folder / "scores.parquet").query("role == 'down_proj'")
    assert {item.step: item.value for item in history} == dict(zip(scores["block"], scores["score"], strict=True))


def test_sending_twice_changes_nothing(settings: TrackingSettings, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    first = record.send_run(folder, settings)
    before = client_of(settings).get_run(first)
    assert record.send_run(folder, settings) == first
    after = client_of(settings).get_run(first)
    assert len(runs_of(settings)) == 1
    assert after.to_dictionary() == before.to_dictionary()
    key = next(name for name in after.data.metrics if name.startswith("score/"))
    assert len(client_of(settings).get_metric_history(first, key)) == 1


def test_run_is_found_by_its_key_when_the_answer_was_lost(settings: TrackingSettings, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    first = record.send_run(folder, settings)
    path = folder / record.RECORD
    path.write_text(json.dumps({**json.loads(path.read_text()), "run_id": None}))
    assert record.send_run(folder, settings) == first


def test_deleted_run_is_made_anew(settings: TrackingSettings, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    first = record.send_run(folder, settings)
    client_of(settings).delete_run(first)
    assert record.send_run(folder, settings) != first
    assert len(runs_of(settings)) == 1


def test_failed_operator_has_no_metric(settings: TrackingSettings, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", failed=2)
    scores = pd.read_parquet(folder / "scores.parquet")
    keys = {metric.key for metric in content.metrics(folder)}
    for op, status in zip(scores["op"], scores["status"], strict=True):
        assert (f"score/{op}" in keys) == (status == "scored")


def test_jobs_of_a_multirun_share_one_parent(settings: TrackingSettings, tmp_path: Path) -> None:
    sweep = record.SweepParent(tmp_path / "sweep", "the sweep", {"sweep_id": "s2"})
    ids = []
    for index in range(2):
        folder = write_run(tmp_path / "sweep" / str(index), seed=index)
        ids.append(record.open_run(settings, folder, name=f"job {index}", tags={"sweep_id": "s2"}, sweep=sweep))
        record.send_run(folder, settings)
    parent = record.finish_parent(sweep.folder, settings, note="two jobs", metrics={"jobs_finished": 2})
    client = client_of(settings)
    assert {client.get_run(run_id).data.tags[record.PARENT_TAG] for run_id in ids} == {parent}
    found = client.get_run(parent)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["jobs_finished"] == 2
    assert found.data.tags["sweep_id"] == "s2"
    assert found.data.tags["mlflow.note.content"] == "two jobs"
    assert len(runs_of(settings)) == 3


def test_large_settings_and_many_keys_pass_the_limits(settings: TrackingSettings, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["many"] = {f"key{index}": index for index in range(250)} | {"long": "x" * 9000, "od(d) key": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    params = client_of(settings).get_run(record.send_run(folder, settings)).data.params
    assert params["many.key249"] == "249"
    assert params["many.long"] == "x" * 6000
    assert params["many.od_d_ key"] == "1"


def test_too_large_file_stays_and_is_named(
    settings: TrackingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"0" * 200_000)
    monkeypatch.setattr(content, "LARGEST_ARTIFACT", 150_000)
    run_id = record.send_run(folder, settings)
    assert client_of(settings).get_run(run_id).data.tags["files_left_out"] == "onnx/model.onnx"
    assert not client_of(settings).list_artifacts(run_id, "onnx")


def test_default_store_is_absolute_and_beside_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = TrackingSettings(uri=None)
    assert store.tracking_uri(settings) == f"sqlite:///{tmp_path}/mlflow.db"
    assert store.artifact_root(settings) == (tmp_path / "mlartifacts").as_uri()
    assert store.ui_command(settings) == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db"
    relative = TrackingSettings(uri="sqlite:///sub/my.db")
    assert store.tracking_uri(relative) == f"sqlite:///{tmp_path}/sub/my.db"
    assert store.artifact_root(TrackingSettings(uri="http://host:5000")) is None


@pytest.mark.parametrize("given", [None, "odd.db"])
def test_a_folder_whose_name_means_something_in_an_address(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow tried for minutes to open a file that was not there."""
    place = tmp_path / "it's 100%20? #1"
    place.mkdir()
    monkeypatch.chdir(place)
    settings = TrackingSettings(uri=given)
    run_id = record.send_run(write_run(place / "run"), settings)
    assert client_of(settings).get_run(run_id).info.status == "FINISHED"
    assert {"run", "mlartifacts", given or "mlflow.db"} <= {path.name for path in place.iterdir()}
    again = TrackingSettings(uri=store.tracking_uri(settings))  # as the run's own record has it
    assert store.tracking_uri(again) == store.tracking_uri(settings)


def test_deleted_experiment_is_told_with_the_remedy(settings: TrackingSettings, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    record.send_run(folder, settings)
    client = client_of(settings)
    client.delete_experiment(client.get_experiment_by_name("tests").experiment_id)
    (folder / record.RECORD).unlink()
    with pytest.raises(TrackingError, match="mlflow experiments restore"):
        record.send_run(folder, settings)


def test_server_away_leaves_the_files_and_the_command_says_so(
    settings: TrackingSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    away = TrackingSettings(uri="http://127.0.0.1:9", experiment="tests")
    folder = write_run(tmp_path / "run")
    assert record.open_run(away, folder, name="one", tags={"sweep_id": "s"}, sweep=None) is None
    assert "qvl_hydra.tracking.send" in caplog.text
    assert send.main([str(folder)]) == 2
    assert "http://127.0.0.1:9" in capsys.readouterr().err
    assert send.main([str(folder), "--uri", str(settings.uri), "--experiment", "later"]) == 0
    settings = dataclasses.replace(settings, experiment="later")
    (run,) = runs_of(settings)
    assert run.info.run_id in capsys.readouterr().out
    assert run.data.tags["sweep_id"] == "s"
    assert run.info.run_name == "one"
    written = json.loads((folder / record.RECORD).read_text())
    assert abs(run.info.start_time - written["start_time"]) < 1000


def test_sweep_made_while_the_server_was_away_is_sent_with_its_parent(
    settings: TrackingSettings, tmp_path: Path
) -> None:
    away = TrackingSettings(uri="http://127.0.0.1:9", experiment="tests")
    sweep = record.SweepParent(tmp_path / "sweep", "the sweep", {"sweep_id": "s3"})
    for index in range(2):
        folder = write_run(tmp_path / "sweep" / str(index), seed=index)
        record.open_run(away, folder, name=f"job {index}", tags={"sweep_id": "s3"}, sweep=sweep)
    sent = send.send(tmp_path / "sweep", settings.uri, None)
    assert len(sent) == 2
    runs = {run.info.run_name: run for run in runs_of(settings)}
    assert set(runs) == {"the sweep", "job 0", "job 1"}
    assert runs["job 1"].data.tags[record.PARENT_TAG] == runs["the sweep"].info.run_id
    assert runs["the sweep"].info.status == "FINISHED"


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="holds no run"):
        send.send(tmp_path, None, None)


def test_unusable_store_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = TrackingSettings(uri=f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")
    with pytest.raises(TrackingError, match="cannot be used"):
        record.send_run(write_run(tmp_path / "run"), settings)


def test_only_files_that_a_run_writes_are_sent(settings: TrackingSettings, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / ".env").write_text("SECRET=1")
    (folder / "notes.txt").write_text("mine")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("mine")
    run_id = record.send_run(folder, settings)
    names = {item.path for item in client_of(settings).list_artifacts(run_id)}
    assert {"scores.parquet", "run.json", "figures"} <= names
    assert not names & {".env", "notes.txt", ".git"}


def test_runs_whose_process_is_gone_are_ended_by_the_next(settings: TrackingSettings, tmp_path: Path) -> None:
    gone, alive, other = (write_run(tmp_path / name) for name in ("gone", "alive", "other"))
    ids = {}
    with RunFolder(alive).locked():
        for folder in (alive, gone):
            ids[folder.name] = record.open_run(settings, folder, name=folder.name, tags={}, sweep=None)
        client = client_of(settings)
        elsewhere = record.open_run(settings, write_run(tmp_path / "far"), name="far", tags={}, sweep=None)
        client.set_tag(elsewhere, "host", "another machine")
        client.update_run(ids["gone"], status="RUNNING")
        record.open_run(settings, other, name="other", tags={}, sweep=None)
    status = {name: client.get_run(run_id).info.status for name, run_id in {**ids, "far": elsewhere}.items()}
    assert status == {"alive": "RUNNING", "gone": "KILLED", "far": "RUNNING"}


def test_a_run_that_ends_while_it_is_looked_at_keeps_its_end(
    settings: TrackingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job found it RUNNING; then it was sent, and its lock let go, before that job looked for its process."""
    own, other = (write_run(tmp_path / name) for name in ("own", "other"))
    run_id = record.open_run(settings, own, name="own", tags={}, sweep=None)

    def ends_now(lock: Path) -> bool:
        if lock.parent == own:
            record.send_run(own, settings)
        return False

    monkeypatch.setattr(record, "is_held", ends_now)
    record.open_run(settings, other, name="other", tags={}, sweep=None)
    assert run_id is not None
    assert client_of(settings).get_run(run_id).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("end", "status", "expected"),
    [("FINISHED", "complete", "FINISHED"), ("FAILED", "complete", "FAILED"), ("KILLED", "partial", "KILLED"),
     (None, "complete", "FINISHED"), (None, "failed", "FAILED"), (None, "partial", "KILLED"), (None, None, "KILLED")],
)  # fmt: skip
def test_a_run_that_is_sent_later_ended_as_its_folder_says(
    tmp_path: Path, end: str | None, status: str | None, expected: str
) -> None:
    if status is not None:
        (tmp_path / "run.json").write_text(json.dumps({"task": "sweep", "status": status}))
    if end is not None:
        (tmp_path / "end.json").write_text(json.dumps({"end": end}))
    assert send.status_of(tmp_path) == expected


def test_a_multirun_that_is_sent_later_ended_as_its_worst_job(settings: TrackingSettings, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    for name, end in {"0": "FINISHED", "1": "FAILED"}.items():
        folder = write_run(sweep / name)
        (folder / "end.json").write_text(json.dumps({"end": end}))
        record.open_run(
            settings, folder, name=name, tags={}, sweep=record.SweepParent(sweep, "both", {"sweep_id": "x"})
        )
    assert settings.uri is not None
    send.send(sweep, settings.uri, settings.experiment)
    assert {run.info.run_name: run.info.status for run in runs_of(settings)} == {
        "0": "FINISHED", "1": "FAILED", "both": "FAILED",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("uri", "shown"),
    [("postgresql://me:secret@host:5432/db", "postgresql://me:***@host:5432/db"),
     ("http://:secret@host/x?token=secret", "http://:***@host/x?***"),
     ("mysql+pymysql://a:se%20cret@h/d", "mysql+pymysql://a:***@h/d"),
     ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"), ("http://host:5000", "http://host:5000")],
)  # fmt: skip
def test_secrets_of_a_uri_are_masked(uri: str, shown: str) -> None:
    assert store.masked(uri) == shown


def test_a_password_is_nowhere_in_what_is_said_saved_or_sent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = TrackingSettings(uri="http://me:secret@127.0.0.1:9/", experiment="tests")
    folder = write_run(tmp_path / "run")
    assert record.open_run(settings, folder, name="one", tags={}, sweep=None) is None
    with pytest.raises(TrackingError) as told:
        record.send_run(folder, settings)
    said = str(told.value) + caplog.text + store.ui_command(settings)
    said += "".join(path.read_text(errors="replace") for path in folder.rglob("*.json"))
    assert "secret" not in said
    assert "127.0.0.1:9" in said


def test_a_server_that_does_not_answer_is_asked_once(
    settings: TrackingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SERVER_TIMEOUT_S", "1")
    monkeypatch.setattr(store, "SERVER_RETRIES", "0")
    monkeypatch.setattr(store, "_silent", {})
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        silent = TrackingSettings(uri=f"http://127.0.0.1:{deaf.getsockname()[1]}", experiment="tests")
        for name in ("a", "b", "c"):
            assert record.open_run(silent, write_run(tmp_path / name), name=name, tags={}, sweep=None) is None
        deaf.settimeout(0.2)
        try:
            while True:
                asked.append(deaf.accept())
        except TimeoutError:
            pass
    assert len(asked) == 1
    assert record.open_run(settings, tmp_path / "a", name="a", tags={}, sweep=None) is not None  # others go on


@pytest.mark.parametrize("stored", [b"no database at all" * 100, b""])
def test_a_broken_sqlite_store_is_one_message(tmp_path: Path, stored: bytes) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(stored)
    settings = TrackingSettings(uri=f"sqlite:///{path}", experiment="tests")
    if stored:
        with pytest.raises(TrackingError, match="cannot be used"):
            store.open_client(settings)
    else:
        store.open_client(settings)  # an empty file is an empty store


def test_a_store_that_was_being_made_when_killed_is_made_again(
    settings: TrackingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = TrackingSettings(uri=f"sqlite:///{tmp_path / 'fresh' / 'mlflow.db'}", experiment="tests")
    whole = tmp_path / "store" / "mlflow.db"
    made = []

    def killed(source: Path, target: Path) -> None:
        made.append(source)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.open_client(fresh)
    monkeypatch.undo()
    assert not (tmp_path / "fresh" / "mlflow.db").exists(), "half a store is no store"
    made[0].write_bytes(whole.read_bytes()[:5000])
    store.open_client(fresh)
    assert not made[0].exists()
    assert record.open_run(fresh, write_run(tmp_path / "run"), name="one", tags={}, sweep=None) is not None
