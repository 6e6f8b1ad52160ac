"""The per-operator table against means, ranks and intervals known in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from qvl_hydra.operators.discover import Operator
from qvl_hydra.runs.folder import COLUMNS as SAMPLE_COLUMNS
from qvl_hydra.scores.interval import interval_text, intervals
from qvl_hydra.scores.shrink import ORIGINS, SPLIT
from qvl_hydra.scores.table import COLUMNS, Scored, changes, changes_by_role, origins, score_table

LAYER = "model.language_model.layers.0.self_attn"


def operator(name: str, group: str | None = None, block: int | None = 0) -> Operator:
    path = f"{LAYER}.{name}"
    return Operator(path, "lm", block, name, group or path, "Linear", 4, 4, 16, "qwen2_5_vl")


def rows(
    values: Mapping[str, Sequence[float]], estimator: str = "exact", metric: str = "squared_error", scheme: str = "s"
) -> pd.DataFrame:
    """Per-sample scores: for each operator one value a sample."""
    found = [
        [f"{LAYER}.{op}" if "." not in op else op, f"s{index}", pd.NA, value, metric, estimator, scheme, None]
        for op, sequence in values.items()
        for index, value in enumerate(sequence)
    ]
    made = pd.DataFrame(found, columns=list(SAMPLE_COLUMNS[: -len(ORIGINS)]))
    return made.reindex(columns=list(SAMPLE_COLUMNS)).astype({"probe": "Int64", "value": "float64"})


def table_of(
    operators: Sequence[Operator],
    frame: pd.DataFrame,
    endings: Mapping[str, tuple[str, str]] | None = None,
    **changes: object,
) -> pd.DataFrame:
    scored = Scored(operators, frame, endings or {}, "squared_error", "u", "s", **changes)  # type: ignore[arg-type]
    return score_table(scored)[0].set_index("role", drop=False)


def test_a_score_is_the_mean_over_samples_and_the_largest_is_rank_1() -> None:
    operators = [operator("q_proj"), operator("k_proj"), operator("v_proj"), operator("lm_head", block=None)]
    values = {"q_proj": [1, 2, 6], "k_proj": [10, 0, 5], "v_proj": [-1, -2, -3], "lm_head": [3, 3, 3]}
    table = table_of(operators, rows(values))
    assert table["role"].tolist() == ["q_proj", "k_proj", "v_proj", "lm_head"]  # data order
    assert table["score"].to_dict() == {name: pytest.approx(np.mean(value)) for name, value in values.items()}
    assert table["rank"].to_dict() == {"k_proj": 1, "q_proj": 2, "lm_head": 3, "v_proj": 4}
    assert table["n_samples"].tolist() == [3] * 4
    assert set(table["status"]) == {"scored"}
    assert set(COLUMNS) <= set(table.columns)
    assert table["block"].isna().tolist() == [False, False, False, True]
    for name, value in values.items():
        assert table.loc[name, "standard_error"] == pytest.approx(np.std(value, ddof=1) / math.sqrt(3))


def kl_table(operators: Sequence[Operator], frame: pd.DataFrame) -> pd.DataFrame:
    return score_table(Scored(operators, frame, {}, "kl", "u", "s"))[0].set_index("role")


def test_steady_scores_are_not_those_of_the_sample_that_loses_most() -> None:
    """Against the sum written out; they keep the sum of all scores, and there are none for other metrics."""
    rng = np.random.default_rng(0)
    operators = [operator(f"o{index}") for index in range(6)]
    drawn = {op.role: rng.lognormal(size=9) * np.exp(3 * rng.normal(size=9)) for op in operators}
    drawn["o5"][2] = -1e-9  # a KL of zero, rounded
    drawn["o0"][7] = 1e4
    table = kl_table(operators, rows(drawn, metric="kl"))
    losses = [sum(max(values[s], 0.0) for values in drawn.values()) for s in range(9)]
    scale = sum(losses) / sum(loss**0.5 for loss in losses)
    for name, values in drawn.items():
        expected = sum(max(value, 0.0) * loss**-0.5 for value, loss in zip(values, losses, strict=True)) / 9
        assert table.loc[name, "steady_score"] == pytest.approx(scale * expected)
    assert table["steady_score"].sum() == pytest.approx(table["score"].sum())
    assert table["score"].idxmax() == "o0"
    assert table.loc["o0", "steady_score"] < table.loc["o0", "score"]
    assert table_of(operators, rows(drawn))["steady_score"].isna().all()
    assert kl_table(operators, rows({op.role: [0.0] * 3 for op in operators}, metric="kl"))["steady_score"].isna().all()


def test_steady_scores_of_sketched_and_exact_operators_are_in_one_unit() -> None:
    """Samples are weighed by what the estimator that saw most operators loses on them."""
    operators = [operator(f"o{index}") for index in range(8)]
    rng = np.random.default_rng(1)
    sketched = {op.role: rng.lognormal(size=5) for op in operators}
    exact = {op.role: 2 * sketched[op.role] for op in operators[:5]}
    frame = pd.concat([rows(sketched, "sketch", "kl"), rows(exact, "exact", "kl")], ignore_index=True)
    table = kl_table(operators, frame)
    alone = kl_table(operators, rows(sketched, "sketch", "kl"))
    assert table["steady_score"].tolist() == pytest.approx((2 * alone["steady_score"]).tolist())


def test_where_errors_come_out_is_exact_where_it_was_measured_and_scaled_where_it_was_sketched() -> None:
    operators = [operator(f"o{index}") for index in range(8)]
    sketched = {op.role: [float(index + 1)] * 4 for index, op in enumerate(operators)}
    exact = {op.role: [3.0 * (index + 1)] * 4 for index, op in enumerate(operators[:5])}
    parts = [
        rows({op: [share * value for value in values] for op, values in found.items()}, estimator, metric)
        for estimator, found, shares in (("sketch", sketched, (0.2, 0.7, 0.1)), ("exact", exact, (0.5, 0.25, 0.25)))
        for metric, share in zip(SPLIT, shares, strict=True)
    ]
    frame = pd.concat([rows(sketched, "sketch"), rows(exact), *parts], ignore_index=True)
    table = table_of(operators, frame)
    assert table.loc["o4", list(SPLIT)].tolist() == pytest.approx([7.5, 3.75, 3.75])
    assert table.loc["o5", list(SPLIT)].tolist() == pytest.approx([3 * 6 * 0.2, 3 * 6 * 0.7, 3 * 6 * 0.1])
    by_exact, by_sketch = 3 * 15, 3 * 21
    told = changes(table)
    assert told["answer"] == pytest.approx((by_exact * 0.25 + by_sketch * 0.1) / (by_exact + by_sketch))
    assert sum(told.values()) == pytest.approx(1)
    assert changes_by_role(table)["score"].sum() == pytest.approx(by_exact + by_sketch)
    assert not changes(table_of(operators, rows(sketched, "sketch")))


def test_shares_by_where_errors_come_in_are_weighed_by_scores() -> None:
    frame = rows({"a": [4, 2], "b": [1, 1], "c": [5, 5]}, estimator="sketch")
    frame.loc[frame["op"] != f"{LAYER}.c", list(ORIGINS)] = [[3, 1, 0], [1, 1, 2], [0, 2, 2], [0, 0, 0]]
    table = table_of([operator(name) for name in "abc"], frame)
    assert table.loc["a", list(ORIGINS)].tolist() == [4 / 8, 2 / 8, 2 / 8]
    assert table.loc["b", list(ORIGINS)].tolist() == [0, 0.5, 0.5]
    assert table.loc["c", list(ORIGINS)].isna().all()
    assert origins(table) == {
        "image": pytest.approx(3 * 0.5 / 4), "text": pytest.approx((3 * 0.25 + 0.5) / 4),
        "answer": pytest.approx((3 * 0.25 + 0.5) / 4),
    }  # fmt: skip
    assert origins(table_of([operator("a")], rows({"a": [1]}))) == {}
    frame[list(ORIGINS[:2])] = 0.0  # a text alone: whatever comes in comes in at the same tokens
    assert origins(table_of([operator(name) for name in "abc"], frame)) == {}
    assert ORIGINS[0] not in table_of([operator("a")], rows({"a": [1]}))


def test_equal_scores_rank_in_data_order() -> None:
    table = table_of([operator("a"), operator("b"), operator("c")], rows({"c": [2, 2], "a": [2, 2], "b": [2, 2]}))
    assert table["rank"].tolist() == [1, 2, 3]


def test_every_operator_ends_somehow() -> None:
    operators = [operator(name) for name in ("scored", "failed", "skipped", "late")]
    frame = rows({"scored": [1, 2], "failed": [9, 9]})
    endings = {f"{LAYER}.failed": ("failed", "not finite"), f"{LAYER}.skipped": ("skipped", "no image")}
    table = table_of(operators, frame, endings)
    assert table["status"].tolist() == ["scored", "failed", "skipped", "skipped"]
    assert table["reason"].tolist() == ["", "not finite", "no image", "the run ended before it was scored"]
    assert table["rank"].isna().tolist() == [False, True, True, True]
    assert table["score"].isna().tolist() == [False, True, True, True]


def test_no_scores_at_all() -> None:
    table = table_of([operator("a"), operator("b")], rows({}))
    assert table["status"].tolist() == ["skipped", "skipped"]
    assert table["rank"].isna().all()


def test_other_schemes_and_metrics_do_not_mix_in() -> None:
    frame = pd.concat(
        [
            rows({"a": [1, 3]}),
            rows({"a": [100, 100]}, scheme="other"),
            rows({"a": [0.5, 0.7]}, metric="kl"),
            rows({"a": [7, 7]}, metric="kl", scheme="other"),
        ]
    )
    table = table_of([operator("a"), operator("b")], frame)
    assert table.loc["a", "score"] == 2
    assert table.loc["a", "kl"] == pytest.approx(0.6)
    assert math.isnan(table.loc["b", "kl"])


def test_sketched_scores_are_scaled_to_exact_ones_by_the_median_ratio() -> None:
    names = ["a", "b", "c", "d", "e", "f"]
    sketch = {name: [value, value * 1.5] for name, value in zip(names, [80, 40, 20, 10, 5, 2.5], strict=True)}
    exact = {"a": [200], "b": [100], "c": [50], "d": [2500]}  # ratios 2, 2, 2, 200
    frame = pd.concat([rows(sketch, "sketch"), rows({k: v * 2 for k, v in exact.items()}, "exact")])
    scored = Scored([operator(name) for name in names], frame, {}, "squared_error", "u", "s")
    table, factor = score_table(scored)
    assert factor == pytest.approx(2)
    assert table["estimator"].tolist() == ["exact"] * 4 + ["sketch"] * 2
    assert table["score"].tolist() == pytest.approx([200, 100, 50, 2500, 12.5, 6.25])
    assert table["rank"].tolist() == [2, 3, 4, 1, 5, 6]
    assert table.loc[4, "score_low"] < 12.5 < table.loc[4, "score_high"]


def test_the_factor_is_the_controls_and_its_noise_is_in_the_intervals() -> None:
    names = [f"op{index}" for index in range(12)]
    sketch = {name: [10.0, 11.0, 12.0] for name in names}
    exact = {name: [30.0, 33.0, 36.0] for name in names[:5]} | {
        name: [22.0 * factor] * 3 for name, factor in zip(names[5:10], (0.5, 0.8, 1, 1.25, 2), strict=True)
    }
    frame = pd.concat([rows(sketch, "sketch"), rows(exact)])
    controls = [f"{LAYER}.{name}" for name in names[5:10]]
    found = {}
    for drawn in ((), controls):
        scored = Scored([operator(name) for name in names], frame, {}, "squared_error", "u", "s", controls=drawn)
        found[len(drawn)] = score_table(scored)
    assert found[0][1] == pytest.approx(2.75, rel=0.1)  # the median of all ten
    assert found[5][1] == pytest.approx(2)
    wide, plain = (found[n][0].loc[11, "score_high"] / found[n][0].loc[11, "score"] for n in (5, 0))
    assert wide > 1.2
    assert plain > 1


def test_too_few_exact_ones_scale_nothing() -> None:
    frame = pd.concat([rows({"a": [1, 1], "b": [1, 1]}, "sketch"), rows({"a": [9, 9]}, "exact")])
    table, factor = score_table(Scored([operator("a"), operator("b")], frame, {}, "squared_error", "u", "s"))
    assert factor is None
    assert table["score"].tolist() == [9, 1]


def test_probes_are_averaged_within_a_sample() -> None:
    frame = rows({"a": [1, 2, 3, 4]}, "sketch")
    frame["sample"], frame["probe"] = ["s0", "s0", "s1", "s1"], pd.array([0, 1, 0, 1], dtype="Int64")
    table = table_of([operator("a")], frame)
    assert table.loc["a", "score"] == 2.5
    assert table.loc["a", "n_samples"] == 2
    assert table.loc["a", "standard_error"] == pytest.approx(np.std([1.5, 3.5], ddof=1) / math.sqrt(2))


def test_one_sample_has_its_probes_for_an_interval() -> None:
    frame = rows({"a": [1, 2, 3, 4]}, "sketch")
    frame["sample"], frame["probe"] = "s0", pd.array([0, 1, 2, 3], dtype="Int64")
    table = table_of([operator("a")], frame)
    assert table.loc["a", "n_samples"] == 1
    assert table.loc["a", "score_low"] < 2.5 < table.loc["a", "score_high"]


def test_one_value_has_no_interval() -> None:
    table = table_of([operator("a")], rows({"a": [5]}))
    assert table.loc["a", "score"] == 5
    assert math.isnan(table.loc["a", "score_low"])
    assert table.loc["a", "rank"] == 1


def test_fused_groups_are_one_row() -> None:
    group = f"{LAYER}.qkv_proj"
    operators = [operator("q_proj", group), operator("k_proj", group), operator("v_proj", group), operator("o_proj")]
    frame = rows({group: [4, 6], f"{LAYER}.o_proj": [1, 1]})
    table = table_of(operators, frame, fuse=True)
    assert table["op"].tolist() == [group, f"{LAYER}.o_proj"]
    assert table["role"].tolist() == ["qkv_proj", "o_proj"]
    assert table["n_params"].tolist() == [48, 16]
    assert table["score"].tolist() == [5, 1]


def test_the_interval_of_many_values_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(30, 2, 5000)
    (low,), (high,), (error,) = intervals([values])
    assert error == pytest.approx(values.std(ddof=1) / math.sqrt(5000))
    assert low == pytest.approx(values.mean() - norm.ppf(0.975) * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + norm.ppf(0.975) * error, abs=0.2 * error)


def test_values_below_zero_have_students_interval() -> None:
    values = np.array([-1.0, 2.0, 3.0])
    (low,), (high,), (error,) = intervals([values])
    assert high - values.mean() == pytest.approx(4.302653 * error)
    assert values.mean() - low == pytest.approx(4.302653 * error)


def test_an_operator_shares_the_noise_of_the_others() -> None:
    calm, wild = np.array([1.0, 1.0, 1.001]), np.array([1.0, 3.0, 9.0])
    _, (alone,), _ = intervals([calm])
    _, (beside, _), _ = intervals([calm, wild])
    assert alone < 1.01
    assert beside > 2


def test_no_values_and_zeros_are_no_trouble() -> None:
    low, high, _ = intervals([np.zeros(3), np.array([1.0]), np.empty(0), np.array([1.0, 2.0])])
    assert (low[0], high[0]) == (0, 0)
    assert np.isnan(low[1:3]).all()
    assert low[3] < 1.5 < high[3]


def test_an_upper_bound_that_bounds_nothing_is_not_told() -> None:
    assert interval_text(1.0, 0.5, 999.0) == "0.5 to 999"
    assert interval_text(1.0, 0.5, 1001.0) == "above 0.5"
    assert interval_text(-1.0, -2.0, 5.0, digits=4) == "-2 to 5"
    assert interval_text(1.0, math.nan, math.nan) == ""


DISTRIBUTIONS = {
    "normal": lambda rng, shape: 5 + rng.normal(size=shape),
    "chi-square": lambda rng, shape: rng.chisquare(1, shape),  # a sketch's products: squares of about normal values
    "log-normal 1": lambda rng, shape: rng.lognormal(0, 1, shape),
    "log-normal 2": lambda rng, shape: rng.lognormal(0, 2, shape),  # one sample in a hundred is most of the sum
    "leaning": lambda rng, shape: np.exp(rng.gumbel(0, 0.6, shape)),  # logarithms lean upwards
}
MEANS = {
    "normal": 5.0,
    "chi-square": 1.0,
    "log-normal 1": math.exp(0.5),
    "log-normal 2": math.exp(2),
    "leaning": math.gamma(0.4),
}


@pytest.mark.parametrize("count", [4, 8, 16, 32])
@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_coverage_of_the_interval(name: str, count: int) -> None:
    """Of nominal 95 %, on twenty operators a draw; never far below, whatever the tail, and missed on neither side."""
    rng, held, below, above = np.random.default_rng(count), [], [], []
    for _ in range(100):
        low, high, _ = intervals(list(DISTRIBUTIONS[name](rng, (20, count))))
        held.append(np.mean((low <= MEANS[name]) & (MEANS[name] <= high)))
        below.append(np.mean(MEANS[name] < low))
        above.append(np.mean(high < MEANS[name]))
    assert np.mean(held) > 0.935, name
    assert np.mean(below) < 0.05
    assert np.mean(above) < 0.05
