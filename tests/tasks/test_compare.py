"""task=compare from made-up runs to the tracked comparison; regret measured on the bundled model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

from qvl_hydra.errors import ComparisonError
from qvl_hydra.models.forward import reference_output
from qvl_hydra.quantization.apply import make_quantizer, observe_ranges, quantized
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.screen import Screen
from qvl_hydra.settings import CompareSettings, Settings, TrackingSettings
from qvl_hydra.tasks import compare
from qvl_hydra.tasks.prepare import prepare
from qvl_hydra.tracking.read import jobs_of
from qvl_hydra.tracking.record import send_run
from tests.made_up_runs import write_run
from tests.program import composed, run_here, with_store


class Heard(Screen):
    """A screen that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def settings_for(overrides: Sequence[str] = (), **wanted: object) -> Settings:
    return dataclasses.replace(composed(*overrides), compare=CompareSettings(resamples=100, **wanted))  # type: ignore[arg-type]


def test_runs_side_by_side(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    write_run(tmp_path / "c", component="vision", config={"seed": 7})
    screen = Heard()
    settings = settings_for(runs=[*map(str, runs), str(tmp_path / "c")], reference=str(runs[0]), top_k=5)
    compare.run(settings, RunFolder(tmp_path / "out"), screen)
    told = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (told["task"], told["n_runs"], told["n_refused"]) == ("compare", 2, 1)
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["differences"]["calibration.seed"]
    assert "it scored vision, the reference lm" in next(iter(content["refused"].values()))
    pair = pd.read_parquet(tmp_path / "out" / "pairs.parquet").iloc[0]
    assert next(iter(told["spearman"].values())) == pair["spearman"]
    assert any("not compared" in line for line in screen.lines)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index("What differs") < page.index("Every pair")
    assert {path.name for path in (tmp_path / "out" / "figures").glob("*.png")} == {"ranks.png"}


def test_nothing_named_and_unknown_reference_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match=r"compare\.runs"):
        compare.run(settings_for(), RunFolder(tmp_path / "out"), Heard())
    runs = [str(write_run(tmp_path / name, seed=seed)) for seed, name in enumerate("ab")]
    with pytest.raises(ComparisonError, match="is none of the runs compared"):
        compare.run(settings_for(runs=runs, reference="nobody"), RunFolder(tmp_path / "out"), Heard())
    with pytest.raises(ComparisonError, match="two are needed"):
        compare.run(settings_for(runs=runs[:1]), RunFolder(tmp_path / "out"), Heard())


def test_multirun_with_a_failed_job_is_compared_tracked_and_linked(tmp_path: Path) -> None:
    store = with_store(tmp_path) / "mlflow.db"
    tracking = TrackingSettings(uri=f"sqlite:///{store}", experiment="tests")
    sweep = tmp_path / "sweep"
    ids = [send_run(write_run(sweep / f"{index}", seed=index), tracking) for index in range(2)]
    (sweep / "2").mkdir()
    (sweep / "2" / "run.json").write_text(json.dumps({"task": "sweep", "status": "failed", "error": "out of memory"}))
    settings = dataclasses.replace(settings_for(kind="calibration_sizes"), tracking=tracking)
    screen = Heard()
    folder = compare.compare_sweep(sweep, settings, screen)
    assert "missing: job 2; it failed: out of memory" in screen.lines
    client = MlflowClient(tracking_uri=tracking.uri)
    run = client.get_run(json.loads((folder / "mlflow.json").read_text())["run_id"])
    assert run.info.status == "FINISHED"
    assert set(run.data.tags["compared_runs"].split(",")) == set(ids)
    assert all(f"/runs/{run_id}" in run.data.tags["mlflow.note.content"] for run_id in ids)
    assert run.data.tags["mlflow.parentRunId"] == json.loads((sweep / "mlflow_parent.json").read_text())["run_id"]
    paths = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "comparison.json", "comparison.parquet", "pairs.parquet", "stability.parquet"} <= paths
    assert any(key.startswith("spearman/") for key in run.data.metrics)
    assert "0" not in {place.name for place, _ in jobs_of(sweep).folders if place.name == "comparison"}
    again = compare.compare_sweep(sweep, settings, screen)
    assert json.loads((again / "mlflow.json").read_text())["run_id"] == run.info.run_id


@pytest.mark.slow
def test_proxy_on_bundled_models_measures_what_the_choice_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (
        "-m experiment=proxy_qwen2_vl component=lm operators.blocks=0-1 strategy.estimator=sketch calibration.size=4 "
        "compare.regret_shares=[0.2] compare.regret_samples=2 compare.random_draws=1 compare.resamples=100 "
        "tracking.enabled=false hydra.sweep.dir=sweep"
    )
    status, said = run_here(line, tmp_path, monkeypatch, capsys)
    assert status == 0, said
    folder = tmp_path / "sweep" / "comparison"
    regret = pd.read_parquet(folder / "regret.parquet").set_index("chooser")
    content = json.loads((folder / "comparison.json").read_text())
    assert content["reference"] == "tiny_qwen2_5_vl"
    assert (folder / "alignment.parquet").exists()
    own = read_settings(tmp_path / "sweep" / "0")
    expected = squared_error_of(own, pd.read_parquet(tmp_path / "sweep" / "0" / "scores.parquet"), 3)
    assert regret.loc["target", "squared_error"] == pytest.approx(expected, rel=1e-3)
    assert regret.loc["target", "regret"] == 0


def read_settings(folder: Path) -> Settings:
    import yaml

    from qvl_hydra.settings import build_settings

    return build_settings(yaml.safe_load((folder / "config.yaml").read_text()))


@torch.no_grad()
def squared_error_of(own: Settings, scores: pd.DataFrame, kept: int) -> float:
    """Mean squared change of the logits with all operators quantized but the most sensitive, sample by sample."""
    from qvl_hydra.calibration.sources import load_calibration

    prepared = prepare(own)
    module, scheme = prepared.model.module, prepared.schemes[0]
    paths = list(scores["op"])
    ranges = observe_ranges(module, paths, prepared.calibration.samples, "lm", scheme)
    high = set(scores.sort_values("rank")["op"].head(kept))
    quantizers = {path: make_quantizer(module, path, scheme, ranges) for path in paths if path not in high}
    held_out = dataclasses.replace(own.calibration, split="evaluation", size=2)
    samples = load_calibration(held_out, prepared.processor).samples
    errors = []
    for sample in samples:
        reference = reference_output(module, sample, "lm")
        with quantized(module, quantizers):
            output = reference_output(module, sample, "lm")
        errors.append(float((output - reference).double().square().sum()))
    return sum(errors) / len(errors)
