"""Units of a decision: operators that a runtime fuses (q/k/v, gate/up) get one precision.

An operator without a score (skipped or failed in the sweep, or left out of it while a neighbour that is fused with it
was scored) keeps its whole unit in high precision: what was not measured is not quantized.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from qvl_hydra.errors import ProfileError
from qvl_hydra.operators.discover import Operator

Rows = Mapping[str, Mapping[Any, Any]]  # scores.parquet by operator


@dataclass(frozen=True)
class Unit:
    """Operators that get one precision.

    Attributes:
        name: path of the fused operator, or of the only member.
        score: what quantizing the unit costs, higher is worse; None when it must stay in high precision.
        reason: why it must stay; None otherwise.
    """

    name: str
    members: tuple[Operator, ...]
    score: float | None
    reason: str | None = None


def units_from_scores(operators: Sequence[Operator], table: pd.DataFrame) -> list[Unit]:
    """Units of all operators that a sweep was asked for, in data order.

    A unit's score is the sum of its members' scores, or the score of the fused operator where the sweep scored that.

    Args:
        operators: every operator of the model.
        table: `scores.parquet`: columns op, status, reason, score.

    Raises:
        ProfileError: the table names operators that the model does not have, or no operator of it is scored.
    """
    rows: Rows = {str(row["op"]): row for row in table.to_dict("records")}
    known = {op.path for op in operators} | {op.group for op in operators}
    foreign = [name for name in rows if name not in known]
    if foreign:
        raise ProfileError(
            f"the sweep scored {len(foreign)} operators that this model does not have, first {foreign[:3]}; "
            "take the sweep of this model, or the model of this sweep"
        )
    touched = {op.group for op in operators if op.path in rows or op.group in rows}
    members: dict[str, list[Operator]] = {}
    for op in operators:
        if op.group in touched:
            members.setdefault(op.group, []).append(op)
    units = [_unit(name, tuple(ops), rows) for name, ops in members.items()]
    if all(unit.score is None for unit in units):
        raise ProfileError("the sweep has no scored operator to decide on; see the reasons in its scores.parquet")
    return units


def units_with_values(units: Sequence[Unit], values: Mapping[str, float]) -> list[Unit]:
    """The same units with other values in the place of scores; what must stay still must.

    Args:
        values: one number an operator path.
    """
    return [
        unit
        if unit.score is None
        else Unit(unit.name, unit.members, sum(values[op.path] for op in unit.members))
        for unit in units
    ]


def _unit(name: str, members: tuple[Operator, ...], rows: Rows) -> Unit:
    asked = [name] if name in rows else [op.path for op in members]
    missing = [path for path in asked if path not in rows or rows[path]["status"] != "scored"]
    if missing:
        return Unit(name, members, None, "; ".join(_why(path, rows) for path in missing))
    score = sum(float(rows[path]["score"]) for path in asked)
    return Unit(name, members, score) if math.isfinite(score) else Unit(name, members, None, f"its score is {score}")


def _why(path: str, rows: Rows) -> str:
    if path not in rows:
        return f"{path} was not part of the sweep"
    return f"{path} {rows[path]['status']}: {rows[path]['reason']}"
