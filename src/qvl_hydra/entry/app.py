"""The entry: composes settings, runs the task, tracks it, and turns errors into one message and an exit status.

Exit status: 0 done, 1 an error that is not the user's (HYDRA_FULL_ERROR=1 shows where), 2 wrong settings or input, or
too little memory or disk, 130 stopped by Ctrl-C or a polite kill.
"""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import signal
import sys
import time
import traceback
import types
from pathlib import Path

import hydra
import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qvl_hydra.entry.command_line import (
    check_command_line,
    config_folder,
    settings_from_config,
    take_saved_settings,
    with_choices,
)
from qvl_hydra.errors import QvlHydraError, TrackingError
from qvl_hydra.runs.folder import RESUMED_FROM, RunFolder, note_sweep, write_atomically, write_json
from qvl_hydra.runs.resume import refuse_other_settings
from qvl_hydra.screen import Screen
from qvl_hydra.settings import Settings
from qvl_hydra.tracking.record import RunStatus, SweepParent, end_superseded, finish_parent, open_run, send_run
from qvl_hydra.tracking.store import ui_command

TASKS = {
    "sweep": "qvl_hydra.tasks.sweep",
    "compare": "qvl_hydra.tasks.compare",
    "profile": "qvl_hydra.tasks.profile",
    "quantize": "qvl_hydra.tasks.quantize",
    "export_onnx": "qvl_hydra.tasks.export_onnx",
}
STOPPED, WRONG_INPUT, BROKEN = 130, 2, 1
log = logging.getLogger(__name__)


class Entry:
    """One call of the program: a run, or the jobs of a multirun one after the other.

    Attributes:
        status: exit status so far; the worst of all jobs.
        sweep_folder: folder of the multirun, once its first job has started.
    """

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.status = 0
        self.sweep_folder: Path | None = None
        self.settings: Settings | None = None
        self.ends: list[str] = []

    def job(self, config: DictConfig) -> None:
        """Run one composed config in the folder that Hydra made."""
        runtime = HydraConfig.get()
        folder = RunFolder(Path(runtime.runtime.output_dir).absolute())
        if runtime.mode == RunMode.MULTIRUN:
            self.sweep_folder = Path(runtime.sweep.dir).absolute()
            note_sweep(self.sweep_folder, ended=False)
        try:
            self.settings = settings_from_config(config)
            with folder.locked():
                self._tracked(self.settings, folder, config)
            self.ends.append("FINISHED")
        except KeyboardInterrupt:
            self.status = STOPPED
            self.ends.append("KILLED")
            self.screen.finish()
            self.screen.say(f"stopped; what was measured is in {folder.path}, and the same command goes on from there")
            if self.sweep_folder is not None:
                raise
        except Exception as error:  # the jobs of a multirun go on; the exit status tells
            self._fail(_explained(error, folder.path), folder)

    def _tracked(self, settings: Settings, folder: RunFolder, config: DictConfig) -> None:
        """Run the task between opening and sending its MLflow run."""
        refuse_other_settings(settings, folder)
        write_atomically(folder.path / "config.yaml", OmegaConf.to_yaml(config, resolve=True).encode())
        if settings.tracking.enabled:
            tags, name = self._tags(settings), _run_name(settings)
            open_run(settings.tracking, folder.path, name=name, tags=tags, sweep=self._sweep())
        status: RunStatus = "FAILED"
        tracked = False
        try:
            self._run_task(settings, folder)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except Exception as error:
            _note_failure(settings, folder, error)
            raise
        finally:
            if settings.tracking.enabled:
                tracked = self._send(settings, folder, status)
        self.screen.say(f"files: {folder.path}")
        if tracked:
            self.screen.say(f"compare runs: {ui_command(settings.tracking)}")

    def _run_task(self, settings: Settings, folder: RunFolder) -> None:
        task = importlib.import_module(TASKS[settings.task.name])
        if settings.task.name in ("sweep", "profile"):
            settings, further = with_choices(settings)
            task.run(settings, folder, self.screen, further)
        else:
            task.run(settings, folder, self.screen)

    def _send(self, settings: Settings, folder: RunFolder, status: RunStatus) -> bool:
        """Whether the run is with MLflow; where it is not, its files are, and the screen says how to send them."""
        try:
            run_id = send_run(folder.path, settings.tracking, status)
            if (folder.path / RESUMED_FROM).exists():
                source = Path(json.loads((folder.path / RESUMED_FROM).read_text())["folder"])
                end_superseded(source, settings.tracking, run_id)
        except TrackingError as error:
            command = f"python -m qvl_hydra.tracking.send {folder.path}"
            self.screen.say(f"not tracked: {error}\nsend it later with: {command}")
            return False
        return True

    def _tags(self, settings: Settings) -> dict[str, str]:
        tags = {
            "model": settings.model.name,
            "component": settings.component.name,
            "strategy": settings.strategy.name,
            "backend": settings.backend.name,
            "task": settings.task.name,
        }
        if self.sweep_folder is not None:
            tags["sweep_id"] = self.sweep_id
        return tags

    @property
    def sweep_id(self) -> str:
        """Name of the multirun: the date and time of its folder."""
        assert self.sweep_folder is not None
        return f"{self.sweep_folder.parent.name}_{self.sweep_folder.name}"

    def _sweep(self) -> SweepParent | None:
        if self.sweep_folder is None:
            return None
        return SweepParent(self.sweep_folder, f"sweep {self.sweep_id}", {"sweep_id": self.sweep_id})

    def _fail(self, error: Exception, folder: RunFolder) -> None:
        self.screen.finish()
        self.ends.append("FAILED")
        wrong = isinstance(error, QvlHydraError)
        self.status = max(self.status, WRONG_INPUT if wrong else BROKEN)
        log.error("%s\n%s", _text(error), traceback.format_exc())
        self.screen.say(f"error: {_text(error)}")
        _show_traceback()
        if not wrong:
            self.screen.say(f"this is a fault of the program; {folder.path / 'run.log'} has the details")

    def after_multirun(self) -> None:
        """Close the parent run and compare what finished, whichever jobs failed; after Ctrl-C only close it."""
        if self.sweep_folder is None or self.settings is None:
            return
        stopped = self.status == STOPPED
        if not stopped:
            note_sweep(self.sweep_folder, ended=True)
        failed = [index for index, end in enumerate(self.ends) if end != "FINISHED"]
        if failed:
            self.screen.say(f"{len(failed)} of {len(self.ends)} jobs did not finish: {', '.join(map(str, failed))}")
        if self.settings.compare.after and len(self.ends) - len(failed) > 1 and not stopped:
            self._compare()
        if self.settings.tracking.enabled:
            status: RunStatus = "KILLED" if stopped else "FAILED" if failed else "FINISHED"
            counts = {"jobs": float(len(self.ends)), "jobs_failed": float(len(failed))}
            try:
                finish_parent(self.sweep_folder, self.settings.tracking, status=status, metrics=counts)
            except TrackingError as error:
                self.screen.say(f"the multirun's own run was not tracked: {error}")

    def _compare(self) -> None:
        from qvl_hydra.tasks.compare import compare_sweep

        assert self.sweep_folder is not None
        assert self.settings is not None
        try:
            compare_sweep(self.sweep_folder, self.settings, self.screen)
        except QvlHydraError as error:
            self.status = max(self.status, WRONG_INPUT)
            self.screen.say(f"error: {error}")


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, QvlHydraError) else f"{type(error).__name__}: {error}"


def _explained(error: Exception, folder: Path) -> Exception:
    """A full disk or memory with what to do about it; any other error as it is."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        lack = "no space is left on the disk: make some, or take a hydra.run.dir elsewhere"
    elif isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        lack = "memory ran out: take model.placement=streamed, model.dtype=bfloat16 or a smaller backend.row_chunk"
    else:
        return error
    return QvlHydraError(f"{lack} ({folder}); then the same command goes on from what was measured")


def _note_failure(settings: Settings, folder: RunFolder, error: Exception) -> None:
    """Leave a `run.json` that says how the run ended, unless the task left one with what it had."""
    result = folder.path / "run.json"
    if not result.exists():
        write_json(result, {"task": settings.task.name, "status": "failed", "error": _text(error), "fingerprint": None})


def _show_traceback() -> None:
    """Within an `except`: where it happened, for those who asked by HYDRA_FULL_ERROR=1."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exc()


def _run_name(settings: Settings) -> str:
    if settings.tracking.run_name:
        return settings.tracking.run_name
    parts = [settings.task.name, settings.model.name, settings.component.name]
    if settings.task.name == "sweep":
        parts += [settings.strategy.name, settings.backend.name, f"n{settings.calibration.size}"]
    return " ".join(parts) + time.strftime(" %H:%M:%S")


def _stop_politely(signum: int, frame: types.FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line, and exit."""
    logging.raiseExceptions = False  # a full disk is told once, and not again for each line that run.log lacks
    screen = Screen()
    transformers.utils.logging.disable_progress_bar()  # one bar is enough
    try:
        sys.argv[1:], config_name = take_saved_settings(sys.argv[1:])
        check_command_line(sys.argv[1:], config_name)
    except QvlHydraError as error:
        screen.say(f"error: {error}")
        _show_traceback()
        sys.exit(WRONG_INPUT)
    signal.signal(signal.SIGTERM, _stop_politely)
    entry = Entry(screen)
    run = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)(entry.job)
    try:
        run()
    except KeyboardInterrupt:
        entry.status = STOPPED
    except SystemExit as end:
        entry.status = max(entry.status, end.code if isinstance(end.code, int) else BROKEN)
    entry.after_multirun()
    sys.exit(entry.status)


if __name__ == "__main__":
    main()
