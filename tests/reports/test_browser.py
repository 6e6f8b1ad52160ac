"""What a reader sees: reports and MLflow's compare page in a real browser, against what the files hold."""

from __future__ import annotations

import json
import os
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qvl_hydra.reports.comparison import write_comparison_report
from qvl_hydra.reports.page import write_page
from qvl_hydra.reports.profile import PLANS, plans_section
from qvl_hydra.reports.sweep import write_sweep_report
from qvl_hydra.runs.files import write_json
from qvl_hydra.settings import TrackingSettings
from qvl_hydra.tracking.record import SweepParent, finish_parent, open_run, send_run
from tests.made_up_runs import write_run
from tests.reports.chromium import chromium
from tests.reports.test_reports import proxy_comparison
from tests.tracking.test_server import free_port, start_server, stop_server

pytestmark = [pytest.mark.slow, pytest.mark.browser]


def requests_of(window: Any) -> list[str]:
    """Everything the page asked for."""
    messages = [json.loads(entry["message"])["message"] for entry in window.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def cells(window: Any, table: str, column: int) -> list[str]:
    script = (
        "return [...document.querySelectorAll('#' + arguments[0] + ' tbody tr')].filter(r => !r.hidden)"
        ".map(r => r.cells[arguments[1]].textContent)"
    )
    return list(window.execute_script(script, table, column))


def test_sweep_report_is_read_sorted_searched_and_hovered(tmp_path: Path) -> None:
    folder = write_run(tmp_path, component="full", blocks=8, failed=2, skipped=1, samples=16)
    path = write_sweep_report(folder)
    scores = pd.read_parquet(folder / "scores.parquet")
    with chromium() as window:
        window.get(path.as_uri())
        assert [url for url in requests_of(window) if url.startswith(("http", "ws", "ftp"))] == []
        assert [entry for entry in window.get_log("browser") if entry["level"] == "SEVERE"] == []
        ranked = scores.sort_values("rank", na_position="last")["op"]
        assert cells(window, "operators", 1) == list(ranked)
        head = window.find_element("xpath", "//table[@id='operators']//th[text()='score']")
        window.execute_script("arguments[0].click()", head)
        scored = scores[scores["status"] == "scored"]
        assert cells(window, "operators", 1)[: len(scored)] == list(scored.sort_values("score")["op"])
        window.find_element("css selector", "input[data-table=operators]").send_keys("visual down_proj")
        wanted = [op for op in scores["op"] if "visual" in op and "down_proj" in op]
        assert set(cells(window, "operators", 1)) == set(wanted)
        assert len(window.find_elements("css selector", "td.failed")) == 2
        top = scored.sort_values("rank").iloc[0]
        assert hover(window, window.find_element("css selector", ".barrow")).startswith(f"{top['op']}\nrank 1, score")
        charts = window.find_elements("css selector", "svg.chart circle")
        assert "samples" in hover(window, charts[0])


def test_plans_are_chosen_by_a_click_and_stand_side_by_side(tmp_path: Path) -> None:
    evil = "</script><b>x</b>"
    plans = [
        {"budget": {"kind": "average_bits", "value": bits}, "cost": bits, "average_bits": bits, "predicted": 1 / bits,
         "kl_answer": 10.0**-bits, "exact_match": 0.9, "of": of}
        for bits, of in ((4.0, [1, 1, 1]), (6.0, [0, 1, 2]), (8.0, [0, 0, 0]))
    ]  # fmt: skip
    operators = ["model.a", f"model.{evil}", "lm_head"]
    write_json(tmp_path / PLANS, {"operators": operators, "choices": ["leave", "nvfp4", "fp8"], "plans": plans})
    path = write_page(tmp_path / "page.html", "plans", plans_section(tmp_path))
    with chromium() as window:
        window.get(path.as_uri())
        assert [entry for entry in window.get_log("browser") if entry["level"] == "SEVERE"] == []
        dots = window.find_elements("css selector", "[data-plan]")
        assert len(dots) == 3
        shown = window.find_element("id", "plans-shown")
        assert "average_bits 4" in shown.text  # before any click: both ends
        dots[1].click()
        lines = shown.text.splitlines()
        assert "exact match 0.9 0.9" in lines
        assert "left in high precision 1 3" in lines
        assert "nvfp4 1 0" in lines
        assert "profile.values=[6.0]" in shown.text
        assert "2 operators differ" in lines
        assert f"model.{evil}: nvfp4, leave" in shown.get_attribute("textContent")
        assert not shown.find_elements("tag name", "b")
        window.find_elements("css selector", "#plans-shown select")[1].send_keys("average_bits 4")
        assert "nvfp4 1 3" in shown.text.splitlines()
        assert len(window.find_elements("css selector", ".picked")) == 2


def hover(window: Any, element: Any) -> str:
    """The text that appears over an element."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.support.wait import WebDriverWait

    window.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)

    def point(page: Any) -> str:  # again and again: on a busy machine the page can move under the pointer
        ActionChains(page).move_by_offset(1, 1).move_to_element(element).perform()
        return str(page.find_element("id", "tip").text)

    return str(WebDriverWait(window, 60).until(point))


@pytest.mark.parametrize("report", ["sweep", "comparison"])
def test_reports_fit_a_phone_and_a_printed_page(tmp_path: Path, report: str) -> None:
    if report == "sweep":
        path = write_sweep_report(write_run(tmp_path, component="full", blocks=6))
    else:
        path = write_comparison_report(proxy_comparison(tmp_path), tmp_path)
    with chromium(390, 844, phone=True) as window:
        window.get(path.as_uri())
        size = "return [document.documentElement.scrollWidth, innerWidth]"
        width, room = window.execute_script(size)
        assert (width, room) == (390, 390), "the page itself must not scroll sideways"
    with chromium(794, 1123) as window:  # A4
        window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        window.get(path.as_uri())
        widths = "return [...document.querySelectorAll('table')].map(table => table.scrollWidth)"
        assert max(window.execute_script(widths)) <= 794, "no column may be cut off"


def test_comparison_report_holds_the_pairs(tmp_path: Path) -> None:
    comparison = proxy_comparison(tmp_path)
    path = write_comparison_report(comparison, tmp_path)
    with chromium() as window:
        window.get(path.as_uri())
        assert cells(window, "pairs", 0) == list(comparison.pairs["a"])
        shown = float(cells(window, "pairs", 2)[0].split()[0])
        assert shown == pytest.approx(comparison.pairs["spearman"].iloc[0], abs=1e-3)
        assert cells(window, "operators", 0) == list(
            comparison.operators.sort_values(f"rank:{comparison.reference.name}")["op"]
        )
        assert len(window.find_elements("css selector", "svg.chart")) == 2
        tip = hover(window, window.find_elements("css selector", "svg.chart")[1].find_element("css selector", "circle"))
        assert tip.split("\n")[0] in set(comparison.operators["op"])


def test_mlflow_compares_runs_side_by_side(tmp_path: Path) -> None:
    """A real server; its compare page shows both runs' parameters and per-operator metrics."""
    port = free_port()
    server = start_server(tmp_path / "server", port)
    try:
        settings = TrackingSettings(uri=f"http://127.0.0.1:{port}", experiment="tests")
        sweep = SweepParent(tmp_path / "sweep", "two sizes", {"sweep_id": "s"})
        folders = [
            write_run(tmp_path / "sweep" / f"{size}", seed=size, config={"calibration.size": size}) for size in (8, 16)
        ]
        ids = [open_run(settings, folder, name=f"size {folder.name}", tags={}, sweep=sweep) for folder in folders]
        for folder in folders:
            write_sweep_report(folder)
            send_run(folder, settings)
        finish_parent(sweep.folder, settings)
        experiment = json.loads((folders[0] / "mlflow.json").read_text())["experiment_id"]
        with chromium(1500, 1400) as window:
            look_at_runs(window, settings.uri or "", experiment, [str(run_id) for run_id in ids], folders)
    finally:
        stop_server(server)


def look_at_runs(window: Any, uri: str, experiment: str, ids: list[str], folders: list[Path]) -> None:
    mode = "workflowType=machine_learning"
    runs, experiments = (urllib.parse.quote(json.dumps(value)) for value in (ids, [experiment]))
    window.get(f"{uri}/#/compare-runs?runs={runs}&experiments={experiments}&{mode}")
    wait_for_text(window, "Run details")
    tables = [pd.read_parquet(folder / "scores.parquet").set_index("op") for folder in folders]
    top = tables[0]["score"].idxmax()
    wait_for_text(window, "by_block/lm.down_proj")
    assert "calibration.size 8 16" in body(window)
    assert "Parallel Coordinates Plot" in body(window)
    assert f"score/{top}" in body(window), "the plot opens on the most sensitive operator"
    shown = compared_metrics(window)
    for op in tables[0].index:
        expected = [pytest.approx(table.loc[op, "score"], abs=6e-4) for table in tables]
        assert [float(value) for value in shown[f"score/{op}"]] == expected
        assert shown[f"rank/{op}"] == [str(table.loc[op, "rank"]) for table in tables]
    keep(window, "mlflow_compare")
    window.get(f"{uri}/#/experiments/{experiment}/runs/{ids[0]}/artifacts?{mode}")
    wait_for_text(window, "report.html")
    for name in ("scores.parquet", "sample_scores.parquet", "run.json", "config.yaml", "figures"):
        assert name in body(window)
    window.get(f"{uri}/#/experiments/{experiment}/runs/{ids[0]}/model-metrics?{mode}")
    wait_for_text(window, "by_block")
    keep(window, "mlflow_run")


def compared_metrics(window: Any) -> dict[str, list[str]]:
    """All rows of the compare page's table of metrics, which keeps only those in view on the page."""
    visible = """
        const found = {};
        document.querySelectorAll('.ReactVirtualized__Grid').forEach((grid, place) => {
            for (const cell of grid.firstElementChild?.children ?? [])
                (found[cell.style.top] ??= []).push([place, parseFloat(cell.style.left), cell.innerText]);
        });
        const scroller = [...document.querySelectorAll('.ReactVirtualized__Grid')].at(-1);
        const before = scroller.scrollTop;
        scroller.scrollTop += scroller.clientHeight / 2;
        const order = (a, b) => a[0] - b[0] || a[1] - b[1];
        const rows = Object.values(found).map(row => row.sort(order).map(cell => cell[2]));
        return [rows, scroller.scrollTop > before];
    """
    rows: dict[str, list[str]] = {}
    more = True
    while more:
        time.sleep(0.5)  # the grids draw what has come into view, one after the other
        found, more = window.execute_script(visible)
        rows |= {key: values for key, *values in found if len(values) == 2}
    return rows


def body(window: Any) -> str:
    return str(window.execute_script("return document.body.innerText")).replace("\t", " ")


def wait_for_text(window: Any, text: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    present: Callable[[Any], bool] = lambda page: text in body(page)  # noqa: E731
    WebDriverWait(window, 120).until(present, f"no {text!r} on the page")


def keep(window: Any, name: str) -> None:
    """Keep a picture where SCREENSHOTS says, for the documents."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        window.save_screenshot(str(Path(folder) / f"{name}.png"))
