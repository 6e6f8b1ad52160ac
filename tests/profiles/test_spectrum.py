"""Baselines and the curve: equal budgets, both ends, and what the columns say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import Operator, find_operators
from qvl_hydra.profiles.apply import Quantizers
from qvl_hydra.profiles.baselines import (
    baseline_profiles,
    distance_from_ends,
    errors_and_ranges,
    take_in_order,
)
from qvl_hydra.profiles.costs import LEAVE
from qvl_hydra.profiles.figure import draw_spectrum, lines
from qvl_hydra.profiles.prices import Terms
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.profiles.select import Budget, select
from qvl_hydra.profiles.spectrum import COLUMNS, best_baseline, candidates, measure_curve, spectrum_budgets
from qvl_hydra.profiles.units import Unit
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat

COARSE = Scheme("w4a4", WeightFormat(4), ActivationFormat(4))


def operator(path: str, component: str = "lm", width: int = 8) -> Operator:
    return Operator(path, component, 0, path, path, "Linear", width, width, width * width, "qwen2_5_vl")


TERMS = Terms({COARSE.name: COARSE})


def unit_of(name: str, members: tuple[Operator, ...], score: float | None) -> Unit:
    return Unit(name, members, {LEAVE: 0.0} if score is None else {COARSE.name: score, LEAVE: 0.0})


def single_units(count: int, forced: int = 0) -> list[Unit]:
    return [unit_of(f"op{i}", (operator(f"op{i}"),), None if i < forced else float(i)) for i in range(count)]


def test_baselines_keep_as_many_operators_as_the_budget_allows() -> None:
    units = single_units(10, forced=1)
    values = {f"op{i}": float((7 * i) % 10) for i in range(1, 10)}  # op0 is not offered the scheme
    found = baseline_profiles(units, Budget("count", 4), TERMS, values, values)
    assert {profile.chooser for profile in found} == {
        "random-0", "random-1", "random-2", "first_and_last", "activation_range", "weight_error",
    }  # fmt: skip
    for profile in found:
        assert len(profile.high) == 4
        assert "op0" in profile.high  # has no score and must stay
        assert profile.predicted == sum(i for i in range(1, 10) if f"op{i}" not in profile.high)
    by_name = {profile.chooser: profile.high for profile in found}
    assert by_name["weight_error"] == by_name["activation_range"] == {"op0", "op7", "op4", "op1"}
    assert by_name["first_and_last"] == {"op0", "op1", "op8", "op9"}
    assert len({by_name[f"random-{seed}"] for seed in range(3)}) > 1


def test_one_that_does_not_fit_is_passed_over() -> None:
    sizes = {"a": 3, "b": 2, "c": 1}
    units = [unit_of(name, tuple(operator(f"{name}{i}") for i in range(size)), 1.0) for name, size in sizes.items()]
    kept = take_in_order(units, [0, 1, 2], Budget("count", 4), TERMS)
    assert kept.tolist() == [True, False, True]


def test_ends_are_those_of_each_tower() -> None:
    units = [unit_of(f"v{i}", (operator(f"v{i}", "vision"),), 1.0) for i in range(3)] + single_units(5)
    assert distance_from_ends(units).tolist() == [0, 0.5, 0, 0, 0.25, 0.5, 0.25, 0]


@pytest.fixture(scope="module")
def measured(small_model: LoadedModel, small_samples: tuple[Sample, ...]) -> tuple:
    """A curve with exact scores of single operators, each measured alone on the held-out samples themselves."""
    module = small_model.module
    operators = [op for op in find_operators(module, "lm") if op.block is not None or op.path == "lm_head"]
    quantizers = Quantizers(small_model, operators, small_samples[:4], "lm", [COARSE])
    held_out = small_samples[4:]
    alone = [
        Profile(COARSE, tuple(operators), frozenset(other.path for other in operators) - {op.path}, 16, op.path)
        for op in operators
    ]
    from qvl_hydra.profiles.measure import measure_profiles

    scores = [item.squared_error for item in measure_profiles(small_model, alone, quantizers, held_out, "lm")]
    units = [unit_of(op.path, (op,), score) for op, score in zip(operators, scores, strict=True)]
    budget = Budget("share", 0.2)
    budgets = [budget, *spectrum_budgets(units, [0, 0.1, 0.5, 1])]
    errors, ranges = errors_and_ranges(small_model, quantizers)
    found = candidates(units, {item: select(units, item, TERMS) for item in budgets}, TERMS, errors, ranges)
    table = measure_curve(small_model, found, quantizers, held_out, "lm", "squared_error")
    return units, table, (errors, ranges), quantizers, small_model


def test_the_curve_has_both_ends_and_equal_budgets(measured: tuple) -> None:
    units, table, *_ = measured
    assert tuple(table.columns) == COLUMNS
    own = table[table["chooser"] == "scores"].sort_values("n_high")
    assert own["n_high"].tolist() == [0, 1, 3, 7, 15]  # floor of the shares of 15
    assert own.iloc[-1]["squared_error"] == 0
    assert own.iloc[-1]["kl"] == pytest.approx(0, abs=1e-6)
    assert own["predicted"].iloc[0] == pytest.approx(sum(unit.scores[COARSE.name] for unit in units))
    for _, same in table.groupby(["budget", "value"]):
        assert same["n_high"].nunique() == 1
        assert len(same) in (1, 7)
    assert (table["measured"] == table["squared_error"]).all()


def test_scores_of_single_operators_order_what_is_measured_together(measured: tuple) -> None:
    """Not additive, but what is predicted to be worse is worse; and no choice has a lower prediction than ours."""
    _, table, *_ = measured
    inner = table[(table["n_high"] > 0) & (table["n_high"] < 15)]
    assert spearmanr(inner["predicted"], inner["measured"]).statistic > 0.7
    for _, same in inner.groupby(["budget", "value"]):
        own = same[same["chooser"] == "scores"]["predicted"].iloc[0]
        assert own <= same["predicted"].min() + 1e-9
    best = best_baseline(table, "share", 0.2)
    assert best is not None
    assert best["chooser"] != "scores"
    assert best_baseline(table, "share", 0.0) is None


def test_weight_errors_are_sums_of_squares(measured: tuple) -> None:
    _, _, (errors, ranges), quantizers, model = measured
    path = "model.language_model.layers.1.mlp.up_proj"
    weight = model.module.get_submodule(path).weight.numpy()
    scale = np.abs(weight).max(1, keepdims=True) / 7.5
    rounded = np.clip(np.round(weight / scale), -8, 7) * scale
    assert errors[path] == pytest.approx(((rounded - weight) ** 2).sum(), rel=1e-3)
    assert ranges[path] == pytest.approx(quantizers[path].input.scale * 15)


def test_lines_of_the_figure_meet_at_both_ends(measured: tuple, tmp_path: Path) -> None:
    _, table, *_ = measured
    found = lines(table)
    ends = table[(table["chooser"] == "scores") & table["n_high"].isin((0, 15))].sort_values("n_high")
    for line in found.values():
        assert line["kl"].iloc[[0, -1]].tolist() == ends["kl"].tolist()
        assert line["share_high"].is_monotonic_increasing
    draw_spectrum(table, "squared_error", tmp_path / "figures" / "curve.png")
    assert (tmp_path / "figures" / "curve.png").stat().st_size > 10_000


@pytest.mark.parametrize("asked", [[], [Budget("share", 1.0)]])
def test_everything_in_high_precision_is_among_the_candidates_whatever_the_scores(asked: list[Budget]) -> None:
    """Of `fallback` scores may be below zero; without baselines nothing else was all in high precision."""
    units = [unit_of(f"op{i}", (operator(f"op{i}"),), score) for i, score in enumerate([1.0, 0.0, -1.0])]
    found = candidates(units, {item: select(units, item, TERMS) for item in asked}, TERMS, None, {})
    assert [len(item.profile.low) for item in found] == ([3, 2, 0] if asked else [3, 0])
    assert found[-1].budget == Budget("share", 1.0)
    assert found[-1].profile.predicted == 0
