"""What a sweep says on the screen when it has ended."""

from __future__ import annotations

from collections.abc import Mapping

from qvl_hydra.estimators.job import EngineReport
from qvl_hydra.models.memory import GIB
from qvl_hydra.profiles.families import name_of
from qvl_hydra.runs.files import read_table
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.runs.record import RunRecord
from qvl_hydra.scores.interval import interval_text
from qvl_hydra.scores.shrink import SPLIT
from qvl_hydra.scores.spread import sharpening
from qvl_hydra.screen import Screen
from qvl_hydra.settings import Settings

SHOWN, SHOWN_FAILED = 10, 3
FAMILIES_SHOWN = 5
ENTERED = {"image": "at image tokens", "text": "at other tokens of the prompt", "answer": "at the answer's own"}
CHANGED = {"image": "where an image token comes next", "text": "where other text does", "answer": "at the answer"}
CHANGES = "changes_at"  # likewise: shares of the squared error by the kind of token that a position predicts
ENTERS = "enters_at"  # in a record's details: tokens at which the language tower's errors come in


def _show_families(folder: RunFolder, screen: Screen) -> None:
    """What families of modules lose."""
    grouped = read_table(folder.path / "families.parquet").to_dict("records")
    if len(grouped) <= FAMILIES_SHOWN:
        return  # the operators themselves say as much
    rows = [
        [name_of(row), str(row["n_ops"]), f"{row['sum_of_scores']:.4g}", f"{row['together']:.4g}"]
        for row in grouped[:FAMILIES_SHOWN]
    ]
    columns = ["family", "operators", "sum of scores", "together"]
    screen.table("families of modules that lose most", columns, rows)


def show(settings: Settings, folder: RunFolder, report: EngineReport, record: RunRecord, screen: Screen) -> None:
    """The most sensitive operators and families, notes, and what the sweep took."""
    table = read_table(folder.path / "scores.parquet")
    top = table[table["status"] == "scored"].sort_values("rank").head(SHOWN)
    title = f"most sensitive of {settings.model.name} ({record.scheme}; {report.unit})"
    rows = [
        [
            f"{row['rank']:2d} {row['op'].removeprefix('model.').removeprefix('language_model.')}",
            f"{row['score']:.4g}",
            interval_text(row["score"], row["score_low"], row["score_high"]),
            row["estimator"],
        ]
        for row in top.to_dict("records")
    ]
    if rows:
        screen.table(title, ["operator", "score", "95 % interval", "by"], rows)
        _show_families(folder, screen)
    for note in report.notes:
        screen.say(note)
    agreement = report.details.get("agreement")
    if agreement is not None:
        said = report.details
        screen.say(
            f"{said['exact_operators']} operators were measured exactly; on the {said['control_operators']} of them "
            f"drawn at random sketch and exact have a rank correlation of {agreement:.3f}; expected on the wrong side "
            f"of the top {said['top_k']}: {said['expected_wrong_in_top_k']:.2f}"
        )
    if entered := _shares(record.details.get(ENTERS), "comes in", ENTERED):
        screen.say(f"of what the language tower loses, {entered}")
    if changed := _shares(record.details.get(CHANGES), "is", CHANGED):
        screen.say(f"of the squared error of {int(table[SPLIT[0]].notna().sum())} operators, {changed}")
    told = sharpening(read_table(folder.path / "sample_scores.parquet"), report.metric, str(record.scheme))
    if told:
        screen.say(told)
    counts = {"scored": record.n_scored, "skipped": record.n_skipped, "failed": record.n_failed}
    counted = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    screen.say(
        f"{counted} of {record.n_ops} operators on {record.n_samples} samples in {record.wall_s:.1f} s "
        f"({record.forward_equivalents or 0:.1f} forward-equivalents, peak memory "
        f"{(record.peak_memory_bytes or 0) / GIB:.1f} GiB)"
    )
    failed = table[table["status"] == "failed"].to_dict("records")
    for row in failed[:SHOWN_FAILED]:
        screen.say(f"failed: {row['op']}: {row['reason']}")
    if len(failed) > SHOWN_FAILED:
        screen.say(f"failed: {len(failed) - SHOWN_FAILED} more; {folder.path / 'report.html'} names them all")
    if record.calibration_bad:
        screen.say(f"{record.calibration_bad} bad calibration samples were left out; calibration.json names them")
    screen.say(f"report: {folder.path / 'report.html'}")


def _shares(shares: Mapping[str, float] | None, verb: str, places: Mapping[str, str]) -> str:
    """Shares of kinds of token in words; nothing where all is of one kind, as with texts that are nobody's answer."""
    parts = [f"{share:.0%} {places[kind]}" for kind, share in (shares or {}).items() if share]
    if len(parts) < 2:
        return ""
    parts[0] = parts[0].replace("%", f"% {verb}", 1)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
