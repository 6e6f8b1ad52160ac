"""Shrinking of a sketch's products between tokens: closed forms, and rows it must leave alone."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from qvl_hydra.runs.folder import COLUMNS, PART_COLUMNS
from qvl_hydra.scores.shrink import shrink_ratios, shrunk


def frame(rows: list[tuple[str, str, float, float | None, float | None]]) -> pd.DataFrame:
    """Rows of operator, sample, value and both products."""
    made = [(op, sample, 0, value, "kl", "sketch", "w8", *cross, None) for op, sample, value, *cross in rows]
    return pd.DataFrame(made, columns=list(PART_COLUMNS[:-3])).reindex(columns=list(PART_COLUMNS)).astype(
        {"probe": "Int64"}
    )


def test_no_noise_keeps_every_ratio() -> None:
    ratios = np.array([0.1, -0.2, 0.6])
    np.testing.assert_allclose(shrink_ratios(ratios, np.zeros(3), 8), ratios)


def test_nothing_but_noise_keeps_the_mean_only() -> None:
    ratios = np.array([0.1, -0.1, 0.3])
    np.testing.assert_allclose(shrink_ratios(ratios, np.full(3, 10.0), 8), np.full(3, 0.1))


def test_half_noise_keeps_half() -> None:
    ratios = np.array([-1.0, 1.0])  # variance 1, of which the errors explain half
    np.testing.assert_allclose(shrink_ratios(ratios, np.full(2, 0.5**0.5), 8), [-0.5, 0.5])


def test_a_ratio_unlike_the_others_is_moved_no_further_than_noise_reaches() -> None:
    ratios = np.array([0.0] * 40 + [10.0])
    found = shrink_ratios(ratios, np.full(41, 1.5), 9)
    kept = 1 - 1.5**2 / ratios.var()
    assert found[0] == pytest.approx((1 - kept) * ratios.mean())
    assert found[-1] == pytest.approx(10 - 1.5 * 1.8595, rel=1e-4)  # t quantile of eight degrees of freedom
    assert found[-1] > ratios.mean() + kept * (10 - ratios.mean())


def test_one_value_an_operator_tells_nothing_of_its_noise() -> None:
    rows = [("a", "s0", 1.0, 0.5, 0.0), ("b", "s0", 2.0, -0.5, 0.0)]  # ratios 0.5 and -0.25
    assert shrunk(frame(rows))["value"].tolist() == pytest.approx([1.125, 2.25])


def test_values_are_multiplied_by_their_operators_factor() -> None:
    first = [("a", "s0", 1.0, 0.5, 0.0), ("a", "s1", 3.0, 1.5, 0.0)]
    given = frame([*first, ("b", "s0", 2.0, 0.5, -0.1), ("b", "s1", 2.0, 0.5, 0.1)])
    found = shrunk(given)
    weight = shrink_ratios(np.array([0.5, 0.25]), np.array([0.5 / 2, 0.0]), 2)
    other = shrink_ratios(np.array([0.0, 0.0]), np.array([0.0, 0.1 / 2]), 2)
    expected = given["value"] * np.repeat(1 + weight + other, 2)
    np.testing.assert_allclose(found["value"], expected)
    assert tuple(found.columns) == COLUMNS


def test_exact_rows_and_a_zero_operator_stay() -> None:
    rows = [("a", "s0", 1.0, None, None), ("zero", "s0", 0.0, 0.0, 0.0), ("zero", "s1", 0.0, 0.0, 0.0)]
    found = shrunk(frame(rows))
    assert found["value"].tolist() == [1.0, 0.0, 0.0]


def test_a_factor_never_turns_a_score_negative() -> None:
    rows = [("a", f"s{i}", 1.0, -3.0, 0.0) for i in range(3)]
    assert shrunk(frame(rows))["value"].tolist() == pytest.approx([0.05] * 3)


def test_the_square_of_the_sum_comes_back_without_noise() -> None:
    """Many samples: the shrunk mean is the mean square of the sum, whose products differ between operators."""
    draw = np.random.default_rng(0)
    rows, expected = [], {}
    for index in range(8):
        shared = index / 8  # share of a product that is the same at both tokens
        p = draw.normal(size=(4000, 2)) * (1 - shared) + draw.normal(size=(4000, 1)) * shared
        expected[f"op{index}"] = float((p.sum(1) ** 2).mean())
        rows += [(f"op{index}", f"s{i}", float((q**2).sum()), float(2 * q[0] * q[1]), 0.0) for i, q in enumerate(p)]
    found = shrunk(frame(rows)).groupby("op")["value"].mean()
    for op, value in expected.items():
        assert found[op] == pytest.approx(value, rel=0.02)
