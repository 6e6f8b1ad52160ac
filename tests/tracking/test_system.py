"""System metrics: noted beside a long run, sent once each, and never a reason to fail."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from qvl_hydra.runs.files import write_json
from qvl_hydra.settings import TrackingSettings
from qvl_hydra.tracking import record, store, system
from tests.made_up_runs import write_run


def watch_until(folder: Path, count: int) -> None:
    with system.watched(folder):
        ends = time.monotonic() + 20
        while len(system.looks(folder)) < count and time.monotonic() < ends:
            time.sleep(0.01)


def test_what_the_machine_does_is_sent_with_the_run(
    settings: TrackingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "EVERY_S", 0.02)
    monkeypatch.setattr(system, "LEAST_S", 0.1)
    folder = write_run(tmp_path / "run")
    watch_until(folder, 3)
    watch_until(folder, 6)  # a run that goes on
    with (folder / system.FILE).open("a") as file:
        file.write('{"time": 17')  # a kill
    found = system.looks(folder)
    assert len(found) >= 6
    assert [look["time"] for look in found] == sorted(look["time"] for look in found)
    assert 0 < found[0]["process_memory_megabytes"] < found[0]["system_memory_usage_megabytes"] * 2
    client = MlflowClient(tracking_uri=store.tracking_uri(settings))
    for _ in range(2):
        run_id = record.send_run(folder, settings)
        sent = client.get_metric_history(run_id, "system/system_memory_usage_megabytes")
        assert [item.value for item in sent] == [look["system_memory_usage_megabytes"] for look in found]
        assert [item.timestamp for item in sent] == [look["time"] for look in found]
    assert not client.get_run(run_id).data.metrics.keys() & {"system/time"}


def test_a_short_run_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "EVERY_S", 0.01)
    with system.watched(tmp_path):
        time.sleep(0.2)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(system, "EVERY_S", 0.01)
    monkeypatch.setattr(system, "LEAST_S", 0.0)
    write_json(tmp_path / "file", {})
    with system.watched(tmp_path / "file"):
        ends = time.monotonic() + 20
        while not caplog.records and time.monotonic() < ends:
            time.sleep(0.01)
    assert "system metrics are noted no further" in caplog.text
