"""A run as data frames, for notebooks: `qvl_hydra.read(run)`; docs/notebook.md has examples."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from qvl_hydra.errors import QvlHydraError, RunFolderError
from qvl_hydra.runs.files import read_json, read_table, read_yaml
from qvl_hydra.runs.record import RunRecord, record_of
from qvl_hydra.settings import TrackingSettings
from qvl_hydra.tracking.read import find_runs


@dataclass(frozen=True)
class Run:
    """What one run left.

    Attributes:
        folder: its files; of a tracked run a download of those that are read, until the program ends.
        record: `run.json`.
        settings: the resolved settings, as `config.yaml` holds them.
        scores: one row an operator and scheme, in data order: op, scheme, component, block, role, score, interval, rank
            and what else `scores.parquet` has; None where nothing was scored.
        sample_scores: every score of every sample and probe; None likewise.
        profiles: one row a profile measured; None where none was.
        profile: the profile decided on: operators by choice, bits, prediction; empty where there is none.
    """

    folder: Path
    record: RunRecord
    settings: Mapping[str, Any]
    scores: pd.DataFrame | None
    sample_scores: pd.DataFrame | None
    profiles: pd.DataFrame | None
    profile: Mapping[str, Any]


def read(run: str | Path, uri: str | None = None) -> Run:
    """Read a run folder, or a run of MLflow by its id.

    Args:
        uri: of the store that has the run; None: `mlflow.db` beside the working folder.

    Raises:
        QvlHydraError: there is no such run, or a file of it is damaged, named.
    """
    folder = Path(run).expanduser()
    if not folder.is_dir():
        try:
            settings = TrackingSettings(uri)
            ((folder, _), *_) = find_runs(settings, [str(run)], None, None, _copies()).folders
        except ValueError as error:
            raise QvlHydraError(f"the run {run} has no scores to read") from error
    if not (folder / "run.json").is_file():
        raise RunFolderError(f"{folder} has no run.json; give the folder of a run")
    record = record_of(folder)
    return Run(
        folder=folder.absolute(),
        record=record,
        settings=read_yaml(folder / "config.yaml"),
        scores=_scores(folder, record),
        sample_scores=_table(folder / "sample_scores.parquet"),
        profiles=_table(folder / "profiles.parquet"),
        profile=read_json(folder / "profile.json"),
    )


@functools.cache
def _copies() -> Path:
    """Where runs of the store are copied to, until the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="qvl_hydra_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _scores(folder: Path, record: RunRecord) -> pd.DataFrame | None:
    """The tables of all schemes, one below the other."""
    found = []
    for path in [folder / "scores.parquet", *sorted(folder.glob("scores_*.parquet"))]:
        table = _table(path)
        if table is not None:
            scheme = record.scheme if path.stem == "scores" else path.stem.removeprefix("scores_")
            found.append(table.assign(scheme=scheme))
    return pd.concat(found, ignore_index=True) if found else None


def _table(path: Path) -> pd.DataFrame | None:
    return read_table(path) if path.is_file() else None
