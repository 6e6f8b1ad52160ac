"""Finds runs to read: folders on disk, runs of the tracker by id, by sweep id, or by a filter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from qvl_hydra.errors import ComparisonError, RunFolderError
from qvl_hydra.runs.files import read_json, write_json
from qvl_hydra.runs.record import RunRecord, read_record
from qvl_hydra.settings import TrackingSettings
from qvl_hydra.tracking.content import config
from qvl_hydra.tracking.record import RECORD
from qvl_hydra.tracking.store import experiment_id, open_client, told, tracking_uri

MOST = 500  # runs of one search
UI_MODE = "workflowType=machine_learning"  # the UI shows runs of models, not traces of agents
NEEDED = (
    "run.json", "config.yaml", "sample_scores.parquet", "experts.parquet", "calibration.json", "profile.json",
    "profiles.parquet",
)  # fmt: skip


@dataclass
class Found:
    """Run folders to read, and the runs that left no scores, with the reason.

    Attributes:
        folders: each with the scheme asked for; None is the scheme that ranks.
    """

    folders: list[tuple[Path, str | None]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def find_runs(
    settings: TrackingSettings, references: Sequence[str], sweep_id: str | None, query: str | None, into: Path
) -> Found:
    """All runs that are asked for, on disk.

    Args:
        references: run ids, run folders or folders above them, each with `#scheme` for a scheme of `quant.also`.
        sweep_id: also every sweep of this multirun.
        query: also every sweep that an MLflow filter finds.
        into: folder that runs of the tracker are downloaded to.

    Raises:
        ComparisonError: a reference or search finds nothing.
        TrackingError: the tracker cannot be used.
    """
    found = Found()
    for reference in references:
        place, _, scheme = reference.partition("#")
        if Path(place).expanduser().is_dir():
            _add_folder(found, Path(place).expanduser().absolute(), scheme or None)
        else:
            _add_tracked(found, settings, [_run_by_id(settings, place)], scheme or None, into)
    for text, filter_string in ((sweep_id, f"tags.sweep_id = '{sweep_id}'"), (query, query)):
        if text:
            runs = _search(settings, str(filter_string))
            if not runs:
                raise ComparisonError(
                    f"no sweep in {tracking_uri(settings)}, experiment {settings.experiment!r}, matches {filter_string}"
                )
            _add_tracked(found, settings, runs, None, into)
    return found


def jobs_of(sweep_folder: Path) -> Found:
    """The sweeps below a folder: those that are complete, and why the others are not."""
    found = Found()
    folders = {path.parent for name in ("config.yaml", "run.json") for path in sweep_folder.glob(f"*/{name}")}
    for folder in sorted(
        folders, key=lambda path: (not path.name.isdigit(), int(path.name) if path.name.isdigit() else 0)
    ):
        try:
            run = read_record(folder)
        except RunFolderError as error:
            found.missing[folder.name] = str(error)
            continue
        own = config(folder)
        if (run and run.task == "compare") or own.get("task", {}).get("name") == "compare":
            continue
        if own.get("shard") is not None:  # the run that they are merged to stands for them
            continue
        if run and run.status == "complete" and (folder / "scores.parquet").exists():
            found.folders.append((folder, None))
        else:
            found.missing[folder.name] = _why(run)
    return found


def _why(run: RunRecord | None) -> str:
    if run is None:
        return "it left no result"
    if run.status == "failed":
        return f"it failed: {run.error}"
    if run.status == "partial":
        return "it was stopped before its end"
    return f"it has no scores (task {run.task})"


def _add_folder(found: Found, folder: Path, scheme: str | None) -> None:
    if (folder / "scores.parquet").exists():
        found.folders.append((folder, scheme))
        return
    below = jobs_of(folder)
    if not below.folders and not below.missing:
        raise ComparisonError(f"{folder} has no scores.parquet, nor a run below it; give the folder of a sweep")
    found.folders += [(path, scheme) for path, _ in below.folders]
    found.missing.update(below.missing)


def _run_by_id(settings: TrackingSettings, run_id: str) -> Run:
    client = open_client(settings)
    with told(tracking_uri(settings)):
        try:
            return client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise ComparisonError(
                f"{run_id!r} is neither a folder nor a run of {tracking_uri(settings)}; "
                "give a run folder, or an id that the UI shows"
            ) from error


def _search(settings: TrackingSettings, filter_string: str) -> list[Run]:
    client = open_client(settings)
    identity = experiment_id(client, settings)
    with told(tracking_uri(settings)):
        runs = client.search_runs([identity], filter_string, max_results=MOST, order_by=["attributes.start_time ASC"])
    return [run for run in runs if run.data.tags.get("task", "sweep") == "sweep"]


def _add_tracked(found: Found, settings: TrackingSettings, runs: Sequence[Run], scheme: str | None, into: Path) -> None:
    client, uri = open_client(settings), tracking_uri(settings)
    for run in runs:
        name = f"{run.info.run_name} ({run.info.run_id[:8]})"
        with told(uri):
            folder = _download(client, run, into / run.info.run_id)
        if (folder / "scores.parquet").exists():
            record = {"run_id": run.info.run_id, "experiment_id": run.info.experiment_id, "uri": uri}
            write_json(folder / RECORD, record)
            found.folders.append((folder, scheme))
        else:
            found.missing[name] = f"it has no scores (status {run.info.status})"


def _download(client: MlflowClient, run: Run, into: Path) -> Path:
    into.mkdir(parents=True, exist_ok=True)
    for item in client.list_artifacts(run.info.run_id):
        if item.path in NEEDED or (item.path.startswith("scores") and item.path.endswith(".parquet")):
            client.download_artifacts(run.info.run_id, item.path, str(into))
    return into


def run_link(folder: Path) -> tuple[str, str] | None:
    """Run id, and the link to its page that works inside the MLflow UI; None when the folder was never tracked."""
    record = read_json(folder / RECORD)
    if not record.get("run_id"):
        return None
    return record["run_id"], f"#/experiments/{record['experiment_id']}/runs/{record['run_id']}?{UI_MODE}"
