"""A profile or checkpoint as a LoggedModel of MLflow, and on request as a version of a registered model.

Everything comes from the run folder, as what a run says does. Both are found again by the run that they come from, so
that sending again, also after a kill, makes neither twice.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException

from qvl_hydra.tracking import content

FIGURES = "plan"  # before the names of its metrics
VERSIONS = "mlflow.modelVersions"  # tag of a LoggedModel by which MLflow's UI finds its versions
ALIAS = "champion"  # of the version that was registered last


def send_model(client: MlflowClient, run_id: str, folder: Path, stamp: int, register: str | None) -> None:
    """Make the LoggedModel of what a run decided: its files, its parameters, its figures on held-out samples.

    Args:
        stamp: of the figures, in milliseconds.
        register: name of the registered model that it becomes a version of, with the alias `champion`; None: of none.

    Raises:
        MlflowException: the server cannot do it.
    """
    plan = content.plan(folder)
    if plan is None:
        return
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment], f"source_run_id = '{run_id}'", max_results=1)
    if found:
        model = found[0]
    else:
        model = client.create_logged_model(experiment, plan.name, run_id, {}, plan.parameters, plan.kind)
    if model.status != LoggedModelStatus.READY:
        _fill(client, run_id, model, folder, plan, stamp)
    if register is not None:
        _register(client, run_id, model, register)


def _fill(
    client: MlflowClient, run_id: str, model: LoggedModel, folder: Path, plan: content.Plan, stamp: int
) -> None:
    files, _ = content.artifacts(folder)
    kept = [path for path in files if path.relative_to(folder).parts[0] in (content.PLAN, *content.PLAN_FOLDERS)]
    with tempfile.TemporaryDirectory(prefix="qvl_hydra_") as place:
        for path in kept:
            target = Path(place) / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path.absolute())
        client.log_model_artifacts(model.model_id, place)
    samples = content.samples(folder, "evaluation")
    known = {metric.key for metric in model.metrics or ()}
    for figures, on in ((plan.figures, {}), (plan.held_out, samples)):
        name, digest = dataset_of(on) if on else (None, None)
        for key, value in figures.items():
            if f"{FIGURES}/{key}" not in known:
                client.log_metric(
                    run_id, f"{FIGURES}/{key}", value, stamp, 0, dataset_name=name, dataset_digest=digest,
                    model_id=model.model_id,
                )  # fmt: skip
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _register(client: MlflowClient, run_id: str, model: LoggedModel, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if any(version.run_id == run_id for version in client.search_model_versions(f"name = '{name}'")):
        return  # a version that came later may be the champion by now
    # Not `models:/<id>`, which a local store looks up in the store of the whole process.
    made = client.create_model_version(
        name, model.artifact_location, run_id, await_creation_for=0, model_id=model.model_id
    )
    client.set_registered_model_alias(name, ALIAS, made.version)
    if VERSIONS not in client.get_logged_model(model.model_id).tags:  # a server writes it, a local store does not
        own = [{"name": name, "version": int(made.version)}]
        client.set_logged_model_tags(model.model_id, {VERSIONS: json.dumps(own)})


def dataset_of(found: Mapping[str, Any]) -> tuple[str, str]:
    """Name and digest of a set of samples, as a data set input has them."""
    return f"{found.get('source')}-{found.get('size')}", str(found["sha"])[:36]
