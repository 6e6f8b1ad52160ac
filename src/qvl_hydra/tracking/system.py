"""What the machine does while a run goes on: MLflow's monitors, noted in the run's folder and sent with it.

MLflow's own thread would write to the store all the time; here the store is written to at the end of a run, and a run
without one can be sent later.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

FILE = "system.jsonl"  # one line a look: `time` in milliseconds, and numbers
EVERY_S, SHARE = 10.0, 0.001  # between two looks: that, or that share of the run's time so far
LEAST_S = 60.0  # shorter runs are not noted
logger = logging.getLogger(__name__)


class _ProcessMonitor(BaseMetricsMonitor):  # type: ignore[misc]
    """The memory of the run itself."""

    def collect_metrics(self) -> None:
        self._metrics["process_memory_megabytes"].append(psutil.Process().memory_info().rss / 1e6)

    def aggregate_metrics(self) -> dict[str, float]:
        return {key: round(max(values), 1) for key, values in self._metrics.items()}


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Note processor, memory, disk and GPU in the folder while the body runs, once that takes above a minute."""
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(folder, ended), daemon=True, name="system metrics")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def looks(folder: Path) -> list[dict[str, float]]:
    """What was noted in a run folder, by time; a line that a kill cut off is left out."""
    path = folder / FILE
    found: list[dict[str, float]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _watch(folder: Path, ended: threading.Event) -> None:
    monitors, began = _monitors(), time.monotonic()
    lines: list[str] = []
    while not ended.wait(max(EVERY_S, SHARE * (time.monotonic() - began))):
        try:
            lines.append(json.dumps({"time": int(time.time() * 1000), **_look(monitors)}) + "\n")
            if time.monotonic() - began >= LEAST_S:
                with (folder / FILE).open("a") as file:
                    file.writelines(lines)
                lines.clear()
        except (OSError, psutil.Error) as error:
            logger.warning("system metrics are noted no further: %s", error)
            return


def _look(monitors: list[Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        found |= monitor.aggregate_metrics()
        monitor.clear_metrics()
    return found


def _monitors() -> list[Any]:
    found = [CPUMonitor(), DiskMonitor(), _ProcessMonitor()]
    try:
        found.append(GPUMonitor())
    except Exception as error:  # pynvml, its driver or a GPU is not there, each with an exception of its own
        logger.debug("no GPU is watched: %s", error)
    return found
