"""From settings to a profile, shared by task=profile and task=quantize: scores, units, selection, quantizers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.calibration.sources import load_calibration
from qvl_hydra.errors import ProfileError
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles.apply import make_quantizers
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.profiles.select import Budget, select
from qvl_hydra.profiles.units import Unit, units_from_scores
from qvl_hydra.quantization.qdq import OperatorQuantizer
from qvl_hydra.quantization.scheme import Scheme
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.screen import Screen
from qvl_hydra.settings import Settings
from qvl_hydra.tasks import sweep
from qvl_hydra.tasks.prepare import Prepared, prepare
from qvl_hydra.tracking.read import find_runs

KEPT = ("scores.parquet", "sample_scores.parquet", "calibration.json")  # of the sweep, copied beside the profile


@dataclass(frozen=True)
class Decision:
    """A profile and what it was decided from.

    Attributes:
        sweep: `run.json` of the sweep.
        metric: of its scores.
        quantizers: of every operator decided on.
        notes: sentences for the user: units that had to stay in high precision, scores of another model.
    """

    prepared: Prepared
    sweep: Mapping[str, Any]
    metric: str
    units: tuple[Unit, ...]
    budget: Budget
    profile: Profile
    quantizers: Mapping[str, OperatorQuantizer]
    notes: tuple[str, ...]


def decide(settings: Settings, folder: RunFolder, screen: Screen) -> Decision:
    """Read or measure scores, and select the profile of the budget.

    The sweep's tables end up in the folder either way.

    Raises:
        ProfileError: scores of another scheme, component or model; a budget that nothing meets; streamed weights.
        QvlHydraError: what the sweep raises.
    """
    if settings.model.placement == "streamed":
        raise ProfileError("a profile is measured on the whole model: take model.placement=resident")
    if settings.profile.scores is None:
        sweep.run(settings, folder, screen)
        record = _record(folder.path)
    else:
        record = _fetch(settings, settings.profile.scores, folder.path)
    prepared = prepare(settings)
    scheme = prepared.schemes[0]
    notes = _compare_settings(settings, record, scheme, prepared)
    table = pd.read_parquet(folder.path / "scores.parquet")
    units = tuple(units_from_scores(find_operators(prepared.model.module, settings.component.name), table))
    budget = Budget(settings.profile.budget, settings.profile.value)
    profile = select(units, budget, scheme, settings.profile.high_bits)
    quantizers = make_quantizers(
        prepared.model.module, profile.operators, prepared.calibration.samples, settings.component.name, scheme
    )
    return Decision(
        prepared=prepared,
        sweep=record,
        metric=str(table["metric"].dropna().iloc[0]),
        units=units,
        budget=budget,
        profile=profile,
        quantizers=quantizers,
        notes=(*notes, *_kept_notes(units)),
    )


def held_out(settings: Settings, prepared: Prepared) -> Sequence[Sample]:
    """Samples that neither scores nor ranges have seen.

    The bundled source has a split of its own for that; of other sources, those that follow the calibration samples.
    """
    given, size = settings.calibration, settings.profile.evaluation_size
    if given.source == "bundled":
        apart = dataclasses.replace(given, split="evaluation", size=size)
        return load_calibration(apart, prepared.processor).samples
    both = dataclasses.replace(given, size=given.size + size)
    return load_calibration(both, prepared.processor).samples[given.size :]


def _fetch(settings: Settings, reference: str, into: Path) -> dict[str, Any]:
    """Copy the tables of a sweep, from a folder or from the tracker, and give its `run.json`."""
    path = Path(reference).expanduser()
    reference = str(path.parent) if path.name == "scores.parquet" else reference
    found = find_runs(settings.tracking, [reference], None, None, into / "source").folders
    if len(found) != 1:
        names = ", ".join(str(source) for source, _ in found[:5])
        raise ProfileError(f"profile.scores={reference} holds {len(found)} sweeps ({names}); give one of them")
    source, scheme = found[0]
    record = _record(source)
    for name in KEPT:
        origin = source / (f"scores_{scheme}.parquet" if scheme and name == "scores.parquet" else name)
        if origin.exists():
            shutil.copyfile(origin, into / name)
    return record | ({"scheme": scheme} if scheme else {}) | {"source": reference}


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return record


def _compare_settings(
    settings: Settings, record: Mapping[str, Any], scheme: Scheme, prepared: Prepared
) -> tuple[str, ...]:
    faults = []
    if record.get("scheme", scheme.name) != scheme.name:
        faults.append(f"quant={record['scheme']}, here quant={scheme.name}")
    if record.get("component", settings.component.name) != settings.component.name:
        faults.append(f"component={record['component']}, here component={settings.component.name}")
    if faults:
        raise ProfileError(f"the scores were measured with {' and '.join(faults)}; give this run the same")
    if record.get("model_sha", prepared.model.sha) != prepared.model.sha:
        return (f"the scores are of another model or checkpoint ({record.get('model')})",)
    return ()


def _kept_notes(units: Sequence[Unit]) -> list[str]:
    return [f"{unit.name} stays in high precision: {unit.reason}" for unit in units if unit.score is None]
