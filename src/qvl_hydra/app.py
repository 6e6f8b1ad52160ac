"""The entry: composes settings, runs the task, tracks it, and turns errors into one message and an exit status.

Exit status: 0 done, 1 an error that is not the user's (HYDRA_FULL_ERROR=1 shows where), 2 wrong settings or input,
130 stopped by Ctrl-C or a polite kill.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import time
import traceback
import types
from pathlib import Path

import hydra
import transformers
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qvl_hydra.command_line import check_command_line, config_folder, settings_from_config
from qvl_hydra.errors import QvlHydraError, TrackingError
from qvl_hydra.scores.store import RunFolder, write_atomically, write_json
from qvl_hydra.screen import Screen
from qvl_hydra.settings import QuantSettings, Settings
from qvl_hydra.tracking.record import SweepParent, finish_parent, open_run, send_run
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
            self._fail(error, folder)

    def _tracked(self, settings: Settings, folder: RunFolder, config: DictConfig) -> None:
        """Run the task between opening and sending its MLflow run."""
        write_atomically(folder.path / "config.yaml", OmegaConf.to_yaml(config, resolve=True).encode())
        if settings.tracking.enabled:
            open_run(settings.tracking, folder.path, name=_run_name(settings), tags=self._tags(settings), sweep=self._sweep())
        status = "FAILED"
        try:
            self._run_task(settings, folder)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            if settings.tracking.enabled:
                self._send(settings, folder, status)
        self.screen.say(f"files: {folder.path}")
        if settings.tracking.enabled:
            self.screen.say(f"compare runs: {ui_command(settings.tracking)}")

    def _run_task(self, settings: Settings, folder: RunFolder) -> None:
        task = importlib.import_module(TASKS[settings.task.name])
        if settings.task.name == "sweep":
            task.run(settings, folder, self.screen, [_scheme_settings(name) for name in settings.quant.also])
        else:
            task.run(settings, folder, self.screen)

    def _send(self, settings: Settings, folder: RunFolder, status: str) -> None:
        try:
            send_run(folder.path, settings.tracking, status)  # type: ignore[arg-type]
        except TrackingError as error:
            self.screen.say(f"not tracked: {error}\nsend it later with: python -m qvl_hydra.tracking.send {folder.path}")

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
        text = str(error) if wrong else f"{type(error).__name__}: {error}"
        self.screen.say(f"error: {text}")
        log.error("%s\n%s", text, traceback.format_exc())
        result = folder.path / "run.json"
        if not result.exists():
            write_json(result, {"status": "failed", "error": text, "fingerprint": None})
        if not wrong:
            self.screen.say(f"this is a fault of the program; {folder.path / 'run.log'} has the details")
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise error

    def after_multirun(self) -> None:
        """Close the parent run and compare what finished, whichever jobs failed."""
        if self.sweep_folder is None or self.settings is None:
            return
        failed = [index for index, end in enumerate(self.ends) if end != "FINISHED"]
        if failed:
            self.screen.say(f"{len(failed)} of {len(self.ends)} jobs did not finish: {', '.join(map(str, failed))}")
        if getattr(self.settings.compare, "after", False) and len(self.ends) - len(failed) > 1:
            self._compare()
        if self.settings.tracking.enabled:
            status = "FAILED" if failed else "FINISHED"
            counts = {"jobs": float(len(self.ends)), "jobs_failed": float(len(failed))}
            try:
                finish_parent(self.sweep_folder, self.settings.tracking, status=status, metrics=counts)  # type: ignore[arg-type]
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


def _run_name(settings: Settings) -> str:
    if settings.tracking.run_name:
        return settings.tracking.run_name
    parts = [settings.task.name, settings.model.name, settings.component.name]
    if settings.task.name == "sweep":
        parts += [settings.strategy.name, settings.backend.name, f"n{settings.calibration.size}"]
    return " ".join(parts) + time.strftime(" %H:%M:%S")


def _scheme_settings(name: str) -> QuantSettings:
    """Settings of a scheme named in `quant.also`."""
    folder = config_folder() / "quant"
    if not (folder / f"{name}.yaml").is_file():
        allowed = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise QvlHydraError(f"quant.also names {name!r}; allowed: {allowed}")
    content: dict[str, object] = {}
    for base in yaml.safe_load((folder / f"{name}.yaml").read_text()).get("defaults", []):
        if base != "_self_":
            content |= vars(_scheme_settings(base))
    own = yaml.safe_load((folder / f"{name}.yaml").read_text())
    content |= {key: value for key, value in own.items() if key != "defaults"}
    return QuantSettings(**content)  # type: ignore[arg-type]


def _stop_politely(signum: int, frame: types.FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line, and exit."""
    screen = Screen()
    transformers.utils.logging.disable_progress_bar()  # one bar is enough
    try:
        check_command_line(sys.argv[1:])
    except QvlHydraError as error:
        screen.say(f"error: {error}")
        sys.exit(WRONG_INPUT)
    signal.signal(signal.SIGTERM, _stop_politely)
    entry = Entry(screen)
    run = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(entry.job)
    try:
        run()
    except KeyboardInterrupt:
        entry.status = STOPPED
    except SystemExit as end:
        entry.status = max(entry.status, end.code if isinstance(end.code, int) else BROKEN)
    if entry.status != STOPPED:
        entry.after_multirun()
    sys.exit(entry.status)


if __name__ == "__main__":
    main()
