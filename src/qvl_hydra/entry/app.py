"""The entry: checks the command line, lets Hydra run its jobs, and ends with one exit status.

Exit status: 0 done, 1 an error that is not the user's (HYDRA_FULL_ERROR=1 shows where), 2 wrong settings or input, or
too little memory or disk, 130 stopped by Ctrl-C or a polite kill.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra

from qvl_hydra.entry.command_line import Checked, as_typed, check_command_line, quoted
from qvl_hydra.entry.compose import config_folder, take_saved_settings, with_choices
from qvl_hydra.entry.process import (
    BROKEN,
    STOPPED,
    WRONG_INPUT,
    be_quiet,
    have_streams,
    keep_to_own_cores,
    note_command,
    said,
    show_traceback,
    stop_politely,
)
from qvl_hydra.errors import QvlHydraError
from qvl_hydra.runs.lock import Lock
from qvl_hydra.screen import Screen


def main() -> None:
    """Run the command line, and exit."""
    note_command()
    have_streams()
    be_quiet()
    screen = Screen()
    try:
        sys.argv[1:], config_name = take_saved_settings(as_typed(sys.argv[1:]))
        checked = check_command_line(sys.argv[1:], config_name)
        if checked.dry:
            _foretell(checked, screen)
            sys.exit(0)
        held = None if checked.sweep_folder is None else _begin(checked.sweep_folder, checked.swept)
        if checked.folder is not None:
            if not checked.multirun:
                _require_writable(checked.folder)
            sys.argv.append(f"hydra.{'sweep' if checked.multirun else 'run'}.dir={quoted(str(checked.folder))}")
    except KeyboardInterrupt:
        screen.finish()
        screen.say("stopped before anything was begun")
        sys.exit(STOPPED)
    except QvlHydraError as error:
        screen.say(f"error: {error}")
        show_traceback()
        sys.exit(WRONG_INPUT)
    except OSError as error:
        screen.say(f"error: {error.filename or 'the working folder'} cannot be written ({error.strerror})")
        sys.exit(WRONG_INPUT)
    stop_politely()
    status = _run(config_name, checked, screen)
    if held is not None:
        held.close()
    _flush(screen)
    sys.exit(status)


def _begin(sweep_folder: Path, swept: Sequence[str]) -> Lock:
    from qvl_hydra.entry.ends import begin  # takes time to import, which help need not

    return begin(sweep_folder, swept)


def _foretell(checked: Checked, screen: Screen) -> None:
    """Say what each job would do, before anything is made for it."""
    from qvl_hydra.tasks.dry_run import foretell

    assert checked.folder is not None
    keep_to_own_cores()
    for number, settings in enumerate(checked.dry):
        if checked.multirun:
            screen.say(f"job {number}")
        own = checked.folder / str(number) if checked.multirun else checked.folder
        foretell(*with_choices(settings), own, screen)
    if checked.jobs != len(checked.dry):
        screen.say(f"the other {(checked.jobs or 0) - len(checked.dry)} of {checked.jobs} jobs are not told of")


def _require_writable(folder: Path) -> None:
    """Make the folder and the log in it, before Hydra does and fails with a traceback of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.log").open("a").close()


def _run(config_name: str, checked: Checked, screen: Screen) -> int:
    if checked.jobs is None:  # Hydra says something and ends
        return _said_by_hydra(config_name)
    from qvl_hydra.entry.ends import after_multirun
    from qvl_hydra.entry.job import run_job

    status = 0
    ended: list[int] = []  # of a single run, which is always in this process

    def one(config: object) -> None:
        ended.append(run_job(config))  # type: ignore[arg-type]

    job = one if checked.sweep_folder is None else run_job  # a launcher sends it to other processes by its name
    run = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)(job)
    try:
        run()
    except KeyboardInterrupt:
        status = STOPPED
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else BROKEN
    except Exception as error:  # a launcher's: a worker was killed, a scheduler does not answer
        screen.say(f"error: the launcher failed: {said(error).splitlines()[0]}\nthe same command goes on from there")
        show_traceback()
        status = WRONG_INPUT
    if checked.sweep_folder is None:
        return max([status, *ended])
    try:
        return max(status, after_multirun(checked.sweep_folder, checked.jobs, status == STOPPED, screen))
    except KeyboardInterrupt:  # while what finished was merged or compared
        screen.finish()
        screen.say("stopped; every job is done, and the same command goes on from there")
        return max(STOPPED, after_multirun(checked.sweep_folder, checked.jobs, True, screen))


def _said_by_hydra(config_name: str) -> int:
    try:
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)(lambda config: None)()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else BROKEN
    except BrokenPipeError:  # read no further, as `head` does
        _leave_stdout()
    return 0


def _flush(screen: Screen) -> None:
    """What cannot be printed any more (a closed pipe) is no failure of a run whose files are there."""
    try:
        sys.stdout.flush()
    except (BrokenPipeError, OSError):
        _leave_stdout()


def _leave_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
