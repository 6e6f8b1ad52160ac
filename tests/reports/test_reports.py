"""Reports of made-up runs: everything in them is what the files hold, and nothing escapes."""

from __future__ import annotations

import html
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qvl_hydra.comparison import proxy, runs
from qvl_hydra.comparison.reading import read_run
from qvl_hydra.comparison.result import Comparison, compare
from qvl_hydra.comparison.stability import Criterion
from qvl_hydra.errors import ComparisonError
from qvl_hydra.reports.bars import bar_scale
from qvl_hydra.reports.chart import Point, Series, chart
from qvl_hydra.reports.comparison import write_comparison_report
from qvl_hydra.reports.heat import shades
from qvl_hydra.reports.page import Column, Section, page, table
from qvl_hydra.reports.sweep import write_sweep_report
from tests.made_up_runs import operator_rows, write_run

OUTSIDE = re.compile(r"""(?:src|href)=["'](?!#|data:)|url\(|@import|https?://""")
PNG = b"\x89PNG\r\n\x1a\n"


def test_sweep_report_shows_every_operator_and_loads_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path, component="full", blocks=6, failed=2, skipped=1)
    text = write_sweep_report(folder).read_text()
    scores = pd.read_parquet(folder / "scores.parquet")
    for row in scores.to_dict("records"):
        assert html.escape(row["op"]) in text
        if row["status"] == "scored":
            assert f'data-v="{row["score"]!r}"' in text
    assert not OUTSIDE.search(text)
    assert '<meta name="viewport"' in text
    for name in ("heat_map", "ranked", "stability"):
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(PNG)


def test_failed_and_skipped_operators_are_shown_as_such_never_as_zero(tmp_path: Path) -> None:
    text = write_sweep_report(write_run(tmp_path, failed=1, skipped=1)).read_text()
    assert text.count('<td class="failed"') == 1
    assert text.count('<td class="skipped"') == 1
    assert "failed: the measurement was not finite" in text
    assert "skipped: weight &lt;all&gt; zero" in text
    (failed,) = re.findall(r'<tr class="failed">(.*?)</tr>', text)
    assert re.findall(r'data-v="([^"]*)"', failed)[:5] == ["", "", "", "", ""]


def test_markup_in_names_stays_text(tmp_path: Path) -> None:
    rows = operator_rows("lm", 2)
    evil = 'x</script><script>alert(1)</script>"\' onload="y'
    rows[0]["op"] = evil
    rows[1]["role"] = evil
    folder = write_run(tmp_path, rows=rows, config={"model.name": evil}, run={"notes": [evil], "model": evil})
    text = write_sweep_report(folder).read_text()
    assert "<script>alert" not in text
    assert text.count("<script>") == 1
    assert html.escape(evil, quote=True) in text


def test_unfinished_run_has_a_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    for name in ("run.json", "sample_scores.parquet", "config.yaml"):
        (folder / name).unlink()
    assert "partial" in write_sweep_report(folder).read_text()


def test_run_without_any_score_has_a_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path, failed=29)
    assert write_sweep_report(folder).read_text().count('<td class="failed"') == 29
    with pytest.raises(ComparisonError, match=r"no scores\.parquet"):
        write_sweep_report(tmp_path / "nowhere")


def test_one_sample_gives_no_curve(tmp_path: Path) -> None:
    text = write_sweep_report(write_run(tmp_path, samples=1)).read_text()
    assert "say nothing about others" in text


def test_further_sections_come_before_the_operators(tmp_path: Path) -> None:
    text = write_sweep_report(write_run(tmp_path), [Section("Precision profiles", "<p>here</p>")]).read_text()
    assert text.index("<h2>Precision profiles</h2>") < text.index("<h2>Operators</h2>")


def test_shades_and_bars_are_logarithmic_only_where_that_has_a_meaning() -> None:
    scores = pd.Series([1.0, 10.0, 100.0])
    np.testing.assert_allclose(shades(scores), [0, 0.5, 1])
    np.testing.assert_allclose(shades(scores - 2), [0, 9 / 99, 1])
    np.testing.assert_allclose(shades(pd.Series([0.0, 1.0, 10.0, 100.0])), [0, 0, 0.5, 1])  # zero: nobody feels it
    np.testing.assert_allclose(shades(pd.Series([0.0, 0.0])), [0.5, 0.5])
    np.testing.assert_allclose(shades(pd.Series([2.0, 2.0])), [0.5, 0.5])
    frame = pd.DataFrame({"score": [1000.0, 1.0, 1.0], "score_high": [np.nan] * 3})
    place, logarithmic = bar_scale(frame)
    assert logarithmic
    assert (place(1000), place(0)) == (pytest.approx(1), 0)
    place, logarithmic = bar_scale(pd.DataFrame({"score": [4.0, -1.0], "score_high": [5.0, 0.0]}))
    assert not logarithmic
    assert place(2) == pytest.approx(0.5)


def test_chart_places_points_and_leaves_out_what_is_no_number() -> None:
    points = [Point(1, 0.5), Point(2, float("nan")), Point(4, 1.0)]
    drawn = chart([Series("a & b", points)], "n", "y", log_x=True, y_limits=(0.0, 1.0))
    assert drawn.count("<circle") == 2
    assert "a &amp; b" in drawn
    heights = [float(value) for value in re.findall(r'cy="([\d.]+)"', drawn)]
    top, bottom = 12.0, 260.0
    assert heights == [pytest.approx((top + bottom) / 2), pytest.approx(top)]
    assert chart([Series("none", [Point(float("nan"), 1)])], "n", "y") == ""


def test_table_sorts_by_full_values_and_marks_missing_ones() -> None:
    drawn = table([Column("x", number=True)], [[1.23456789], [None], [float("nan")], [(2.5, 2.0, 3.0)]], identity="t")
    assert re.findall(r'data-v="([^"]*)"', drawn) == ["1.23456789", "", "", "2.5"]
    assert "(2 to 3)" in drawn
    assert page("<t>", [Section("empty", "")]).count("<h2>") == 0


def proxy_comparison(tmp_path: Path) -> Comparison:
    model = {"model.name": "small", "model.path": "small"}
    found = runs.named(
        [
            read_run(write_run(tmp_path / "a", blocks=4)),
            read_run(write_run(tmp_path / "b", blocks=2, seed=1, config=model)),
        ]
    )
    comparison = compare(
        found, found[0], "proxy", Criterion(5, 0.8, 0.9), draws=100, seed=0, missing={"2": "it failed"}
    )
    sets = {3: proxy.kept_sets(comparison.runs[0], comparison.runs[1:], 3, 2, 0)}
    regret = proxy.regret_table(sets, lambda asked: [{"squared_error": 10.0 - len(kept)} for kept in asked])
    return Comparison(**{**vars(comparison), "regret": regret})


def test_comparison_report_has_its_parts_in_order(tmp_path: Path) -> None:
    comparison = proxy_comparison(tmp_path)
    text = write_comparison_report(comparison, tmp_path).read_text()
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles[:2] == ["What differs between the runs", "Result"]
    assert {"Agreement in parts", "What the choice costs", "Alignment", "Operators"} <= set(titles)
    assert "Missing: job 2; it failed." in text
    row = comparison.pairs.iloc[0]
    assert f'data-v="{float(row["spearman"])!r}"' in text
    assert f'data-v="{float(row["kendall"])!r}"' in text
    assert all(html.escape(op) in text for op in comparison.reference.table["op"])
    assert not OUTSIDE.search(text)
    assert {path.name for path in (tmp_path / "figures").glob("*")} == {"ranks.png", "regret.png"}
