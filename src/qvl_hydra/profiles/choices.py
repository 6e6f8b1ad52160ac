"""Profiles among any number of schemes: one choice a unit, solved exactly as a small integer program (HiGHS).

A unit's choices are those that every one of its operators was scored in, and leaving it in high precision where that is
allowed. One yes-or-no a unit and choice; a choice that costs as much as another of its unit and loses more is dropped
first, since no plan needs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from qvl_hydra.errors import ProfileError
from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.profile import Profile, low_bits, weight_values
from qvl_hydra.profiles.units import Unit, units_from_scores
from qvl_hydra.quantization.scheme import Scheme

LEAVE = "leave"  # the choice of high precision
_SCALE = 1e6  # see profiles.select


@dataclass(frozen=True)
class ChoiceUnit:
    """Operators that get one choice.

    Attributes:
        scores: what each choice that the unit can have costs the output; 0 for `leave`.
        bits: what each takes for the unit's weights, scales included.
        reasons: why it cannot have the others.
    """

    name: str
    members: tuple[Operator, ...]
    scores: Mapping[str, float]
    bits: Mapping[str, float]
    reasons: Mapping[str, str]


def choice_units(
    operators: Sequence[Operator],
    tables: Mapping[str, pd.DataFrame],
    schemes: Mapping[str, Scheme],
    choices: Sequence[str],
    high_bits: int,
) -> list[ChoiceUnit]:
    """Units with a score for every choice that they can have, in data order.

    A unit that has no other choice stays in high precision, also where `leave` is not among the choices.

    Args:
        operators: every operator of the model's component.
        tables: `scores.parquet` of each scheme.
        schemes: of each choice but `leave`.

    Raises:
        ProfileError: no operator was scored in any of them.
    """
    by_scheme: dict[str, dict[str, Unit]] = {}
    for name in schemes:
        try:
            by_scheme[name] = {unit.name: unit for unit in units_from_scores(operators, tables[name])}
        except ProfileError:
            continue
    if not by_scheme:
        raise ProfileError(f"no operator was scored in any of {', '.join(schemes)}; see scores.parquet for the reasons")
    found = []
    names = dict.fromkeys(name for units in by_scheme.values() for name in units)
    for name in names:
        own = {scheme: units[name] for scheme, units in by_scheme.items() if name in units}
        members = next(iter(own.values())).members
        scores = {scheme: unit.score for scheme, unit in own.items() if unit.score is not None}
        bits = {scheme: sum(low_bits(op, schemes[scheme], high_bits) for op in members) for scheme in scores}
        if LEAVE in choices or not scores:
            scores[LEAVE] = 0.0
            bits[LEAVE] = float(sum(high_bits * weight_values(op) for op in members))
        reasons = {scheme: unit.reason or "" for scheme, unit in own.items() if unit.score is None}
        found.append(ChoiceUnit(name, members, scores, bits, reasons))
    return found


def undominated(unit: ChoiceUnit) -> list[str]:
    """The unit's choices that no other of it beats in both bits and score, cheapest first."""
    kept: list[str] = []
    for choice in sorted(unit.scores, key=lambda name: (unit.bits[name], unit.scores[name])):
        if not kept or unit.scores[choice] < unit.scores[kept[-1]]:
            kept.append(choice)
    return kept


def assign(units: Sequence[ChoiceUnit], average_bits: float) -> dict[str, str]:
    """The choice of every unit with the lowest sum of scores within a budget of bits a weight.

    Raises:
        ProfileError: not even the cheapest choices are that small.
    """
    options = [undominated(unit) for unit in units]
    weights = sum(weight_values(op) for unit in units for op in unit.members)
    least = math.fsum(unit.bits[own[0]] for unit, own in zip(units, options, strict=True))
    limit = average_bits * weights
    if least > limit * (1 + 1e-12):
        raise ProfileError(
            f"profile.values={average_bits:g} bits a weight: not even the cheapest choice of every unit is that small "
            f"({least / weights:.3f}); raise it, or offer smaller choices"
        )
    pairs = [(row, choice) for row, own in enumerate(options) for choice in own]
    scores = np.array([units[row].scores[choice] for row, choice in pairs])
    bits = np.array([units[row].bits[choice] for row, choice in pairs])
    one_each = csr_array(
        (np.ones(len(pairs)), ([row for row, _ in pairs], np.arange(len(pairs)))), shape=(len(units), len(pairs))
    )
    size = bits.max() or 1.0
    result = milp(
        scores / (np.abs(scores).max() or 1.0) * _SCALE,
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(bits[None] / size * _SCALE, -np.inf, limit / size * _SCALE * (1 + 1e-12)),
        ],
        options={"mip_rel_gap": 0.0, "disp": False},
    )
    assert result.status == 0, f"a program that has a solution was not solved: {result.message}"
    return {units[row].name: choice for (row, choice), taken in zip(pairs, result.x > 0.5, strict=True) if taken}


def frontier(units: Sequence[ChoiceUnit], count: int) -> list[float]:
    """So many budgets in bits a weight from the cheapest plan to the one that loses least."""
    weights = sum(weight_values(op) for unit in units for op in unit.members)
    options = [undominated(unit) for unit in units]
    ends = [math.fsum(unit.bits[own[at]] for unit, own in zip(units, options, strict=True)) / weights for at in (0, -1)]
    return [float(value) for value in np.linspace(ends[0], ends[1], count)]


def plan_profile(
    units: Sequence[ChoiceUnit], plan: Mapping[str, str], schemes: Mapping[str, Scheme], high_bits: int
) -> Profile:
    """The profile of an assignment; its first scheme is the one that most operators have."""
    assigned = {op.path: schemes[plan[u.name]] for u in units if plan[u.name] != LEAVE for op in u.members}
    counts = {name: sum(scheme.name == name for scheme in assigned.values()) for name in schemes}
    main = schemes[max(counts, key=lambda name: counts[name])]
    operators = tuple(op for unit in units for op in unit.members)
    return Profile(
        scheme=main,
        operators=operators,
        high=frozenset(op.path for op in operators if op.path not in assigned),
        high_bits=high_bits,
        chooser="scores",
        predicted=math.fsum(unit.scores[plan[unit.name]] for unit in units),
        others={path: scheme for path, scheme in assigned.items() if scheme.name != main.name},
    )
