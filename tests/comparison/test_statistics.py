"""Agreement statistics against scipy, closed forms, and score sets whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from qvl_hydra.comparison.statistics import (
    correlation_interval,
    kendall,
    share_interval,
    spearman,
    top_membership,
    top_overlap,
)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_correlations_are_scipys(ties: bool) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 40))
    if ties:
        a, b = np.round(a), np.round(a + b)
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(spearman(a, b), expected, rtol=1e-12)
    expected = [stats.kendalltau(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(kendall(a, b), expected, rtol=1e-12)


def test_correlations_without_ties_are_the_textbook_sums() -> None:
    a, b = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 4, 3, 5])
    assert spearman(a, b) == pytest.approx(1 - 6 * 4 / (5 * 24))  # 1 - 6 sum d^2 / (n (n^2 - 1))
    assert kendall(a, b) == pytest.approx((8 - 2) / 10)  # (concordant - discordant) / pairs


def test_monotone_change_of_scores_changes_nothing() -> None:
    a = np.random.default_rng(1).normal(size=30)
    assert spearman(a, np.exp(a)) == pytest.approx(1)
    assert kendall(a, -(a**3)) == pytest.approx(-1)


@pytest.mark.parametrize("measure", [spearman, kendall])
def test_constant_scores_and_one_operator_rank_nothing(measure) -> None:
    assert np.isnan(measure(np.ones(6), np.arange(6.0)))
    assert np.isnan(measure(np.ones(1), np.ones(1)))
    rows = measure(np.array([[1.0, 2, 3], [1, 1, 1]]), np.array([3.0, 2, 1]))
    assert rows[0] == pytest.approx(-1)
    assert np.isnan(rows[1])


def test_overlap_counts_common_operators() -> None:
    a = np.array([9.0, 8, 7, 6, 1, 2, 3])
    b = np.array([9.0, 1, 7, 2, 8, 3, 4])
    for k in range(1, 7):
        expected = len(set(np.argsort(-a)[:k]) & set(np.argsort(-b)[:k])) / k
        assert top_overlap(a, b, k) == pytest.approx(expected)
    assert top_overlap(a, b, 100) == 1


def test_tied_operators_share_the_places_that_are_left() -> None:
    scores = np.array([5.0, 3, 3, 3, 1])
    np.testing.assert_allclose(top_membership(scores, 3), [1, 2 / 3, 2 / 3, 2 / 3, 0])
    assert top_overlap(scores, scores, 3) == pytest.approx(1)
    constant, distinct = np.ones(20), np.arange(20.0)
    assert top_overlap(constant, distinct, 5) == pytest.approx(5 / 20), "what a random choice would share on average"


def test_correlation_interval_covers_the_truth_of_a_normal_pair() -> None:
    """Fisher: z of a correlation of n normal pairs has standard error 1 / sqrt(n - 3)."""
    rng, n, rho = np.random.default_rng(2), 50, 0.6
    draws = np.tanh(np.arctanh(rho) + rng.normal(size=20000) / np.sqrt(n - 3))
    low, high = correlation_interval(rho, draws, 0.95)
    expected = np.tanh(np.arctanh(rho) + np.array([-1.96, 1.96]) / np.sqrt(n - 3))
    np.testing.assert_allclose([low, high], expected, atol=0.01)


def test_interval_of_equal_rankings_has_one_side() -> None:
    low, high = correlation_interval(1.0, np.linspace(0.9, 1.0, 101), 0.95)
    assert (low, high) == (pytest.approx(0.905), 1.0)
    assert correlation_interval(1.0, np.ones(10), 0.95) == (1.0, 1.0)


def test_no_interval_without_draws() -> None:
    assert np.isnan(correlation_interval(float("nan"), np.ones(5), 0.95)).all()
    assert np.isnan(share_interval(0.5, np.array([np.nan]), 0.95)).all()


def test_share_interval_holds_the_estimate() -> None:
    assert share_interval(1.0, np.linspace(0.5, 0.9, 101), 0.9) == (pytest.approx(0.52), 1.0)
