"""Plans under a budget, solved as small integer programs (`scipy.optimize.milp`, HiGHS).

One yes-or-no a unit and choice. The best plan is proven to be the best, but where hundreds of units score nearly the
same: there the proof does not come in minutes, and the best plan of the first thousand nodes of the search is taken. A
budget of a cost bounds what all choices cost together and takes those whose scores sum lowest; `error` bounds the sum
of scores and keeps as few operators in high precision as possible. A choice that costs as much as another of its unit
and loses more is dropped first, since no plan needs it.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from qvl_hydra.errors import ProfileError
from qvl_hydra.profiles.costs import COSTS, ERROR, LEAVE, Cost
from qvl_hydra.profiles.prices import Terms
from qvl_hydra.profiles.profile import Profile, weight_values
from qvl_hydra.profiles.units import Unit
from qvl_hydra.quantization.scheme import Scheme

# HiGHS takes a solution for optimal and a constraint for kept within 1e-6, absolute: with the largest score and the
# largest price at these values that is a trillionth of the one and a ten-billionth of the other.
_SCALE = 1e6
_TIGHT = 1e4  # larger ones make HiGHS repair its own solutions
APART = 0.1  # of the units: how far apart plans of one budget are that are measured against each other
NAMED = 3  # units that a message tells the reasons of
BEST = {"mip_rel_gap": 0.0, "node_limit": 1000}  # the search for the best plan ends with a proof, or in seconds
OTHERS = {"mip_rel_gap": 0.01, "node_limit": 10}  # that for the next best within 1 % of it, or after ten nodes
_SLACK = 1e-9  # of the largest price: what a budget is overrun by that rounding alone overruns

Prices = Sequence[Mapping[str, float]]  # of each unit, by choice
Plan = dict[str, str]  # the choice of each unit, by its name


@dataclass(frozen=True)
class Budget:
    """What a plan may cost.

    Attributes:
        kind: a row of the table of costs, or `error`, the predicted error allowed.
        value: the limit, inclusive.
    """

    kind: str
    value: float

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"


def select(units: Sequence[Unit], budget: Budget, terms: Terms, chooser: str = "scores") -> Profile:
    """The best profile of the budget; see `several`."""
    return several(units, budget, terms, 1, chooser)[0]


def several(
    units: Sequence[Unit], budget: Budget, terms: Terms, count: int, chooser: str = "scores"
) -> list[Profile]:
    """The best profile of the budget, and others nearly as good, which differ in `APART` of the units from each other.

    Scores of operators measured alone do not quite add up, so that the second best of a sum can be the best measured.

    Args:
        units: from `units_from_scores`.
        terms: the schemes of all choices, and what prices depend on.
        count: how many at most; `error` has one alone.
        chooser: name noted in the profiles.

    Returns:
        For `error` the profile with the fewest operators in high precision, of equals the one with the fewest bits; for
        a cost that with the lowest sum of scores, as they decide (`Unit.decides`), and then the others.

    Raises:
        ProfileError: no profile meets the budget.
    """
    plans: list[Plan] = []
    if budget.kind == ERROR:
        plans = [_fewest(units, budget.value, terms)]
    else:
        prices = prices_of(units, COSTS[budget.kind], terms)
        size = size_of(units, COSTS[budget.kind])
        while len(plans) < count:
            plan = assign(units, prices, budget, size, plans)
            if plan is None:
                break
            plans.append(plan)
    return [plan_profile(units, plan, terms.schemes, terms.high_bits, chooser) for plan in plans]


def prices_of(units: Sequence[Unit], cost: Cost, terms: Terms) -> list[dict[str, float]]:
    """What every choice of every unit costs."""
    price = cost.load()
    return [
        {choice: math.fsum(price(op, terms.of(choice), terms) for op in unit.members) for choice in unit.scores}
        for unit in units
    ]


def size_of(units: Sequence[Unit], cost: Cost) -> float:
    """What a budget's value is multiplied with to bound the sum of prices."""
    operators = [op for unit in units for op in unit.members]
    return float({"": 1, "operators": len(operators), "weights": sum(map(weight_values, operators))}[cost.per])


def cost_of(profile: Profile, cost: Cost, terms: Terms) -> float:
    """What a profile costs over all operators that it decides on."""
    price = cost.load()
    return math.fsum(
        price(op, None if op.path in profile.high else profile.scheme_of(op), terms) for op in profile.operators
    )


def undominated(unit: Unit, prices: Mapping[str, float]) -> list[str]:
    """The unit's choices that no other of it beats in both price and score, cheapest first."""
    kept: list[str] = []
    for choice in sorted(unit.scores, key=lambda name: (prices[name], unit.decides(name))):
        if not kept or unit.decides(choice) < unit.decides(kept[-1]):
            kept.append(choice)
    return kept


def assign(
    units: Sequence[Unit], prices: Prices, budget: Budget, size: float, others: Sequence[Plan] = ()
) -> Plan | None:
    """The choice of every unit with the lowest sum of deciding scores whose prices sum to the budget at most.

    Args:
        size: what prices are divided by to be in the budget's unit.
        others: plans that it must differ from, in `APART` of the units each.

    Returns:
        None where no plan is that different from the others, or none was found.

    Raises:
        ProfileError: not even the cheapest choices are that small.
    """
    limit = budget.value * size
    options = [undominated(unit, own) for unit, own in zip(units, prices, strict=True)]
    least = math.fsum(own[choices[0]] for own, choices in zip(prices, options, strict=True))
    largest = max(max(own.values()) for own in prices) or 1.0
    if least > limit + _SLACK * max(largest, abs(limit)):
        raise _too_small(units, budget, least / size)
    score = [[unit.decides(choice) for choice in own] for unit, own in zip(units, options, strict=True)]
    price = [[own[choice] for choice in choices] for own, choices in zip(prices, options, strict=True)]
    return _solve(units, options, score, price, limit - least, others)


def frontier(units: Sequence[Unit], prices: Prices, size: float, count: int) -> list[float]:
    """So many budgets from the cheapest plan to the one that loses least."""
    options = [undominated(unit, own) for unit, own in zip(units, prices, strict=True)]
    ends = [math.fsum(own[names[at]] for own, names in zip(prices, options, strict=True)) / size for at in (0, -1)]
    return [float(value) for value in np.linspace(ends[0], ends[1], count)]


def plan_profile(
    units: Sequence[Unit], plan: Mapping[str, str], schemes: Mapping[str, Scheme], high_bits: int, chooser: str
) -> Profile:
    """The profile of a plan; its first scheme is the one that most operators have."""
    assigned = {op.path: schemes[plan[unit.name]] for unit in units if plan[unit.name] != LEAVE for op in unit.members}
    counts = {name: sum(scheme.name == name for scheme in assigned.values()) for name in schemes}
    main = schemes[max(counts, key=lambda name: counts[name])]
    operators = tuple(op for unit in units for op in unit.members)
    return Profile(
        scheme=main,
        operators=operators,
        high=frozenset(op.path for op in operators if op.path not in assigned),
        high_bits=high_bits,
        chooser=chooser,
        predicted=math.fsum(unit.scores.get(plan[unit.name], 0.0) for unit in units),
        others={path: scheme for path, scheme in assigned.items() if scheme.name != main.name},
    )


def profile_of(
    units: Sequence[Unit], kept: Bool[np.ndarray, " unit"], scheme: Scheme, high_bits: int, chooser: str
) -> Profile:
    """The profile that keeps some units in high precision and puts the others into one scheme."""
    plan = {unit.name: LEAVE if keep else scheme.name for unit, keep in zip(units, kept, strict=True)}
    return plan_profile(units, plan, {scheme.name: scheme}, high_bits, chooser)


def left_alone(units: Sequence[Unit], scheme: Scheme, high_bits: int) -> Profile:
    """The profile that keeps every unit in high precision."""
    return profile_of(units, np.ones(len(units), dtype=bool), scheme, high_bits, "scores")


def _fewest(units: Sequence[Unit], allowed: float, terms: Terms) -> Plan:
    """The plan with the fewest operators in high precision whose scores sum to what is allowed at most."""
    options = [list(unit.scores) for unit in units]
    score = [[unit.scores[choice] for choice in own] for unit, own in zip(units, options, strict=True)]
    least = math.fsum(map(min, score))
    if allowed < least:
        raise ProfileError(
            f"profile.budget=error, profile.value={allowed:g}: with every operator in high precision the predicted "
            f"error is {least:g}; allow at least that"
        )
    counts, bits = (prices_of(units, COSTS[name], terms) for name in ("count", "weight_bytes"))
    # Bytes decide between equal counts: all of them together weigh less than one operator.
    total = math.fsum(max(own.values()) for own in bits) or 1.0
    price = [[c[choice] + b[choice] / (2 * total) for choice in own]
             for c, b, own in zip(counts, bits, options, strict=True)]  # fmt: skip
    found = _solve(units, options, price, score, allowed - least)
    assert found is not None
    return found


def _solve(
    units: Sequence[Unit],
    options: Sequence[Sequence[str]],
    objective: Sequence[Sequence[float]],
    spent: Sequence[Sequence[float]],
    left: float,
    others: Sequence[Plan] = (),
) -> Plan | None:
    """One option a unit: the lowest sum of objectives, with at most `left` spent above the least possible.

    Args:
        others: plans that it must differ from.

    Returns:
        None where nothing was found that differs enough from the others.
    """
    rows = [row for row, own in enumerate(options) for _ in own]
    worth = np.array([value - min(own) for own in objective for value in own])
    above = np.array([value - min(own) for own in spent for value in own])
    one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(len(units), len(rows)))
    size = above.max(initial=0.0) or 1.0
    names = [choice for own in options for choice in own]
    apart = max(1, round(APART * len(units)))
    same = np.array([[plan[units[row].name] == name for row, name in zip(rows, names, strict=True)] for plan in others])
    cuts = [LinearConstraint(same.astype(float), -np.inf, len(units) - apart)] if others else []
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(above[None] / size * _TIGHT, -np.inf, (max(left, 0.0) / size + _SLACK) * _TIGHT),
        *cuts,
    ]
    with _silent():
        result = milp(
            worth / (worth.max(initial=0.0) or 1.0) * _SCALE,
            integrality=np.ones(len(rows)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"disp": False, **(OTHERS if others else BEST)},
        )
    if others and result.x is None:
        return None
    assert result.x is not None, f"a program that has a solution was not solved: {result.message}"
    return {units[row].name: name for row, name, taken in zip(rows, names, result.x > 0.5, strict=True) if taken}


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing of what HiGHS prints past `disp`, where it repairs a solution of its own, reaches the screen."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError):  # the screen is gone
        yield
        return
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _too_small(units: Sequence[Unit], budget: Budget, least: float) -> ProfileError:
    cheapest = f"a budget of {budget} is too small: the cheapest plan has {_rounded_up(least)}"
    stay = [unit for unit in units if unit.stays and unit.reasons]
    if not stay:
        return ProfileError(f"{cheapest}; raise the budget, or offer cheaper choices")
    reasons = "; ".join(f"{unit.name} ({'; '.join(dict.fromkeys(unit.reasons.values()))})" for unit in stay[:NAMED])
    more = f"; and {len(stay) - NAMED} more" if len(stay) > NAMED else ""
    return ProfileError(
        f"{cheapest}, since what has no score stays in high precision: {reasons}{more}; raise the budget, or score them"
    )


def _rounded_up(value: float) -> str:
    """Four digits that are not below the value, so that a budget of just as much is met."""
    text = f"{value:.4g}"
    return text if float(text) >= value else f"{value * 1.0005:.4g}"
