"""Other ways to choose what stays in high precision, at the same budget: what scores have to beat."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from qvl_hydra.estimators.metrics import squared_norms
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.models.memory import row_parts
from qvl_hydra.profiles.costs import COSTS, LEAVE
from qvl_hydra.profiles.prices import Terms
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.profiles.select import Budget, prices_of, profile_of, select, size_of
from qvl_hydra.profiles.units import Unit, units_with_values
from qvl_hydra.quantization.qdq import OperatorQuantizer

RANDOM_SEEDS = (0, 1, 2)
MOST = len(RANDOM_SEEDS) + 3  # profiles that `baseline_profiles` gives of a budget


def baseline_profiles(
    units: Sequence[Unit],
    budget: Budget,
    terms: Terms,
    weight_errors: Mapping[str, float],
    ranges: Mapping[str, float],
) -> list[Profile]:
    """One profile a baseline, all within the budget.

    - `random-<seed>`: units in random order;
    - `first_and_last`: the operators nearest to the two ends of their tower, a common rule of thumb;
    - `weight_error`: the largest `||Q(W) - W||^2`, which needs no data;
    - `activation_range`: the widest input range on the calibration samples (omitted where the scheme has no static
      input ranges).

    Args:
        budget: of a cost.
        terms: of one scheme.
        weight_errors, ranges: one number an operator path that is offered the scheme.
    """
    (scheme,) = terms.schemes.values()
    high_bits = terms.high_bits
    orders = {f"random-{seed}": np.random.default_rng(seed).permutation(len(units)) for seed in RANDOM_SEEDS}
    orders["first_and_last"] = np.argsort(distance_from_ends(units), kind="stable")
    if ranges:
        widest = [max(ranges.get(op.path, 0.0) for op in unit.members) for unit in units]
        orders["activation_range"] = np.argsort(-np.array(widest), kind="stable")
    profiles = [
        profile_of(units, take_in_order(units, order.tolist(), budget, terms), scheme, high_bits, name)
        for name, order in orders.items()
    ]
    if any(weight_errors.values()):
        by_weight = select(units_with_values(units, scheme.name, weight_errors), budget, terms)
        kept = np.array([unit.members[0].path in by_weight.high for unit in units])
        profiles.append(profile_of(units, kept, scheme, high_bits, "weight_error"))
    return profiles


def take_in_order(
    units: Sequence[Unit], order: Sequence[int], budget: Budget, terms: Terms
) -> Bool[np.ndarray, " unit"]:
    """Keep units one after the other as long as they fit; one that does not fit is passed over.

    Units without a score stay in high precision first.
    """
    (scheme,) = terms.schemes
    cost = COSTS[budget.kind]
    prices = prices_of(units, cost, terms)
    limit = budget.value * size_of(units, cost)
    kept = np.array([unit.stays for unit in units])
    spent = math.fsum(own[LEAVE if keep else scheme] for own, keep in zip(prices, kept, strict=True))
    for index in order:
        more = 0.0 if kept[index] else prices[index][LEAVE] - prices[index][scheme]
        if not kept[index] and spent + more <= limit * (1 + 1e-12) + 1e-9:
            kept[index] = True
            spent += more
    return kept


def distance_from_ends(units: Sequence[Unit]) -> Float64[np.ndarray, " unit"]:
    """How far a unit is from the nearer end of its tower: 0 at an end, 0.5 in the middle."""
    distances = np.zeros(len(units))
    for component in ("vision", "lm"):
        places = [index for index, unit in enumerate(units) if unit.members[0].component == component]
        last = max(len(places) - 1, 1)
        for rank, index in enumerate(places):
            distances[index] = min(rank, last - rank) / last
    return distances


def errors_and_ranges(
    model: LoadedModel, quantizers: Mapping[str, OperatorQuantizer], each: Callable[[], None] = lambda: None
) -> tuple[dict[str, float], dict[str, float]]:
    """What baselines choose by, in one pass over all operators.

    Args:
        each: called after each operator.

    Returns:
        `||Q(W) - W||^2` of each operator, 0 where the scheme leaves weights in float; and the width of its calibrated
        input range, empty where the scheme has no static inputs.
    """
    errors, ranges = {}, {}
    for path in quantizers:
        with model.weights([path]):
            quantizer, weight = quantizers[path], model.module.get_submodule(path).get_parameter("weight")
            rounded, inputs = quantizer.weight, quantizer.input
            errors[path] = 0.0 if rounded is None else _squared_distance(rounded.flatten(1), weight.flatten(1))
        if inputs is not None:
            ranges[path] = inputs.scale * (inputs.qmax - inputs.qmin)
        each()
    return errors, ranges


def _squared_distance(first: Float[Tensor, "row in"], second: Float[Tensor, "row in"]) -> float:
    """Some rows at a time: of a head with a large vocabulary there is no room for copies."""
    parts = (squared_norms((first[rows] - second[rows]).float()).sum() for rows in row_parts(first))
    return float(sum(parts))
