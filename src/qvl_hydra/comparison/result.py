"""A whole comparison, and the files it is kept in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from qvl_hydra.comparison import proxy, runs, stability
from qvl_hydra.comparison.agreement import pairs
from qvl_hydra.comparison.alignment import without_counterpart
from qvl_hydra.comparison.reading import RunScores
from qvl_hydra.comparison.runs import Mapped
from qvl_hydra.comparison.stability import Criterion
from qvl_hydra.runs.files import write_json, write_parquet


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        kind: `runs`, `calibration_sizes` or `proxy`.
        runs: those compared, the reference first, each seen through the reference's operators.
        refused: why the others cannot be compared, by name.
        missing: jobs of the sweep that left no result, and what is known of them.
        differences: settings that are not the same in all runs.
        operators: one row an operator.
        pairs: one row a pair of runs.
        parts: proxy: agreement in total, by component and by role.
        curve: calibration_sizes: measured and predicted agreement by number of samples, told apart by `source`.
        regret: proxy: the target's measured error by chooser and budget.
        verdicts: what it comes to, in sentences.
    """

    kind: str
    criterion: Criterion
    runs: tuple[Mapped, ...]
    refused: Mapping[str, str]
    missing: Mapping[str, str]
    differences: pd.DataFrame
    costs: pd.DataFrame
    operators: pd.DataFrame
    pairs: pd.DataFrame
    parts: pd.DataFrame | None = None
    curve: pd.DataFrame | None = None
    regret: pd.DataFrame | None = None
    verdicts: tuple[str, ...] = field(default=())

    @property
    def reference(self) -> RunScores:
        return self.runs[0].run

    @property
    def aligned(self) -> tuple[Mapped, ...]:
        """Runs of another model than the reference's."""
        return tuple(
            item for item in self.runs[1:] if (item.alignment["match"] != "same").any() or self.kind == "proxy"
        )


def compare(
    found: Sequence[RunScores],
    reference: RunScores,
    kind: str,
    criterion: Criterion,
    *,
    draws: int,
    seed: int,
    missing: Mapping[str, str] | None = None,
) -> Comparison:
    """Compare runs with each other.

    Args:
        found: runs with different names, the reference among them.
        draws: resampled score vectors behind intervals and probabilities.
        missing: jobs without a result, by name.

    Raises:
        ComparisonError: fewer than two runs can be compared.
    """
    mapped, refused = runs.map_runs(found, reference)
    kept = [item.run for item in mapped]
    chances = {
        run.name: pd.Series(stability.top_probability(run.samples(), criterion.top_k, draws, seed), run.scores.index)
        for run in kept
    }
    agreement = pairs(mapped, criterion, draws, seed)
    curve = _curve(mapped, agreement, criterion, draws, seed) if kind == "calibration_sizes" else None
    parts = None
    if kind == "proxy":
        per_run = [proxy.agreement_in_parts(mapped[0], item, criterion, draws, seed) for item in mapped[1:]]
        parts = pd.concat(per_run, ignore_index=True)
    return Comparison(
        kind=kind,
        criterion=criterion,
        runs=tuple(mapped),
        refused=refused,
        missing=missing or {},
        differences=runs.differences(kept),
        costs=runs.costs(kept),
        operators=runs.operator_table(mapped, criterion, chances),
        pairs=agreement,
        parts=parts,
        curve=curve,
        verdicts=tuple(_verdicts(kind, agreement, curve, parts, criterion, mapped)),
    )


def _curve(
    mapped: Sequence[Mapped], agreement: pd.DataFrame, criterion: Criterion, draws: int, seed: int
) -> pd.DataFrame:
    """Measured agreement by size, and predicted from the reference's samples for sets within them and for others."""
    reference = mapped[0].run
    sizes = {item.name: item.run.run.n_samples or 0 for item in mapped}
    seeds = {item.name: item.run.run.calibration_seed or 0 for item in mapped}
    measured = stability.measured_curve(agreement, sizes, seeds, reference.name)
    frames = [measured.assign(source="measured")]
    table = reference.samples()
    if table.can_resample:
        wanted = sorted(set(sizes.values()))
        full = sizes[reference.name]
        for nested, source in (
            (True, "predicted, part of its samples"),
            (False, "predicted, other samples"),
        ):
            # A set within the reference's own, of its size, is the reference: its agreement says nothing.
            asked = [size for size in wanted if size < full] if nested else wanted
            if not asked:
                continue
            found = stability.predicted_curve(table, asked, criterion, draws, seed, nested)
            frames.append(found.assign(source=source))
    return pd.concat(frames, ignore_index=True)


def _verdicts(
    kind: str,
    agreement: pd.DataFrame,
    curve: pd.DataFrame | None,
    parts: pd.DataFrame | None,
    criterion: Criterion,
    mapped: Sequence[Mapped],
) -> list[str]:
    said = [
        f"{item.name} did not finish: its scores cover {len(item.run.scores)} operators"
        f" on {item.run.run.n_samples or 'an unknown number of'} samples."
        for item in mapped
        if item.run.run.status == "partial"
    ]
    if curve is not None:
        asked = f"{criterion.overlap:.0%} of the top {criterion.top_k} of {mapped[0].name}"
        told = curve[curve["p_stable"].notna()]
        if "shared" in told:  # a run on the reference's own samples is the reference once more
            told = told[~(told["shared"].fillna(0) >= told["size"].max()) | (told["size"] < told["size"].max())]
        for source, rows in told.groupby("source", sort=False):
            size = stability.smallest_stable_size(rows, criterion.confidence)
            sure = f"with {criterion.confidence:.0%} confidence"
            answer = (
                f"found {sure} from {size} samples on" if size else f"not {sure} by {int(rows['size'].max())} samples"
            )
            said.append(f"{asked} ({source}): {answer}.")
    elif parts is not None:
        for row in parts[~parts["part"].str.contains(":")].to_dict("records"):
            part = "" if row["part"] == "all" else f" {row['part']}"
            said.append(f"{row['b']} ranks {row['common']}{part} operators of {row['a']} with {_agreement(row)}.")
    elif len(agreement):
        for row in agreement[agreement["a"] == mapped[0].name].to_dict("records"):
            said.append(f"{row['b']} and {row['a']}: {_agreement(row)} over {row['common']} operators.")
    return said


def _agreement(row: Mapping[Any, Any]) -> str:
    def interval(name: str) -> str:
        low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
        return "" if low is None or pd.isna(low) else f" ({low:.3f} to {high:.3f})"

    if pd.isna(row.get("spearman")):
        return f"no rank correlation ({row['note']})"
    return (
        f"Spearman {row['spearman']:.3f}{interval('spearman')}, "
        f"top-{row['top_k']:g} overlap {row['overlap']:.2f}{interval('overlap')}"
    )


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write `comparison.json`, and as parquet `comparison`, `pairs`, and what there is of the other tables."""
    write_parquet(folder / "comparison.parquet", comparison.operators)
    write_parquet(folder / "pairs.parquet", comparison.pairs)
    for name, table in (("stability", comparison.curve), ("parts", comparison.parts), ("regret", comparison.regret)):
        if table is not None:
            write_parquet(folder / f"{name}.parquet", table)
    if comparison.aligned:
        tables = [item.alignment.assign(run=item.name) for item in comparison.aligned]
        write_parquet(folder / "alignment.parquet", pd.concat(tables, ignore_index=True))
    write_json(folder / "comparison.json", summary(comparison))


def summary(comparison: Comparison) -> dict[str, Any]:
    """The comparison in plain values: runs, reasons, differences, verdicts, operators without counterpart."""
    return {
        "kind": comparison.kind,
        "reference": comparison.reference.name,
        "runs": {
            item.name: {"folder": str(item.run.folder), "run_id": item.run.run_id, "uri": item.run.uri}
            for item in comparison.runs
        },
        "refused": dict(comparison.refused),
        "missing": dict(comparison.missing),
        "differences": comparison.differences.to_dict("index"),
        "criterion": vars(comparison.criterion),
        "verdicts": list(comparison.verdicts),
        "without_counterpart": {
            item.name: dict(zip(("reference", "run"), without_counterpart(item.alignment, item.run.table), strict=True))
            for item in comparison.aligned
        },
    }
