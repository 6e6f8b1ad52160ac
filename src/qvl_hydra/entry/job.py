"""One job: a run of one composed config in the folder that Hydra made for it.

Nothing of the process that started it is needed: a launcher can put a job into any other, and how it ended stands on
the disk.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import re
import shlex
import textwrap
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qvl_hydra.entry.compose import settings_from_config, with_choices
from qvl_hydra.entry.ends import End, note_end
from qvl_hydra.entry.process import (
    BROKEN,
    STOPPED,
    WRONG_INPUT,
    be_quiet,
    elsewhere,
    keep_to_own_cores,
    said,
    show_traceback,
    stop_politely,
)
from qvl_hydra.errors import QvlHydraError, RunFolderError, TrackingError
from qvl_hydra.runs.files import read_json, write_atomically, write_json
from qvl_hydra.runs.folder import END, RESUMED_FROM, RunFolder, refuse_foreign_folder, swept_keys
from qvl_hydra.runs.record import RUN_FILE, RunRecord, write_record
from qvl_hydra.runs.resume import refuse_other_settings
from qvl_hydra.screen import Screen
from qvl_hydra.settings import Settings
from qvl_hydra.tracking.record import RunStatus, SweepParent, end_superseded, open_run, send_run, sweep_id
from qvl_hydra.tracking.store import masked, ui_command
from qvl_hydra.tracking.system import watched

TASKS = {
    "sweep": "qvl_hydra.tasks.sweep",
    "merge": "qvl_hydra.tasks.merge",
    "compare": "qvl_hydra.tasks.compare",
    "profile": "qvl_hydra.tasks.profile",
    "quantize": "qvl_hydra.tasks.quantize",
    "export_onnx": "qvl_hydra.tasks.export_onnx",
    "measure_costs": "qvl_hydra.tasks.measure_costs",
}
LACKS = {  # by the system's numbers: what a run lacked, and what to do
    (errno.ENOSPC, errno.EDQUOT): "no space is left on the disk: make some, or take a hydra.run.dir elsewhere",
    (errno.EFBIG,): "a file became too large (ulimit -f, or the file system): take a hydra.run.dir elsewhere",
    (errno.EMFILE, errno.ENFILE): "too many files are open: raise the limit (ulimit -n)",
    (errno.EIO, errno.ESTALE): "a disk failed ({error}): see to it, or take a hydra.run.dir elsewhere",
    (errno.EACCES, errno.EROFS, errno.EPERM): "{place} cannot be written: take a hydra.run.dir elsewhere",
}
NO_MEMORY = ("can't allocate memory", "Cannot allocate memory")  # torch's words, and the system's
LONGEST_NAME = 120  # characters of a run's name
log = logging.getLogger(__name__)


def run_job(config: DictConfig) -> int:
    """Run one composed config; the jobs of a multirun that follow go on after any failure.

    Returns:
        The exit status that the job asks for.

    Raises:
        KeyboardInterrupt: it was stopped, which stops those that would follow.
    """
    be_quiet()
    transformers.utils.logging.disable_progress_bar()  # one bar is enough
    stop_politely()
    keep_to_own_cores()
    runtime = HydraConfig.get()
    path = Path(runtime.runtime.output_dir).absolute()
    sweep, number = None, 0
    if runtime.mode == RunMode.MULTIRUN:
        sweep, number = Path(runtime.sweep.dir).absolute(), int(runtime.job.num)
    return _Job(path, sweep, number, Screen(f"job {number}" if sweep and elsewhere() else "")).run(config)


@dataclass(frozen=True)
class _Job:
    """A job and where it runs.

    Attributes:
        path: its run folder.
        sweep: folder of its multirun; None for one run.
        number: its place in the multirun.
    """

    path: Path
    sweep: Path | None
    number: int
    screen: Screen

    def run(self, config: DictConfig) -> int:
        """Run it and note its end; its exit status."""
        end, own = End("FAILED", BROKEN), False
        try:
            refuse_foreign_folder(self.path)
            folder = RunFolder(self.path)
            settings = settings_from_config(config)
            with folder.locked():
                refuse_other_settings(settings, folder)
                own = True
                self._tracked(settings, folder, config)
            end = End("FINISHED", 0)
        except KeyboardInterrupt:
            end = End("KILLED", STOPPED)
            self.screen.finish()
            self.screen.say(f"stopped; what was measured is in {self.path}, and the same command goes on from there")
            if self.sweep is not None:
                raise
        except Exception as error:
            end = self._fail(_explained(error, self.path, config))
        finally:
            with contextlib.suppress(OSError):  # a full disk; without its end a run counts as killed
                if own:
                    write_json(self.path / END, {"end": end.end})
                if self.sweep is not None:
                    note_end(self.sweep, self.number, self.path, end)
        return end.status

    def _tracked(self, settings: Settings, folder: RunFolder, config: DictConfig) -> None:
        """Run the task between opening and sending its MLflow run."""
        (folder.path / END).unlink(missing_ok=True)
        write_atomically(folder.path / "config.yaml", _saved(config, settings).encode())
        if settings.tracking.enabled:
            open_run(settings.tracking, folder.path, name=self._name(settings), tags=self._tags(settings),
                     sweep=self._parent())  # fmt: skip
        status: RunStatus = "FAILED"
        tracked = False
        try:
            with watched(folder.path) if settings.tracking.enabled else contextlib.nullcontext():
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
        if settings.task.name in ("sweep", "profile", "quantize", "measure_costs"):
            settings, further = with_choices(settings)
            task.run(settings, folder, self.screen, further)
        elif settings.task.name == "merge":
            task.run(settings, folder, self.screen, with_choices)
        else:
            task.run(settings, folder, self.screen)

    def _send(self, settings: Settings, folder: RunFolder, status: RunStatus) -> bool:
        """Whether the run is with MLflow; where it is not, its files are, and the screen says how to send them."""
        try:
            run_id = send_run(folder.path, settings.tracking, status)
            if source := read_json(folder.path / RESUMED_FROM).get("folder"):
                end_superseded(Path(source), settings.tracking, run_id)
        except (TrackingError, RunFolderError) as error:
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
            "command": _command(settings),
        }
        return tags if self.sweep is None else {**tags, "sweep_id": sweep_id(self.sweep)}

    def _name(self, settings: Settings) -> str:
        """What the run is called: a job of a multirun by what it does not share with the others."""
        if settings.tracking.run_name:
            return settings.tracking.run_name
        swept = [] if self.sweep is None else swept_keys(self.sweep)
        own = [item for item in HydraConfig.get().overrides.task if item.partition("=")[0].lstrip("+") in swept]
        return textwrap.shorten(", ".join(own), LONGEST_NAME) or _run_name(settings)

    def _parent(self) -> SweepParent | None:
        if self.sweep is None:
            return None
        return SweepParent.of(self.sweep)

    def _fail(self, error: Exception) -> End:
        self.screen.finish()
        wrong = isinstance(error, QvlHydraError)
        log.error("%s\n%s", said(error), traceback.format_exc())
        self.screen.say(f"error: {said(error)}")
        show_traceback()
        if not wrong:
            self.screen.say(f"this is a fault of the program; {self.path / 'run.log'} has the details")
        return End("FAILED", WRONG_INPUT if wrong else BROKEN)


def _saved(config: DictConfig, settings: Settings) -> str:
    """The resolved settings as they are saved: without the secrets of the tracker's address."""
    resolved = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    if settings.tracking.uri is not None:
        OmegaConf.update(resolved, "tracking.uri", masked(settings.tracking.uri))
    return OmegaConf.to_yaml(resolved)


def _explained(error: Exception, folder: Path, config: DictConfig) -> Exception:
    """What the place that a run writes to lacks, with what to do about it; any other error as it is."""
    told = re.search(r"\(os error (\d+)\)", str(error))  # safetensors' way
    number = int(told[1]) if told else getattr(error, "errno", None)
    if "No space left on device" in str(error):  # without a number
        number = errno.ENOSPC
    lack = next((said for numbers, said in LACKS.items() if number in numbers), None)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in NO_MEMORY):
        smaller = {"model.placement": "streamed", "model.dtype": "bfloat16"}
        asked = [f"{key}={value}, " for key, value in smaller.items() if OmegaConf.select(config, key) != value]
        lack = f"memory ran out: take {''.join(asked)}a smaller backend.row_chunk or fewer samples"
    if lack is None:
        return error
    lack = lack.format(error=error, place=getattr(error, "filename", None) or folder)
    return QvlHydraError(f"{lack} ({folder}); then the same command goes on from what was measured")


def _note_failure(settings: Settings, folder: RunFolder, error: Exception) -> None:
    """Leave a `run.json` that says how the run ended, unless the task left one with what it had."""
    if not (folder.path / RUN_FILE).exists():
        write_record(folder.path, RunRecord(settings.task.name, "failed", said(error)))


def _command(settings: Settings) -> str:
    """The command that repeats this run alone, without the secrets of the tracker's address."""
    given, uri = HydraConfig.get().overrides.task, "tracking.uri="
    own = [f"{uri}{masked(settings.tracking.uri or '')}" if item.startswith(uri) else item for item in given]
    return shlex.join(["python", "-m", "qvl_hydra", *own])


def _run_name(settings: Settings) -> str:
    parts = [settings.task.name, settings.model.name, settings.component.name]
    if settings.task.name == "sweep":
        parts += [settings.strategy.name, settings.backend.name, f"n{settings.calibration.size}"]
    if settings.shard is not None:
        parts.append(f"shard {settings.shard}")
    return " ".join(parts) + time.strftime(" %H:%M:%S")
