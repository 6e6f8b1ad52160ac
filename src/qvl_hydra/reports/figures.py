"""The figures of a report as PNG, for MLflow and for documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qvl_hydra.reports.bars import REACH, bar_scale
from qvl_hydra.reports.chart import Limits, Series
from qvl_hydra.reports.heat import MARKS, TOWERS, shades

DPI = 120
TOP_BARS = 25


def write_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG without a display."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))
    return path


def heat_figure(scores: pd.DataFrame) -> Figure:
    """Blocks by roles of each tower; failed operators are crossed, skipped ones dashed, others left white."""
    towers = [name for name in TOWERS if (scores["component"] == name).any()]
    shade = shades(scores[scores["status"] == "scored"].set_index("op")["score"])
    blocks = max((int(scores["block"].max()) if scores["block"].notna().any() else 0) + 1, 4)
    figure = Figure(figsize=(4.6 * len(towers) + 0.6, 1.8 + 0.26 * blocks), dpi=DPI, layout="constrained")
    for index, name in enumerate(towers):
        axes = figure.add_subplot(1, len(towers), index + 1)
        _heat_axes(axes, scores[scores["component"] == name], shade)
        axes.set_title(TOWERS[name], fontsize=10)
    return figure


def _heat_axes(axes: Axes, rows: pd.DataFrame, shade: pd.Series) -> None:
    records = rows.to_dict("records")
    labels = pd.Series(
        [row["role"] if pd.isna(row["block"]) else str(int(row["block"])) for row in records], rows.index
    )
    inside = rows["block"].notna()
    lines = [*sorted(set(labels[inside]), key=int), *labels[~inside]]
    roles = list(dict.fromkeys(rows.loc[inside, "role"])) or ["operator"]
    grid = pd.DataFrame(float("nan"), index=lines, columns=roles)
    for label, row in zip(labels, records, strict=True):
        columns = [row["role"]] if pd.notna(row["block"]) else roles
        if row["status"] == "scored":
            grid.loc[label, columns] = shade[row["op"]]
        else:
            place = (roles.index(columns[0]), lines.index(label))
            axes.text(*place, MARKS.get(row["status"], "?"), ha="center", va="center", fontsize=8)
    axes.imshow(grid.to_numpy(float), aspect="auto", cmap="YlOrRd", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks(range(len(roles)), roles, rotation=35, ha="right", fontsize=7)
    axes.set_yticks(range(len(lines)), lines, fontsize=7)


def bars_figure(scores: pd.DataFrame) -> Figure:
    """The most sensitive operators with their intervals."""
    scored = scores[scores["status"] == "scored"].sort_values("rank")
    shown = scored.head(TOP_BARS).iloc[::-1]
    figure = Figure(figsize=(8, 1.2 + 0.22 * len(shown)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    values, low, high = (shown[key].to_numpy(float) for key in ("score", "score_low", "score_high"))
    high = np.fmin(high, REACH * values.max(initial=0.0))
    axes.barh(shown["op"], values, color="#2b6cb0")
    reach = np.nan_to_num(np.clip([values - low, high - values], 0, None))
    axes.errorbar(values, shown["op"], xerr=reach, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
    if bar_scale(scored)[1]:
        axes.set_xscale("log")
    axes.tick_params(labelsize=7)
    axes.set_xlabel(f"score ({scored['unit'].iloc[0]})", fontsize=8)
    return figure


def chart_figure(
    series: Sequence[Series],
    x_title: str,
    y_title: str,
    *,
    log_x: bool = False,
    y_limits: Limits | None = None,
    diagonal: bool = False,
) -> Figure:
    """The same chart as `chart.chart`."""
    figure = Figure(figsize=(6.4, 4), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for index, item in enumerate(series):
        colour = f"C{index % 10}"
        x, y = [point.x for point in item.points], [point.y for point in item.points]
        style = ("--" if item.dashed else "-") if item.line else ""
        axes.plot(x, y, style, marker="o", markersize=4, color=colour, label=item.name)
        ranged = [point for point in item.points if point.low is not None and point.high is not None]
        if item.line and ranged:
            low, high = ([float(getattr(point, key)) for point in ranged] for key in ("low", "high"))
            axes.fill_between([point.x for point in ranged], low, high, color=colour, alpha=0.15)
    if log_x:
        axes.set_xscale("log", base=2)
        sizes = sorted({point.x for item in series for point in item.points})
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    if y_limits:
        axes.set_ylim(*y_limits)
    if diagonal:
        axes.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    axes.set_xlabel(x_title, fontsize=8)
    axes.set_ylabel(y_title, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if series:
        axes.legend(fontsize=7)
    return figure
