"""How the jobs of a multirun ended, and what follows when all have: from the disk alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from qvl_hydra.entry.compose import with_choices
from qvl_hydra.entry.process import STOPPED, WRONG_INPUT
from qvl_hydra.errors import QvlHydraError, RunFolderError, TrackingError
from qvl_hydra.runs.files import read_json, read_yaml, write_json
from qvl_hydra.runs.folder import SWEEP_LOCK, hold, note_sweep
from qvl_hydra.runs.lock import Lock
from qvl_hydra.screen import Screen
from qvl_hydra.settings import Settings, judge_settings
from qvl_hydra.tracking.record import RunStatus, finish_parent

ENDS = "jobs"  # in the sweep folder: one file a job that has ended


@dataclass(frozen=True)
class End:
    """How a job ended.

    Attributes:
        end: as MLflow has it; LOST: it left no word, since its process was killed.
        status: the exit status that it asks for.
        folder: its run folder.
    """

    end: Literal["FINISHED", "FAILED", "KILLED", "LOST"]
    status: int
    folder: str = ""


def begin(sweep_folder: Path, swept: Sequence[str]) -> Lock:
    """Note that a multirun begins; what an earlier one left of its jobs' ends is gone.

    Args:
        swept: keys with a value a job.

    Returns:
        What holds the folder as long as it is kept.

    Raises:
        RunFolderError: another command is at work there.
    """
    held = hold(sweep_folder / SWEEP_LOCK)
    shutil.rmtree(sweep_folder / ENDS, ignore_errors=True)
    note_sweep(sweep_folder, ended=False, swept=swept)
    return held


def note_end(sweep_folder: Path, number: int, folder: Path, end: End) -> None:
    """Leave word of a job's end, whichever process it ran in."""
    write_json(sweep_folder / ENDS / f"{number}.json", {**asdict(end), "folder": str(folder)})


def ends_of(sweep_folder: Path, jobs: int) -> list[End]:
    """How each of so many jobs ended."""
    found = []
    for number in range(jobs):
        content = read_json(sweep_folder / ENDS / f"{number}.json")
        found.append(End(**content) if content else End("LOST", WRONG_INPUT))
    return found


def after_multirun(sweep_folder: Path, jobs: int, stopped: bool, screen: Screen) -> int:
    """Close the parent run and compare what finished, whichever jobs failed; after Ctrl-C only close it.

    Returns:
        The exit status: the worst of all jobs.
    """
    ends = ends_of(sweep_folder, jobs)
    stopped = stopped or any(end.end == "KILLED" for end in ends)
    status = STOPPED if stopped else max((end.status for end in ends), default=0)
    if not stopped:
        note_sweep(sweep_folder, ended=all(end.end != "LOST" for end in ends))
    failed = [number for number, end in enumerate(ends) if end.end != "FINISHED"]
    if failed and not stopped:
        screen.say(f"{len(failed)} of {jobs} jobs did not finish: {', '.join(map(str, failed))}")
    if any(end.end == "LOST" for end in ends) and not stopped:
        screen.say("jobs were lost with their process; the same command goes on from what they had measured")
    settings = _settings_of(ends)
    if settings is None:
        return status
    if not stopped:
        status = max(status, _follow(sweep_folder, settings, jobs - len(failed) > 1, screen))
    if settings.tracking.enabled:
        end: RunStatus = "KILLED" if stopped else "FAILED" if failed else "FINISHED"
        counts = {"jobs": float(jobs), "jobs_failed": float(len(failed))}
        try:
            finish_parent(sweep_folder, settings.tracking, status=end, metrics=counts)
        except TrackingError as error:
            screen.say(f"the multirun's own run was not tracked: {error}")
    return status


def _settings_of(ends: list[End]) -> Settings | None:
    """The settings of the first job that left its own."""
    for end in ends:
        if end.folder:
            try:
                settings, _ = judge_settings(read_yaml(Path(end.folder) / "config.yaml"))
            except RunFolderError:
                continue
            if settings is not None:
                return settings
    return None


def _follow(sweep_folder: Path, settings: Settings, several: bool, screen: Screen) -> int:
    """Merge what are shards, and compare what is asked for and several; the exit status."""
    try:
        if settings.shard is not None:
            from qvl_hydra.tasks.merge import merge_multirun

            several = merge_multirun(sweep_folder, screen, with_choices) > 1
        if settings.compare.after and several:
            from qvl_hydra.tasks.compare import compare_sweep

            compare_sweep(sweep_folder, settings, screen)
    except QvlHydraError as error:
        screen.say(f"error: {error}")
        return WRONG_INPUT
    return 0
