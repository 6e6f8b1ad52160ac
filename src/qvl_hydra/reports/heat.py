"""The heat map: blocks by roles of each tower, as an HTML table that a phone and a printer can show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from qvl_hydra.reports.page import number, text
from qvl_hydra.scores.interval import interval_text

MARKS = {"failed": "\u00d7", "skipped": "\u2013"}
Row = Mapping[Any, Any]  # a row of `scores.parquet` as a mapping
TOWERS = {"vision": "Vision tower", "lm": "Language tower"}
LONGEST_LABEL = 10  # letters of a row that the narrow column of block numbers takes


def shades(scores: pd.Series) -> pd.Series:
    """Place of each score between smallest (0) and largest (1): logarithmic where none is below zero, else linear.

    A score of zero, of what the output does not feel, has the place of the smallest.
    """
    finite = scores.dropna().astype(float)
    values = finite[finite > 0].map(math.log) if is_log(finite) else finite
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    places = (values - low) / (high - low) if high > low else values * 0 + 0.5
    return places.reindex(finite.index, fill_value=0.0)


def is_log(scores: pd.Series) -> bool:
    """Whether scores are shown on a logarithmic scale."""
    return bool((scores > 0).any()) and not bool((scores < 0).any())


def heat_map(scores: pd.DataFrame) -> str:
    """One table a tower. Blocks are rows; operators outside blocks (head, merger, patch embedding) have their own.

    Args:
        scores: the columns of `scores.parquet`.
    """
    scored = scores[scores["status"] == "scored"]
    shade = shades(scored.set_index("op")["score"])
    towers = [
        f"<div><h3>{text(title)}</h3>{_tower(scores[scores['component'] == name], shade)}</div>"
        for name, title in TOWERS.items()
        if (scores["component"] == name).any()
    ]
    scale = (
        "Stronger colour is more sensitive; the scale is logarithmic."
        if is_log(scored["score"])
        else "Stronger colour is more sensitive."
    )
    legend = f'<p class="note">{scale} {MARKS["failed"]} failed, {MARKS["skipped"]} skipped, empty: not asked for.</p>'
    return f'<div class="row">{"".join(towers)}</div>{legend}'


def _tower(rows: pd.DataFrame, shade: pd.Series) -> str:
    inside, outside = rows[rows["block"].notna()], rows[rows["block"].isna()]
    roles = list(dict.fromkeys(inside["role"]))
    head = "".join(f'<th scope="col">{text(role)}</th>' for role in roles)
    lines = []
    for block, group in inside.groupby("block", sort=True):
        by_role = {row["role"]: row for row in group.to_dict("records")}
        cells = "".join(_cell(by_role.get(role), shade) for role in roles)
        lines.append(f'<tr><th scope="row">{text(block)}</th>{cells}</tr>')
    for row in outside.to_dict("records"):
        cell = _cell(row, shade, span=max(1, len(roles)))
        lines.append(f'<tr><th scope="row">{text(row["role"])}</th>{cell}</tr>')
    head = f'<thead><tr><th scope="row">block</th>{head}</tr></thead>'
    named = " named" if any(len(role) > LONGEST_LABEL for role in outside["role"]) else ""
    return f'<table class="heat{named}">{head}<tbody>{"".join(lines)}</tbody></table>'


def _cell(row: Row | None, shade: pd.Series, span: int = 1) -> str:
    width = f' colspan="{span}"' if span > 1 else ""
    if row is None:
        return f'<td class="none"{width}></td>'
    tip = f' data-tip="{text(operator_tip(row))}"'
    if row["status"] != "scored":
        return f'<td class="{text(row["status"])}"{width}{tip}>{MARKS.get(str(row["status"]), "?")}</td>'
    return f'<td style="--t:{shade[row["op"]]:.3f}"{width}{tip}></td>'


def operator_tip(row: Row) -> str:
    """What hovering over an operator tells."""
    if row["status"] != "scored":
        return f"{row['op']}\n{row['status']}: {row['reason']}"
    low, high = (float(row.get(key, math.nan)) for key in ("score_low", "score_high"))
    known = interval_text(float(row["score"]), low, high, digits=4)
    interval = f"\n95 % interval {known}" if known else ""
    return f"{row['op']}\nrank {row['rank']}, score {number(row['score'], 5)} {row.get('unit') or ''}{interval}"
