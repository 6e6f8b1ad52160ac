"""What a sweep measures now, and what it takes from the runs before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from qvl_hydra.backends.protocol import load_engine
from qvl_hydra.backends.table import BACKENDS
from qvl_hydra.calibration.sample import samples_sha
from qvl_hydra.estimators.auto import CONTROLS, RACES, doubts
from qvl_hydra.estimators.bench import CENSUS, FORWARD, RANGES
from qvl_hydra.estimators.job import EngineReport, SweepJob
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.runs.resume import Asked
from qvl_hydra.runs.reuse import REUSED
from qvl_hydra.screen import Screen
from qvl_hydra.settings import QuantSettings, Settings
from qvl_hydra.tasks.prepare import Prepared, may_reuse

REPORT = "report"  # where a run keeps what its engine said when it had measured everything
# Of parts, what is of all samples: ranges, census, a plain forward, what was said, and a race's operators and turns.
OF_ALL_SAMPLES = (RANGES, CENSUS, FORWARD, REPORT, CONTROLS, RACES, *(f"exact{digit}" for digit in range(10)))


def asked_of(settings: Settings, further: Sequence[QuantSettings], prepared: Prepared) -> Asked:
    """What the run looks for among those before it; with static ranges, which are of all samples, nothing smaller."""
    samples = prepared.calibration.samples
    return Asked(
        settings, tuple(further), prepared.model.sha, len(samples), lambda count: samples_sha(samples[:count]),
        takes=may_reuse(settings) and settings.strategy.row.shards and settings.shard is None,
        grows=not any(scheme.needs_ranges for scheme in prepared.schemes),
        of_all=OF_ALL_SAMPLES, by_scheme=(RANGES, CONTROLS, RACES), report=REPORT,
    )  # fmt: skip


def report_of(settings: Settings, folder: RunFolder, job: SweepJob, screen: Screen) -> EngineReport:
    """What the engine says, now or when it measured the scores that are in the folder."""
    told = folder.recall(REPORT) if BACKENDS[settings.backend.name].shards else None  # of others files would be missing
    reused = folder.recall(REUSED, {})
    if told is None:
        report = _measured(settings, folder, job, screen, reused)
        folder.remember(REPORT, asdict(report))
    else:
        report = EngineReport(**told)
    report.notes += doubts(report.details, settings.strategy.agreement_warn)
    if reused:
        of = "scores"
        if "samples" in reused:
            of = f"scores of {reused['samples']} samples"
        elif "schemes" in reused:
            of = f"scores in {', '.join(reused['schemes'])}"
        report.notes.append(
            f"{of} are those of {reused['folder']}, measured under the same settings; cache=off measures them again"
        )
    return report


def _measured(
    settings: Settings, folder: RunFolder, job: SweepJob, screen: Screen, reused: Mapping[str, Any]
) -> EngineReport:
    """What the engine says when it has measured the schemes that no other run has."""
    taken = reused.get("schemes", ())
    left = tuple(scheme for scheme in job.schemes if scheme.name not in taken)
    report = EngineReport(**reused["report"]) if job.scheme.name in taken else None
    if left:
        found = load_engine(settings.backend.name)(replace(job, schemes=left), folder, screen)
        if report is None:
            return found
        report = replace(report, engine_s=found.engine_s, notes=list(dict.fromkeys([*report.notes, *found.notes])))
    assert report is not None  # of the scheme that ranks, which is left where it was not taken
    report.details |= folder.recall(RACES, {}).get(job.scheme.name, {})
    return report
