"""task=profile with `profile.choices`: plans among several schemes for several budgets, from one sweep."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import ProfileError
from qvl_hydra.estimators.metrics import unit_of
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles.apply import Quantizers
from qvl_hydra.profiles.costs import COSTS, LEAVE, Cost
from qvl_hydra.profiles.figure import draw_front
from qvl_hydra.profiles.formats.written import not_exported, pasted, write_formats
from qvl_hydra.profiles.measure import steps
from qvl_hydra.profiles.prices import Terms
from qvl_hydra.profiles.profile import Profile, describe
from qvl_hydra.profiles.select import Budget, cost_of, frontier, left_alone, prices_of, select, several, size_of
from qvl_hydra.profiles.spectrum import Candidate, described, measure_curve
from qvl_hydra.profiles.units import Unit, calibrated, units_from_scores
from qvl_hydra.reports.profile import PLANS, profile_sections
from qvl_hydra.reports.sweep import write_sweep_report
from qvl_hydra.runs.files import read_table, write_json, write_parquet
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.runs.record import RunRecord, write_record
from qvl_hydra.screen import Screen
from qvl_hydra.settings import QuantSettings, Settings
from qvl_hydra.tasks.beforehand import storable, terms_of
from qvl_hydra.tasks.candidates import MEASURED, best_measured
from qvl_hydra.tasks.decide import Decision, evaluation_samples
from qvl_hydra.tasks.family_costs import measure_families
from qvl_hydra.tasks.keep_lists import Lists, compare_lists
from qvl_hydra.tasks.prepare import Prepared, prepare
from qvl_hydra.tasks.scored import of_profile, of_selected, scored_by, shared

FRONT = 9  # plans between the cheapest and the one that loses least, where no values are given
SMALL_LOSS = 0.1  # of the cheapest plan's predicted loss: the plan that is exported loses less, at the fewest bits
FIGURE = Path("figures") / "profile_spectrum.png"


@dataclass(frozen=True)
class Plans:
    """What was decided, and from what.

    Attributes:
        values: budgets of each plan, in the unit of the cost.
        chosen: which plan is exported.
        quantizers: of every operator in every scheme that it can have.
        notes: sentences for the user.
    """

    prepared: Prepared
    sweep: RunRecord
    metric: str
    units: Sequence[Unit]
    terms: Terms
    cost: Cost
    values: Sequence[float]
    profiles: Sequence[Profile]
    chosen: int
    quantizers: Quantizers
    notes: Sequence[str]


def run(settings: Settings, folder: RunFolder, screen: Screen, further: Sequence[QuantSettings]) -> None:
    """Score or read scores, assign, measure, write, show.

    Args:
        further: schemes of the choices beside `settings.quant`.

    Raises:
        ProfileError: scores without one of the schemes; a budget that nothing meets.
        QvlHydraError: what the sweep raises.
    """
    began = time.perf_counter()
    plans = plans_of(settings, folder, screen, further)
    prepared = plans.prepared
    samples, few = evaluation_samples(settings, prepared, folder.path)
    table = _measure(settings, plans, samples, folder, screen)
    write_parquet(folder.path / "profiles.parquet", table)
    chosen = plans.profiles[plans.chosen]
    budget = str(Budget(plans.cost.name, plans.values[plans.chosen]))
    write_json(folder.path / "profile.json", {"budget": budget, **describe(chosen)})
    draw_front(table, folder.path / FIGURE)
    everything = find_operators(plans.prepared.model.module, "full")
    exports = write_formats(chosen, everything, settings.profile.formats, folder.path / "exports")
    notes = [*not_exported(exports), *plans.notes, *few]
    lists = Lists(prepared, plans.units, plans.terms, plans.metric, plans.quantizers, samples)
    notes += measure_families(settings, lists, folder, screen, shared(plans.sweep))
    if settings.profile.compare_with:
        notes += compare_lists(settings, lists, folder, screen)
    summary = _summary(table, plans, budget, len(samples))
    write_record(folder.path, of_profile(plans.sweep, "profile", summary, notes, time.perf_counter() - began))
    write_sweep_report(folder.path, extra=profile_sections(folder.path))
    _show(table, plans, notes, len(samples), screen)
    for line in pasted(exports):
        screen.say(line)


def decide(settings: Settings, folder: RunFolder, screen: Screen, further: Sequence[QuantSettings]) -> Decision:
    """The plan that is exported, as the decision that task=quantize works on.

    Raises:
        QvlHydraError: see `plans_of`.
    """
    plans = plans_of(settings, folder, screen, further)
    budget = Budget(plans.cost.name, plans.values[plans.chosen])
    return Decision(
        prepared=plans.prepared,
        sweep=plans.sweep,
        metric=plans.metric,
        interactions=None,
        units=tuple(plans.units),
        terms=plans.terms,
        budget=budget,
        curve={budget: plans.profiles[plans.chosen]},
        quantizers=plans.quantizers,
        notes=tuple(plans.notes),
    )


def _refused(units: Sequence[Unit]) -> list[str]:
    """What units cannot have, a sentence a reason."""
    names: dict[str, list[str]] = {}
    for unit in units:
        if unit.reasons:
            reason = f"cannot be {', '.join(unit.reasons)}: {'; '.join(dict.fromkeys(unit.reasons.values()))}"
            names.setdefault(reason, []).append(unit.name)
    return [f"{own[0]}{f' and {len(own) - 1} more' * (len(own) > 1)} {reason}" for reason, own in names.items()]


def plans_of(settings: Settings, folder: RunFolder, screen: Screen, further: Sequence[QuantSettings]) -> Plans:
    """Score or read scores, and the plan of every budget.

    Args:
        further: schemes of the choices beside `settings.quant`.

    Raises:
        ProfileError: scores without one of the schemes; a budget that nothing meets.
        QvlHydraError: what the sweep raises.
    """
    record = scored_by(settings, folder, screen, further)
    prepared = prepare(settings, further)
    schemes = {scheme.name: scheme for scheme in prepared.schemes}
    operators = find_operators(prepared.model.module, settings.component.name)
    found = _tables(folder.path, str(record.scheme), list(schemes))
    tables = {name: of_selected(settings, operators, table) for name, table in found.items()}
    wanted = settings.profile
    units = units_from_scores(operators, tables, wanted.choices, wanted.spaces, shared(record))
    units = storable(settings, units, schemes)
    terms, cost = terms_of(settings, schemes, prepared.description.family), COSTS[wanted.cost]
    values = wanted.values or frontier(units, prices_of(units, cost, terms), size_of(units, cost), FRONT)
    plans = [several(units, Budget(cost.name, value), terms, wanted.candidates) for value in values]
    scored = pd.concat(tables.values()).dropna(subset=["metric"]).iloc[0]
    metric = "kl_answer" if scored["unit"] == unit_of("kl", "answer") else str(scored["metric"])
    profiles, notes = [own[0] for own in plans], _refused(units)
    samples = prepared.calibration.samples
    quantizers = Quantizers(
        prepared.model, calibrated(units, samples), samples, settings.component.name, prepared.schemes
    )
    if wanted.candidates > 1 and metric in MEASURED:
        # Whatever meets a smaller budget meets this one, too.
        pools = [
            [*own, *(plan for other, less in zip(plans, values, strict=True) if less < value for plan in other)]
            for own, value in zip(plans, values, strict=True)
        ]
        profiles, said = best_measured(settings, prepared, pools, metric, quantizers, folder, screen)
        notes.append(said)
    chosen = 0
    if not settings.profile.values:
        limit = SMALL_LOSS * (profiles[0].predicted or 0.0)
        chosen = next(i for i, p in enumerate(profiles) if (p.predicted or 0.0) <= limit or i == len(profiles) - 1)
    return Plans(prepared, record, metric, units, terms, cost, values, profiles, chosen, quantizers, notes)


def _tables(folder: Path, main: str, schemes: Sequence[str]) -> dict[str, pd.DataFrame]:
    found = {}
    for name in schemes:
        path = folder / ("scores.parquet" if name == main else f"scores_{name}.parquet")
        if not path.exists():
            raise ProfileError(
                f"profile.choices names {name}, which the sweep did not score; score it with "
                f"quant={main} quant.also=[{','.join(other for other in schemes if other != main)}]"
            )
        found[name] = read_table(path)
    return found


def _measure(
    settings: Settings, plans: Plans, samples: Sequence[Sample], folder: RunFolder, screen: Screen
) -> pd.DataFrame:
    """Plans, everything in its cheapest choice and everything in high precision, on held-out samples."""
    prepared, cost, terms = plans.prepared, plans.cost, plans.terms
    size = size_of(plans.units, cost)
    cheapest = frontier(plans.units, prices_of(plans.units, cost, terms), size, 2)[0]
    least = select(plans.units, Budget(cost.name, cheapest), terms)
    whole = left_alone(plans.units, least.scheme, settings.profile.high_bits)
    ends = [
        Candidate(Budget(cost.name, cheapest), least),
        Candidate(Budget(cost.name, cost_of(whole, cost, terms) / size), whole),
    ]
    found = [*ends, *(Candidate(Budget(cost.name, v), p) for v, p in zip(plans.values, plans.profiles, strict=True))]
    model, component = prepared.model, settings.component.name
    profiles = [item.profile for item in found]
    with screen.working(steps(model, profiles, samples, component), f"measuring {len(profiles)} plans"):
        table = measure_curve(
            model, found, plans.quantizers, samples, component, plans.metric, screen.step, folder=folder
        )
    for name in plans.terms.schemes:
        table[f"n_{name}"] = [sum(p.scheme_of(op).name == name for op in p.low) for p in profiles]
    table["cost"] = [cost_of(p, cost, terms) / size for p in profiles]
    write_json(folder.path / PLANS, described(found, table))
    return table.drop_duplicates(["value", "average_bits", "n_high", "predicted"]).reset_index(drop=True)


def _summary(table: pd.DataFrame, plans: Plans, budget: str, samples: int) -> dict[str, Any]:
    own = table[table["value"] == plans.values[plans.chosen]].iloc[-1]
    names = ("n_high", "share_high", "average_bits", "weight_bytes", "predicted", "measured", "squared_error", "kl",
             "kl_answer", "loss", "exact_match", "recovered")  # fmt: skip
    found = {name: None if pd.isna(own[name]) else own[name].item() for name in names}
    found |= {f"n_{name}": int(own[f"n_{name}"]) for name in plans.terms.schemes}
    ends = {"quantized": table.iloc[0], "float": table[table["kl"] == 0].iloc[0] if (table["kl"] == 0).any() else own}
    for name, row in ends.items():
        found |= {f"exact_match_{name}": float(row["exact_match"]), f"loss_{name}": float(row["loss"])}
    return {"budget": budget, **found, "evaluation_samples": samples}


def _show(table: pd.DataFrame, plans: Plans, notes: Sequence[str], samples: int, screen: Screen) -> None:
    bits = plans.cost.name == "average_bits"
    ordered = table.sort_values("cost").to_dict("records")
    rows = [
        [
            *([] if bits else [f"{row['cost']:.4g}"]),
            f"{row['average_bits']:.3f}",
            *(str(row[f"n_{name}"]) for name in plans.terms.schemes),
            str(row["n_high"]),
            f"{row['predicted']:.3g}",
            f"{row['kl_answer']:.3g}",
            f"{row['exact_match']:.3f}",
        ]
        for row in ordered
    ]
    name = plans.prepared.description.settings.name
    first = [*([] if bits else [plans.cost.name]), "bits"]
    columns = [*first, *plans.terms.schemes, LEAVE, "predicted", "KL at the answer", "exact match"]
    screen.table(f"plans of {name} on {samples} held-out samples", columns, rows)
    for note in notes:
        screen.say(note)
    chosen = plans.profiles[plans.chosen]
    said = ", ".join(f"{sum(chosen.scheme_of(op).name == s for op in chosen.low)} {s}" for s in plans.terms.schemes)
    screen.say(
        f"exported: the plan of {plans.values[plans.chosen]:.4g} {plans.cost.unit} ({said}, {len(chosen.high)} {LEAVE})"
    )
