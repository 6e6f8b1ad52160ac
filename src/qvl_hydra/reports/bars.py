"""Ranked bars with intervals: one line an operator, most sensitive first."""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd

from qvl_hydra.reports.heat import Row, is_log, operator_tip
from qvl_hydra.reports.page import number, text

FIRST = 25  # bars shown at once; the rest is one click away
REACH = 4.0  # times the largest score, where intervals may end: those of few samples would press the bars together
LOG_RATIO = 50.0  # largest over median score from which a linear bar shows nothing but the first few


def bar_scale(scored: pd.DataFrame) -> tuple[Callable[[float], float], bool]:
    """A function from a score to a share of the bar's width, and whether it is logarithmic."""
    scores = scored["score"].astype(float)
    top, bottom = float(scores.max()), float(scores.min())
    highs = scored["score_high"].dropna().astype(float)
    end = max(top, min(float(highs.max()), REACH * top)) if len(highs) else top
    felt = scores[scores > 0]
    if is_log(scores) and top / float(felt.median()) > LOG_RATIO:
        low, high = math.log(float(felt.min()) / 1.5), math.log(end)
        return lambda value: (math.log(value) - low) / (high - low) if value > 0 else 0.0, True
    low, high = min(0.0, bottom), max(end, 0.0)
    return lambda value: (value - low) / (high - low) if high > low else 0.0, False


def ranked_bars(scores: pd.DataFrame) -> str:
    """The bars, with the interval of each score; nothing when no operator is scored."""
    scored = scores[scores["status"] == "scored"].sort_values("rank")
    if scored.empty:
        return ""
    place, logarithmic = bar_scale(scored)
    rows = [_bar(row, place) for row in scored.to_dict("records")]
    kind = "logarithmic" if logarithmic else "linear"
    legend = f"Score ({text(scored['unit'].iloc[0])}), {kind} scale; lines are 95 % intervals."
    first, others = _group(rows[:FIRST]), rows[FIRST:]
    rest = f"<details><summary>The other {len(others)}</summary>{_group(others)}</details>" if others else ""
    return f'<p class="note">{legend}</p>{first}{rest}'


def _group(rows: list[str]) -> str:
    return f'<div class="bars">{"".join(rows)}</div>'


def _bar(row: Row, place: Callable[[float], float]) -> str:
    end = _share(place(float(row["score"])))
    whisker = ""
    if number(row["score_low"]) and number(row["score_high"]):
        low, high = (_share(place(float(row[key]))) for key in ("score_low", "score_high"))
        whisker = f'<b style="left:{low:.2f}%;width:{max(high - low, 0.1):.2f}%"></b>'
    name = f'<span class="op">{text(row["rank"])}. {text(row["op"])}</span>'
    bar = f'<span class="track"><i style="width:{end:.2f}%"></i>{whisker}</span>'
    return (
        f'<div class="barrow" data-tip="{text(operator_tip(row))}">'
        f"{name}{bar}<output>{number(row['score'])}</output></div>"
    )


def _share(value: float) -> float:
    return 100 * min(1.0, max(0.0, value))
