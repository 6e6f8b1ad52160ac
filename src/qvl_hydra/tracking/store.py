"""Where MLflow writes: the tracking URI, the artifact root beside it, the experiment, and how to open the UI.

Everything is absolute, so that the store can be opened from any folder. Only an `http` URI reaches a network.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shlex
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from qvl_hydra.errors import QvlHydraError, TrackingError
from qvl_hydra.runs.lock import Lock, LockedError
from qvl_hydra.settings import TrackingSettings

logging.getLogger("alembic").setLevel(logging.WARNING)  # a new store tells every migration otherwise
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # what it raises is told, see `told`

from mlflow import MlflowClient  # noqa: E402  (after its loggers were quieted)

SQLITE = "sqlite:///"
STORE_FILE = "mlflow.db"
ARTIFACT_FOLDER = "mlartifacts"
SILENT_S = 600.0  # so long a server that did not answer is not asked again: one wait a multirun
_silent: dict[str, float] = {}  # when a server did not answer
SERVER_RETRIES = "1"  # a server that is away must not hold up a run that has its result on disk
SERVER_TIMEOUT_S = "8"


def tracking_uri(settings: TrackingSettings) -> str:
    """The absolute tracking URI: `mlflow.db` in the working folder unless the settings name another place."""
    uri = settings.uri
    if uri is None:
        return _sqlite(Path.cwd() / STORE_FILE)
    if uri.startswith(SQLITE):
        return _sqlite(_file(uri).expanduser().absolute())
    if "://" in uri or uri == "databricks":
        return uri
    path = Path(uri.removeprefix("file:")).expanduser().absolute()
    return _sqlite(path) if path.suffix == ".db" else path.as_uri()


def _sqlite(path: Path) -> str:
    """The URI of a SQLite file, whose path may hold what means something in a URI."""
    return SQLITE + str(path).replace("%", "%25").replace("?", "%3F")


def _file(uri: str) -> Path:
    """The file of a SQLite URI."""
    return Path(unquote(uri.removeprefix(SQLITE)))


def is_server(uri: str) -> bool:
    """Whether the URI is a tracking server's, which keeps the artifacts itself."""
    return uri.startswith(("http://", "https://", "databricks"))


def artifact_root(settings: TrackingSettings) -> str | None:
    """Where a new experiment's artifacts go, as an absolute URI; None leaves it to the server."""
    if settings.artifact_location is not None:
        given = settings.artifact_location
        return given if "://" in given else Path(given.removeprefix("file:")).expanduser().absolute().as_uri()
    uri = tracking_uri(settings)
    if is_server(uri):
        return None
    return (_store_folder(uri) / ARTIFACT_FOLDER).as_uri()


def ui_command(settings: TrackingSettings) -> str:
    """What to type to see the runs: the command of the UI, or the server's address."""
    uri = tracking_uri(settings)
    if is_server(uri):
        return f"open {masked(uri)}"
    return f"mlflow ui --backend-store-uri {shlex.quote(masked(uri))}"


def open_client(settings: TrackingSettings) -> MlflowClient:
    """A client of the store; a SQLite store is made on first use.

    Raises:
        TrackingError: the store cannot be opened.
    """
    uri = tracking_uri(settings)
    with told(uri), _store_lock(uri):
        _make(uri)
        _require_open(uri)
        client = MlflowClient(tracking_uri=uri)
        client.get_experiment_by_name(settings.experiment)  # makes the tables of a new store, one process at a time
    return client


def _make(uri: str) -> None:
    """Make a SQLite store beside its place, and put it there whole: half of its tables are no store for anybody."""
    path = _file(uri)
    if not uri.startswith(SQLITE) or path.exists():
        return
    for left in path.parent.glob(f"{path.name}.new-*"):  # of one that was killed
        left.unlink(missing_ok=True)
    beside = path.with_name(f"{path.name}.new-{uuid.uuid4().hex}")
    MlflowClient(tracking_uri=_sqlite(beside)).search_experiments(max_results=1)
    os.replace(beside, path)


def _require_open(uri: str) -> None:
    """Open a SQLite store once: MLflow tries one that cannot be opened for minutes."""
    if uri.startswith(SQLITE):
        with contextlib.closing(sqlite3.connect(_file(uri), timeout=10)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
            connection.execute("BEGIN IMMEDIATE")


def masked(uri: str) -> str:
    """A URI without the secrets that stand in it."""
    parts = urlsplit(uri)
    if parts.password is None and not parts.query:
        return uri
    place = parts.netloc.rpartition("@")
    user = f"{parts.username or ''}:***@" if parts.password is not None else f"{place[0]}{place[1]}"
    return urlunsplit((parts.scheme, user + place[2], parts.path, "***" if parts.query else "", parts.fragment))


def experiment_id(client: MlflowClient, settings: TrackingSettings) -> str:
    """The id of the experiment, which is created when it is not there.

    Raises:
        TrackingError: the server is away, or the experiment was deleted.
    """
    uri = tracking_uri(settings)
    with told(uri), _store_lock(uri):
        found = client.get_experiment_by_name(settings.experiment)
        if found is None:
            created: str = client.create_experiment(settings.experiment, artifact_root(settings), _EXPERIMENT_TAGS)
            return created
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"the MLflow experiment {settings.experiment!r} was deleted; take another tracking.experiment, "
            f"or bring it back with `mlflow experiments restore --experiment-id {found.experiment_id}`"
        )
    identity: str = found.experiment_id
    return identity


@contextmanager
def told(uri: str) -> Iterator[None]:
    """Turn MLflow's failures into one message, and keep a server that is away from being asked for minutes.

    Raises:
        TrackingError: in place of any failure of MLflow inside the context.
    """
    if time.monotonic() - _silent.get(uri, -math.inf) < SILENT_S:
        raise TrackingError(f"MLflow at {masked(uri)} did not answer a moment ago; start it, or correct tracking.uri")
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": SERVER_RETRIES, "MLFLOW_HTTP_REQUEST_TIMEOUT": SERVER_TIMEOUT_S}
    unset = [name for name in limits if name not in os.environ]
    os.environ.update({name: limits[name] for name in unset})
    try:
        yield
    except QvlHydraError:
        raise
    except Exception as error:  # MLflow, its stores' drivers and its clients raise a dozen unrelated kinds
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        if "Max retries exceeded" in reason or "timed out" in reason:
            reason = "it does not answer"
            _silent[uri] = time.monotonic()
        reason = reason.replace(uri, masked(uri))
        advice = "start it, or correct tracking.uri" if is_server(uri) else "look at it, or set another tracking.uri"
        raise TrackingError(f"MLflow at {masked(uri)} cannot be used ({reason}); {advice}") from error
    finally:
        for name in unset:
            os.environ.pop(name, None)


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold a lock file; it falls with the process. On a read-only place there is nothing to protect, and no lock.

    Raises:
        TrackingError: a process of another machine has held it for long.
    """
    try:
        lock = Lock(path, wait=True)
    except OSError:
        yield
        return
    except LockedError as error:
        raise TrackingError(str(error)) from error
    with closing(lock):
        yield


@contextmanager
def _store_lock(uri: str) -> Iterator[None]:
    """One process at a time makes tables and experiments of a SQLite store; MLflow's own first steps race."""
    if not uri.startswith(SQLITE):
        yield
        return
    _store_folder(uri).mkdir(parents=True, exist_ok=True)
    path = _file(uri)
    with file_lock(path.with_name(f"{path.name}.lock")):
        yield


def _store_folder(uri: str) -> Path:
    """The folder beside which artifacts of a local store go."""
    if uri.startswith(SQLITE):
        return _file(uri).parent
    if uri.startswith("file:"):
        return Path(unquote(urlsplit(uri).path)).parent
    return Path.cwd()


_EXPERIMENT_TAGS = {
    "mlflow.note.content": (
        "Sensitivity of the operators of Qwen-VL models to quantization. "
        "`score/<operator>` and `rank/<operator>` compare operators between runs; "
        "`by_block/<role>` draws scores over depth."
    ),
    "mlflow.experimentKind": "custom_model_development",  # else the UI asks on the first visit
}
