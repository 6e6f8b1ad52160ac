"""The scores that task=profile and task=quantize decide by: measured first, or of a sweep at hand."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from qvl_hydra.backends.table import BACKENDS
from qvl_hydra.errors import ProfileError
from qvl_hydra.models.memory import peak_memory_bytes
from qvl_hydra.operators.discover import Operator, select_operators
from qvl_hydra.profiles.families import families
from qvl_hydra.runs.files import read_table, read_yaml, write_parquet
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.runs.record import RunRecord, record_of, write_record
from qvl_hydra.screen import Screen
from qvl_hydra.settings import QuantSettings, Settings
from qvl_hydra.tasks import sweep
from qvl_hydra.tasks.sweep import versions
from qvl_hydra.tracking.read import find_runs

SCORES, FAMILIES, EXPERTS = "scores.parquet", "families.parquet", "experts.parquet"
# Of the sweep, copied beside the profile.
KEPT = (SCORES, "sample_scores.parquet", EXPERTS, "calibration.json")
OF_PLANS = ("profile", "quantize")  # what plans add to the sweep's record


def scored_by(
    settings: Settings, folder: RunFolder, screen: Screen, further: Sequence[QuantSettings] = ()
) -> RunRecord:
    """Score, or fetch scores; the sweep's tables end up in the folder either way.

    Args:
        further: schemes beside `settings.quant`.

    Returns:
        The sweep's record.

    Raises:
        ProfileError: `profile.scores` names several sweeps.
        QvlHydraError: what the sweep raises.
    """
    if settings.profile.scores is not None:
        return _fetch(settings, further, settings.profile.scores, folder.path)
    sweep.run(settings, folder, screen, further)
    return _sweep_record(folder.path)


def of_selected(settings: Settings, operators: Sequence[Operator], table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the operators that this run selects, of a sweep that may have scored more; and of other models.

    What is not selected stays as it is, as where a sweep leaves it out.

    Raises:
        OperatorError: a glob or block names nothing, or nothing is left.
    """
    selected = select_operators(operators, settings.operators, settings.seed)
    others = {op.path for op in operators} | {op.group for op in operators}
    others -= {name for op in selected for name in (op.path, op.group)}
    return table[~table["op"].isin(others)]


def shared(record: RunRecord) -> bool:
    """Whether the scores of operators are those of their whole units."""
    row = BACKENDS.get(record.backend or "")
    return row is not None and row.shares


def of_profile(sweep: RunRecord, task: str, said: Mapping[str, Any], notes: Sequence[str], wall_s: float) -> RunRecord:
    """The sweep's record with what a profile says beside it, and this run's own times."""
    return dataclasses.replace(
        sweep,
        task=task,
        status="complete",
        further={**sweep.further, task: dict(said)},
        wall_s=wall_s,
        peak_memory_bytes=peak_memory_bytes(),
        versions=versions(),
        notes=[*sweep.notes, *notes],
        n_sweep_notes=len(sweep.notes),
    )


def _fetch(settings: Settings, further: Sequence[QuantSettings], reference: str, into: Path) -> RunRecord:
    """Copy the tables of a sweep, from a folder or from the tracker, and give its `run.json`.

    Those of a scheme of `quant.also` become the main ones where the reference or this run's own scheme says so.
    """
    path = Path(reference).expanduser()
    reference = str(path.parent) if path.name == SCORES else reference
    found = find_runs(settings.tracking, [reference], None, None, into / "source").folders
    if len(found) != 1:
        names = ", ".join(str(source) for source, _ in found[:5])
        raise ProfileError(f"profile.scores={reference} holds {len(found)} sweeps ({names}); give one of them")
    source, scheme = found[0]
    _require_same_scheme(source, [settings.quant, *further])
    record = _sweep_record(source)
    for path in [*(source / name for name in KEPT), *source.glob("scores_*.parquet")]:
        if path.exists():
            shutil.copyfile(path, into / path.name)
    wanted = scheme or settings.quant.name
    if wanted != record.scheme and (own := into / f"scores_{wanted}.parquet").exists():  # of `quant.also`
        (into / SCORES).rename(into / f"scores_{record.scheme}.parquet")
        own.rename(into / SCORES)
        (into / EXPERTS).unlink(missing_ok=True)
        scheme, record = wanted, dataclasses.replace(record, details={})  # they are of the other scheme
    beside = {**record.further, "source": reference}
    record = dataclasses.replace(record, scheme=scheme or record.scheme, further=beside)
    samples = read_table(into / "sample_scores.parquet")
    write_parquet(into / FAMILIES, families(read_table(into / SCORES), samples, record.scheme, shared(record)))
    write_record(into, dataclasses.replace(record, task=settings.task.name))  # should no plan follow
    return record


def _require_same_scheme(source: Path, wanted: Sequence[QuantSettings]) -> None:
    """Refuse scores of a scheme that is called as one of these and is another, by the settings that the sweep left."""
    kept = read_yaml(source / "config.yaml").get("quant")
    there: dict[str, Any] = kept if isinstance(kept, dict) else {}
    for quant in wanted:
        here = vars(dataclasses.replace(quant, perturb=wanted[0].perturb))
        apart = [key for key in here if key != "also" and key in there and there[key] != here[key]]
        if apart and quant.name == there.get("name"):
            faults = " and ".join(f"quant.{key}={there[key]}, here {here[key]}" for key in apart)
            raise ProfileError(
                f"the scores of {quant.name} were measured with {faults}; give this run the same, or score this "
                "scheme, with a quant.name of its own"
            )


def _sweep_record(folder: Path) -> RunRecord:
    """The `run.json` of a folder as its sweep left it: what plans from its scores said is theirs."""
    record = record_of(folder)
    further = {key: value for key, value in record.further.items() if key not in OF_PLANS}
    return dataclasses.replace(record, further=further, notes=record.notes[: record.n_sweep_notes], n_sweep_notes=None)
