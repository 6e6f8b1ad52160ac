"""task=compare: any two or more sweeps side by side; also what follows a multirun with compare.after=true."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qvl_hydra.calibration.held_out import held_out, seen_by
from qvl_hydra.comparison import proxy, runs
from qvl_hydra.comparison.reading import RunScores, read_run
from qvl_hydra.comparison.result import Comparison, compare, write_comparison
from qvl_hydra.comparison.stability import Criterion
from qvl_hydra.errors import ComparisonError, QvlHydraError
from qvl_hydra.models.memory import peak_memory_bytes
from qvl_hydra.profiles.apply import Quantizers
from qvl_hydra.profiles.measure import measure_profiles, steps
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.reports.comparison import write_comparison_report
from qvl_hydra.runs.files import write_atomically
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.runs.record import RunRecord, write_record
from qvl_hydra.screen import Screen
from qvl_hydra.settings import CompareSettings, Settings, TaskSettings, build_settings
from qvl_hydra.tasks.prepare import prepare
from qvl_hydra.tracking.read import Found, find_runs, jobs_of, run_link
from qvl_hydra.tracking.record import tracked_beside

FOLDER = "comparison"  # of a multirun's comparison, in the sweep folder
SHOWN_DIFFERENCES = 20  # rows in the run's description
FLOAT_BITS = 16  # width an operator kept in float counts with; no budget of bytes is asked for here


def run(settings: Settings, folder: RunFolder, screen: Screen) -> None:
    """Compare the runs that `compare.runs`, `compare.sweep_id` or `compare.filter` names.

    Raises:
        ComparisonError: nothing is named, nothing is found, or nothing can be compared.
        TrackingError: runs of the tracker were asked for and it cannot be used.
    """
    wanted = settings.compare
    if not (wanted.runs or wanted.sweep_id or wanted.filter):
        raise ComparisonError(
            "task=compare needs runs: compare.runs=[<id or folder>,...], compare.sweep_id=<id> or "
            "compare.filter=<MLflow filter>"
        )
    with tempfile.TemporaryDirectory(prefix="qvl_hydra_") as into:
        found = find_runs(settings.tracking, wanted.runs, wanted.sweep_id, wanted.filter, Path(into))
        _compare(settings, folder, screen, found)


def compare_sweep(sweep_folder: Path, settings: Settings, screen: Screen) -> Path:
    """Compare the jobs of a multirun that are complete, say which are not, and track the comparison beside them.

    Args:
        sweep_folder: with one folder a job.
        settings: of any job; `compare` is what counts.

    Returns:
        Folder of the comparison.

    Raises:
        ComparisonError: fewer than two jobs are complete, or they cannot be compared.
    """
    folder = RunFolder(sweep_folder / FOLDER)
    own = dataclasses.replace(settings, task=TaskSettings("compare"))
    write_atomically(folder.path / "config.yaml", yaml.safe_dump(dataclasses.asdict(own), sort_keys=False).encode())
    tags = {"task": "compare", "comparison": own.compare.kind}
    with tracked_beside(sweep_folder, folder.path, own.tracking, "comparison", tags, screen.say):
        _compare(own, folder, screen, jobs_of(sweep_folder))
    return folder.path


def _compare(settings: Settings, folder: RunFolder, screen: Screen, found: Found) -> None:
    began, wanted = time.perf_counter(), settings.compare
    read = runs.named([read_run(path, scheme=scheme) for path, scheme in found.folders])
    if len(read) < 2:
        reasons = "".join(f"\n  - {name}: {reason}" for name, reason in found.missing.items())
        raise ComparisonError(f"{'one' if read else 'no'} run with scores was found; two are needed{reasons}")
    comparison = compare(
        read,
        _reference(read, wanted),
        wanted.kind,
        Criterion(wanted.top_k, wanted.overlap, wanted.confidence),
        draws=wanted.resamples,
        seed=settings.seed,
        missing=found.missing,
    )
    if wanted.kind == "proxy":
        comparison = _with_regret(comparison, wanted, settings.seed, screen)
    write_comparison(comparison, folder.path)
    write_atomically(folder.path / "description.md", _description(comparison).encode())
    write_record(folder.path, _record(comparison, settings, time.perf_counter() - began))
    write_comparison_report(comparison, folder.path)
    _show(comparison, folder, screen)


def _reference(read: Sequence[RunScores], wanted: CompareSettings) -> RunScores:
    if wanted.reference is None:
        return read[0] if wanted.kind == "proxy" else runs.pick_reference(read)
    asked, _, scheme = wanted.reference.partition("#")
    for item in read:
        same_place = item.folder.absolute() == Path(asked).expanduser().absolute()
        same_scheme = not scheme or item.run.scheme == scheme
        if same_scheme and (same_place or asked in (item.run_id, item.name, item.folder.name)):
            return item
    names = ", ".join(f"{item.name} ({item.run_id or item.folder})" for item in read)
    raise ComparisonError(f"compare.reference={wanted.reference} is none of the runs compared: {names}")


def _with_regret(comparison: Comparison, wanted: CompareSettings, seed: int, screen: Screen) -> Comparison:
    """The comparison with what choosing by the proxy costs the target; the reason, where that cannot be measured."""
    try:
        regret = _regret(comparison, wanted, seed, screen)
    except QvlHydraError as error:
        reason = f"What the choice costs was not measured: {error}"
        return dataclasses.replace(comparison, verdicts=(*comparison.verdicts, reason))
    finally:
        screen.finish()
    said = []
    for row in regret[regret["chooser"].str.startswith(proxy.PROXY)].to_dict("records"):
        said.append(
            f"With {row['kept']} operators kept in float by {row['chooser']}, the target's squared error is "
            f"{row['squared_error']:.4g}: {row['gain_share']:.0%} of what its own choice gains."
        )
    return dataclasses.replace(comparison, regret=regret, verdicts=(*comparison.verdicts, *said))


def _regret(comparison: Comparison, wanted: CompareSettings, seed: int, screen: Screen) -> Any:
    target = comparison.runs[0]
    own = build_settings(target.run.config)
    prepared = prepare(own)
    scored = set(target.run.scores.index)
    operators = tuple(op for op in prepared.operators if op.path in scored or op.group in scored)
    scheme = prepared.schemes[0]
    quantizers = Quantizers(
        prepared.model, operators, prepared.calibration.samples, own.component.name, [scheme]
    )
    seen = seen_by([item.run.folder for item in comparison.runs]) | {s.id for s in prepared.calibration.samples}
    samples = held_out(own.calibration, prepared.processor, wanted.regret_samples, seen)

    def measure(sets: Sequence[Sequence[str]]) -> list[dict[str, float]]:
        profiles = []
        for kept in map(set, sets):
            high = frozenset(op.path for op in operators if op.path in kept or op.group in kept)
            profiles.append(Profile(scheme, operators, high, FLOAT_BITS, "regret"))
        screen.total(steps(prepared.model, profiles, samples, own.component.name), "measuring what the choice costs")
        found = measure_profiles(prepared.model, profiles, quantizers, samples, own.component.name, screen.step)
        return [dataclasses.asdict(item) for item in found]

    budgets = dict.fromkeys(max(1, round(share * len(scored))) for share in wanted.regret_shares)
    others = comparison.runs[1:]
    sets = {k: proxy.kept_sets(target, others, k, wanted.random_draws, seed) for k in budgets}
    return proxy.regret_table(sets, measure)


def _description(comparison: Comparison) -> str:
    """Markdown for the comparison's page in MLflow, with links to the runs it read."""
    lines = [f"**{comparison.kind}**, reference: {comparison.reference.name}", ""]
    lines += [f"- {sentence}" for sentence in comparison.verdicts]
    lines += [f"- not compared: {name}; {reason}" for name, reason in comparison.refused.items()]
    lines += [f"- missing: job {name}; {reason}" for name, reason in comparison.missing.items()]
    lines += ["", "Runs read:", ""]
    for item in comparison.runs:
        link = run_link(item.run.folder)
        lines.append(f"- [{item.name}]({link[1]})" if link else f"- {item.name} ({item.run.folder})")
    names = list(comparison.differences.columns)
    lines += ["", f"| setting | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for key, values in comparison.differences.head(SHOWN_DIFFERENCES).to_dict("index").items():
        lines.append(f"| {key} | {' | '.join(str(value).replace('|', '/') for value in values.values())} |")
    return "\n".join(lines) + "\n"


def _record(comparison: Comparison, settings: Settings, wall_s: float) -> RunRecord:
    """`run.json` of the comparison; its numbers become metrics, its `tags` tags."""
    reference = comparison.reference
    mine = comparison.pairs[comparison.pairs["a"] == reference.name].to_dict("records")
    links = {item.name: link[0] for item in comparison.runs if (link := run_link(item.run.folder))}
    numbers = {
        name: {row["b"]: row[name] for row in mine if row.get(name) == row.get(name) and row.get(name) is not None}
        for name in ("spearman", "kendall", "overlap", "p_stable")
    }
    told = reference.run
    return RunRecord(
        task="compare",
        status="complete",
        model=told.model,
        component=told.component,
        strategy=told.strategy,
        backend=told.backend,
        scheme=told.scheme,
        wall_s=wall_s,
        peak_memory_bytes=peak_memory_bytes(),
        notes=list(comparison.verdicts),
        tags={
            "comparison": comparison.kind,
            "reference_run": links.get(reference.name, str(reference.folder)),
            "compared_runs": ",".join(links.get(item.name, str(item.run.folder)) for item in comparison.runs),
        },
        further={
            "comparison": comparison.kind,
            "reference": reference.name,
            "n_runs": len(comparison.runs),
            "n_refused": len(comparison.refused),
            "n_missing": len(comparison.missing),
            **numbers,
            "regret": _regret_numbers(comparison),
            "seed": settings.seed,
        },
    )


def _regret_numbers(comparison: Comparison) -> dict[str, float]:
    if comparison.regret is None:
        return {}
    table = proxy.regret_summary(comparison.regret)
    rows = table[table["chooser"] != proxy.NONE].to_dict("records")
    return {f"{row['chooser']} {row['kept']} kept": float(row["regret"]) for row in rows}


def _show(comparison: Comparison, folder: RunFolder, screen: Screen) -> None:
    columns = ["setting", *comparison.differences.columns]
    rows = [
        [key, *map(str, values)]
        for key, values in zip(comparison.differences.index, comparison.differences.to_numpy(), strict=True)
    ]
    if len(columns) <= 5 and rows:
        screen.table("what differs", columns, rows)
    else:
        screen.say(f"what differs: {', '.join(map(str, comparison.differences.index)) or 'nothing'}")
    for sentence in comparison.verdicts:
        screen.say(sentence)
    for name, reason in comparison.refused.items():
        screen.say(f"not compared: {name}; {reason}")
    for name, reason in comparison.missing.items():
        screen.say(f"missing: job {name}; {reason}")
    screen.say(f"report: {folder.path / 'report.html'}")
