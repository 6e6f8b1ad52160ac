"""What a run folder says to MLflow: parameters, metrics, tags, description, data set, files; from the folder alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from qvl_hydra.backends.table import BACKENDS
from qvl_hydra.profiles.families import THIRDS
from qvl_hydra.runs.files import read_json, read_table, read_yaml
from qvl_hydra.runs.record import read_record
from qvl_hydra.scores.interval import interval_text
from qvl_hydra.tracking.store import masked
from qvl_hydra.tracking.system import looks

VALUE_LIMIT = 6000  # characters of a parameter, MLflow's own limit
TAG_LIMIT = 8000
KEY_LIMIT = 250
LARGEST_ARTIFACT = 256 * 1024**2  # bytes; an exported model stays where it is
TOP_ROWS = 15  # operators in a run's description
PROFILE_CURVES = (
    "exact_match", "kl_answer", "kl", "loss", "squared_error", "predicted", "predicted_joint", "average_bits",
)  # fmt: skip
_HELD_OUT = (
    "exact_match", "kl", "loss", "squared_error", "recovered", "best_baseline", "identical", "largest_difference",
    "relative_difference",
)  # fmt: skip
_TAG_KEYS = ("task", "status", "model", "component", "strategy", "backend", "estimator", "scheme")
PLAN = "profile.json"
TABLE_COLUMNS = (
    "op", "component", "block", "role", "status", "reason", "score", "score_low", "score_high", "rank", "metric",
    "unit", "estimator",
)  # fmt: skip
_IDENTITY = frozenset({"calibration_size", "calibration_seed", "calibration_bad", "seed"})  # no results
_FILES = (
    "config.yaml", "run.json", "end.json", "run.log", "report.html", "description.md", "calibration.json",
    "scores.parquet", "sample_scores.parquet", "resumed_from.json", "inc_order.json", "profile.json",
    "plans.json", "keep_lists.json", "profiles.parquet", "comparison.json", "comparison.parquet", "pairs.parquet",
    "stability.parquet", "parts.parquet", "regret.parquet", "alignment.parquet", "costs.parquet",
    "evaluation.json", "families.parquet", "experts.parquet", "system.jsonl",
)  # fmt: skip
PLAN_FOLDERS = ("exports", "inc", "compressed_tensors")  # what others read of a profile or checkpoint
_FOLDERS = ("figures", "onnx", *PLAN_FOLDERS, *BACKENDS)


@dataclass(frozen=True)
class Measured:
    """One metric value; `step` is the block of a `by_block` curve, what stays float of a profile's curve, else 0.

    Attributes:
        time: when it was seen, in milliseconds; None: at the end of the run.
    """

    key: str
    value: float
    step: int = 0
    time: int | None = None


def _plain(folder: Path) -> dict[str, Any]:
    """`run.json` in plain values, without its version; empty while there is none."""
    record = read_record(folder)
    return {} if record is None else {key: value for key, value in record.plain().items() if key != "version"}


def config(folder: Path) -> dict[str, Any]:
    """The resolved settings of the run, as `config.yaml` holds them; empty when there is none."""
    return read_yaml(folder / "config.yaml")


def parameters(folder: Path) -> dict[str, str]:
    """The resolved settings of `config.yaml`, one flat key a value (`calibration.size`)."""
    return {
        _legal(key): (masked(str(value)) if key == "tracking.uri" else str(value))[:VALUE_LIMIT]
        for key, value in leaves(config(folder), ".")
    }


def metrics(folder: Path) -> list[Measured]:
    """Scores and ranks of every scored operator, their curves over depth, the numbers of `run.json`, profile curves.

    The most sensitive operator comes first: the UI's compare view opens on the first metric it is given.
    """
    path = folder / "scores.parquet"
    found = list(_score_metrics(read_table(path))) if path.exists() else []
    found += [
        Measured(_legal(key), float(value))
        for key, value in leaves(_plain(folder), "/")
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in _IDENTITY
    ]
    path = folder / "families.parquet"
    found += list(_family_metrics(read_table(path))) if path.exists() else []
    path = folder / "profiles.parquet"
    found += list(_profile_metrics(read_table(path))) if path.exists() else []
    found += [
        Measured(_legal(f"system/{key}"), float(value), step, int(look["time"]))
        for step, look in enumerate(looks(folder))
        for key, value in look.items()
        if key != "time"
    ]
    return [metric for metric in found if math.isfinite(metric.value)]


def _family_metrics(families: pd.DataFrame) -> Iterator[Measured]:
    """What a family loses, one curve a role; the step is the third of the tower, from the front."""
    for row in families[families["depth"] != ""].to_dict("records"):
        name = _legal(f"by_family/{row['component']}.{row['role']}")
        yield Measured(name, row["sum_of_scores"], THIRDS.index(row["depth"]))


def _profile_metrics(profiles: pd.DataFrame) -> Iterator[Measured]:
    """One curve a chooser and measurement; the step is the number of operators in high precision."""
    for row in profiles.drop_duplicates(["chooser", "n_high"]).to_dict("records"):
        for column in PROFILE_CURVES:
            if pd.notna(row[column]):
                yield Measured(_legal(f"curve/{row['chooser']}/{column}"), float(row[column]), int(row["n_high"]))


def _score_metrics(scores: pd.DataFrame) -> Iterator[Measured]:
    rows = scores[scores["status"] == "scored"].sort_values("rank").to_dict("records")
    for kind in ("score", "rank"):
        for row in rows:
            yield Measured(_legal(f"{kind}/{row['op']}"), float(row[kind]))
    for row in rows:
        if pd.notna(row["block"]):
            yield Measured(_legal(f"by_block/{row['component']}.{row['role']}"), float(row["score"]), int(row["block"]))


def score_table(folder: Path) -> pd.DataFrame | None:
    """The scores of every operator, for a table that is read over many runs; None where there are none."""
    path = folder / "scores.parquet"
    if not path.exists():
        return None
    table = read_table(path)
    return table[[name for name in TABLE_COLUMNS if name in table]]


def tags(folder: Path) -> dict[str, str]:
    """What runs are filtered by (task, status, model, component, strategy, ...), the description, and further tags."""
    run = _plain(folder)
    found = {key: str(run[key]) for key in _TAG_KEYS if run.get(key) is not None}
    found.update({key: str(value)[:TAG_LIMIT] for key, value in run.get("tags", {}).items()})
    note = description(folder)
    return {**found, "mlflow.note.content": note} if note else found


def description(folder: Path) -> str:
    """Markdown for the run's page: the folder's `description.md`, else its most sensitive operators."""
    own = folder / "description.md"
    if own.exists():
        return own.read_text()[:TAG_LIMIT]
    path = folder / "scores.parquet"
    if not path.exists():
        return ""
    run, scores = _plain(folder), read_table(path)
    counts = scores["status"].value_counts()
    summary = ", ".join(f"{counts.get(status, 0)} {status}" for status in ("scored", "skipped", "failed"))
    names = " · ".join(str(run.get(key, "")) for key in ("model", "component", "strategy", "backend"))
    lines = [
        f"**{names}**",
        "",
        f"{len(scores)} operators: {summary}. Higher scores are more sensitive.",
        "",
        *_top_table(scores),
    ]
    lines += ["", *(f"- {note}" for note in run.get("notes", []))] if run.get("notes") else []
    return "\n".join(lines)[:TAG_LIMIT]


def _top_table(scores: pd.DataFrame) -> list[str]:
    ranked = scores[scores["status"] == "scored"].sort_values("rank").head(TOP_ROWS)
    lines = ["| rank | operator | score | interval |", "|---|---|---|---|"]
    for row in ranked.to_dict("records"):
        interval = interval_text(row["score"], row["score_low"], row["score_high"], digits=4)
        lines.append(f"| {row['rank']} | `{row['op']}` | {row['score']:.4g} {row['unit'] or ''} | {interval} |")
    return lines


def artifacts(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files that a run writes, by name, as far as they are there: those that are sent, and those that are too large."""
    named = [*(folder / name for name in _FILES), *sorted(folder.glob("scores_*.parquet"))]  # those of `quant.also`
    inside = [path for name in _FOLDERS for path in sorted((folder / name).rglob("*"))]
    found = [path for path in (*named, *inside) if path.is_file() and path.suffix not in (".tmp", ".lock")]
    large = [path for path in found if path.stat().st_size > LARGEST_ARTIFACT]
    return [path for path in found if path not in large], large


def samples(folder: Path, purpose: str) -> dict[str, Any]:
    """What `calibration.json` or `evaluation.json` says of its samples: source, size, sha, ids; empty without one."""
    return read_json(folder / f"{purpose}.json")


@dataclass(frozen=True)
class Plan:
    """A profile or checkpoint that a run made.

    Attributes:
        name: as a LoggedModel may be called.
        kind: `profile` or `checkpoint`.
        parameters: what it was decided from.
        figures: its size, and what it was predicted to cost.
        held_out: what it cost on held-out samples.
    """

    name: str
    kind: str
    parameters: dict[str, str]
    figures: dict[str, float]
    held_out: dict[str, float]


def plan(folder: Path) -> Plan | None:
    """What the run decided; None where it decided nothing, or did not come to its end."""
    run, decided = _plain(folder), read_json(folder / PLAN)
    if not decided or run.get("status") != "complete":
        return None
    told = {key: value for key, value in decided.items() if not isinstance(value, list | dict)}
    numbers = told | dict(leaves(run.get(run["task"], {}), "/"))
    figures: dict[bool, dict[str, float]] = {True: {}, False: {}}
    for key, value in numbers.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            figures[key.rpartition("/")[2].startswith(_HELD_OUT)][_legal(key)] = float(value)
    return Plan(
        re.sub(r"[^\w-]", "_", f"{run['model']}-{run['component']}-{told['scheme']}-{told['budget']}")[:KEY_LIMIT],
        "checkpoint" if run["task"] == "quantize" else "profile",
        {key: str(run[key]) for key in _TAG_KEYS if run.get(key) is not None}
        | {key: str(value) for key, value in told.items() if not isinstance(value, int | float)},
        figures[False],
        figures[True],
    )


def leaves(tree: Mapping[str, Any], joint: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings, by its keys in one."""
    for key, value in tree.items():
        name = f"{prefix}{joint}{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from leaves(value, joint, name)
        else:
            yield name, value


def _legal(key: str) -> str:
    """The key with characters that MLflow refuses replaced, at most as long as it allows."""
    return re.sub(r"[^\w.\- :/]", "_", key)[:KEY_LIMIT]
