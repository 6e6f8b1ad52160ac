"""Selection against an enumeration of every profile."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from qvl_hydra.errors import ProfileError
from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.costs import LEAVE
from qvl_hydra.profiles.prices import Terms
from qvl_hydra.profiles.select import Budget, select
from qvl_hydra.profiles.units import Unit, units_from_scores
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat

W8A8 = Scheme("w8a8_static", WeightFormat(8), ActivationFormat(8))
HIGH_BITS = 16
TERMS = Terms({W8A8.name: W8A8}, HIGH_BITS)
BOTH = (W8A8.name, LEAVE)


def unit_of(name: str, members: tuple[Operator, ...], score: float) -> Unit:
    return Unit(name, members, {W8A8.name: score, LEAVE: 0.0})


def units_from(operators: list[Operator], scores: pd.DataFrame) -> list[Unit]:
    return units_from_scores(operators, {W8A8.name: scores}, BOTH)


def operator(path: str, width: int = 8, group: str | None = None) -> Operator:
    role = path.rsplit(".", 1)[-1]
    return Operator(path, "lm", 0, role, group or path, "Linear", width, width, width * width, "qwen2_5_vl")


def random_units(rng: np.random.Generator, count: int, spread: float) -> list[Unit]:
    """Units of 1 to 3 operators of different widths, with scores over `spread` powers of ten, some negative."""
    units = []
    for index in range(count):
        members = tuple(operator(f"{index}.{part}", int(rng.integers(4, 40))) for part in range(rng.integers(1, 4)))
        sign = -1.0 if rng.random() < 0.1 else 1.0
        units.append(unit_of(f"unit{index}", members, sign * float(10 ** rng.uniform(-spread, 0))))
    return units


def enumerate_profiles(units: list[Unit]) -> list[tuple[float, int, float, float]]:
    """(predicted error, operators kept, weight bytes, average bits) of every possible profile."""
    found = []
    for kept in itertools.product([False, True], repeat=len(units)):
        if any(unit.stays and not keep for unit, keep in zip(units, kept, strict=True)):
            continue
        predicted = sum(unit.scores.get(W8A8.name, 0.0) for unit, keep in zip(units, kept, strict=True) if not keep)
        values = [op.in_features * op.out_features for unit in units for op in unit.members]
        bits = [  # 8 bits and a half-precision scale a channel
            16 if keep else 8 + 16 / op.in_features
            for unit, keep in zip(units, kept, strict=True)
            for op in unit.members
        ]
        total = float(np.dot(values, bits))
        count = sum(len(unit.members) for unit, keep in zip(units, kept, strict=True) if keep)
        found.append((predicted, count, total / 8, total / sum(values)))
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spread", [1.0, 6.0])
@pytest.mark.parametrize("kind", ["count", "share", "average_bits", "weight_bytes"])
def test_lowest_error_within_the_budget(kind: str, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    units = random_units(rng, 9, spread)
    everything = enumerate_profiles(units)
    total_ops = sum(len(unit.members) for unit in units)
    column = {"count": 1, "share": 1, "weight_bytes": 2, "average_bits": 3}[kind]
    costs = sorted(row[column] for row in everything)
    limit = costs[int(rng.integers(len(costs)))]
    best = min(row[0] for row in everything if row[column] <= limit * (1 + 1e-12))
    value = limit / total_ops if kind == "share" else limit
    profile = select(units, Budget(kind, value), TERMS)
    assert profile.predicted == pytest.approx(best, rel=1e-9, abs=1e-12)
    reached = {"count": len(profile.high), "share": len(profile.high), "weight_bytes": profile.weight_bytes,
               "average_bits": profile.average_bits}[kind]
    assert reached <= limit * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_smallest_profile_under_an_error(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    units = random_units(rng, 9, 3.0)
    everything = enumerate_profiles(units)
    allowed = sorted(row[0] for row in everything)[int(rng.integers(len(everything)))]
    meeting = [row for row in everything if row[0] <= allowed + 1e-12]
    fewest = min(row[1] for row in meeting)
    lightest = min(row[2] for row in meeting if row[1] == fewest)
    profile = select(units, Budget("error", allowed), TERMS)
    assert len(profile.high) == fewest
    assert profile.weight_bytes == pytest.approx(lightest)
    assert profile.predicted is not None
    assert profile.predicted <= allowed + 1e-9


def test_single_operators_by_count_are_the_highest_scores() -> None:
    rng = np.random.default_rng(0)
    scores = 10 ** rng.uniform(-8, 2, size=60)
    units = [unit_of(f"op{i}", (operator(f"op{i}"),), float(score)) for i, score in enumerate(scores)]
    profile = select(units, Budget("count", 12), TERMS)
    assert profile.high == {f"op{i}" for i in np.argsort(-scores)[:12]}


def table(rows: list[tuple[str, str, float | None, str | None]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["op", "status", "score", "reason"])


QKV = ("a.q_proj", "a.k_proj", "a.v_proj")
ATTENTION = [*(operator(path, group="a.qkv_proj") for path in QKV), operator("a.o_proj")]


def test_fused_operators_get_one_precision_and_the_sum_of_their_scores() -> None:
    scores = dict(zip((*QKV, "a.o_proj"), (1.0, 0.5, 4.0, 5.0), strict=True))
    units = units_from(ATTENTION, table([(path, "scored", score, None) for path, score in scores.items()]))
    assert [(unit.name, unit.scores[W8A8.name]) for unit in units] == [("a.qkv_proj", 5.5), ("a.o_proj", 5.0)]
    # Two operators do not hold the three of q/k/v, so the lower score wins.
    assert select(units, Budget("count", 2), TERMS).high == {"a.o_proj"}
    assert select(units, Budget("count", 3), TERMS).high == set(QKV)


def test_scores_that_are_their_whole_unit_s_are_not_added_up() -> None:
    rows = [*((path, "scored", 7.0, None) for path in QKV), ("a.o_proj", "scored", 5.0, None)]
    units = units_from_scores(ATTENTION, {W8A8.name: table(rows)}, BOTH, shared=True)
    assert [unit.scores[W8A8.name] for unit in units] == [7.0, 5.0]


def test_scores_of_fused_operators_count_once() -> None:
    scores = table([("a.qkv_proj", "scored", 7.0, None), ("a.o_proj", "scored", 5.0, None)])
    units = units_from(ATTENTION, scores)
    assert [(unit.name, unit.scores[W8A8.name], len(unit.members)) for unit in units] == [
        ("a.qkv_proj", 7.0, 3),
        ("a.o_proj", 5.0, 1),
    ]


def test_an_operator_without_a_score_stays_high_counts_and_is_named() -> None:
    rows = [(path, "scored", 1.0, None) for path in (*QKV, "a.o_proj")]
    rows[1] = (QKV[1], "failed", None, "range not finite")
    units = units_from(ATTENTION, table(rows))
    profile = select(units, Budget("count", 3), TERMS)
    assert profile.high == set(QKV)
    assert profile.predicted == 1.0
    with pytest.raises(ProfileError, match=r"a\.k_proj failed: range not finite"):
        select(units, Budget("count", 2), TERMS)


def test_a_neighbour_left_out_of_the_sweep_keeps_its_fused_operator_high() -> None:
    units = units_from(ATTENTION, table([(QKV[0], "scored", 1.0, None), ("a.o_proj", "scored", 2.0, None)]))
    assert [(unit.scores.get(W8A8.name), len(unit.members)) for unit in units] == [(None, 3), (2.0, 1)]
    assert units[0].reasons[W8A8.name] == "a.k_proj was not part of the sweep; a.v_proj was not part of the sweep"


def test_an_impossible_size_is_refused() -> None:
    units = [unit_of("op", (operator("op"),), 1.0)]
    with pytest.raises(ProfileError, match="the cheapest plan has"):
        select(units, Budget("average_bits", 7.0), TERMS)


def test_scores_of_another_model_are_refused() -> None:
    with pytest.raises(ProfileError, match=r"first \['b\.o_proj'\]"):
        units_from(ATTENTION, table([("b.o_proj", "scored", 1.0, None)]))


def test_steady_scores_decide_and_scores_are_what_is_predicted() -> None:
    operators = [operator("a.up_proj"), operator("b.up_proj")]
    scores = pd.DataFrame(
        {"op": [op.path for op in operators], "status": "scored", "reason": "", "score": [5.0, 4.0],
         "steady_score": [1.0, 3.0]}
    )  # fmt: skip
    found = select(units_from(operators, scores), Budget("count", 1), TERMS)
    assert found.high == {"b.up_proj"}
    assert found.predicted == 5.0
    without = select(units_from(operators, scores.drop(columns="steady_score")), Budget("count", 1), TERMS)
    assert without.high == {"a.up_proj"}
    bounded = select(units_from(operators, scores), Budget("error", 4.5), TERMS)
    assert bounded.high == {"a.up_proj"}, "an error is bounded in the scores themselves"
