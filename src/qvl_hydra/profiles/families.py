"""Families of modules: component by projection by depth, and what each costs, quantized and nothing else with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from qvl_hydra.profiles.joint import Interactions, interactions_of
from qvl_hydra.profiles.profile import Profile

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
    scored = _scored(scores, shared)
    if scored.empty:
        return pd.DataFrame(columns=list(COLUMNS))
    own = scored.set_index("op")["score"].astype(float).clip(lower=0.0)
    found = interactions_of(samples, own, scheme, str(scored["metric"].iloc[0]))
    rows: list[dict[str, Any]] = []
    for key, part in _by_family(scored):
        names = set(part["op"])
        rows.append(
            {
                **dict(zip(COLUMNS, key, strict=False)),
                "n_ops": len(names),
                "sum_of_scores": float(own[part["op"]].sum()),
                "together": _together(own, found, names),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS)).sort_values("sum_of_scores", ascending=False, ignore_index=True)


def family_plans(
    scores: pd.DataFrame, largest: pd.DataFrame, float_profile: Profile, shared: bool = False
) -> list[Profile]:
    """Everything quantized that was scored; then for each family it alone, and everything but it.

    Args:
        scores: `scores.parquet`.
        largest: rows of `families`.
        float_profile: whose operators all stay in high precision; of its scheme the plans are.
        shared: see `families`.
    """
    operators = float_profile.operators
    names_of = {
        key: {*part["op"], *(part["group"] if shared else ())} for key, part in _by_family(_scored(scores, shared))
    }

    def paths(names: set[str]) -> frozenset[str]:
        return frozenset(op.path for op in operators if op.path in names or op.group in names)

    everything = paths(set().union(*names_of.values()))
    own = [paths(names_of[tuple(key)]) for key in largest[list(COLUMNS[:3])].itertuples(index=False)]
    quantized = [everything, *(part for family in own for part in (family, everything - family))]
    high = float_profile.high
    return [replace(float_profile, high=high - low, chooser="families", predicted=None) for low in quantized]


def name_of(row: Mapping[Any, Any]) -> str:
    """A family in words."""
    tower = {"lm": "language", "vision": "vision"}.get(row["component"], row["component"])
    return " ".join(part for part in (tower, row["role"], row["depth"]) if part)


def _scored(scores: pd.DataFrame, shared: bool) -> pd.DataFrame:
    scored = scores[scores["status"] == "scored"]
    return scored.drop_duplicates("group") if shared else scored


def _by_family(scored: pd.DataFrame) -> Iterator[tuple[tuple[str, ...], pd.DataFrame]]:
    """Component, role and depth, and the rows of the family."""
    for key, part in scored.assign(depth=_depth(scored)).groupby(list(COLUMNS[:3]), sort=False):
        yield tuple(map(str, key)), part


def _together(own: pd.Series, found: Interactions | None, names: set[str]) -> float:
    return float(own[own.index.isin(names)].sum()) if found is None else found.error(names)


def _depth(scored: pd.DataFrame) -> pd.Series:
    """Which third of its tower an operator's block is in."""
    block = scored["block"].astype(float)
    count = block.groupby(scored["component"]).transform("max") + 1
    third = block * len(THIRDS) // count
    return third.map(lambda value: "" if np.isnan(value) else THIRDS[int(value)])
