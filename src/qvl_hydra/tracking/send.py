"""Sends run folders to MLflow: those whose server was away, or any to a further server.

`python -m qvl_hydra.tracking.send outputs/2026-01-31/12-00-00 [more folders] [--uri http://host:5000]`
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from qvl_hydra.errors import QvlHydraError, TrackingError
from qvl_hydra.runs.files import read_json
from qvl_hydra.runs.folder import END
from qvl_hydra.runs.record import read_record
from qvl_hydra.tracking.record import PARENT_RECORD, RunStatus, finish_parent, recorded_settings, send_run


def run_folders(path: Path) -> list[Path]:
    """The run folders at or below a path.

    Raises:
        TrackingError: there is none.
    """
    files = [file for name in ("run.json", "config.yaml") for file in path.rglob(name)]
    found = sorted({file.parent for file in files if file.parent.name != ".hydra"})
    outermost = [folder for folder in found if not any(parent in found for parent in folder.parents)]
    if not outermost:
        raise TrackingError(f"{path} holds no run: give a run folder (with run.json or config.yaml) or a sweep folder")
    return outermost


def send(path: Path, uri: str | None, experiment: str | None) -> list[tuple[Path, str]]:
    """Send every run at or below a path, and end the multirun's own run if the path is a sweep folder.

    Raises:
        TrackingError: nothing to send, or MLflow cannot be used.
    """
    sent = []
    statuses: list[RunStatus] = []
    for folder in run_folders(path):
        settings = recorded_settings(folder, uri)
        if experiment is not None:
            settings = dataclasses.replace(settings, experiment=experiment)
        status = status_of(folder)
        statuses.append(status)
        sent.append((folder, send_run(folder, settings, status)))
    if (path / PARENT_RECORD).exists():
        ordered: tuple[RunStatus, ...] = ("KILLED", "FAILED")
        worst: RunStatus = next((status for status in ordered if status in statuses), "FINISHED")
        finish_parent(path, settings, status=worst)
    return sent


def status_of(folder: Path) -> RunStatus:
    """How a run ended, by what its folder says; one without a word was killed."""
    end = read_json(folder / END).get("end")
    if end in ("FINISHED", "FAILED", "KILLED"):
        return end  # type: ignore[no-any-return]
    record = read_record(folder)
    known: dict[str, RunStatus] = {"complete": "FINISHED", "failed": "FAILED"}
    return "KILLED" if record is None else known.get(record.status, "KILLED")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m qvl_hydra.tracking.send", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or sweep folders with runs below them")
    parser.add_argument("--uri", help="tracking URI; default: the one the run was made with")
    parser.add_argument("--experiment", help="MLflow experiment; default: the one the run was made with")
    given = parser.parse_args(arguments)
    try:
        for path in given.folders:
            for folder, run_id in send(path, given.uri, given.experiment):
                print(f"{folder}: {run_id}")
    except QvlHydraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
