"""task=sweep: score the operators, and leave scores, settings, a report and what was measured (README)."""

from __future__ import annotations

import math
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from qvl_hydra.backends.table import BACKENDS
from qvl_hydra.errors import EngineError
from qvl_hydra.estimators.auto import CONTROLS
from qvl_hydra.estimators.bench import CENSUS, shard_of
from qvl_hydra.estimators.job import EngineReport, SweepJob
from qvl_hydra.estimators.metrics import unit_of
from qvl_hydra.estimators.sketch_run import of_expert
from qvl_hydra.models.memory import peak_memory_bytes
from qvl_hydra.profiles.families import families
from qvl_hydra.quantization.formats.table import not_offered
from qvl_hydra.reports.sweep import write_sweep_report
from qvl_hydra.runs.files import write_json, write_parquet
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.runs.record import RunRecord, write_record
from qvl_hydra.runs.resume import take_up
from qvl_hydra.runs.versions import installed_versions
from qvl_hydra.scores.table import Scored, changes, origins, score_table
from qvl_hydra.screen import Screen
from qvl_hydra.settings import QuantSettings, Settings
from qvl_hydra.tasks.measured import asked_of, report_of
from qvl_hydra.tasks.prepare import Prepared, may_reuse, not_quantized, prepare
from qvl_hydra.tasks.shown import CHANGES, ENTERS, show
from qvl_hydra.version import __version__

REFRESH_S = 10.0  # how old scores.parquet may get while the run goes on
STOPPED = "stopped before the end: what is here was measured until then"
NOTHING_SCORED = "no operator could be scored; are the model's weights whole, and do the samples reach its operators?"
PACKAGES = (
    "torch", "transformers", "numpy", "pandas", "hydra-core", "mlflow", "neural-compressor", "onnx", "onnxruntime-gpu",
    "nvidia-modelopt",
)  # fmt: skip


def run(
    settings: Settings,
    folder: RunFolder,
    screen: Screen,
    further_schemes: Sequence[QuantSettings] = (),
    only_there: str = "",
) -> None:
    """Score, write, show.

    Args:
        only_there: a reason to measure nothing, and to write what the folder has as partial.

    Raises:
        QvlHydraError: see `prepare`; what the engine cannot do; no operator could be scored.
        KeyboardInterrupt: after what there is was written, marked partial.
    """
    began = time.perf_counter()
    prepared = prepare(settings, further_schemes)
    asked = asked_of(settings, further_schemes, prepared)
    take_up(asked, folder, screen, may_reuse(settings))
    _write_calibration(settings, folder, prepared)
    job = job_of(settings, prepared, folder.path / settings.backend.name)
    note: dict[str, Any] = {"fingerprint": asked.fingerprint, "began": began}
    report: EngineReport | None = None
    if only_there:
        _write_results(settings, folder, prepared, None, note | {"why": only_there})
        return
    folder.after_write = _refresher(settings, folder, prepared)
    try:
        report = report_of(settings, folder, job, screen)
        report.notes += not_quantized(settings, prepared)
    finally:  # Ctrl-C, an error or the end: what there is is written
        screen.finish()
        folder.after_write = lambda: None  # the other holds the model: a profile loads it again
        record = _write_results(settings, folder, prepared, report, note)
    show(settings, folder, report, record, screen)
    if not record.n_scored:
        raise EngineError(_nothing_scored(settings))


def job_of(settings: Settings, prepared: Prepared, workdir: Path) -> SweepJob:
    """The measuring that settings ask for; `workdir` is the engine's own folder."""
    return SweepJob(
        model=prepared.model,
        component=settings.component.name,
        operators=prepared.operators,
        calibration=prepared.calibration,
        scored=prepared.scored,
        batch_size=settings.calibration.batch_size,
        schemes=prepared.schemes,
        strategy=settings.strategy,
        backend=settings.backend,
        fuse=settings.operators.fuse,
        seed=settings.seed,
        workdir=workdir,
        shard=settings.part,
        single_experts=settings.operators.experts == "single",
    )


def _write_calibration(settings: Settings, folder: RunFolder, prepared: Prepared) -> None:
    calibration = prepared.calibration
    write_json(
        folder.path / "calibration.json",
        {
            "source": calibration.source,
            "size": len(calibration.samples),
            "seed": settings.calibration.seed,
            "sha": calibration.sha,
            "bad": [asdict(item) for item in calibration.bad],
            "samples": [sample.id for sample in calibration.samples],
            "scored": [sample.id for sample in prepared.scored],
        },
    )


def ranking_metric(settings: Settings) -> str:
    """What a sweep ranks by, before it has a report."""
    strategy, backend = settings.strategy, settings.backend
    row = strategy.row
    return BACKENDS[backend.name].ranks_by(row, strategy.metric, strategy.weighting, backend.method)


def _tables(
    settings: Settings, folder: RunFolder, prepared: Prepared, report: EngineReport | None
) -> Iterator[tuple[str, tuple[pd.DataFrame, float | None]]]:
    """Each scheme with its table, also one that no operator can have; the main one first."""
    frame = folder.frame()
    metric = report.metric if report else ranking_metric(settings)
    unit = report.unit if report else unit_of(metric, settings.strategy.positions)
    fixed = BACKENDS[settings.backend.name].scheme
    own = [fixed] if fixed else [scheme.name for scheme in prepared.schemes]
    by_name = defaultdict(lambda: prepared.schemes[0], {item.name: item for item in prepared.schemes})
    for scheme in dict.fromkeys([*own, *frame["scheme"].unique()]):
        yield scheme, score_table(
            Scored(
                prepared.operators, frame, folder.endings(), metric, unit, scheme, settings.operators.fuse,
                folder.recall(CONTROLS, {}).get(scheme, ()), folder.recall(CENSUS, {}),
                partial(not_offered, scheme=by_name[scheme]),
            )
        )  # fmt: skip


def _refresher(settings: Settings, folder: RunFolder, prepared: Prepared) -> Callable[[], None]:
    """Keeps scores.parquet readable and young while the run goes on."""
    last = time.monotonic()

    def refresh() -> None:
        nonlocal last
        if time.monotonic() - last > REFRESH_S:
            _, (table, _) = next(_tables(settings, folder, prepared, None))
            write_parquet(folder.path / "scores.parquet", table)
            last = time.monotonic()

    return refresh


def _write_experts(folder: RunFolder, frame: pd.DataFrame, metric: str, scheme: str) -> None:
    """Of a mixture, how many calibration tokens each expert was given, and its score where that was asked for."""
    rows = [
        {"op": path, "expert": expert, "tokens": tokens}
        for path, seen in folder.recall(CENSUS, {}).items()
        for expert, tokens in enumerate(seen.get("tokens", ()))
    ]
    if not rows:
        return
    table = pd.DataFrame(rows)
    own = frame[(frame["metric"] == of_expert(metric)) & (frame["scheme"] == scheme)]
    if len(own):
        scores = own.groupby("op")["value"].mean().to_dict()
        table["score"] = [scores.get(f"{row['op']}.{row['expert']}", math.nan) for row in rows]
    write_parquet(folder.path / "experts.parquet", table)


def _write_results(
    settings: Settings, folder: RunFolder, prepared: Prepared, report: EngineReport | None, note: dict[str, Any]
) -> RunRecord:
    tables = dict(_tables(settings, folder, prepared, report))
    main = next(iter(tables))
    for scheme, (table, _) in tables.items():
        name = "scores.parquet" if scheme == main else f"scores_{scheme}.parquet"
        write_parquet(folder.path / name, table)
    frame = folder.frame()
    write_parquet(folder.path / "sample_scores.parquet", frame)
    _write_experts(folder, frame, report.metric if report else settings.strategy.metric, main)
    grouped = families(tables[main][0], frame, main, BACKENDS[settings.backend.name].shares)
    write_parquet(folder.path / "families.parquet", grouped)
    record = _run_record(settings, prepared, report, tables[main], main, note)
    write_record(folder.path, record)
    write_sweep_report(folder.path)
    return record


def _run_record(
    settings: Settings,
    prepared: Prepared,
    report: EngineReport | None,
    scored: tuple[pd.DataFrame, float | None],
    scheme: str,
    note: dict[str, Any],
) -> RunRecord:
    table, factor = scored
    status = table["status"].value_counts()
    forward_s, engine_s = (report.forward_s, report.engine_s) if report else (None, None)
    details = dict(report.details) if report else {}
    if factor is not None:
        details["sketch_factor"] = factor
    if told := origins(table):
        details[ENTERS] = told
    if told := changes(table):
        details[CHANGES] = told
    if prepared.model.device.type == "cuda":
        details["peak_cuda_memory_bytes"] = torch.cuda.max_memory_allocated(prepared.model.device)
    n_scored = int(status.get("scored", 0))
    error = _nothing_scored(settings) if report and not n_scored else None
    return RunRecord(
        task="sweep",
        status="failed" if error else "complete" if report else "partial",
        backend=settings.backend.name,
        device=str(prepared.model.device),
        strategy=settings.strategy.name,
        direction=settings.strategy.direction,
        estimator=report.estimator if report else settings.strategy.estimator,
        scheme=scheme,
        component=settings.component.name,
        model=settings.model.name,
        n_ops=len(table),
        n_scored=n_scored,
        n_skipped=int(status.get("skipped", 0)),
        n_failed=int(status.get("failed", 0)),
        n_samples=len(prepared.scored[shard_of(len(prepared.scored), settings.part)]),
        calibration_size=len(prepared.calibration.samples),
        calibration_seed=settings.calibration.seed,
        calibration_bad=len(prepared.calibration.bad),
        wall_s=time.perf_counter() - note["began"],
        engine_s=engine_s,
        forward_s=forward_s,
        forward_equivalents=engine_s / forward_s if engine_s is not None and forward_s else None,
        peak_memory_bytes=peak_memory_bytes(),
        versions=versions(),
        model_sha=prepared.model.sha,
        calibration_sha=prepared.calibration.sha,
        fingerprint=note["fingerprint"],
        notes=list(report.notes) if report else [note.get("why", STOPPED)],
        details=details,
        error=error,
    )


def _nothing_scored(settings: Settings) -> str:
    if settings.model.dtype != "float16":
        return NOTHING_SCORED
    return f"{NOTHING_SCORED} model.dtype=float16 overflows beyond 65,504; take bfloat16 or float32"


def versions() -> dict[str, str]:
    """Versions of what a result depends on, as far as installed."""
    return {"python": platform.python_version(), "qvl_hydra": __version__, **installed_versions(PACKAGES)}
