"""Reads a sweep's run folder into what comparisons and reports work on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from qvl_hydra.comparison.resampling import SampleTable, sample_table
from qvl_hydra.errors import ComparisonError
from qvl_hydra.runs.files import damaged, read_json, read_table, read_yaml
from qvl_hydra.runs.record import RunRecord, read_record

NEEDED = ("op", "component", "block", "role", "group", "status", "score", "rank", "metric", "estimator")  # columns


@dataclass(frozen=True)
class RunScores:
    """One sweep as its folder holds it.

    Attributes:
        name: short label, unique among the runs compared.
        config: resolved settings.
        run: `run.json`.
        table: `scores.parquet`, indexed by operator, in data order.
        sample_scores: the per-sample rows behind the score of each operator; empty when the run kept none.
        run_id: of the MLflow run, when it is tracked.
        uri: of the store that has it.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    run: RunRecord
    table: pd.DataFrame
    sample_scores: pd.DataFrame
    run_id: str | None = None
    uri: str | None = None

    @property
    def scores(self) -> pd.Series:
        """Score of each scored operator, in data order."""
        return self.table.loc[self.table["status"] == "scored", "score"].astype(float)

    def samples(self, ops: pd.Index | None = None) -> SampleTable:
        """Per-sample scores of the operators named (default: all that are scored)."""
        scores = self.scores if ops is None else self.scores.loc[ops]
        rows = self.sample_scores[self.sample_scores["op"].isin(scores.index)]
        return sample_table(scores, rows)


def read_run(folder: Path, *, name: str | None = None, scheme: str | None = None) -> RunScores:
    """Read a run folder, finished or not.

    Args:
        scheme: one of `quant.also`, whose scores the run keeps in a table of their own; null: the scheme that ranks.

    Raises:
        ComparisonError: the folder has no scores.
        RunFolderError: a file of it is damaged.
    """
    path = folder / ("scores.parquet" if scheme is None else f"scores_{scheme}.parquet")
    if not path.exists():
        others = ", ".join(sorted(item.name for item in folder.glob("scores*.parquet"))) or "no scores at all"
        raise ComparisonError(f"{folder} has no {path.name} ({others}); give the folder of a sweep that has scores")
    table = read_table(path, NEEDED).set_index("op", drop=False)
    if table.index.has_duplicates:
        raise damaged(path, f"{table.index[table.index.duplicated()][0]} stands in it twice")
    run = read_record(folder) or RunRecord("sweep", "partial")  # the run goes on
    tracked = read_json(folder / "mlflow.json")
    config = read_yaml(folder / "config.yaml")
    return RunScores(
        name=name or folder.name,
        folder=folder,
        config=config,
        run=run if scheme is None else replace(run, scheme=scheme),
        table=table,
        sample_scores=_ranking_rows(folder, table, scheme or run.scheme),
        run_id=tracked.get("run_id"),
        uri=tracked.get("uri"),
    )


def _ranking_rows(folder: Path, table: pd.DataFrame, scheme: str | None) -> pd.DataFrame:
    """The rows of `sample_scores.parquet` that the table's scores are means of."""
    path = folder / "sample_scores.parquet"
    if not path.exists():
        return pd.DataFrame({"op": [], "sample": [], "value": []})
    rows = read_table(path, ("op", "sample", "value", "metric", "estimator", "scheme"))
    if scheme is not None and rows["scheme"].nunique() > 1:
        rows = rows[rows["scheme"] == scheme]
    wanted = table[["metric", "estimator"]].rename(columns={"metric": "row_metric", "estimator": "row_estimator"})
    joined = rows.join(wanted, on="op")
    same = (joined["metric"] == joined["row_metric"]) & (joined["estimator"] == joined["row_estimator"])
    return rows[same.fillna(False)]
