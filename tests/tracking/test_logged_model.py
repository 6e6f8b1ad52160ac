"""A run that decided a plan becomes one LoggedModel, and at most one version of a registered model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from qvl_hydra.errors import TrackingError
from qvl_hydra.runs.files import write_json
from qvl_hydra.settings import TrackingSettings
from qvl_hydra.tracking import logged_model, record, store
from tests.made_up_runs import write_run

NAME = "our plan"
MEASURED = {"exact_match": 0.9, "kl_answer": 0.02, "predicted_joint": 0.03, "evaluation_samples": 2, "recovered": None}


def decided(folder: Path, task: str = "profile", status: str = "complete") -> Path:
    """The folder of a run that decided a plan."""
    folder = write_run(folder, run={"task": task, "status": status, task: MEASURED})
    plan = {"budget": "share=0.1", "scheme": "w8a8_static", "average_bits": 9.5, "high": ["lm_head"], "choices": {}}
    write_json(folder / "profile.json", plan)
    write_json(folder / "evaluation.json", {"source": "bundled", "size": 2, "sha": "cafe", "samples": ["a", "b"]})
    (folder / "exports" / "modelopt").mkdir(parents=True)
    (folder / "exports" / "modelopt" / "quant_cfg.yaml").write_text("[]")
    (folder / "notes.txt").write_text("of nobody's concern")
    return folder


def models(settings: TrackingSettings) -> list:
    client = MlflowClient(store.tracking_uri(settings))
    return list(client.search_logged_models([client.get_experiment_by_name(settings.experiment).experiment_id]))


@pytest.mark.parametrize(("task", "kind"), [("profile", "profile"), ("quantize", "checkpoint")])
def test_a_plan_is_one_model_with_its_files_and_figures(
    task: str, kind: str, settings: TrackingSettings, tmp_path: Path
) -> None:
    folder = decided(tmp_path / "run", task)
    run_id = record.send_run(folder, settings)
    assert record.send_run(folder, settings) == run_id
    (model,) = models(settings)
    assert (model.model_type, model.status, model.source_run_id) == (kind, "READY", run_id)
    assert model.params["budget"] == "share=0.1"
    found = {metric.key: metric for metric in model.metrics}
    assert {key: metric.value for key, metric in found.items()} == {
        "plan/average_bits": 9.5, "plan/exact_match": 0.9, "plan/kl_answer": 0.02, "plan/predicted_joint": 0.03,
        "plan/evaluation_samples": 2,
    }  # fmt: skip
    for key in ("plan/exact_match", "plan/kl_answer"):
        assert (found[key].dataset_name, found[key].dataset_digest) == ("bundled-2", "cafe")
    for key in ("plan/average_bits", "plan/predicted_joint"):
        assert found[key].dataset_name is None
    place = Path(model.artifact_location.removeprefix("file://"))
    files = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert files == {"profile.json", "exports/modelopt/quant_cfg.yaml"}
    assert json.loads((place / "profile.json").read_text())["high"] == ["lm_head"]
    run = MlflowClient(store.tracking_uri(settings)).get_run(run_id)
    assert [item.model_id for item in run.outputs.model_outputs] == [model.model_id]
    purposes = {item.dataset.name: item.tags[0].value for item in run.inputs.dataset_inputs}
    assert purposes["bundled-2"] == "evaluation"


@pytest.mark.parametrize("status", ["partial", "failed"])
def test_what_did_not_come_to_its_end_is_none(status: str, settings: TrackingSettings, tmp_path: Path) -> None:
    record.send_run(decided(tmp_path / "run", status=status), settings)
    record.send_run(write_run(tmp_path / "sweep"), settings)
    assert models(settings) == []


def test_a_sending_that_broke_off_is_taken_up(
    settings: TrackingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = decided(tmp_path / "run")
    with monkeypatch.context() as context:
        context.setattr(MlflowClient, "log_outputs", lambda *_: (_ for _ in ()).throw(ConnectionError("gone")))
        with pytest.raises(TrackingError, match="gone"):
            record.send_run(folder, settings)
    (model,) = models(settings)
    assert model.status != "READY"
    record.send_run(folder, settings)
    (again,) = models(settings)
    assert (again.model_id, again.status) == (model.model_id, "READY")
    assert len(again.metrics) == 5


def test_the_last_that_was_registered_is_the_champion(settings: TrackingSettings, tmp_path: Path) -> None:
    own = dataclasses.replace(settings, register=NAME)
    first, second = decided(tmp_path / "first"), decided(tmp_path / "second", "quantize")
    runs = [record.send_run(folder, own) for folder in (first, second)]
    record.send_run(first, own)  # again: neither a version more nor another champion
    client = MlflowClient(store.tracking_uri(settings))
    versions = {version.run_id: version for version in client.search_model_versions(f"name = '{NAME}'")}
    assert set(versions) == set(runs)
    assert client.get_model_version_by_alias(NAME, logged_model.ALIAS).run_id == runs[1]
    made = {model.source_run_id: model.artifact_location for model in models(settings)}
    tags = {model.source_run_id: json.loads(model.tags[logged_model.VERSIONS]) for model in models(settings)}
    assert tags == {run: [{"name": NAME, "version": int(own.version)}] for run, own in versions.items()}
    assert {run_id: version.source for run_id, version in versions.items()} == made
