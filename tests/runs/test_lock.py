"""Locks with `flock` and without: one holder, gone with its process."""

from __future__ import annotations

import errno
import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qvl_hydra.errors import RunFolderError
from qvl_hydra.runs.folder import RunFolder, hold
from qvl_hydra.runs.lock import Lock, LockedError, is_held
from qvl_hydra.tracking import store

# Holds a lock, in a file system without flock where that is asked for, and says so.
HOLDER = """
import errno, fcntl, sys, time
from pathlib import Path
from qvl_hydra.runs.lock import Lock
def none(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")
if sys.argv[2] == "without":
    fcntl.flock = none
held = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["with", "without"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    def none(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if request.param == "without":
        monkeypatch.setattr(fcntl, "flock", none)
    return str(request.param)


def test_a_lock_has_one_holder_and_falls_with_its_process(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    assert not is_held(path)
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path), kind], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert is_held(path)
        with pytest.raises(LockedError, match="another process holds"):
            Lock(path)
        with pytest.raises(RunFolderError, match="another command is at work"):
            hold(path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not is_held(path)
    Lock(path).close()
    Lock(path).close()


def test_a_folder_is_one_runs_at_a_time(kind: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.locked(), pytest.raises(RunFolderError, match="another run is writing"), folder.locked():
        raise AssertionError
    with folder.locked():
        assert is_held(tmp_path / "run.lock")


def test_stores_are_locked(kind: str, tmp_path: Path) -> None:
    for _ in range(2):
        with store.file_lock(tmp_path / "store.lock"):
            assert is_held(tmp_path / "store.lock")
    with store.file_lock(tmp_path / "no" / "such" / "folder.lock"):  # a place that is not there is not protected
        assert not is_held(tmp_path / "store.lock")
