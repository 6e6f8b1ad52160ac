"""A run's folder: whole parts or none, one holder, what is found again after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from qvl_hydra.errors import RunFolderError
from qvl_hydra.runs import folder as store
from qvl_hydra.runs.files import write_atomically, write_json
from qvl_hydra.runs.folder import (
    COLUMNS,
    END,
    FINGERPRINT,
    RunFolder,
    SampleScore,
    adopt,
    earlier_runs,
    find_resumable,
    note_sweep,
)


def score(op: str = "lm_head", sample: str = "s0", value: float = 1.5, probe: int | None = None) -> SampleScore:
    return SampleScore(op, sample, probe, value, "squared_error", "exact" if probe is None else "sketch", "w8a8_static")


def test_scores_come_back_as_they_were(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert list(folder.frame().columns) == list(COLUMNS)
    assert folder.frame().empty
    awkward = [1 / 3, 1e-300, -0.0, 1.7976931348623157e308]
    folder.write("b", [score(value=value, probe=index) for index, value in enumerate(awkward)])
    folder.write("a", [score("x", "s1", 2.0)])
    folder.write("empty", [])
    frame = folder.frame()
    assert frame["value"].tolist() == [2.0, *awkward]  # in the order of the units' names
    assert frame["probe"].isna().tolist() == [True, False, False, False, False]
    assert frame["op"].tolist() == ["x", *["lm_head"] * 4]
    assert (folder.done("a"), folder.done("empty"), folder.done("c")) == (True, True, False)


def test_a_write_that_was_cut_off_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.write("a", [score()])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.write("b", [score()])
    with pytest.raises(KeyboardInterrupt):
        folder.remember("order", [1, 2])
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")
    monkeypatch.undo()
    assert any(path.suffix == ".tmp" for path in folder.parts.iterdir())
    again = RunFolder(tmp_path)
    assert (again.done("a"), again.done("b")) == (True, False)
    assert len(again.frame()) == 1
    assert again.recall("order") is None
    again.write("b", [score(), score()])
    assert len(again.frame()) == 3


def test_what_a_resumed_run_needs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.recall("chunk", 7) == 7
    folder.remember("chunk", {"rows": [1, 2], "share": 0.1})
    assert RunFolder(tmp_path).recall("chunk") == {"rows": [1, 2], "share": 0.1}


def test_operators_that_are_not_scored(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.skip("a", "no image")
    folder.fail("b", "not finite")
    folder.fail("b", "not finite again")
    folder.fail("c", "broken")
    assert RunFolder(tmp_path).endings() == {
        "a": ("skipped", "no image"), "b": ("failed", "not finite"), "c": ("failed", "broken"),
    }  # fmt: skip


def test_after_write_is_called(tmp_path: Path) -> None:
    folder, calls = RunFolder(tmp_path), []
    folder.after_write = lambda: calls.append(len(folder.frame()))
    folder.write("a", [score()])
    folder.write("b", [score()])
    assert calls == [1, 2]


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a folder."""
    code = (
        "import sys, time; from pathlib import Path; from qvl_hydra.runs.folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked(): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_folder_has_one_holder_and_the_lock_falls_with_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with holder(tmp_path) as other:
        refusal = r"another run is writing in .*; wait for it, or .* hydra\.run\.dir"
        with pytest.raises(RunFolderError, match=refusal), folder.locked():
            pass
        other.kill()  # without a chance to clean up
        other.wait()
        with folder.locked():
            pass
    with pytest.raises(ZeroDivisionError), folder.locked():
        raise ZeroDivisionError
    with folder.locked():
        pass


def killed_run(path: Path, fingerprint: str = "f", status: str | None = None, parts: int = 1) -> RunFolder:
    folder = RunFolder(path)
    for index in range(parts):
        folder.write(f"exact-{index}", [score(sample=f"s{index}")])
    write_json(path / FINGERPRINT, {"fingerprint": fingerprint})
    if status is not None:
        write_json(path / "run.json", {"status": status})
        write_json(path / END, {"end": "FINISHED"})
    return folder


def test_the_latest_unfinished_run_of_the_same_settings_is_found(tmp_path: Path) -> None:
    root, asking = tmp_path / "outputs", tmp_path / "outputs" / "now"
    assert find_resumable(earlier_runs([root, tmp_path / "nowhere"]), "f", asking) is None
    killed_run(root / "complete", status="complete")
    killed_run(root / "other", fingerprint="g")
    killed_run(root / "nothing done", parts=0)
    killed_run(asking)
    (killed_run(root / "unreadable").path / FINGERPRINT).write_text("{")
    assert find_resumable(earlier_runs([root]), "f", asking) is None
    for age, (name, status) in enumerate([("day/new", "partial"), ("day/old", None), ("day/oldest", "failed")]):
        folder = killed_run(root / name, status=status)
        then = time.time() - 100 * age
        os.utime(folder.path / FINGERPRINT, (then, then))
    assert find_resumable(earlier_runs([root]), "f", asking) == root / "day" / "new"
    with holder(root / "day" / "new"):
        assert find_resumable(earlier_runs([root]), "f", asking) == root / "day" / "old"


def test_a_run_is_taken_over_once(tmp_path: Path) -> None:
    source = killed_run(tmp_path / "outputs" / "killed", parts=3)
    source.remember("row_chunk", 8)
    (source.parts / "exact-3.parquet.tmp").write_bytes(b"half a file")
    before = {path.name: path.stat().st_mtime_ns for path in source.parts.glob("*.parquet")}
    target = RunFolder(tmp_path / "outputs" / "next")
    adopt(source.path, target)
    assert {path.name: path.stat().st_mtime_ns for path in target.parts.glob("*.parquet")} == before
    assert target.recall("row_chunk") == 8
    assert not any(path.suffix == ".tmp" for path in target.parts.iterdir())
    pd.testing.assert_frame_equal(target.frame(), source.frame())
    assert json.loads((target.path / store.RESUMED_FROM).read_text()) == {"folder": str(source.path)}
    assert find_resumable(earlier_runs([tmp_path / "outputs"]), "f", target.path) is None


def test_finished_jobs_of_a_stopped_multirun_are_found(tmp_path: Path) -> None:
    root = tmp_path / "multirun"
    first, second = root / "day" / "10-00", root / "day" / "11-00"
    killed_run(first / "0", status="complete")
    note_sweep(first, ended=False)
    note_sweep(second, ended=False)
    assert find_resumable(earlier_runs([root]), "f", second / "0") == first / "0"
    # A job of the same multirun is measured for itself.
    assert find_resumable(earlier_runs([root]), "f", first / "1") is None
    adopt(first / "0", RunFolder(second / "0"))
    assert (first / "0" / FINGERPRINT).exists()  # a finished run stays what it is
    note_sweep(first, ended=True)
    assert find_resumable(earlier_runs([root]), "f", second / "0") is None
