"""Opens, sends and closes the MLflow runs of run folders and of multiruns.

Which run belongs to a folder is kept in the folder (`mlflow.json`; `mlflow_parent.json` for a multirun). The key in it
is also a tag of the run, so that a run is found again when the answer of the server was lost, and so that the same
folder sent to a second server makes exactly one run there. One file because opening, sending and ending read and write
that one key, and a change to one of them is a change to all.
"""

from __future__ import annotations

import dataclasses
import getpass
import json
import logging
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from qvl_hydra.errors import TrackingError
from qvl_hydra.runs.files import read_json, write_json
from qvl_hydra.runs.folder import LOCK, SWEEP_LOCK
from qvl_hydra.runs.lock import is_held
from qvl_hydra.settings import TrackingSettings
from qvl_hydra.tracking import content
from qvl_hydra.tracking.logged_model import dataset_of, send_model
from qvl_hydra.tracking.store import experiment_id, file_lock, masked, open_client, told, tracking_uri

T = TypeVar("T")
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
RECORD = "mlflow.json"
PARENT_RECORD = "mlflow_parent.json"
KEY_TAG = "record_key"
PARENT_TAG = "mlflow.parentRunId"
TABLE, LOGGED_TABLES = "scores.json", "mlflow.loggedArtifacts"  # what MLflow's UI shows and `load_table` reads
_ABANDONED = 200  # runs that are looked at when one begins
_METRIC_BATCH, _PARAM_BATCH = 1000, 100  # MLflow's limits of one request
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepParent:
    """The multirun that a run is a job of.

    Attributes:
        folder: the sweep folder, above the jobs' folders.
        name: of the parent run.
        tags: of the parent run; `sweep_id` among them.
    """

    folder: Path
    name: str
    tags: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, sweep_folder: Path) -> SweepParent:
        """The multirun in a folder."""
        identity = sweep_id(sweep_folder)
        return cls(sweep_folder, f"sweep {identity}", {"sweep_id": identity})


def sweep_id(sweep_folder: Path) -> str:
    """Name of a multirun: the date and time of its folder."""
    return f"{sweep_folder.parent.name}_{sweep_folder.name}"


@contextmanager
def tracked_beside(
    sweep_folder: Path, folder: Path, settings: TrackingSettings, name: str, tags: Mapping[str, str],
    say: Callable[[str], None],
) -> Iterator[None]:
    """Track what follows the jobs of a multirun, in a folder beside theirs, as one more run below its parent.

    Args:
        name: what the run is called, with the multirun's id behind it.
        say: told how to send the run later, where MLflow cannot be used.
    """  # fmt: skip
    if settings.enabled:
        identity = sweep_id(sweep_folder)
        own = {**tags, "sweep_id": identity}
        open_run(settings, folder, name=f"{name} {identity}", tags=own, sweep=SweepParent.of(sweep_folder))
    status: RunStatus = "FAILED"
    try:
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if settings.enabled:
            try:
                send_run(folder, settings, status)
            except TrackingError as error:
                say(f"not tracked: {error}\nsend it later: python -m qvl_hydra.tracking.send {folder}")


def open_run(
    settings: TrackingSettings, folder: Path, *, name: str, tags: Mapping[str, str], sweep: SweepParent | None
) -> str | None:
    """Create the folder's run with status RUNNING, or open it again when the folder has one.

    Returns:
        The run id; None, with a warning, when MLflow cannot be used: the result stays on disk and is sent later.
    """
    _keep_record(folder / RECORD, name, tags, settings, _sweep_entry(folder, sweep))
    try:
        client = open_client(settings)
        with told(tracking_uri(settings)):
            run_id = _folder_run(client, settings, folder)
            client.update_run(run_id, status="RUNNING")
            _end_abandoned(client, settings, folder)
    except TrackingError as error:
        logger.warning(
            "%s\nThe result stays on disk; send it later with: python -m qvl_hydra.tracking.send %s", error, folder
        )
        return None
    return run_id


def send_run(folder: Path, settings: TrackingSettings, status: RunStatus = "FINISHED") -> str:
    """Send everything the folder holds to its run, which is made when there is none; sending again changes nothing.

    A parameter that the run has already keeps its first value, as MLflow demands; `config.yaml` among the artifacts
    is the latest.

    Returns:
        The run id.

    Raises:
        TrackingError: MLflow cannot be used; the folder is as before.
    """
    if not (folder / RECORD).exists():
        _keep_record(folder / RECORD, folder.name, {}, settings, None)
    client = open_client(settings)
    with told(tracking_uri(settings)):
        run_id = _folder_run(client, settings, folder)
        _send_content(client, run_id, folder)
        client.set_terminated(run_id, status, end_time=_end_time(folder))
        send_model(client, run_id, folder, _end_time(folder), settings.register)
    return run_id


def _end_abandoned(client: MlflowClient, settings: TrackingSettings, own: Path) -> None:
    """End the runs of this machine whose process is gone: a kill leaves them RUNNING, and nobody comes back to them."""
    experiment = experiment_id(client, settings)
    query = f"attributes.status = 'RUNNING' and tags.host = '{socket.gethostname()}'"
    for run in client.search_runs([experiment], query, max_results=_ABANDONED):
        folder = Path(run.data.tags.get("folder", ""))
        lock = folder / (SWEEP_LOCK if run.data.tags.get("task") == "multirun" else LOCK)
        above = own.parent == folder  # the multirun that this run is a job of, perhaps in another process
        if folder == own or above or is_held(lock):
            continue
        if client.get_run(run.info.run_id).info.status == "RUNNING":  # and did not end since it was found
            client.set_terminated(run.info.run_id, "KILLED")


def end_superseded(folder: Path, settings: TrackingSettings, by: str) -> None:
    """End the run of a killed folder whose work another run took over; one that ended by itself stays as it is.

    Args:
        by: id of the run that went on.

    Raises:
        TrackingError: MLflow cannot be used.
    """
    run_id = recorded_run(folder).get("run_id")
    if run_id is None or recorded_run(folder)["uri"] != masked(tracking_uri(settings)):
        return
    client = open_client(settings)
    with told(tracking_uri(settings)):
        if _is_active(client, run_id):
            client.set_tag(run_id, "resumed_as", by)
            if client.get_run(run_id).info.status == "RUNNING":
                client.set_terminated(run_id, "KILLED")


def parent_run(sweep_folder: Path, settings: TrackingSettings, name: str, tags: Mapping[str, str]) -> str:
    """The one run above all jobs of a multirun, created by whichever job comes first.

    Raises:
        TrackingError: MLflow cannot be used.
    """
    _keep_record(sweep_folder / PARENT_RECORD, name, {"task": "multirun", **tags}, settings, None)
    client = open_client(settings)
    with told(tracking_uri(settings)):
        return _ensure_run(client, settings, sweep_folder / PARENT_RECORD, {})


def finish_parent(
    sweep_folder: Path,
    settings: TrackingSettings,
    *,
    status: RunStatus = "FINISHED",
    note: str = "",
    metrics: Mapping[str, float] | None = None,
) -> str:
    """End the multirun's run, with a description in Markdown and its numbers (jobs finished, failed).

    Raises:
        TrackingError: MLflow cannot be used, or the folder has no parent run.
    """
    path = sweep_folder / PARENT_RECORD
    if not path.exists():
        raise TrackingError(f"{sweep_folder} has no {PARENT_RECORD}: no multirun was tracked there")
    client = open_client(settings)
    now = int(time.time() * 1000)
    with told(tracking_uri(settings)):
        run_id = _ensure_run(client, settings, path, {})
        if note:
            client.set_tag(run_id, "mlflow.note.content", note[: content.TAG_LIMIT])
        client.log_batch(run_id, metrics=[Metric(key, value, now, 0) for key, value in (metrics or {}).items()])
        client.set_terminated(run_id, status)
    return run_id


def recorded_run(folder: Path) -> dict[str, Any]:
    """What the folder knows of its run: `run_id`, `uri`, `experiment_id`; empty when it was never tracked."""
    return read_json(folder / RECORD)


def recorded_settings(folder: Path, uri: str | None = None) -> TrackingSettings:
    """The tracking settings a folder was run with, its store named absolutely; `uri` takes their place."""
    known = {item.name for item in dataclasses.fields(TrackingSettings)}
    given = content.config(folder).get("tracking", {})
    settings = TrackingSettings(**{"uri": None, **{key: value for key, value in given.items() if key in known}})
    record = recorded_run(folder)
    return dataclasses.replace(
        settings,
        uri=uri or record.get("uri") or settings.uri,
        experiment=record.get("experiment") or settings.experiment,
    )


def _keep_record(
    path: Path, name: str, tags: Mapping[str, str], settings: TrackingSettings, sweep: dict[str, Any] | None
) -> None:
    """Write the record of a run that is still to be made; one that exists stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(path.with_suffix(".lock")):
        if path.exists():
            return
        write_json(
            path,
            {
                "key": uuid.uuid4().hex,
                "name": name,
                "tags": {key: str(value) for key, value in tags.items()},
                "start_time": int(time.time() * 1000),
                "sweep": sweep,
                "uri": masked(tracking_uri(settings)),
                "experiment": settings.experiment,
                "run_id": None,
                "experiment_id": None,
            },
        )


def _sweep_entry(folder: Path, sweep: SweepParent | None) -> dict[str, Any] | None:
    if sweep is None:
        return None
    relative = os.path.relpath(sweep.folder.absolute(), folder.absolute())  # still right when the sweep is moved
    return {"folder": relative, "name": sweep.name, "tags": dict(sweep.tags)}


def _folder_run(client: MlflowClient, settings: TrackingSettings, folder: Path) -> str:
    """The run of a folder, below the run of its multirun."""
    sweep = recorded_run(folder).get("sweep")
    above = {}
    if sweep is not None:
        above[PARENT_TAG] = parent_run((folder / sweep["folder"]).resolve(), settings, sweep["name"], sweep["tags"])
    return _ensure_run(client, settings, folder / RECORD, above)


def _ensure_run(client: MlflowClient, settings: TrackingSettings, path: Path, above: Mapping[str, str]) -> str:
    """The run that a record names in this store: the one it has, one with its key, or a new one."""
    with file_lock(path.with_suffix(".lock")):
        record, uri = read_json(path), tracking_uri(settings)
        if record["uri"] == masked(uri) and record["run_id"] and _is_active(client, record["run_id"]):
            return str(record["run_id"])
        experiment = experiment_id(client, settings)
        same_key = client.search_runs([experiment], filter_string=f"tags.{KEY_TAG} = '{record['key']}'", max_results=1)
        if same_key:
            run_id = same_key[0].info.run_id
        else:
            origin = {
                KEY_TAG: record["key"],
                "mlflow.user": getpass.getuser(),
                "mlflow.source.name": "qvl_hydra",
                "folder": str(path.parent.absolute()),
                "host": socket.gethostname(),
            }
            created = client.create_run(
                experiment, record["start_time"], tags={**record["tags"], **origin, **above}, run_name=record["name"]
            )
            run_id = created.info.run_id
        write_json(path, {**record, "uri": masked(uri), "run_id": run_id, "experiment_id": experiment})
        return str(run_id)


def _is_active(client: MlflowClient, run_id: str) -> bool:
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _send_content(client: MlflowClient, run_id: str, folder: Path) -> None:
    present = client.get_run(run_id).data.params
    params = [Param(key, value) for key, value in content.parameters(folder).items() if key not in present]
    for part in _batches(params, _PARAM_BATCH):
        client.log_batch(run_id, params=part)
    stamp = _end_time(folder)  # the same at every sending: equal rows are one row
    metrics = [
        Metric(metric.key, metric.value, stamp if metric.time is None else metric.time, metric.step)
        for metric in content.metrics(folder)
    ]
    for batch in _batches(metrics, _METRIC_BATCH):
        client.log_batch(run_id, metrics=batch)
    files, large = content.artifacts(folder)
    tags = content.tags(folder)
    if large:
        tags["files_left_out"] = ", ".join(str(path.relative_to(folder)) for path in large)[: content.TAG_LIMIT]
    table = content.score_table(folder)
    if table is not None:
        tags[LOGGED_TABLES] = json.dumps([{"path": TABLE, "type": "table"}])
        _send_table(client, run_id, table)
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    _send_datasets(client, run_id, folder)
    for path in files:
        inside = path.relative_to(folder).parent.as_posix()
        client.log_artifact(run_id, str(path), None if inside == "." else inside)


def _send_table(client: MlflowClient, run_id: str, table: pd.DataFrame) -> None:
    """What `mlflow.log_table` would make, which appends to what is there: the scores again at every sending."""
    with tempfile.TemporaryDirectory(prefix="qvl_hydra_") as place:
        path = Path(place) / TABLE
        table.to_json(path, orient="split", index=False)
        client.log_artifact(run_id, str(path))


def _send_datasets(client: MlflowClient, run_id: str, folder: Path) -> None:
    """The calibration and the evaluation set as data set inputs; a digest is the hash over all tensors of a set."""
    for purpose in ("calibration", "evaluation"):
        found = content.samples(folder, purpose)
        if not found:
            continue
        source = {key: found.get(key) for key in ("source", "size", "seed")}
        profile = {"num_rows": len(found.get("samples", [])), "num_bad": len(found.get("bad", []))}
        name, digest = dataset_of(found)
        dataset = Dataset(
            name=name,
            digest=digest,
            source_type="local",
            source=json.dumps(source),
            schema=json.dumps({"mlflow_colspec": [{"name": "sample", "type": "string", "required": True}]}),
            profile=json.dumps(profile),
        )
        client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", purpose)])])


def _end_time(folder: Path) -> int:
    """When the folder's result was written, in milliseconds, not before the run began; now, when it has none."""
    path = folder / "run.json"
    written = int((path.stat().st_mtime if path.exists() else time.time()) * 1000)
    return max(written, recorded_run(folder)["start_time"])


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
