"""Families of modules: component by projection by depth, and what each costs, quantized and nothing else with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from qvl_hydra.profiles.joint import Interactions, interactions_of

THIRDS = ("early", "middle", "late")  # of a tower's blocks
COLUMNS = (
    "component",
    "role",
    "depth",  # third of the tower's blocks; empty outside them
    "n_ops",
    "sum_of_scores",
    "together",  # predicted error with this family quantized and nothing else
)


def families(scores: pd.DataFrame, samples: pd.DataFrame, scheme: str | None, shared: bool = False) -> pd.DataFrame:
    """One row a family, the highest sum of scores first.

    Args:
        scores: `scores.parquet`.
        samples: `sample_scores.parquet`; with a sketch's signed sums effects that add up or cancel within a family are
            in `together`, else it is the sum of scores.
        shared: the score of an operator is that of its whole fused unit: of a unit one counts.

    Returns:
        With the columns of `COLUMNS`.
    """
    scored = scores[scores["status"] == "scored"]
    if shared:
        scored = scored.drop_duplicates("group")
    if scored.empty:
        return pd.DataFrame(columns=list(COLUMNS))
    own = scored.set_index("op")["score"].astype(float).clip(lower=0.0)
    found = interactions_of(samples, own, scheme, str(scored["metric"].iloc[0]))
    rows: list[dict[str, Any]] = []
    keys = scored.assign(depth=_depth(scored)).groupby(["component", "role", "depth"], sort=False)["op"]
    for key, ops in keys:
        names = set(ops)
        rows.append(
            {
                **dict(zip(COLUMNS, key, strict=False)),
                "n_ops": len(names),
                "sum_of_scores": float(own[list(names)].sum()),
                "together": _together(own, found, names),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS)).sort_values("sum_of_scores", ascending=False, ignore_index=True)


def name_of(row: Mapping[Any, Any]) -> str:
    """A family in words."""
    tower = {"lm": "language", "vision": "vision"}.get(row["component"], row["component"])
    return " ".join(part for part in (tower, row["role"], row["depth"]) if part)


def _together(own: pd.Series, found: Interactions | None, names: set[str]) -> float:
    return float(own[own.index.isin(names)].sum()) if found is None else found.error(names)


def _depth(scored: pd.DataFrame) -> pd.Series:
    """Which third of its tower an operator's block is in."""
    block = scored["block"].astype(float)
    count = block.groupby(scored["component"]).transform("max") + 1
    third = block * len(THIRDS) // count
    return third.map(lambda value: "" if np.isnan(value) else THIRDS[int(value)])
