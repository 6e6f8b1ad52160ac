"""The figure of a profile run: what each share of operators in high precision buys, and how far errors add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLES: dict[str, dict[str, Any]] = {
    "scores": {"color": "#1f5fa8", "marker": "o", "linewidth": 2.0, "zorder": 5},
    "random": {"color": "#9a9a9a", "marker": "."},
    "first_and_last": {"color": "#c4751b", "marker": "s"},
    "weight_error": {"color": "#3b8a4e", "marker": "^"},
    "activation_range": {"color": "#a63d5c", "marker": "v"},
}


def draw_spectrum(table: pd.DataFrame, metric: str, path: Path) -> None:
    """Draw `profiles.parquet`: exact match, KL, and measured against predicted error where both are known.

    Args:
        table: columns of `spectrum.COLUMNS`.
        metric: of the scores, for the axis titles.
        path: PNG file to write.
    """
    both = table[(table["predicted"] > 0) & (table["measured"] > 0)]
    panels = 3 if len(both) else 2
    figure = Figure(figsize=(5.2 * panels, 4.2), layout="constrained")
    axes = figure.subplots(1, panels)
    _against_share(axes[0], table, "exact_match", "exact match on held-out samples")
    axes[0].legend(fontsize=8, loc="lower right")
    _against_share(axes[1], table, "kl", "KL to the float model (nats a token)")
    axes[1].set_yscale("log")
    if panels == 3:
        _additivity(axes[2], both, metric)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_front(table: pd.DataFrame, path: Path) -> None:
    """Draw plans among several schemes: KL at the answer and exact match against bits a weight.

    Args:
        table: one row a plan, with `average_bits`, `kl_answer`, `exact_match`.
        path: PNG file to write.
    """
    ordered = table.sort_values("average_bits")
    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    for axes, column, label in zip(
        figure.subplots(1, 2),
        ("kl_answer", "exact_match"),
        ("KL to the float model at the answer (nats a token)", "exact match on held-out samples"),
        strict=True,
    ):
        line = ordered[ordered[column] > 0] if column == "kl_answer" else ordered
        axes.plot(line["average_bits"], line[column], **STYLES["scores"])
        axes.set_xlabel("bits a weight, scales included")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if column == "kl_answer" and len(line):
            axes.set_yscale("log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def lines(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """One table a line, ordered by share: random choices averaged, both ends part of each line."""
    named = table.assign(line=table["chooser"].str.replace(r"-\d+$", "", regex=True))
    ends = named[named["n_high"].isin((named["n_high"].min(), named["n_high"].max())) & (named["chooser"] == "scores")]
    found = {}
    for name in STYLES:
        rows = named[named["line"] == name]
        if len(rows):
            both = pd.concat([rows, ends.assign(line=name)])
            found[name] = both.groupby("share_high")[["exact_match", "kl", "squared_error"]].mean().reset_index()
    return found


def _against_share(axes: Axes, table: pd.DataFrame, column: str, label: str) -> None:
    for name, whole in lines(table).items():
        line = whole[whole[column] > 0] if column == "kl" else whole  # the float model has none to show on a log scale
        axes.plot(100 * line["share_high"], line[column], label=name.replace("_", " "), markersize=4, **STYLES[name])
    axes.set_xlabel("operators in high precision (%)")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def _additivity(axes: Axes, rows: pd.DataFrame, metric: str) -> None:
    """Predicted (sum of scores) against measured: on the diagonal, errors of single operators add up."""
    choosers = rows["chooser"].str.replace(r"-\d+$", "", regex=True)
    for name, style in STYLES.items():
        some = rows[choosers == name]
        axes.scatter(some["predicted"], some["measured"], s=18, color=style["color"], marker=style["marker"])
    both = pd.concat([rows["predicted"], rows["measured"]])
    axes.plot([both.min(), both.max()], [both.min(), both.max()], color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"predicted {metric.replace('_', ' ')}: sum of the scores of what is quantized")
    axes.set_ylabel("measured, all quantized at once")
    axes.grid(alpha=0.3)
