"""Which operator of one model stands for which of another: the same role at the nearest relative depth of its tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

# What does the same under another name: a vision tower's MLP is plain in one family and gated in another.
ALIKE = (
    ("fc1", "up_proj", "linear_fc1"),
    ("fc2", "down_proj", "linear_fc2"),
    ("merger.0", "merger.linear_fc1"),
    ("merger.2", "merger.linear_fc2"),
)
COLUMNS = ("op", "component", "role", "block", "depth", "other_op", "other_block", "other_depth", "match")
Row = Mapping[Any, Any]


def same_names(table: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The alignment of two runs of one model: each operator with itself."""
    aligned = _rows_of(table)
    for row in aligned:
        if row["op"] in other.index:
            row |= {"other_op": row["op"], "other_block": row["block"], "other_depth": row["depth"], "match": "same"}
    return _frame(aligned)


def by_depth(table: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Align two models whose towers may differ in depth.

    Relative depth is the block's index over the index of the last block, 0 to 1; a shorter tower's operator can stand
    for several. Operators outside blocks (head, merger, patch embedding) meet their own role.

    Args:
        table, other: `scores.parquet` of the two runs, indexed by operator.

    Returns:
        One row an operator of `table`: columns `COLUMNS`; `match` is `same` (equal role, equal number of blocks),
        `depth` (equal role, nearest depth), `alike` (a role that does the same), or `none`.
    """
    found = _rows_of(table)
    candidates = _rows_of(other)
    blocks = {
        (name, side): _blocks(frame, name) for name in ("lm", "vision") for side, frame in ((0, table), (1, other))
    }
    for row in found:
        best = _nearest(row, candidates, row["role"])
        match = "same" if blocks[row["component"], 0] == blocks[row["component"], 1] else "depth"
        if best is None:
            others = [role for roles in ALIKE if row["role"] in roles for role in roles]
            best, match = next(filter(None, (_nearest(row, candidates, role) for role in others)), None), "alike"
        if best is not None:
            row |= {"other_op": best["op"], "other_block": best["block"], "other_depth": best["depth"], "match": match}
    return _frame(found)


def without_counterpart(alignment: pd.DataFrame, other: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Operators of the first model, and of the other, that stand alone."""
    used = set(alignment["other_op"].dropna())
    return list(alignment.loc[alignment["other_op"].isna(), "op"]), [op for op in other.index if op not in used]


def _rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for row in table.to_dict("records"):
        block = None if pd.isna(row["block"]) else int(row["block"])
        last = _blocks(table, row["component"]) - 1
        depth = np.nan if block is None else block / last if last > 0 else 0.0
        names = {"op": row["op"], "component": row["component"], "role": row["role"]}
        rows.append({**names, "block": block, "depth": depth, "other_op": None, "match": "none"})
    return rows


def _blocks(table: pd.DataFrame, component: str) -> int:
    blocks = table.loc[(table["component"] == component) & table["block"].notna(), "block"]
    return int(blocks.max()) + 1 if len(blocks) else 0


def _nearest(row: Row, candidates: list[dict[str, Any]], role: str) -> Row | None:
    """The candidate of this role in the same tower at the nearest depth; the shallower of two as near."""
    same = [item for item in candidates if item["component"] == row["component"] and item["role"] == role]
    same = [item for item in same if (item["block"] is None) == (row["block"] is None)]
    if not same or row["block"] is None:
        return same[0] if same else None
    return min(same, key=lambda item: (round(abs(item["depth"] - row["depth"]), 9), item["depth"]))


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.astype({"block": "Int64", "other_block": "Int64", "depth": "float64", "other_depth": "float64"})
