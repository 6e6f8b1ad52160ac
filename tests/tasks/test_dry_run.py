"""dry_run=true against the run that it tells of: the same numbers, the same refusals, and nothing left behind."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.models.load import outline_model
from qvl_hydra.profiles import measure, spectrum
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.tasks import candidates, family_costs, keep_lists
from qvl_hydra.tasks.dry_run import sample_seconds
from qvl_hydra.tasks.prepare import prepare
from tests.program import SMALL, composed, run_here


def test_it_writes_nothing_and_says_what_the_run_then_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, run = f"experiment=lm_mse_v2 {SMALL}", tmp_path / "outputs" / "run"
    status, text = run_here(f"{line} dry_run=true", tmp_path, monkeypatch, capsys)
    assert status == 0
    assert not list(tmp_path.iterdir())
    assert "nothing: no run of the same settings" in text
    assert "MB below" in text

    assert run_here(f"{line} hydra.run.dir={run}", tmp_path, monkeypatch, capsys)[0] == 0
    record = json.loads((run / "run.json").read_text())
    assert f"{record['n_ops']} of component=lm" in text
    assert f"{record['n_samples']} of them scored" in text
    assert f"by {record['estimator']} on backend={record['backend']}, in {record['scheme']}," in text

    (run / "end.json").unlink()  # as if it had been killed
    before = sorted(tmp_path.rglob("*"))
    text = run_here(f"{line} dry_run=true", tmp_path, monkeypatch, capsys)[1]
    assert f"{len(list((run / 'parts').glob('*.parquet')))} parts of {run}" in text
    assert sorted(tmp_path.rglob("*")) == before
    assert "nothing: no run" in run_here(f"{line} dry_run=true seed=1", tmp_path, monkeypatch, capsys)[1]


def test_every_job_of_a_multirun_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"-m experiment=sharded {SMALL} dry_run=true shard=0/2,1/2"
    status, text = run_here(line, tmp_path, monkeypatch, capsys)
    assert status == 0
    assert text.count("2 of them scored") == 2
    assert "job 1" in text
    assert not list(tmp_path.iterdir())


def test_it_refuses_what_the_run_would_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = f"experiment=quantize_mixed {SMALL} dry_run=true"
    status, text = run_here(f"{mixed} profile.values=[16]", tmp_path, monkeypatch, capsys)
    assert status == 0
    assert "a model by compressed_tensors of at most 0.0" in text
    status, text = run_here(f"{mixed} profile.values=[3]", tmp_path, monkeypatch, capsys)
    assert status == 2
    assert "a budget of average_bits=3 is too small" in text
    too_large = "model=qwen2_5_vl_7b model.weights=random model.memory_limit_gib=2 dry_run=true"
    status, text = run_here(too_large, tmp_path, monkeypatch, capsys)
    assert status == 2
    assert "needs" in text
    assert "2.0 GiB are free" in text
    status, text = run_here("task=export_onnx dry_run=true", tmp_path, monkeypatch, capsys)
    assert status == 2
    assert "dry_run tells what task=sweep, profile, quantize would measure, not export_onnx" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "asked",
    [
        "experiment=profile_spectrum profile.compare_with=[llm_compressor] profile.families=2",
        "experiment=profile_choices profile.values=[6,8] profile.families=1",
    ],
)
def test_no_more_plans_are_measured_than_it_says(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor far fewer: those of budgets near to each other are the same."""
    few = "operators.exclude=null calibration.size=4 profile.evaluation_size=3 strategy.estimator=sketch"
    line = f"{asked} component=lm {few} tracking.enabled=false"
    text = run_here(f"{line} dry_run=true", tmp_path, monkeypatch, capsys)[1]
    told = [tuple(map(int, found)) for found in re.findall(r"(\d+) plans on (\d+) samples", " ".join(text.split()))]
    measured: list[tuple[int, int]] = []

    def counted(model: object, profiles: Sequence[Profile], _: object, samples: Sequence[Sample], *more: Any) -> Any:
        measured.append((len({profile.key for profile in profiles}), len(samples)))
        return measure.measure_profiles(model, profiles, _, samples, *more)

    for module in (candidates, spectrum, keep_lists, family_costs):
        monkeypatch.setattr(module, "measure_profiles", counted)
    run_here(line, tmp_path, monkeypatch, capsys)
    for most, samples in told:
        found = sum(count for count, own in measured if own == samples)
        assert most / 2 <= found <= most


@pytest.mark.parametrize("model", ["tiny_qwen2_5_vl", "tiny_qwen2_vl", "tiny_qwen3_vl"])
@pytest.mark.parametrize("component", ["lm", "vision", "full"])
def test_every_segment_of_the_component_is_counted_once(
    model: str, component: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = composed(f"model={model}", f"component={component}", "calibration.size=4")
    prepared = prepare(settings, (), outline_model)
    sample = next(sample for sample in prepared.scored if sample.pixel_values is not None)
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    stages = prepared.description.family.load_stages()(prepared.model.module)
    assert sample_seconds(prepared.model, component, sample) == len(stages.of(component))
    timings = next(ticks) / 4
    assert timings <= len(stages.of("full")) - 3  # those of a kind are timed once
