"""Selection of a profile under a budget, solved exactly as a small integer program (`scipy.optimize.milp`, HiGHS).

One yes-or-no a unit (stays in high precision or not). Four budgets bound what high precision may cost and keep the
units whose scores sum highest; the fifth bounds the predicted error and keeps as few operators as possible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64
from scipy.optimize import Bounds, LinearConstraint, milp

from qvl_hydra.errors import ProfileError
from qvl_hydra.profiles.profile import Profile, low_bits, weight_values
from qvl_hydra.profiles.units import Unit
from qvl_hydra.quantization.scheme import Scheme

# HiGHS takes a solution for optimal within 1e-6 and a constraint for kept within 1e-6, absolute: with the largest
# score at this value both are a billionth of it and less.
_SCALE = 1e6


@dataclass(frozen=True)
class Budget:
    """What a profile may cost.

    Attributes:
        kind: `count` and `share` of operators kept in high precision, `average_bits` a weight and `weight_bytes` over
            all weights decided on, or `error`, the predicted error allowed.
        value: the limit, inclusive.
    """

    kind: Literal["count", "share", "average_bits", "weight_bytes", "error"]
    value: float

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"


def select(units: Sequence[Unit], budget: Budget, scheme: Scheme, high_bits: int, chooser: str = "scores") -> Profile:
    """The best profile of the budget.

    Args:
        units: from `units_from_scores`; those without a score stay in high precision and count.
        chooser: name noted in the profile.

    Returns:
        For `error` the profile with the fewest operators in high precision, of equals the one with the fewest bytes;
        for the other budgets the one with the lowest sum of scores over quantized operators.

    Raises:
        ProfileError: no profile meets the budget.
    """
    scores = np.array([0.0 if unit.score is None else unit.score for unit in units])
    forced = np.array([unit.score is None for unit in units])
    cost, limit = cost_and_limit(units, budget, scheme, high_bits)
    if budget.kind == "error":
        extra, _ = cost_and_limit(units, Budget("weight_bytes", 0.0), scheme, high_bits)
        kept = _fewest(units, scores, forced, budget.value, extra)
    else:
        _require(units, cost, limit, forced, budget)
        kept = _solve(-_scaled(scores), cost, limit, forced)
    return profile_of(units, kept, scheme, high_bits, chooser)


def profile_of(
    units: Sequence[Unit], kept: Bool[np.ndarray, " unit"], scheme: Scheme, high_bits: int, chooser: str
) -> Profile:
    """The profile that keeps some units in high precision and quantizes the others."""
    high = frozenset(op.path for unit, keep in zip(units, kept, strict=True) if keep for op in unit.members)
    operators = tuple(op for unit in units for op in unit.members)
    return Profile(scheme, operators, high, high_bits, chooser, predicted_error(units, high))


def predicted_error(units: Sequence[Unit], high: frozenset[str]) -> float:
    """Sum of the scores of the quantized units: what the error would be if single errors added up."""
    low = [unit for unit in units if unit.members[0].path not in high]
    return math.fsum(unit.score or 0.0 for unit in low)


def cost_and_limit(
    units: Sequence[Unit], budget: Budget, scheme: Scheme, high_bits: int
) -> tuple[Float64[np.ndarray, " unit"], float]:
    """What keeping each unit costs, and what all kept ones may cost together.

    Bits and bytes are counted above everything quantized.
    """
    counts = np.array([float(len(unit.members)) for unit in units])
    if budget.kind in ("count", "error"):
        return counts, budget.value
    if budget.kind == "share":
        return counts, math.floor(budget.value * counts.sum() + 1e-9)
    weights = np.array([float(sum(weight_values(op) for op in unit.members)) for unit in units])
    low = np.array([sum(low_bits(op, scheme, high_bits) for op in unit.members) for unit in units])
    allowed_bits = budget.value * (weights.sum() if budget.kind == "average_bits" else 8)
    return weights * high_bits - low, allowed_bits - low.sum()


def _fewest(
    units: Sequence[Unit],
    scores: Float64[np.ndarray, " unit"],
    forced: Bool[np.ndarray, " unit"],
    allowed: float,
    extra: Float64[np.ndarray, " unit"],
) -> Bool[np.ndarray, " unit"]:
    """The smallest set of units whose removal brings the sum of the others' scores down to what is allowed.

    Args:
        extra: bits that keeping each unit costs.
    """
    counts = np.array([float(len(unit.members)) for unit in units])
    reachable = math.fsum(scores[(scores < 0) & ~forced])
    if allowed < reachable:
        raise ProfileError(
            f"profile.budget=error, profile.value={allowed:g}: with every operator in high precision the predicted "
            f"error is {reachable:g}; allow at least that"
        )
    # Bytes decide between equal counts: all of them together weigh less than one operator.
    objective = _SCALE * (counts + extra / (2 * np.abs(extra).sum() or 1.0))
    return _solve(objective, -scores, allowed - math.fsum(scores[~forced]), forced)


def _solve(
    objective: Float64[np.ndarray, " unit"],
    cost: Float64[np.ndarray, " unit"],
    limit: float,
    forced: Bool[np.ndarray, " unit"],
) -> Bool[np.ndarray, " unit"]:
    """Minimise `objective @ kept` with `cost @ kept <= limit` over units that are not forced; the forced are kept."""
    free = ~forced
    size = np.abs(cost).max(initial=0.0) or 1.0
    left = limit - cost[forced].sum()
    result = milp(
        objective[free],
        integrality=np.ones(free.sum()),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(cost[free][None] / size * _SCALE, -np.inf, left / size * _SCALE),
        options={"mip_rel_gap": 0.0},
    )
    assert result.status == 0, f"a program that has a solution was not solved: {result.message}"
    kept = forced.copy()
    kept[free] = result.x > 0.5
    return kept


def _scaled(scores: Float64[np.ndarray, " unit"]) -> Float64[np.ndarray, " unit"]:
    largest = np.abs(scores).max(initial=0.0)
    return scores if largest == 0 else scores / largest * _SCALE


def _require(
    units: Sequence[Unit],
    cost: Float64[np.ndarray, " unit"],
    limit: float,
    forced: Bool[np.ndarray, " unit"],
    budget: Budget,
) -> None:
    if cost[forced].sum() <= limit:
        return
    stay = [unit for unit in units if unit.score is None]
    if not stay:
        raise ProfileError(
            f"profile.budget={budget.kind}, profile.value={budget.value:g}: not even everything quantized is that small"
        )
    reasons = "; ".join(f"{unit.name} ({unit.reason})" for unit in stay[:5])
    raise ProfileError(
        f"profile.budget={budget.kind}, profile.value={budget.value:g}: {len(stay)} units without a score must stay in "
        f"high precision and cost more than that: {reasons}; raise the budget, or score them"
    )
