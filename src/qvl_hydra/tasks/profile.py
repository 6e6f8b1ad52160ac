"""task=profile: decides a precision profile, measures it beside baselines and the spectrum, and writes the exports."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles.baselines import errors_and_ranges
from qvl_hydra.profiles.figure import draw_spectrum
from qvl_hydra.profiles.formats.written import not_exported, pasted, write_formats
from qvl_hydra.profiles.measure import steps
from qvl_hydra.profiles.profile import describe
from qvl_hydra.profiles.spectrum import best_baseline, candidates, described, measure_curve
from qvl_hydra.reports.profile import PLANS, profile_sections
from qvl_hydra.reports.sweep import write_sweep_report
from qvl_hydra.runs.files import write_json, write_parquet
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.runs.record import write_record
from qvl_hydra.screen import Screen
from qvl_hydra.settings import QuantSettings, Settings
from qvl_hydra.tasks import choose
from qvl_hydra.tasks.beforehand import refuse_beforehand
from qvl_hydra.tasks.decide import Decision, decide, evaluation_samples
from qvl_hydra.tasks.family_costs import measure_families
from qvl_hydra.tasks.keep_lists import Lists, compare_lists
from qvl_hydra.tasks.scored import of_profile, shared

FIGURE = Path("figures") / "profile_spectrum.png"


def run(settings: Settings, folder: RunFolder, screen: Screen, further: Sequence[QuantSettings] = ()) -> None:
    """Decide, measure, write, show.

    Args:
        further: schemes of `profile.choices` beside `settings.quant`.

    Raises:
        QvlHydraError: see `decide`; and a format asked for by name that cannot express the profile.
    """
    refuse_beforehand(settings, further)
    if settings.profile.choices:
        choose.run(settings, folder, screen, further)
        return
    began = time.perf_counter()
    decision = decide(settings, folder, screen)
    samples, few = evaluation_samples(settings, decision.prepared, folder.path)
    table = _measure(settings, decision, samples, folder, screen)
    write_parquet(folder.path / "profiles.parquet", table)
    write_json(folder.path / "profile.json", {"budget": str(decision.budget), **describe(decision.profile)})
    draw_spectrum(table, decision.metric, folder.path / FIGURE)
    everything = find_operators(decision.prepared.model.module, "full")
    exports = write_formats(decision.profile, everything, settings.profile.formats, folder.path / "exports")
    summary = summarise(table, decision) | {"evaluation_samples": len(samples)}
    notes = [*decision.notes, *few, *not_exported(exports)]
    lists = Lists(decision.prepared, decision.units, decision.terms, decision.metric, decision.quantizers, samples)
    notes += measure_families(settings, lists, folder, screen, shared(decision.sweep))
    if settings.profile.compare_with:
        notes += compare_lists(settings, lists, folder, screen)
    said = {"budget": str(decision.budget), **summary}
    write_record(folder.path, of_profile(decision.sweep, "profile", said, notes, time.perf_counter() - began))
    write_sweep_report(folder.path, extra=profile_sections(folder.path))
    _show(decision, table, summary, notes, screen)
    for line in pasted(exports):
        screen.say(line)


def _measure(
    settings: Settings, decision: Decision, samples: Sequence[Sample], folder: RunFolder, screen: Screen
) -> pd.DataFrame:
    model = decision.prepared.model
    errors: dict[str, float] | None = None
    ranges: dict[str, float] = {}
    if settings.profile.baselines:
        with screen.working(len(decision.quantizers), "what baselines choose by"):
            errors, ranges = errors_and_ranges(model, decision.quantizers, screen.step)
    found = candidates(decision.units, decision.curve, decision.terms, errors, ranges)
    component = settings.component.name
    profiles = [item.profile for item in found]
    with screen.working(steps(model, profiles, samples, component), f"measuring {len(profiles)} profiles"):
        table = measure_curve(
            model,
            found,
            decision.quantizers,
            samples,
            component,
            decision.metric,
            screen.step,
            decision.interactions,
            folder,
        )
    write_json(folder.path / PLANS, described(found, table))
    return table


def summarise(table: pd.DataFrame, decision: Decision) -> dict[str, Any]:
    """The numbers of the profile decided on, beside both ends of the curve and the best baseline."""
    kind, value = decision.budget.kind, decision.budget.value
    own = table[(table["chooser"] == "scores") & (table["budget"] == kind) & (table["value"] == value)].iloc[0]
    columns = [name for name in table.columns if name not in ("chooser", "budget", "value")]
    found = {name: _plain(own[name]) for name in columns}
    ends = {"quantized": table.iloc[0], "float": table[table["n_high"] == len(decision.profile.operators)].iloc[0]}
    for name, row in ends.items():
        found |= {f"exact_match_{name}": _plain(row["exact_match"]), f"loss_{name}": _plain(row["loss"])}
    best = best_baseline(table, kind, value)
    if best is not None:
        found |= {f"best_baseline_{name}": _plain(best[name]) for name in ("exact_match", "kl", "recovered")}
        found["best_baseline"] = best["chooser"]
    return found


def _plain(value: Any) -> float | int | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return int(value) if float(value).is_integer() and not isinstance(value, float) else float(value)


def _show(decision: Decision, table: pd.DataFrame, summary: dict[str, Any], notes: list[str], screen: Screen) -> None:
    total = len(decision.profile.operators)
    own = table[table["chooser"] == "scores"].sort_values("n_high").to_dict("records")
    rows = [
        [
            f"{row['n_high']} of {total}",
            f"{row['average_bits']:.2f}",
            f"{row['kl_answer']:.3g}",
            f"{row['loss']:.4f}",
            f"{row['exact_match']:.3f}",
            _best(table, row),
        ]
        for row in own
    ]
    name, samples = decision.prepared.description.settings.name, summary["evaluation_samples"]
    columns = ["in high precision", "bits", "KL at the answer", "loss", "exact match", "best baseline"]
    screen.table(f"profiles of {name} on {samples} held-out samples", columns, rows)
    for note in notes:
        screen.say(note)
    screen.say(
        f"{decision.budget}: {summary['n_high']} of {total} operators stay in high precision, "
        f"exact match {summary['exact_match']:.3f} (all quantized {summary['exact_match_quantized']:.3f}, "
        f"float {summary['exact_match_float']:.3f})"
    )


def _best(table: pd.DataFrame, row: dict[Any, Any]) -> str:
    best = best_baseline(table, row["budget"], row["value"])
    return "" if best is None else f"{best['exact_match']:.3f} {best['chooser']}"
