"""From settings to a profile, shared by task=profile and task=quantize: scores, units, selection, quantizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qvl_hydra.calibration.held_out import held_out, seen_by
from qvl_hydra.calibration.sample import Sample, samples_sha
from qvl_hydra.errors import ProfileError
from qvl_hydra.estimators.metrics import unit_of
from qvl_hydra.estimators.positions import without_answer
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles.apply import Quantizers
from qvl_hydra.profiles.costs import ERROR, LEAVE
from qvl_hydra.profiles.joint import Interactions, interactions_from
from qvl_hydra.profiles.measure import measure_profiles, steps
from qvl_hydra.profiles.prices import Terms
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.profiles.select import Budget, select, several
from qvl_hydra.profiles.spectrum import spectrum_budgets
from qvl_hydra.profiles.units import Unit, calibrated, units_from_scores
from qvl_hydra.quantization.qdq import OperatorQuantizer
from qvl_hydra.quantization.scheme import Scheme
from qvl_hydra.runs.files import read_table, write_json
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.runs.record import RunRecord
from qvl_hydra.screen import Screen
from qvl_hydra.settings import Settings
from qvl_hydra.tasks.beforehand import require_bound, storable, terms_of
from qvl_hydra.tasks.candidates import MEASURED, best_measured
from qvl_hydra.tasks.prepare import Prepared, prepare
from qvl_hydra.tasks.scored import of_selected, scored_by, shared

BISECTIONS = 8
EVALUATION = "evaluation.json"  # which samples profiles were measured on


@dataclass(frozen=True)
class Decision:
    """A profile and what it was decided from.

    Attributes:
        sweep: `run.json` of the sweep.
        metric: of its scores, named as a measurement names it (`kl_answer` for KL at the answer's positions).
        interactions: between its scores; None where the sweep left none.
        curve: the profile of each budget: the one asked for, and those of the spectrum.
        quantizers: of every operator decided on.
        notes: sentences for the user: units that had to stay in high precision, scores of another model.
    """

    prepared: Prepared
    sweep: RunRecord
    metric: str
    interactions: Interactions | None
    units: tuple[Unit, ...]
    terms: Terms
    budget: Budget
    curve: Mapping[Budget, Profile]
    quantizers: Mapping[str, OperatorQuantizer]
    notes: tuple[str, ...]

    @property
    def profile(self) -> Profile:
        """The profile of the budget that was asked for."""
        return self.curve[self.budget]


def decide(settings: Settings, folder: RunFolder, screen: Screen) -> Decision:
    """Read or measure scores, and select the profile of the budget.

    Raises:
        ProfileError: scores of another scheme, component or model; a budget that nothing meets.
        QvlHydraError: what the sweep raises.
    """
    record = scored_by(settings, folder, screen)
    prepared = prepare(settings)
    scheme = prepared.schemes[0]
    notes = _compare_settings(settings, record, scheme, prepared)
    operators = find_operators(prepared.model.module, settings.component.name)
    table = of_selected(settings, operators, read_table(folder.path / "scores.parquet"))
    units = units_from_scores(operators, {scheme.name: table}, (scheme.name, LEAVE), shared=shared(record))
    units = storable(settings, units, {scheme.name: scheme})
    scored = table.dropna(subset=["metric"]).iloc[0]
    by_sample = read_table(folder.path / "sample_scores.parquet")
    interactions = interactions_from(by_sample, units, scheme.name, str(scored["metric"]))
    metric = "kl_answer" if scored["unit"] == unit_of("kl", "answer") else str(scored["metric"])
    budget = Budget(settings.profile.budget, settings.profile.value)
    if budget.kind == ERROR:
        require_bound(record.direction or "requantize", metric)
    terms = terms_of(settings, {scheme.name: scheme}, prepared.description.family)
    shares = settings.profile.spectrum if settings.task.name == "profile" else []
    pools = {
        item: several(units, item, terms, settings.profile.candidates)
        for item in (budget, *spectrum_budgets(units, shares))
    }
    curve = {item: pool[0] for item, pool in pools.items()}
    samples = prepared.calibration.samples
    quantizers = Quantizers(
        prepared.model, calibrated(units, samples), samples, settings.component.name, [scheme]
    )
    if budget.kind == ERROR:
        curve[budget], said = _held_bound(
            settings, prepared, units, terms, curve[budget], budget, metric, quantizers, folder, screen
        )
        notes = (*notes, said)
    pools = {item: pool for item, pool in pools.items() if len(pool) > 1}
    if pools and metric in MEASURED:
        plans = list(pools.values())
        best, said = best_measured(settings, prepared, plans, metric, quantizers, folder, screen)
        curve |= dict(zip(pools, best, strict=True))
        notes = (*notes, said)
    return Decision(
        prepared=prepared,
        sweep=record,
        metric=metric,
        interactions=interactions,
        units=tuple(units),
        terms=terms,
        budget=budget,
        curve=curve,
        quantizers=quantizers,
        notes=(*notes, *_kept_notes(units)),
    )


def _held_bound(
    settings: Settings,
    prepared: Prepared,
    units: Sequence[Unit],
    terms: Terms,
    profile: Profile,
    budget: Budget,
    metric: str,
    quantizers: Mapping[str, OperatorQuantizer],
    folder: RunFolder,
    screen: Screen,
) -> tuple[Profile, str]:
    """A profile whose error, measured on the calibration samples, is within the budget.

    Scores do not add up, so the sum that `select` may spend is bisected between nothing and the budget, or a
    multiple of it where errors cancel, until the largest that holds is known well enough.
    """
    model, samples, component = prepared.model, prepared.scored, settings.component.name

    def error_of(candidate: Profile) -> float:
        with screen.working(steps(model, [candidate], samples, component), f"measuring a plan for {budget}"):
            found = measure_profiles(model, [candidate], quantizers, samples, component, screen.step, folder)
        return float(getattr(found[0], metric))

    low, high = 0.0, budget.value
    best, error = profile, error_of(profile)
    holds = error <= budget.value
    for _ in range(BISECTIONS):
        if holds:
            break
        middle = (low + high) / 2
        candidate = select(units, Budget(ERROR, middle), terms)
        found = error_of(candidate)
        if found <= budget.value:
            best, error, low = candidate, found, middle
            holds = high - low < 0.05 * budget.value
        else:
            high = middle
    if error > budget.value:
        best = select(units, Budget(ERROR, 0.0), terms)
        error = error_of(best)
    kept = "held" if error <= budget.value else "not held even by what quantizes nothing that was scored above zero"
    return best, (
        f"{budget} is {kept}: measured on {len(samples)} calibration samples the error is {error:.4g} "
        f"(sum of scores {best.predicted:.4g})"
    )


def evaluation_samples(settings: Settings, prepared: Prepared, folder: Path) -> tuple[tuple[Sample, ...], list[str]]:
    """Samples that neither scores nor ranges have seen, by the sweep's calibration.json and this run's own.

    Which they are is left in `evaluation.json`.

    Returns:
        At most `profile.evaluation_size` of them; and notes where there are fewer, or some without an answer.

    Raises:
        CalibrationError: none is left.
    """
    wanted = settings.profile.evaluation_size
    seen = seen_by([folder]) | {sample.id for sample in prepared.calibration.samples}
    samples = held_out(settings.calibration, prepared.processor, wanted, seen)
    write_json(
        folder / EVALUATION,
        {
            "source": settings.calibration.source,
            "size": len(samples),
            "sha": samples_sha(samples),
            "samples": [sample.id for sample in samples],
        },
    )
    notes = []
    if len(samples) < wanted:
        left = f"{len(samples)} of profile.evaluation_size={wanted} samples are left that no score or range has seen"
        notes.append(f"only {left}; profiles were measured on those")
    if lacking := without_answer(samples):
        how = "the figures at it are of all text" if lacking == len(samples) else "the others were measured on"
        notes.append(f"{lacking} of {len(samples)} held-out samples have no answer: {how}")
    return samples, notes


def _compare_settings(
    settings: Settings, record: RunRecord, scheme: Scheme, prepared: Prepared
) -> tuple[str, ...]:
    faults = []
    if (record.scheme or scheme.name) != scheme.name:
        faults.append(f"quant={record.scheme}, here quant={scheme.name}")
    if (record.component or settings.component.name) != settings.component.name:
        faults.append(f"component={record.component}, here component={settings.component.name}")
    if faults:
        raise ProfileError(f"the scores were measured with {' and '.join(faults)}; give this run the same")
    if (record.model_sha or prepared.model.sha) != prepared.model.sha:
        return (f"the scores are of another model or checkpoint ({record.model})",)
    return ()


def _kept_notes(units: Sequence[Unit]) -> list[str]:
    return [
        f"{unit.name} stays in high precision: {'; '.join(dict.fromkeys(unit.reasons.values()))}"
        for unit in units
        if unit.stays
    ]
