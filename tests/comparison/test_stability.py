"""Resampling and stability on score sets drawn from known distributions."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from qvl_hydra.comparison.agreement import _apart
from qvl_hydra.comparison.resampling import (
    SampleTable,
    draw_means,
    draw_weights,
    nested_means,
    resampled_scores,
    sample_table,
)
from qvl_hydra.comparison.stability import Criterion, predicted_curve, smallest_stable_size, top_probability
from qvl_hydra.comparison.statistics import spearman, top_overlap


def made_up(means: np.ndarray, noise: float, samples: int, seed: int = 0) -> SampleTable:
    rng = np.random.default_rng(seed)
    values = means[:, None] + noise * rng.normal(size=(len(means), samples))
    return SampleTable(values.mean(axis=1), values, tuple(f"s{seed}-{index}" for index in range(samples)))


@pytest.mark.parametrize("samples", [4, 64])
def test_resampled_scores_vary_as_means_do(samples: int) -> None:
    """Averaged over many tables, the variance is sigma^2 / n: a closed form."""
    found = []
    for seed in range(60):
        table = made_up(np.zeros(20), 2.0, samples, seed)
        weights = draw_weights(table.samples, 400, np.random.default_rng(seed))
        found.append(resampled_scores(table, weights).var(axis=0).mean())
    assert np.mean(found) == pytest.approx(4 / samples, rel=0.05)


def test_resampled_scores_stay_around_the_score() -> None:
    table = made_up(np.arange(5.0), 1.0, 16)
    shifted = SampleTable(table.scores + 7, table.values, table.samples)
    draws = resampled_scores(shifted, draw_weights(table.samples, 4000, np.random.default_rng(0)))
    np.testing.assert_allclose(draws.mean(axis=0), shifted.scores, atol=0.02)


def test_runs_on_the_same_samples_move_together() -> None:
    table = made_up(np.arange(6.0), 3.0, 8)
    twin = SampleTable(table.scores * 2, table.values * 2, table.samples)
    other = SampleTable(table.scores, table.values, tuple(f"other{index}" for index in range(8)))
    weights = draw_weights(table.samples + other.samples, 300, np.random.default_rng(0))
    same = spearman(resampled_scores(table, weights), resampled_scores(twin, weights))
    apart = spearman(resampled_scores(table, weights), resampled_scores(other, weights))
    assert same == pytest.approx(np.ones(300))
    assert apart.mean() < 0.95


def test_missing_measurements_do_not_count() -> None:
    table = made_up(np.arange(3.0), 1.0, 6)
    values = np.hstack([table.values, np.full((3, 2), np.nan)])
    with_missing = SampleTable(table.scores, values, (*table.samples, "x", "y"))
    weights = draw_weights(with_missing.samples, 50, np.random.default_rng(0))
    np.testing.assert_allclose(resampled_scores(with_missing, weights), resampled_scores(table, weights), rtol=1e-12)


def test_table_averages_probes_and_follows_the_order_of_scores() -> None:
    frame = pd.DataFrame({"op": ["b", "b", "a", "b"], "sample": ["1", "1", "1", "2"], "value": [1.0, 3.0, 5.0, 7.0]})
    table = sample_table(pd.Series([5.0, 4.5], index=["a", "b"]), frame)
    assert table.samples == ("1", "2")
    np.testing.assert_array_equal(table.values, [[5.0, np.nan], [2.0, 7.0]])


def test_predicted_curve_is_what_fresh_samples_show() -> None:
    """The slow obvious way: draw new small and large sets from the distribution itself, many times."""
    rng, full = np.random.default_rng(3), 5000  # so many that the drawn distribution is close to the true one
    means, noise = rng.normal(size=40), 2.0
    table = made_up(means, noise, full, seed=5)
    for size in (4, 16):
        small = means + noise * rng.normal(size=(3000, 40)) / np.sqrt(size)
        large = means + noise * rng.normal(size=(3000, 40)) / np.sqrt(full)
        curve = predicted_curve(table, [size], Criterion(8, 0.75, 0.95), 300, 0, nested=False).iloc[0]
        assert curve["spearman"] == pytest.approx(spearman(small, large).mean(), abs=0.02)
        assert curve["overlap"] == pytest.approx(top_overlap(small, large, 8).mean(), abs=0.03)
        assert curve["p_stable"] == pytest.approx((top_overlap(small, large, 8) >= 0.75).mean(), abs=0.09)


def test_nested_sets_agree_more_and_fully_at_full_size() -> None:
    table = made_up(np.random.default_rng(1).normal(size=30), 2.0, 16)
    nested = predicted_curve(table, [8, 16], Criterion(), 200, 0, nested=True)
    apart = predicted_curve(table, [8, 16], Criterion(), 200, 0, nested=False)
    assert nested["spearman"].iloc[0] > apart["spearman"].iloc[0] + 0.02
    assert nested["spearman"].iloc[1] == pytest.approx(1)
    assert apart["spearman"].iloc[1] < 0.99


def test_means_have_the_variance_of_their_size() -> None:
    table = made_up(np.zeros(200), 1.0, 32)
    population = table.values.var(axis=1, ddof=1)
    for small, full in (
        draw_means(table, 8, 2000, np.random.default_rng(0)),
        nested_means(table, 8, 2000, np.random.default_rng(0)),
    ):
        assert (small.var(axis=0) / (population / 8)).mean() == pytest.approx(1, rel=0.03)
        assert (full.var(axis=0) / (population / 32)).mean() == pytest.approx(1, rel=0.03)


def test_smallest_stable_size_needs_every_larger_one() -> None:
    curve = pd.DataFrame({"size": [4, 8, 16, 32], "p_stable": [0.96, 0.9, 0.97, 1.0]})
    assert smallest_stable_size(curve, 0.95) == 16
    assert smallest_stable_size(curve, 0.5) == 4
    assert smallest_stable_size(pd.DataFrame({"size": [4, 8], "p_stable": [1.0, 0.8]}), 0.95) is None
    seeds = pd.DataFrame({"size": [4, 4, 8, 8], "p_stable": [1.0, 0.8, 1.0, 0.96]})
    assert smallest_stable_size(seeds, 0.95) == 8


def test_probability_in_the_top_of_two_is_the_normal_one() -> None:
    """Two operators, top 1: the probability that the better one's mean stays above is Phi(gap / standard error)."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 400))
    noise -= noise.mean(axis=1, keepdims=True)
    values = np.array([[0.10], [0.0]]) + noise
    table = SampleTable(values.mean(axis=1), values, tuple(map(str, range(400))))
    error = (values[0] - values[1]).std(ddof=1) / np.sqrt(400)
    found = top_probability(table, 1, 20000, 0)
    assert found[0] == pytest.approx(stats.norm.cdf(0.10 / error), abs=0.01)
    assert found.sum() == pytest.approx(1)


def test_one_sample_gives_no_probability() -> None:
    assert np.isnan(top_probability(made_up(np.arange(4.0), 1.0, 1), 2, 10, 0)).all()


def test_stability_of_runs_on_samples_of_their_own_counts_their_noise_once() -> None:
    """The mean over many pairs of runs is how often fresh pairs agree."""
    rng, count, k = np.random.default_rng(0), 16, 5
    truth = np.exp(np.linspace(0, 3, 25))
    criterion = Criterion(k, 0.8, 0.95)

    def drawn(name: str) -> SampleTable:
        values = truth[:, None] * rng.lognormal(0, 0.8, (25, count))
        return SampleTable(values.mean(1), values, tuple(f"{name}{index}" for index in range(count)))

    agree, said = [], []
    for index in range(60):
        first, second = drawn(f"a{index}-"), drawn(f"b{index}-")
        agree.append(float(top_overlap(first.scores, second.scores, k)) >= 0.8)
        said.append(_apart({"top_k": k}, (first, second), criterion, 200, index))
    assert np.mean(said) == pytest.approx(np.mean(agree), abs=0.1)
