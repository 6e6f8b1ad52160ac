"""Any two or more runs side by side: what differs in their settings, and whether they can be compared at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from qvl_hydra.comparison import alignment
from qvl_hydra.comparison.reading import RunScores
from qvl_hydra.comparison.resampling import SampleTable
from qvl_hydra.comparison.stability import Criterion
from qvl_hydra.errors import ComparisonError

FEWEST = 3  # operators in common: two have no order that could disagree by degrees
ASIDE = ("tracking.", "compare.", "profile.", "export.", "task.", "resume", "hydra.")  # decide no score
DERIVED = ("scheme", "estimator", "device")  # told by run.json; settings name them better where they differ
IDENTITIES = ("model_sha", "calibration_sha")
COSTS = (
    "n_scored", "n_skipped", "n_failed", "n_samples", "calibration_size", "calibration_seed", "engine_s", "forward_s",
    "forward_equivalents", "wall_s", "peak_memory_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Mapped:
    """A run seen through the reference's operators.

    Attributes:
        run: the run itself.
        alignment: one row an operator of the reference (columns of `alignment.COLUMNS`).
        scores: by operator of the reference; nan where the run has none.
    """

    run: RunScores
    alignment: pd.DataFrame
    scores: pd.Series

    @property
    def name(self) -> str:
        return self.run.name

    def samples(self, ops: pd.Index) -> SampleTable:
        """Per-sample scores of operators of the reference, all of which the run has scored."""
        own = self.alignment.set_index("op").loc[ops, "other_op"]
        table = self.run.samples()
        places = self.run.scores.index.get_indexer(pd.Index(own))
        return SampleTable(table.scores[places], table.values[places], table.samples)


def map_runs(runs: Sequence[RunScores], reference: RunScores) -> tuple[list[Mapped], dict[str, str]]:
    """See every run through the reference's operators.

    Returns:
        The runs that can be compared, the reference first, and the reason for each one that cannot.

    Raises:
        ComparisonError: fewer than two runs are left.
    """
    kept: list[Mapped] = []
    refused: dict[str, str] = {}
    for run in [reference, *(run for run in runs if run is not reference)]:
        same_model = run is reference or _identity(run) == _identity(reference)
        aligned = (alignment.same_names if same_model else alignment.by_depth)(reference.table, run.table)
        own = run.scores.reindex(aligned["other_op"].tolist()).to_numpy(float)
        scores = pd.Series(own, index=pd.Index(aligned["op"], name="op"))
        reason = _refusal(run, reference, int((scores.notna() & reference.scores.reindex(scores.index).notna()).sum()))
        if reason is None:
            kept.append(Mapped(run, aligned, scores))
        else:
            refused[run.name] = reason
    if len(kept) < 2:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ComparisonError(
            f"nothing to compare with {reference.name} ({reasons or 'it is the only run'}); "
            "give two or more runs that scored operators of one kind"
        )
    return kept, refused


def _identity(run: RunScores) -> tuple[object, ...]:
    """What names a run's model: its path and shape; names of operators then mean the same in both runs."""
    model = run.config.get("model", {})
    return model.get("path"), model.get("family"), str(model.get("overrides"))


def _refusal(run: RunScores, reference: RunScores, common: int) -> str | None:
    if run.scores.empty:
        return "no operator was scored"
    if common >= FEWEST:
        return None
    kinds = [" and ".join(sorted(set(item.table["component"]))) for item in (run, reference)]
    if kinds[0] != kinds[1]:
        return f"it scored {kinds[0]}, the reference {kinds[1]}: {common} operators in common"
    return f"{common} operators in common with the reference, at least {FEWEST} are needed"


def differences(runs: Sequence[RunScores]) -> pd.DataFrame:
    """Settings, samples, models and versions that are not the same in all runs: one row a key, one column a run."""
    flat = {run.name: _flat(run) for run in runs}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    rows = {key: [flat[run.name].get(key, "") for run in runs] for key in keys}
    differing = {key: values for key, values in rows.items() if len(set(values)) > 1}
    return pd.DataFrame.from_dict(differing, orient="index", columns=[run.name for run in runs])


def _flat(run: RunScores) -> dict[str, str]:
    settings = {key: value for key, value in _leaves(run.config) if not key.startswith(ASIDE)}
    record = run.run.plain()
    told = {key: str(record[key]) for key in (*IDENTITIES, *DERIVED) if key in record}
    versions = {f"versions.{key}": value for key, value in run.run.versions.items()}
    return {**settings, **told, **versions}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def named(runs: Sequence[RunScores]) -> list[RunScores]:
    """The runs with short, different names made of what differs: `size=8 seed=1`, `inc_fx`."""
    numbered = [replace(run, name=str(index)) for index, run in enumerate(runs)]
    table = differences(numbered)
    groups = {key.removesuffix(".name") for key in table.index if key.endswith(".name")}
    derived = [key for key in table.index if key in (*IDENTITIES, *DERIVED) or key.startswith("versions.")]
    settings = [key for key in table.index if key not in derived]
    chosen = [key for key in settings if key.endswith(".name") or key.split(".")[0] not in groups]
    labels: list[str] = []
    for keys in (chosen, settings, [*settings, *(key for key in derived if key in DERIVED)]):
        labels = [" ".join(_label(key, table.loc[key, run.name]) for key in keys)[:60] for run in numbered]
        if len(set(labels)) == len(labels):
            break
    labels = [label or run.folder.name for label, run in zip(labels, numbered, strict=True)]
    counts = Counter(labels)
    unique = [label if counts[label] == 1 else f"{label} #{index + 1}" for index, label in enumerate(labels)]
    return [replace(run, name=label) for run, label in zip(runs, unique, strict=True)]


def _label(key: str, value: object) -> str:
    return str(value) if key.endswith(".name") else f"{key.rpartition('.')[2]}={value}"


def pick_reference(runs: Sequence[RunScores]) -> RunScores:
    """The run with the most calibration samples; the first of several."""
    return max(runs, key=lambda run: (run.run.calibration_size or 0, run.run.n_samples or 0))


def costs(runs: Sequence[RunScores]) -> pd.DataFrame:
    """What each run took: one row a run, columns `COSTS`; empty where it is not known."""
    rows = [{"run": run.name, **{key: getattr(run.run, key) for key in COSTS}} for run in runs]
    return pd.DataFrame(rows).astype(dict.fromkeys(COSTS, "float64"))


def operator_table(
    runs: Sequence[Mapped], criterion: Criterion, probabilities: Mapping[str, pd.Series]
) -> pd.DataFrame:
    """One row an operator of the reference: for each run its score, rank, status and probability in the top k."""
    reference = runs[0].run.table
    frame = reference[["op", "component", "block", "role", "group", "n_params"]].reset_index(drop=True)
    for mapped in runs:
        own = mapped.alignment["other_op"]
        status = mapped.run.table["status"].reindex(own.tolist()).fillna("no counterpart")
        frame[f"score:{mapped.name}"] = mapped.scores.to_numpy(float)
        frame[f"rank:{mapped.name}"] = mapped.scores.rank(ascending=False, method="first").astype("Int64").to_numpy()
        frame[f"status:{mapped.name}"] = status.to_numpy()
        chance = probabilities[mapped.name].reindex(own.tolist()).to_numpy(float)
        frame[f"p_top_{criterion.top_k}:{mapped.name}"] = chance
    return frame
