"""Whole comparisons of made-up runs whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from qvl_hydra.comparison import proxy, runs
from qvl_hydra.comparison.agreement import pair, pairs
from qvl_hydra.comparison.reading import RunScores, read_run
from qvl_hydra.comparison.result import compare, write_comparison
from qvl_hydra.comparison.stability import Criterion
from qvl_hydra.errors import ComparisonError, RunFolderError
from tests.made_up_runs import operator_rows, write_run

CRITERION = Criterion(top_k=5, overlap=0.8, confidence=0.95)


def read(*folders: Path) -> list[RunScores]:
    return runs.named([read_run(folder) for folder in folders])


def test_scores_and_samples_are_those_of_the_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", failed=1, skipped=2)
    run = read_run(folder)
    table = pd.read_parquet(folder / "scores.parquet")
    assert list(run.scores.index) == list(table.loc[table["status"] == "scored", "op"])
    np.testing.assert_allclose(run.samples().values.mean(axis=1), run.scores)


def test_pair_is_scipys_on_operators_both_scored(tmp_path: Path) -> None:
    a, b = read(
        write_run(tmp_path / "a", seed=0, failed=3),
        write_run(tmp_path / "b", seed=1, config={"quant.name": "w4a16"}),
    )
    mapped, refused = runs.map_runs([a, b], a)
    assert refused == {}
    row = pair(*mapped, CRITERION, 200, 0)
    common = a.scores.index.intersection(b.scores.index)
    assert row["common"] == len(common) == len(a.table) - 3
    assert row["spearman"] == pytest.approx(stats.spearmanr(a.scores[common], b.scores[common]).statistic)
    assert row["kendall"] == pytest.approx(stats.kendalltau(a.scores[common], b.scores[common]).statistic)
    top = [set(run.scores[common].nlargest(5).index) for run in (a, b)]
    assert row["overlap"] == len(top[0] & top[1]) / 5
    assert row["spearman_low"] < row["spearman"] < row["spearman_high"]
    assert row["shared_samples"] == 0


def test_noise_widens_the_interval(tmp_path: Path) -> None:
    means = np.linspace(1, 3, 29)
    widths = []
    for noise in (0.05, 0.5):
        folders = [write_run(tmp_path / f"{noise}{seed}", means=means, noise=noise, seed=seed) for seed in range(2)]
        a, b = read(*folders)
        row = pair(*runs.map_runs([a, b], a)[0], CRITERION, 300, 0)
        widths.append(row["spearman_high"] - row["spearman_low"])
    assert widths[0] < widths[1] / 2


def test_constant_scores_are_told(tmp_path: Path) -> None:
    constant = write_run(tmp_path / "a", means=np.ones(29), noise=0.0, config={"backend.name": "inc_fx"})
    found = read(constant, write_run(tmp_path / "b"))
    comparison = compare(found, found[1], "runs", CRITERION, draws=100, seed=0)
    (row,) = comparison.pairs.to_dict("records")
    assert np.isnan(row["spearman"])
    assert "ranks nothing" in row["note"]
    assert "no rank correlation" in comparison.verdicts[0]


def test_differences_come_with_their_values_and_name_the_runs(tmp_path: Path) -> None:
    a, b, c = read(
        write_run(tmp_path / "0", config={"calibration.size": 4}),
        write_run(tmp_path / "1", config={"calibration.size": 8}),
        write_run(tmp_path / "2", config={"calibration.size": 8, "backend.name": "inc_fx", "tracking.uri": "x"}),
    )
    assert [run.name for run in (a, b, c)] == ["torch size=4", "torch size=8", "inc_fx size=8"]
    table = runs.differences([a, b, c])
    assert list(table.loc["calibration.size"]) == ["4", "8", "8"]
    assert list(table.loc["backend.name"]) == ["torch", "torch", "inc_fx"]
    assert not any(key.startswith("tracking") for key in table.index)
    assert runs.differences([a, a]).empty


def test_equal_runs_get_different_names(tmp_path: Path) -> None:
    found = read(write_run(tmp_path / "x"), write_run(tmp_path / "y"))
    assert len({run.name for run in found}) == 2


def test_other_component_is_refused_with_the_reason(tmp_path: Path) -> None:
    lm, other, vision = read(
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", config={"strategy.name": "hawq_v2"}),
        write_run(tmp_path / "c", component="vision"),
    )
    comparison = compare([lm, other, vision], lm, "runs", CRITERION, draws=100, seed=0)
    assert list(comparison.refused) == [vision.name]
    assert "it scored vision, the reference lm" in comparison.refused[vision.name]
    with pytest.raises(ComparisonError, match="it scored vision, the reference lm"):
        compare([lm, vision], lm, "runs", CRITERION, draws=100, seed=0)


def test_component_with_overlap_is_compared(tmp_path: Path) -> None:
    full, lm = read(write_run(tmp_path / "a", component="full"), write_run(tmp_path / "b", component="lm"))
    comparison = compare([full, lm], full, "runs", CRITERION, draws=100, seed=0)
    assert comparison.pairs["common"].iloc[0] == len(lm.scores)


def test_calibration_sizes_show_more_agreement_with_more_samples(tmp_path: Path) -> None:
    means = np.exp(np.random.default_rng(1).normal(size=29))
    full = write_run(tmp_path / "64", means=means, noise=1.0, samples=64, run={"n_samples": 64, "calibration_size": 64})
    folders = [full]
    for size in (4, 16):
        folder = write_run(tmp_path / f"{size}", means=means, noise=1.0, samples=64, config={"calibration.size": size})
        _keep_samples(folder, size)
        folders.append(folder)
    found = read(*folders)
    reference = runs.pick_reference(found)
    assert reference.folder == full
    comparison = compare(found, reference, "calibration_sizes", Criterion(10, 0.8, 0.9), draws=300, seed=0)
    assert comparison.curve is not None
    measured = comparison.curve[comparison.curve["source"] == "measured"]
    assert list(measured["size"]) == [4, 16]
    assert list(measured["shared"]) == [4, 16]
    predicted = comparison.curve[comparison.curve["source"] == "predicted, part of its samples"].set_index("size")
    for row in measured.to_dict("records"):
        low, high = predicted.loc[row["size"], ["spearman_low", "spearman_high"]]
        assert low <= row["spearman"] <= high
    assert len(comparison.verdicts) == 3


def _keep_samples(folder: Path, count: int) -> None:
    """Make the run one on the first `count` of its samples."""
    rows = pd.read_parquet(folder / "sample_scores.parquet")
    rows = rows[rows["sample"].isin(rows["sample"].unique()[:count])]
    rows.to_parquet(folder / "sample_scores.parquet", index=False)
    scores = pd.read_parquet(folder / "scores.parquet")
    scores["score"] = scores["op"].map(rows.groupby("op")["value"].mean())
    scores.to_parquet(folder / "scores.parquet", index=False)
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "n_samples": count, "calibration_size": count}))


def two_models(tmp_path: Path) -> list[RunScores]:
    """A target of six blocks, and a proxy of three whose scores are those of the nearest depth, one role reversed."""
    target_rows, proxy_rows = operator_rows("lm", 6), operator_rows("lm", 3)
    proxy_means = np.exp(np.random.default_rng(0).normal(size=len(proxy_rows)))
    by_place = {(row["role"], row["block"]): mean for row, mean in zip(proxy_rows, proxy_means, strict=True)}
    nearest = {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2, None: None}
    means = [
        by_place[row["role"], nearest[row["block"]]] ** (-1 if row["role"] == "o_proj" else 1) for row in target_rows
    ]
    model = {"model.name": "small", "model.path": "small", "model.family": "qwen2_vl"}
    return read(
        write_run(tmp_path / "target", rows=target_rows, means=means, noise=0.01),
        write_run(tmp_path / "proxy", rows=proxy_rows, means=proxy_means, noise=0.01, config=model, seed=9),
    )


def test_proxy_agrees_by_role_as_it_was_made_to(tmp_path: Path) -> None:
    target, small = two_models(tmp_path)
    comparison = compare([target, small], target, "proxy", CRITERION, draws=100, seed=0)
    assert comparison.parts is not None
    parts = comparison.parts.set_index("part")
    assert parts.loc["lm: down_proj", "spearman"] > 0.8
    assert parts.loc["lm: o_proj", "spearman"] < -0.8
    assert parts.loc["all", "common"] == len(target.scores)
    write_comparison(comparison, tmp_path)
    alignment = pd.read_parquet(tmp_path / "alignment.parquet").set_index("op")
    assert (
        alignment.loc["model.language_model.layers.5.mlp.up_proj", "other_op"]
        == "model.language_model.layers.2.mlp.up_proj"
    )
    told = json.loads((tmp_path / "comparison.json").read_text())
    assert told["differences"]["model.name"] == {target.name: "tiny_qwen2_5_vl", small.name: "small"}
    operators = pd.read_parquet(tmp_path / "comparison.parquet")
    np.testing.assert_allclose(operators[f"score:{target.name}"], target.scores)


def test_regret_is_the_error_above_the_targets_own_choice(tmp_path: Path) -> None:
    """A model whose error is the sum of the quantized operators' scores: its own choice is the best there is."""
    target, small = two_models(tmp_path)
    mapped, _ = runs.map_runs([target, small], target)
    total = float(target.scores.sum())

    def measure(sets):
        return [{"squared_error": total - float(target.scores[list(kept)].sum())} for kept in sets]

    sets = {k: proxy.kept_sets(mapped[0], mapped[1:], k, 4, 0) for k in (2, 6)}
    assert all(len(set(ops)) == k for k, chosen in sets.items() for ops in chosen.values())
    assert sets[2][proxy.FIRST] == list(target.scores.index[:2])
    table = proxy.regret_table(sets, measure)
    assert (table["regret"].dropna() >= -1e-9).all()
    own = table[table["chooser"] == proxy.TARGET].set_index("kept")
    assert own.loc[6, "squared_error"] == pytest.approx(total - target.scores.nlargest(6).sum())
    assert own["gain_share"].tolist() == pytest.approx([1, 1])
    by_proxy = table[(table["chooser"] == proxy.PROXY) & (table["kept"] == 6)].iloc[0]
    kept = sets[6][proxy.PROXY]
    assert by_proxy["regret"] == pytest.approx(target.scores.nlargest(6).sum() - target.scores[kept].sum())
    summary = proxy.regret_summary(table)
    random = table[table["chooser"].str.startswith(proxy.RANDOM) & (table["kept"] == 2)]["squared_error"]
    row = summary[(summary["chooser"] == proxy.RANDOM) & (summary["kept"] == 2)].iloc[0]
    assert (row["squared_error"], row["error_high"]) == (pytest.approx(random.mean()), pytest.approx(random.max()))


def test_many_runs_are_paired_with_the_reference_only(tmp_path: Path) -> None:
    found = read(*(write_run(tmp_path / f"{index}", seed=index, samples=2) for index in range(14)))
    mapped, _ = runs.map_runs(found, found[0])
    assert len(pairs(mapped, CRITERION, 100, 0)) == 13
    assert len(pairs(mapped[:5], CRITERION, 100, 0)) == 10


def test_further_scheme_is_a_run_of_its_own(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    table = pd.read_parquet(folder / "scores.parquet")
    table["score"] *= 2
    table.to_parquet(folder / "scores_w4a16.parquet", index=False)
    rows = pd.read_parquet(folder / "sample_scores.parquet")
    other = rows.assign(scheme="w4a16", value=rows["value"] * 2)
    pd.concat([rows, other]).to_parquet(folder / "sample_scores.parquet", index=False)
    first, second = runs.named([read_run(folder), read_run(folder, scheme="w4a16")])
    assert (first.name, second.name) == ("scheme=w8a8_static", "scheme=w4a16")
    np.testing.assert_allclose(second.samples().values, 2 * first.samples().values)
    with pytest.raises(ComparisonError, match=r"scores_w2\.parquet"):
        read_run(folder, scheme="w2")


def test_a_run_that_did_not_finish_is_compared_and_named(tmp_path: Path) -> None:
    found = read(
        write_run(tmp_path / "whole", seed=0),
        write_run(tmp_path / "stopped", seed=1, failed=3, samples=4, run={"status": "partial"}),
    )
    verdicts = compare(found, found[0], "runs", CRITERION, draws=50, seed=0).verdicts
    name = found[1].name
    assert verdicts[0] == f"{name} did not finish: its scores cover {len(found[1].scores)} operators on 4 samples."
    assert len(verdicts) == 2


def test_an_operator_that_stands_twice_is_a_damaged_table(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    table = pd.read_parquet(folder / "scores.parquet")
    table.loc[3, "op"] = table.loc[0, "op"]
    table.to_parquet(folder / "scores.parquet")
    with pytest.raises(RunFolderError, match=rf"scores\.parquet.*{table.loc[0, 'op']} stands in it twice"):
        read_run(folder)
