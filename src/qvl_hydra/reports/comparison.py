"""The report of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from qvl_hydra.comparison.alignment import without_counterpart
from qvl_hydra.comparison.proxy import NONE, RANDOM, regret_summary
from qvl_hydra.comparison.result import Comparison
from qvl_hydra.comparison.runs import Mapped
from qvl_hydra.reports.chart import Point, Series, chart
from qvl_hydra.reports.figures import chart_figure, write_figure
from qvl_hydra.reports.page import Column, Section, notes, number, table, text, write_page
from qvl_hydra.reports.sweep import FIGURES, REPORT, agreement_limits, stability_series

SCATTERED = 4  # runs drawn against the reference in one plot
TITLES = {
    "runs": "Comparison of runs",
    "calibration_sizes": "How many calibration samples are enough",
    "proxy": "Can the proxy answer for the target",
}
MEASURES = ("spearman", "kendall", "overlap")
AGREEMENT = [
    *(
        Column(name, number=True)
        for name in ("Spearman", "Kendall", "overlap of the top", "of k", "P(stable)", "operators")
    ),
    Column("shared samples", number=True),
    Column("note", wide=True),
]


def write_comparison_report(comparison: Comparison, folder: Path) -> Path:
    """Write `report.html` and `figures/*.png` of a comparison."""
    for name, figure in _figures(comparison).items():
        write_figure(figure, folder / FIGURES / f"{name}.png")
    sections = [
        Section("What differs between the runs", _differences(comparison)),
        Section("Result", notes(comparison.verdicts) + _absent(comparison)),
        Section("Agreement by number of samples", _curves(comparison)),
        Section("Agreement in parts", _parts(comparison)),
        Section("What the choice costs", _regret(comparison)),
        Section("Ranks side by side", _scatter(comparison)),
        Section("Every pair", _pairs(comparison)),
        Section("Time and memory", _costs(comparison)),
        Section("Alignment", _alignment(comparison)),
        Section("Operators", _operators(comparison)),
    ]
    return write_page(folder / REPORT, TITLES[comparison.kind], sections)


def _figures(comparison: Comparison) -> dict[str, Figure]:
    found = {
        "ranks": chart_figure(_scatter_series(comparison), _rank_title(comparison), "rank elsewhere", diagonal=True)
    }
    if comparison.curve is not None:
        series = curve_series(comparison.curve)
        found["stability"] = chart_figure(
            series, "samples", "agreement", log_x=True, y_limits=agreement_limits(comparison.curve)
        )
    if comparison.regret is not None:
        found["regret"] = chart_figure(_regret_series(comparison.regret), "operators kept in float", "squared error")
    return found


def _differences(comparison: Comparison) -> str:
    if comparison.differences.empty:
        return "<p>Nothing: settings, samples, model and versions are the same.</p>"
    shown, corner = comparison.differences, "setting"
    if shown.shape[1] > shown.shape[0]:  # many runs: one line each
        shown, corner = shown.T, "run"
    rows = [(key, *values) for key, values in zip(shown.index, shown.to_numpy(), strict=True)]
    first = f"<p>Reference: <b>{text(comparison.reference.name)}</b></p>"
    return first + table([Column(corner), *map(Column, map(str, shown.columns))], rows)


def _absent(comparison: Comparison) -> str:
    lines = [f"Not compared: {name}. Reason: {reason}." for name, reason in comparison.refused.items()]
    lines += [f"Missing: job {name}; {reason}." for name, reason in comparison.missing.items()]
    return f'<div class="bad">{notes(lines)}</div>' if lines else ""


def curve_series(curve: pd.DataFrame) -> list[Series]:
    """The measured curve (seeds averaged) and the predicted ones."""
    series = []
    for source, rows in curve.groupby("source", sort=False):
        means = rows.groupby("size", as_index=False).mean(numeric_only=True)
        kept = stability_series(means, f", {source}", dashed=source != "measured")
        series += kept if source == "measured" else kept[:1]
    return series


def _curves(comparison: Comparison) -> str:
    if comparison.curve is None:
        return ""
    drawn = chart(
        curve_series(comparison.curve), "samples", "agreement", log_x=True, y_limits=agreement_limits(comparison.curve)
    )
    columns = [Column("source"), Column("samples", number=True), Column("seed", number=True)]
    columns += [Column(name, number=True) for name in ("Spearman", "Kendall", "overlap of the top", "P(stable)")]
    rows = [
        [row["source"], row["size"], row["seed"], *_with_intervals(row), row["p_stable"]]
        for row in _records(comparison.curve)
    ]
    explained = (
        f"With {comparison.reference.name}. A size is stable when {comparison.criterion.overlap:.0%} of the "
        f"top {comparison.criterion.top_k} are found with {comparison.criterion.confidence:.0%} probability. "
        "Predictions resample the reference's own samples and keep its activation ranges; smaller runs calibrate anew."
    )
    return f'{drawn}<p class="note">{text(explained)}</p>{table(columns, rows, identity="sizes")}'


def _with_intervals(row: Mapping[str, object]) -> list[object]:
    return [(row.get(name), row.get(f"{name}_low"), row.get(f"{name}_high")) for name in MEASURES]


def _agreement_row(row: Mapping[str, object]) -> list[object]:
    return [*_with_intervals(row), *(row.get(key) for key in ("top_k", "p_stable", "common", "shared_samples", "note"))]


def _parts(comparison: Comparison) -> str:
    if comparison.parts is None:
        return ""
    rows = [[row["b"], row["part"], *_agreement_row(row)] for row in _records(comparison.parts)]
    return table([Column("proxy"), Column("part"), *AGREEMENT], rows, identity="parts")


def _pairs(comparison: Comparison) -> str:
    rows = [[row["a"], row["b"], *_agreement_row(row)] for row in _records(comparison.pairs)]
    return table([Column("run"), Column("other run"), *AGREEMENT], rows, identity="pairs")


def _regret_series(regret: pd.DataFrame) -> list[Series]:
    none = float(regret.loc[regret["chooser"] == NONE, "squared_error"].iloc[0])
    series = []
    for chooser, rows in regret_summary(regret[regret["chooser"] != NONE]).groupby("chooser", sort=False):
        points = [Point(0.0, none, tip=f"none kept\nerror {number(none)}")]
        for row in rows.to_dict("records"):
            ends = (row["error_low"], row["error_high"]) if chooser == RANDOM else (None, None)
            tip = f"{chooser}, {row['kept']} kept\nerror {number(row['squared_error'])}, regret {number(row['regret'])}"
            points.append(Point(row["kept"], row["squared_error"], ends[0], ends[1], tip))
        series.append(Series(f"{chooser}", points, dashed=chooser == RANDOM))
    return series


def _regret(comparison: Comparison) -> str:
    if comparison.regret is None:
        return ""
    summary = regret_summary(comparison.regret)
    ends = ["error_low", "error_high"]
    summary.loc[summary["chooser"] != RANDOM, ends] = float("nan")
    known = [name for name in summary.columns if name not in ("kept", "chooser")]
    columns = [Column("kept", number=True), Column("chosen by")]
    columns += [Column(name.replace("_", " "), number=True) for name in known]
    rows = [[row["kept"], row["chooser"], *(row[name] for name in known)] for row in summary.to_dict("records")]
    how = (
        f"Squared error of the target ({comparison.reference.name}) with every operator quantized but those kept, on "
        "other samples than the scores. Regret is the error minus that of the target's own choice; share of gain is "
        "how much of the error that its choice removes this one removes. Random is the mean of its draws."
    )
    drawn = chart(_regret_series(comparison.regret), "operators kept in float", "squared error")
    return f'{drawn}<p class="note">{text(how)}</p>{table(columns, rows, identity="regret")}'


def _rank_title(comparison: Comparison) -> str:
    return f"rank in {comparison.reference.name}"


def _scatter_series(comparison: Comparison) -> list[Series]:
    reference = comparison.runs[0]
    own = _ranks(reference.scores)
    series = []
    for item in comparison.runs[1 : SCATTERED + 1]:
        others = _ranks(item.scores.where(reference.scores.reindex(item.scores.index).notna()))
        points = [
            Point(float(own[op]), float(others[op]), tip=_scatter_tip(op, reference, item))
            for op in own.index
            if pd.notna(own[op]) and pd.notna(others.get(op))
        ]
        series.append(Series(item.name, points, line=False))
    return series


def _scatter_tip(op: str, reference: Mapped, item: Mapped) -> str:
    other = str(item.alignment.set_index("op")["other_op"][op])
    shown = "" if other == op else f"\nmeets {other}"
    values = (f"{run.name}: {number(float(run.scores[op]), 4)}" for run in (reference, item))
    return f"{op}{shown}\n" + "\n".join(values)


def _ranks(scores: pd.Series) -> pd.Series:
    return scores.rank(ascending=False, method="first")


def _scatter(comparison: Comparison) -> str:
    left_out = len(comparison.runs) - 1 - SCATTERED
    more = f" The first {SCATTERED} runs are drawn; the tables have all." if left_out > 0 else ""
    drawn = chart(_scatter_series(comparison), _rank_title(comparison), "rank elsewhere", diagonal=True)
    return f'{drawn}<p class="note">1 is the most sensitive; equal ranks lie on the line.{text(more)}</p>'


def _costs(comparison: Comparison) -> str:
    known = [name for name in comparison.costs.columns if name != "run" and comparison.costs[name].notna().any()]
    columns = [Column("run"), *(Column(name.replace("_", " "), number=True) for name in known)]
    rows = [[row["run"], *(row[name] for name in known)] for row in comparison.costs.to_dict("records")]
    return table(columns, rows, identity="costs")


def _alignment(comparison: Comparison) -> str:
    parts = []
    for index, item in enumerate(comparison.aligned):
        mine, theirs = without_counterpart(item.alignment, item.run.table)
        lines = [f"{comparison.reference.name}, without counterpart: {', '.join(mine)}"] if mine else []
        lines += [f"{item.name}, without counterpart: {', '.join(theirs)}"] if theirs else []
        columns = [Column("operator", code=True), Column("stands for it", code=True), Column("role")]
        columns += [Column("depth", number=True), Column("its depth", number=True), Column("match")]
        keys = ["op", "other_op", "role", "depth", "other_depth", "match"]
        rows = [[row[key] for key in keys] for row in item.alignment.to_dict("records")]
        listed = table(columns, rows, identity=f"align{index}")
        parts.append(
            f"<h3>{text(item.name)}</h3>{notes(lines)}<details><summary>All operators</summary>{listed}</details>"
        )
    return "".join(parts)


def _operators(comparison: Comparison) -> str:
    frame, k = comparison.operators, comparison.criterion.top_k
    columns = [Column("operator", code=True), Column("block", number=True), Column("role")]
    kinds = (("rank", "rank"), ("score", "score"), (f"p_top_{k}", f"P(top {k})"))
    names = [item.name for item in comparison.runs]
    for name in names:
        columns += [Column(f"{title} {name}", number=True) for _, title in kinds]
    rows = []
    for row in _records(frame.sort_values(f"rank:{names[0]}", na_position="last")):
        values: list[object] = [row["op"], row["block"], row["role"]]
        for name in names:
            status = row[f"status:{name}"]
            values += [row[f"{kind}:{name}"] if status == "scored" else status for kind, _ in kinds[:1]]
            values += [row[f"{kind}:{name}"] for kind, _ in kinds[1:]]
        rows.append(values)
    return table(columns, rows, identity="operators")


def _records(frame: pd.DataFrame) -> Sequence[dict[str, object]]:
    """Rows as mappings, with None for what is missing."""
    return [
        {str(key): None if pd.isna(value) else value for key, value in row.items()} for row in frame.to_dict("records")
    ]
