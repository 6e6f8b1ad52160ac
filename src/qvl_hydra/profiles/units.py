"""Units of a decision: operators that a runtime fuses (q/k/v, gate/up) get one choice.

A unit has a score for every choice that each of its operators was scored in. An operator without a score (skipped or
failed in the sweep, or left out of it while a neighbour that is fused with it was scored) takes that choice from its
whole unit: what was not measured is not quantized.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import ProfileError
from qvl_hydra.operators.discover import Operator, unmatched
from qvl_hydra.profiles.costs import LEAVE
from qvl_hydra.settings import SpaceSettings

Rows = Mapping[str, Mapping[Any, Any]]  # scores.parquet by operator


@dataclass(frozen=True)
class Unit:
    """Operators that get one choice.

    Attributes:
        name: path of the fused operator, or of the only member.
        scores: what each choice that the unit can have costs the output, higher is worse; 0 for `leave`.
        reasons: why it cannot have the others.
        steady: the same scores as they decide, where a few samples shall not; see `steady_score` of the table.
    """

    name: str
    members: tuple[Operator, ...]
    scores: Mapping[str, float]
    reasons: Mapping[str, str] = field(default_factory=dict)
    steady: Mapping[str, float] = field(default_factory=dict)

    def decides(self, choice: str) -> float:
        """What a choice counts where plans are compared."""
        return self.steady.get(choice, self.scores[choice])

    @property
    def stays(self) -> bool:
        """Whether high precision is all it can have."""
        return set(self.scores) == {LEAVE}


def calibrated(units: Sequence[Unit], samples: Sequence[Sample]) -> list[Operator]:
    """Operators of units, without those of a vision tower that stay as they are and that no sample reaches."""
    images = any(sample.pixel_values is not None for sample in samples)
    return [op for unit in units for op in unit.members if images or op.component != "vision" or not unit.stays]


def units_from_scores(
    operators: Sequence[Operator],
    tables: Mapping[str, pd.DataFrame],
    choices: Sequence[str],
    spaces: Sequence[SpaceSettings] = (),
    shared: bool = False,
) -> list[Unit]:
    """Units of all operators that a sweep was asked for, in data order.

    A unit's score is the sum of its members' scores, or the score of the fused operator where the sweep scored that.
    One that can have none of its choices stays in high precision, also where `leave` is not among them.

    Args:
        operators: every operator of the model's component.
        tables: `scores.parquet` of each scheme: columns op, status, reason, score.
        choices: schemes, and `leave`.
        spaces: choices of some operators alone; of several that match, the last.
        shared: an operator's score is already that of its whole unit.

    Raises:
        ProfileError: a table names operators that the model does not have; no operator is scored in any scheme; a
            space names no operator, or some but not all operators of a unit.
    """
    by_scheme: dict[str, Rows] = {
        name: {str(row["op"]): row for row in table.to_dict("records")} for name, table in tables.items()
    }
    known = {op.path for op in operators} | {op.group for op in operators}
    asked = {name for rows in by_scheme.values() for name in rows}
    foreign = [name for rows in by_scheme.values() for name in rows if name not in known]
    if foreign:
        raise ProfileError(
            f"the sweep scored {len(foreign)} operators that this model does not have, first {foreign[:3]}; "
            "take the sweep of this model, or the model of this sweep"
        )
    touched = {op.group for op in operators if op.path in asked or op.group in asked}
    members: dict[str, list[Operator]] = {}
    for op in operators:
        if op.group in touched:
            members.setdefault(op.group, []).append(op)
    allowed = _spaces({name: tuple(ops) for name, ops in members.items()}, choices, spaces)
    units = [_unit(name, tuple(ops), by_scheme, allowed[name], shared) for name, ops in members.items()]
    if all(unit.stays for unit in units):
        said = [reason for unit in units for reason in unit.reasons.values()] or ["none is asked for"]
        raise ProfileError(f"no operator can be in any of {', '.join(tables)}: {said[0]}")
    return units


def units_with_values(units: Sequence[Unit], scheme: str, values: Mapping[str, float]) -> list[Unit]:
    """The same units with other values in the place of a scheme's scores; what must stay still must.

    Args:
        values: one number an operator path.
    """
    return [
        unit
        if scheme not in unit.scores
        else Unit(unit.name, unit.members, {**unit.scores, scheme: sum(values[op.path] for op in unit.members)})
        for unit in units
    ]


def units_without(units: Sequence[Unit], refused: Callable[[Operator, str], str | None]) -> list[Unit]:
    """The same units without the choices that one of their operators is refused.

    Args:
        refused: gives the reason why an operator cannot have a scheme, or None.
    """
    found = []
    for unit in units:
        said = {
            choice: [why for op in unit.members if (why := refused(op, choice)) is not None]
            for choice in unit.scores
            if choice != LEAVE
        }
        reasons = {choice: "; ".join(dict.fromkeys(why)) for choice, why in said.items() if why}
        scores = {choice: value for choice, value in unit.scores.items() if choice not in reasons} or {LEAVE: 0.0}
        found.append(replace(unit, scores=scores, reasons={**unit.reasons, **reasons}))
    return found


def _spaces(
    members: Mapping[str, tuple[Operator, ...]], choices: Sequence[str], spaces: Sequence[SpaceSettings]
) -> dict[str, Sequence[str]]:
    """The choices that each unit may have."""
    allowed: dict[str, Sequence[str]] = dict.fromkeys(members, choices)
    for space in spaces:
        found = False
        for name, ops in members.items():
            inside = [fnmatch.fnmatchcase(op.path, space.match) for op in ops]
            if any(inside) and not all(inside):
                parted = ", ".join(op.path for op, one in zip(ops, inside, strict=True) if not one)
                raise ProfileError(
                    f"profile.spaces: {space.match!r} cuts {name} in two, which gets one choice: it leaves out {parted}"
                )
            if all(inside):
                found, allowed[name] = True, space.choices
        if not found:
            every = [op for ops in members.values() for op in ops]
            raise ProfileError(f"profile.spaces: {unmatched(space.match, every)}")
    return allowed


def _unit(
    name: str, members: tuple[Operator, ...], by_scheme: Mapping[str, Rows], choices: Sequence[str], shared: bool
) -> Unit:
    scores: dict[str, float] = {}
    steady: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for scheme, rows in by_scheme.items():
        if scheme not in choices:
            continue
        asked = [name] if name in rows else [op.path for op in members]
        missing = [path for path in asked if path not in rows or rows[path]["status"] != "scored"]
        if missing:
            reasons[scheme] = "; ".join(_why(path, rows) for path in missing)
            continue
        together = max if shared else sum
        score = together(float(rows[path]["score"]) for path in asked)
        deciding = together(float(rows[path].get("steady_score", math.nan)) for path in asked)
        if math.isfinite(score):
            scores[scheme] = score
            if math.isfinite(deciding):
                steady[scheme] = deciding
        else:
            reasons[scheme] = f"its score is {score}"
    if LEAVE in choices or not scores:
        scores[LEAVE] = 0.0
    return Unit(name, members, scores, reasons, steady)


def _why(path: str, rows: Rows) -> str:
    if path not in rows:
        return f"{path} was not part of the sweep"
    return f"{path} {rows[path]['status']}: {rows[path]['reason']}"
