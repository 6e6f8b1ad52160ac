"""The report of one sweep, made from the files of its folder alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from qvl_hydra.blockwise.census import FLOAT16
from qvl_hydra.comparison.reading import RunScores, read_run
from qvl_hydra.comparison.stability import Criterion, predicted_curve, smallest_stable_size, top_probability
from qvl_hydra.profiles.families import name_of
from qvl_hydra.reports.bars import ranked_bars
from qvl_hydra.reports.chart import Point, Series, chart
from qvl_hydra.reports.figures import bars_figure, chart_figure, heat_figure, write_figure
from qvl_hydra.reports.heat import Row, heat_map
from qvl_hydra.reports.page import Column, Section, facts, notes, number, table, text, write_page
from qvl_hydra.runs.files import read_table
from qvl_hydra.scores.shrink import ORIGINS, SPLIT
from qvl_hydra.scores.table import changes_by_role, origins_by_role

REPORT = "report.html"
FIGURES = "figures"
DRAWS = 500  # resampled score vectors behind the probabilities and the stability curve
MIB = 1024**2
CENSUS_ROWS = 10
EXPERTS_SHOWN = 15
FAMILIES_SHOWN = {
    "n_ops": "operators",
    "sum_of_scores": "sum of scores",
    "together": "quantized together",
    "kl_answer_alone": "KL alone",
    "kl_answer_won": "KL won by leaving it",
    "exact_match_alone": "exact match alone",
    "exact_match_won": "exact match won",
}
CENSUS_SHOWN = {
    "input_max": "largest input",
    "weight_max": "largest weight",
    "output_max": "largest output",
    "row_ratio": "largest row / median row",
    "nonfinite": "not finite",
}


def write_sweep_report(folder: Path, extra: Sequence[Section] = ()) -> Path:
    """Write `report.html` and `figures/*.png` from what the folder holds, finished or not.

    Args:
        folder: with `scores.parquet` at least.
        extra: further sections, put before the table of operators.

    Returns:
        Path of the page.

    Raises:
        ComparisonError: there are no scores.
    """
    run = read_run(folder)
    criterion = Criterion(top_k=min(10, max(1, len(run.scores) // 2)))
    curve = stability(run, criterion)
    if len(run.scores):
        write_figure(heat_figure(run.table), folder / FIGURES / "heat_map.png")
        write_figure(bars_figure(run.table), folder / FIGURES / "ranked.png")
    if len(curve):
        figure = chart_figure(
            stability_series(curve), "samples", "agreement", log_x=True, y_limits=agreement_limits(curve)
        )
        write_figure(figure, folder / FIGURES / "stability.png")
    sections = [
        Section("Run", _summary(run)),
        Section("Blocks and roles", heat_map(run.table)),
        *_families(folder),
        *_origins(run.table),
        *_changes(run.table),
        Section("Most sensitive operators", ranked_bars(run.table)),
        Section("How many samples are enough", stability_section(curve, criterion, run)),
        *extra,
        *_single_experts(folder),
        *_census(run.table),
        Section("Operators", _operators(run, criterion.top_k)),
        Section(
            "Settings",
            f"<details><summary>All settings</summary><pre>{text(yaml.safe_dump(dict(run.config)))}</pre></details>",
        ),
    ]
    title = " · ".join(filter(None, (run.run.model, run.run.component, run.run.strategy, run.run.backend)))
    return write_page(folder / REPORT, title or folder.name, sections)


def _families(folder: Path) -> list[Section]:
    """Families of modules, where the run has them."""
    path = folder / "families.parquet"
    if not path.exists():
        return []
    told = read_table(path)
    shown = {name: title for name, title in FAMILIES_SHOWN.items() if name in told}
    rows = [[name_of(row), *(_present(row[name]) for name in shown)] for row in told.to_dict("records")]
    columns = [Column("family"), *(Column(title, number=True) for title in shown.values())]
    how = [
        "The families at the top lose most by themselves, and are the first to leave in high precision.",
        "Sum and together in the unit of the scores. Together: the predicted error with the family quantized and "
        "nothing else, where effects that add up or cancel count if a sketch left its signed sums.",
        "Measured on held-out samples, for the largest: KL at the answer (nats) and exact match with the family "
        "quantized alone, and what leaving it wins where everything else is quantized."
        if "kl_answer_alone" in told
        else "task=profile measures what leaving the largest of them wins where everything else is quantized.",
    ]
    return [Section("Families", table(columns, rows, identity="families") + notes(how))]


def _single_experts(folder: Path) -> list[Section]:
    """The experts that lose most by themselves, where each was scored."""
    path = folder / "experts.parquet"
    told = read_table(path) if path.exists() else pd.DataFrame()
    if "score" not in told:
        return []
    shares = told["score"] / told.groupby("op")["score"].transform("sum")
    shown = told.assign(share=shares).nlargest(EXPERTS_SHOWN, "score")
    rows = [
        [row["op"], row["expert"], row["tokens"], row["score"], f"{row['share']:.0%}"]
        for row in shown.to_dict("records")
    ]
    names = ("expert", "calibration tokens", "score", "of all experts' scores")
    columns = [Column("operator", code=True), *(Column(name, number=True) for name in names)]
    how = (
        f"The {len(rows)} single experts that lose most when nothing else is quantized, by the sketch. Runtimes give "
        "all experts of a block one scheme, so that they are not decided on one by one."
    )
    return [Section("Single experts", table(columns, rows) + notes([how]))]


def _present(value: float) -> float | None:
    return None if pd.isna(value) else value


def _origins(scores: pd.DataFrame) -> list[Section]:
    """Where errors come in: shares of each role's effect by kind of token; nothing where no sketch told them."""
    names = ("image tokens", "other prompt tokens", "answer tokens")
    how = (
        "Language tower. The share of the effect on the output that comes in at each kind of token: rounding there, in "
        "the operator's input, weight product or output, is what the output feels. From the sketch, to first order, "
        "without what errors at different tokens do together."
    )
    return _shares("Where errors come in", origins_by_role(scores), ORIGINS, names, how)


def _changes(scores: pd.DataFrame) -> list[Section]:
    """Where errors come out: shares of each role's squared error by what is predicted; nothing where it is not told."""
    names = ("next is an image token", "next is other text", "next is the answer's")
    told = int(scores[SPLIT[0]].notna().sum()) if SPLIT[0] in scores else 0
    how = (
        f"The squared error of the logits by the kind of token that a position predicts, of the {told} operators for "
        "which it is told: those that were measured exactly, and with strategy.split_positions=true all."
    )
    return _shares("Where errors come out", changes_by_role(scores), SPLIT, names, how)


def _shares(title: str, sums: pd.DataFrame, parts: Sequence[str], names: Sequence[str], how: str) -> list[Section]:
    """A table of roles with the share of each part in their sums."""
    if not len(sums):
        return []
    sums.loc["all"] = sums.sum()
    rows = [
        [role, float(row["score"]), *(f"{row[name] / row['score']:.0%}" for name in parts)]
        for role, row in sums.iterrows()
    ]
    columns = [Column("role"), *(Column(name, number=True) for name in ("sum of scores", *names))]
    return [Section(title, table(columns, rows) + notes([how]))]


def _census(scores: pd.DataFrame) -> list[Section]:
    """The operators that get largest, and those with one row far above the others; nothing where none were counted."""
    if "output_max" not in scores:
        return []
    largest = scores[["input_max", "output_max"]].max(axis=1)
    shown = scores.assign(largest=largest).nlargest(CENSUS_ROWS, "largest")
    rows = [
        [row["op"], *(number(row[name]) for name in CENSUS_SHOWN), number(row["largest"] / FLOAT16)]
        for row in shown.to_dict("records")
    ]
    columns = [Column("operator", code=True), *(Column(title, number=True) for title in CENSUS_SHOWN.values())]
    how = (
        f"The {len(rows)} operators that get largest on the calibration samples. Beyond 1 in the last column float16 "
        "overflows; beyond 448 FP8 without a scale clips. A large output comes from a row far above the median."
    )
    return [Section("Range census", table([*columns, Column("of float16", number=True)], rows) + notes([how]))]


def _summary(run: RunScores) -> str:
    counts, told = run.table["status"].value_counts(), run.run
    tiles = {
        "status": told.status,
        "operators": len(run.table),
        **{status: int(counts.get(status, 0)) for status in ("scored", "skipped", "failed")},
        "scheme": told.scheme,
        "estimator": told.estimator,
        "metric": run.table["metric"].dropna().iloc[0] if run.table["metric"].notna().any() else None,
        "samples scored": told.n_samples,
        "calibration samples": told.calibration_size,
        "device": told.device,
        "time": None if told.wall_s is None else f"{told.wall_s:.1f} s",
        "forward-equivalents": number(told.forward_equivalents),
        "peak memory": f"{told.peak_memory_bytes / MIB:.0f} MiB" if told.peak_memory_bytes else None,
    }
    return facts(tiles) + notes(told.notes)


def stability(run: RunScores, criterion: Criterion) -> pd.DataFrame:
    """The agreement predicted for smaller runs; empty when there are fewer than two samples or three operators."""
    samples = run.samples()
    count = samples.values.shape[1]
    if count < 2 or len(samples.scores) < 3:
        return pd.DataFrame()
    sizes = [size for size in (2**power for power in range(20)) if size < count] + [count]
    return predicted_curve(samples, sizes, criterion, DRAWS, seed=0, nested=False)


def agreement_limits(curve: pd.DataFrame) -> tuple[float, float]:
    """Limits of an axis for correlations and shares: up to 1, and down to a tenth below the lowest."""
    lows = curve[["spearman", "overlap", "spearman_low", "overlap_low"]].to_numpy(float)
    lows = lows[np.isfinite(lows)]
    return (math.floor(10 * lows.min()) / 10 if len(lows) else 0.0), 1.02


def stability_series(curve: pd.DataFrame, suffix: str = "", dashed: bool = False) -> list[Series]:
    """Spearman and top-k overlap of a stability curve, with their bands."""
    found = []
    for key, name in (("spearman", "Spearman"), ("overlap", "top-k overlap")):
        points = [
            Point(row["size"], row[key], row[f"{key}_low"], row[f"{key}_high"], _curve_tip(row, key, name))
            for row in curve.to_dict("records")
        ]
        found.append(Series(name + suffix, points, dashed=dashed))
    return found


def _curve_tip(row: Row, key: str, name: str) -> str:
    interval = f"{number(row[f'{key}_low'])} to {number(row[f'{key}_high'])}"
    return f"{row['size']:g} samples\n{name} {number(row[key])} ({interval})"


def stability_section(curve: pd.DataFrame, criterion: Criterion, run: RunScores) -> str:
    """The predicted curve, and what it says in one sentence."""
    if curve.empty:
        return "" if run.scores.empty else '<p class="note">One sample, or two operators, say nothing about others.</p>'
    size, full = smallest_stable_size(curve, criterion.confidence), int(curve["size"].max())
    asked = (
        f"{criterion.overlap:.0%} of the top {criterion.top_k} in common with another run of {full} samples, "
        f"with {criterion.confidence:.0%} confidence"
    )
    verdict = f"From {size} samples on: {asked}." if size else f"{full} samples are not enough for {asked}."
    drawn = chart(stability_series(curve), "samples", "agreement", log_x=True, y_limits=agreement_limits(curve))
    how = (
        f"Predicted by resampling the {full} samples of this run: a set of so many against another set of {full}. "
        f"Bands hold {criterion.confidence:.0%} of the draws. Activation ranges stay those of this run."
    )
    return f'<p>{text(verdict)}</p>{drawn}<p class="note">{text(how)}</p>'


def _operators(run: RunScores, k: int) -> str:
    probability = pd.Series(top_probability(run.samples(), k, DRAWS, seed=0), index=run.scores.index)
    columns = [
        Column("rank", number=True),
        Column("operator", code=True),
        Column("score", number=True),
        Column("low", number=True),
        Column("high", number=True),
        Column(f"P(top {k})", number=True),
        Column("block", number=True),
        Column("role"),
        Column("parameters", number=True),
        Column("estimator"),
        Column("status"),
    ]
    rows, classes = [], []
    for row in run.table.sort_values("rank", na_position="last").to_dict("records"):
        status = row["status"] if row["status"] == "scored" else f"{row['status']}: {row['reason']}"
        block, rank = (None if pd.isna(row[key]) else int(row[key]) for key in ("block", "rank"))
        chance = float(probability.get(row["op"], float("nan")))
        scores = (row["score"], row["score_low"], row["score_high"])
        estimator = row["estimator"] if isinstance(row["estimator"], str) else ""
        rows.append((rank, row["op"], *scores, chance, block, row["role"], int(row["n_params"]), estimator, status))
        classes.append(row["status"])
    return table(columns, rows, identity="operators", classes=classes)
