"""`run.json`: what is written is read back, and what is not a record is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qvl_hydra.errors import RunFolderError
from qvl_hydra.runs.record import RUN_FILE, VERSION, RunRecord, read_record, record_of, write_record

WHOLE = RunRecord(
    "sweep", "complete", model="m", n_ops=3, n_failed=0, wall_s=1.5, engine_s=2, versions={"torch": "2"},
    notes=["a", "b"], details={"row_chunk": 4}, further={"profile": {"n_high": 3}},
)  # fmt: skip


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    with pytest.raises(RunFolderError, match=r"has no run\.json"):
        record_of(tmp_path)
    write_record(tmp_path, WHOLE)
    assert record_of(tmp_path) == WHOLE
    content = json.loads((tmp_path / RUN_FILE).read_text())
    assert content["profile"] == {"n_high": 3}, "what only a task has stands beside the rest"
    assert content["n_failed"] == 0
    assert "error" not in content


def test_a_record_of_before_versions_is_read(tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).write_text(json.dumps({"task": "sweep", "status": "complete", "fingerprint": None}))
    assert record_of(tmp_path) == RunRecord("sweep", "complete")


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"status": "done"}, "status is 'done'"), ({"n_ops": "3"}, "n_ops is '3'"), ({"n_ops": True}, "n_ops is True"),
     ({"wall_s": []}, "wall_s"), ({"notes": [1]}, "notes"), ({"versions": {"a": 1}}, "versions"),
     ({"details": 1}, "details"), ({"task": None}, "lacks task"), ({"version": VERSION + 1}, "newer version")],
)  # fmt: skip
def test_what_is_no_record_is_told(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    (tmp_path / RUN_FILE).write_text(json.dumps(WHOLE.plain() | changes))
    with pytest.raises(RunFolderError, match=said):
        read_record(tmp_path)
