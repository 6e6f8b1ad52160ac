"""Runs found again: by folder, id, sweep id and filter; and those that left nothing, with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from qvl_hydra.errors import ComparisonError
from qvl_hydra.settings import TrackingSettings
from qvl_hydra.tracking.read import find_runs, jobs_of, run_link
from qvl_hydra.tracking.record import SweepParent, open_run, send_run
from tests.made_up_runs import write_run


def tracked(settings: TrackingSettings, folder: Path, sweep: str | None = None) -> str:
    above = None if sweep is None else SweepParent(folder.parent, sweep, {"sweep_id": sweep})
    tags = {} if sweep is None else {"sweep_id": sweep}
    open_run(settings, folder, name=folder.name, tags=tags, sweep=above)
    return send_run(folder, settings)


def test_run_comes_back_with_its_scores(settings: TrackingSettings, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    further = write_run(tmp_path / "further", seed=1) / "scores.parquet"
    further.rename(folder / "scores_w4a16.parquet")
    run_id = tracked(settings, folder)
    found = find_runs(settings, [run_id], None, None, tmp_path / "into")
    ((place, scheme),) = found.folders
    assert scheme is None
    for name in ("scores.parquet", "scores_w4a16.parquet"):
        pd.testing.assert_frame_equal(pd.read_parquet(place / name), pd.read_parquet(folder / name))
    assert json.loads((place / "run.json").read_text()) == json.loads((folder / "run.json").read_text())
    link = run_link(place)
    assert link is not None
    assert link[0] == run_id


def test_sweep_id_and_filter_find_sweeps_only(settings: TrackingSettings, tmp_path: Path) -> None:
    ids = {tracked(settings, write_run(tmp_path / "sweep" / f"{index}", seed=index), "s1") for index in range(2)}
    tracked(settings, write_run(tmp_path / "other", config={"backend.name": "inc_fx"}))
    by_sweep = find_runs(settings, [], "s1", None, tmp_path / "a")
    assert {place.name for place, _ in by_sweep.folders} == ids
    by_filter = find_runs(settings, [], None, "tags.backend = 'torch'", tmp_path / "b")
    assert {place.name for place, _ in by_filter.folders} == ids


def test_folders_need_no_tracker(tmp_path: Path) -> None:
    away = TrackingSettings(uri="http://127.0.0.1:9")
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    found = find_runs(away, [str(first), f"{second}#w4a16"], None, None, tmp_path / "into")
    assert found.folders == [(first, None), (second, "w4a16")]


def test_jobs_that_failed_or_stopped_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "0")
    write_run(tmp_path / "10", seed=1)
    write_run(tmp_path / "2", run={"status": "partial"})
    (tmp_path / "3").mkdir()
    failed = {"task": "sweep", "status": "failed", "error": "no such model"}
    (tmp_path / "3" / "run.json").write_text(json.dumps(failed))
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "config.yaml").write_text("seed: 0")
    found = jobs_of(tmp_path)
    assert [place.name for place, _ in found.folders] == ["0", "10"]
    assert found.missing == {
        "2": "it was stopped before its end",
        "3": "it failed: no such model",
        "4": "it left no result",
    }


def test_what_is_not_there_is_told(settings: TrackingSettings, tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match="neither a folder nor a run"):
        find_runs(settings, ["0123456789abcdef0123456789abcdef"], None, None, tmp_path)
    with pytest.raises(ComparisonError, match="no sweep in"):
        find_runs(settings, [], "never", None, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ComparisonError, match=r"no scores\.parquet"):
        find_runs(settings, [str(tmp_path / "empty")], None, None, tmp_path)
