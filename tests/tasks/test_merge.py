"""Shards of a sweep, merged, against the sweep itself; and what cannot be merged."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient

from qvl_hydra.entry.compose import with_choices
from qvl_hydra.errors import EngineError, RunFolderError, SettingsError
from qvl_hydra.estimators import exact_run, reverse_walk
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.screen import Screen
from qvl_hydra.tasks import merge, sweep
from tests.program import finish, run_here, start, wait_for, with_store
from tests.tasks.test_sweep import settings_of

LINE = ("operators.max_ops=6", "calibration.size=7", "strategy.confidence_batches=null", "tracking.enabled=false")
FAST = ("strategy.estimator=gradient",)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def measured(path: Path, *overrides: str) -> Path:
    """The run folder of a sweep, with its config as the entry leaves it."""
    settings, folder = settings_of(*LINE, *overrides), RunFolder(path)
    (path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False))
    settings, further = with_choices(settings)
    sweep.run(settings, folder, Screen(), further)
    return path


def shards_of(folder: Path, count: int, *overrides: str) -> list[Path]:
    return [measured(folder / f"shard{index}", f"shard={index}/{count}", *overrides) for index in range(count)]


def merged(folder: Path, runs: list[Path], *overrides: str) -> Path:
    names = ",".join(str(path) for path in runs)
    settings = settings_of("task=merge", f"merge.runs=[{names}]", "tracking.enabled=false", *overrides)
    merge.run(settings, RunFolder(folder), Screen(), with_choices)
    return folder


def assert_same_scores(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """To float32's rounding: more of it is in differences of losses, and in the tails that intervals end in."""
    assert (found.columns == expected.columns).all()
    for name in found:
        rtol, atol = {"score_low": (0.1, 0), "score_high": (0.1, 0), "loss_change": (0, 1e-7)}.get(name, (2e-3, 1e-9))
        pd.testing.assert_series_equal(found[name], expected[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy.estimator=exact", "quant.also=[w8a16]"),
        ("strategy.estimator=sketch", "component=full", "quant.also=[w8a16]"),
        ("strategy.estimator=sketch", "strategy=mse_v2", "strategy.probes=2", "component=vision"),
        ("strategy.estimator=auto", "strategy.controls=1", "strategy.top_k=2"),
        ("strategy=hawq_v2",),
        ("strategy.estimator=gradient", "model=tiny_qwen3_vl", "component=full"),
    ],
    ids=lambda value: value[0].rpartition("=")[2],
)
def test_merged_shards_are_the_whole_run(
    overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To float32's rounding: other samples walk together."""
    whole = measured(tmp_path / "whole", *overrides)
    shards = shards_of(tmp_path, 3, *overrides)
    assert [json.loads((path / "run.json").read_text())["n_samples"] for path in shards] == [2, 2, 3]
    if "strategy.estimator=auto" not in overrides:
        for module, name in ((exact_run, "score_samples"), (reverse_walk, "step_back")):
            monkeypatch.setattr(module, name, lambda *_: pytest.fail("measured again"))
    found = merged(tmp_path / "merged", shards)
    for name in sorted(path.name for path in whole.glob("scores*.parquet")):
        one, other = (pd.read_parquet(path / name) for path in (found, whole))
        assert_same_scores(one, other)
    keys = ["op", "sample", "probe", "metric", "estimator", "scheme"]
    samples = [
        pd.read_parquet(path / "sample_scores.parquet").sort_values(keys, ignore_index=True) for path in (found, whole)
    ]
    assert samples[0][keys].equals(samples[1][keys])
    record, other = (json.loads((path / "run.json").read_text()) for path in (found, whole))
    for key in ("status", "n_samples", "n_scored", "estimator", "scheme", "fingerprint"):
        assert record[key] == other[key], key
    assert record["forward_s"] > 0
    assert "shard: null" in (found / "config.yaml").read_text()
    assert len(json.loads((found / "shards.json").read_text())["shards"]) == 3


DEEP = ("model.weights=random", "+model.overrides={text_config.num_hidden_layers: 36}", "operators.max_ops=24")


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["exact", "sketch", "auto", "gauss_newton"])
def test_four_shards_of_36_blocks_are_the_whole_run(estimator: str, tmp_path: Path) -> None:
    strategy = ("strategy=hawq_v2",) if estimator == "gauss_newton" else (f"strategy.estimator={estimator}",)
    overrides = (*DEEP, *strategy, "calibration.size=8")
    whole = measured(tmp_path / "whole", *overrides)
    found = merged(tmp_path / "merged", shards_of(tmp_path, 4, *overrides))
    one, other = (pd.read_parquet(path / "scores.parquet") for path in (found, whole))
    assert_same_scores(one, other)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return shards_of(tmp_path_factory.mktemp("quick"), 3, *FAST)


def test_a_missing_shard_is_named_and_the_rest_can_be_merged(quick: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"shard=1/3 missing; .*merge.partial=true"):
        merged(tmp_path / "merged", [quick[0], quick[2]])
    found = merged(tmp_path / "partial", [quick[2], quick[0]], "merge.partial=true")
    record = json.loads((found / "run.json").read_text())
    assert record["status"] == "partial"
    assert record["notes"] == ["shards 1 are missing: scores are of the other samples"]
    rows = [pd.read_parquet(path / "sample_scores.parquet") for path in (quick[0], quick[2], found)]
    assert len(rows[2]) == len(rows[0]) + len(rows[1])
    scores = pd.read_parquet(found / "scores.parquet").set_index("op")["score"]
    expected = rows[2].groupby("op")["value"].mean()
    pd.testing.assert_series_equal(scores, expected[scores.index], check_names=False)


def test_what_is_no_part_of_one_sweep_is_refused(quick: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="shard=1/3 stands twice"):
        merged(tmp_path / "twice", [*quick, quick[1]])
    other = measured(tmp_path / "other", *FAST, "shard=2/3", "seed=1")
    with pytest.raises(RunFolderError, match="different sweeps: they differ in seed"):
        merged(tmp_path / "seeds", [quick[0], quick[1], other])
    half = measured(tmp_path / "half", *FAST, "shard=1/2")
    with pytest.raises(RunFolderError, match="their samples overlap"):
        merged(tmp_path / "halves", [quick[0], half])
    with pytest.raises(RunFolderError, match="run of no shard"):
        merged(tmp_path / "none", [measured(tmp_path / "alone", *FAST)])
    with pytest.raises(RunFolderError, match="no run folder"):
        merged(tmp_path / "nothing", [tmp_path / "empty"])
    with pytest.raises(RunFolderError, match="needs shards"):
        merged(tmp_path / "unnamed", [])
    stopped = tmp_path / "stopped"
    shutil.copytree(quick[1], stopped)
    content = json.loads((stopped / "run.json").read_text())
    (stopped / "run.json").write_text(json.dumps(content | {"status": "partial"}))
    with pytest.raises(RunFolderError, match=r"shard=1/3 missing[\s\S]*stopped: it is partial"):
        merged(tmp_path / "early", [quick[0], stopped, quick[2]])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("shard=4/4",), "expected i/n with i below n"),
        (("shard=1of4",), "expected i/n with i below n"),
        (("shard=0/2", "task=profile"), "not of profile"),
        (("shard=0/2", "backend=onnxrt"), "backend=torch, not onnxrt"),
        (("shard=0/2", "strategy=hawq_v2", "strategy.curvature=hessian"), "hessian decides by all samples"),
        (("backend.device=cuda:shard",), "shard is null"),
    ],
)
def test_what_has_no_shards(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        settings_of(*overrides)


def test_a_shard_without_samples_says_so(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="shard=0/9 has no sample of 7; take fewer shards"):
        measured(tmp_path / "many", *FAST, "shard=0/9")


def test_each_shard_takes_the_next_gpu() -> None:
    settings = settings_of("shard=5/8", "backend.device=cuda:shard")
    assert [settings.device_name(count) for count in (8, 4, 1, 0)] == ["cuda:5", "cuda:1", "cuda:0", "cuda:0"]


def test_a_multirun_of_shards_ends_with_the_merged_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sweep each of two seeds; the comparison is of the merged runs, and all are under one parent."""
    line = "-m experiment=sharded shard=0/2,1/2 seed=0,1 compare.after=true hydra.sweep.dir=jobs tracking.enabled=true "
    status, text = run_here(line + " ".join([*LINE[:3], *FAST]), with_store(tmp_path), monkeypatch, capsys)
    assert status == 0, text
    assert text.count("merging 2 of 2 shards") == 2
    whole = measured(tmp_path / "whole", *FAST, "seed=1")
    found, expected = (pd.read_parquet(path / "scores.parquet") for path in (tmp_path / "jobs/merged-1", whole))
    assert_same_scores(found, expected)
    compared = json.loads((tmp_path / "jobs" / "comparison" / "comparison.json").read_text())
    assert sorted(compared["runs"]) == ["seed=0", "seed=1"]
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    (parent,) = [item for item in runs if item.data.tags["task"] == "multirun"]
    below = [item for item in runs if item.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len([item for item in below if "merged" in item.data.tags]) == 2
    assert len(below) == 7
    assert all(item.info.status == "FINISHED" for item in runs)


def test_ctrl_c_while_shards_are_merged_ends_politely(tmp_path: Path) -> None:
    line = "-m shard=0/2,1/2 hydra.sweep.dir=jobs calibration.size=64 strategy.estimator=auto tracking.enabled=true"
    process = start(line, tmp_path)
    wait_for(lambda: any((tmp_path / "jobs/merged/parts").glob("exact*.parquet")), process)
    process.send_signal(signal.SIGINT)
    status, text = finish(process)
    assert status == 130, text
    assert "Traceback" not in text
    assert "the same command goes on from there" in text
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert sorted(run.info.status for run in runs) == ["FINISHED", "FINISHED", "KILLED", "KILLED"]
