"""What of a plan can be refused before anything is scored: all but what scores alone tell.

Every operator is taken for scored in every scheme that it can have. What then has no plan, no sample to be measured on,
or no file to be written to, has none afterwards either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import pandas as pd

from qvl_hydra.calibration.held_out import held_out
from qvl_hydra.calibration.sources import load_calibration
from qvl_hydra.errors import ProfileError
from qvl_hydra.families.record import Family
from qvl_hydra.models.load import ModelDescription, describe_model
from qvl_hydra.operators.discover import Operator, find_operators, select_operators
from qvl_hydra.profiles.costs import ERROR, LEAVE
from qvl_hydra.profiles.formats.table import FORMATS, Consumer
from qvl_hydra.profiles.formats.written import require_able
from qvl_hydra.profiles.keep_lists import read_keep_list
from qvl_hydra.profiles.prices import Terms, lengths_of
from qvl_hydra.profiles.profile import Profile, require_modules
from qvl_hydra.profiles.select import Budget, select
from qvl_hydra.profiles.storable import never_storable, not_storable, require_storable
from qvl_hydra.profiles.units import Unit, units_from_scores, units_without
from qvl_hydra.quantization.formats.table import not_offered
from qvl_hydra.quantization.scheme import Scheme
from qvl_hydra.settings import QuantSettings, Settings
from qvl_hydra.tasks.candidates import MEASURED
from qvl_hydra.tasks.measure_costs import read_costs
from qvl_hydra.tasks.prepare import processor_of, schemes_of
from qvl_hydra.tasks.sweep import ranking_metric

CHECKPOINT, INC = "compressed_tensors", "inc"  # entries of `profile.quantize_with`
INC_FORMAT = "neural_compressor"  # what the latter is given


def refuse_beforehand(settings: Settings, further: Sequence[QuantSettings]) -> None:
    """Refuse budgets, spaces, samples, lists and formats of task=profile and task=quantize that cannot do.

    With scores at hand all of it is soon told by itself.

    Args:
        further: schemes of `profile.choices` beside `settings.quant`.

    Raises:
        ProfileError: what cannot do, named.
        QvlHydraError: the model cannot be described, or samples are missing.
    """
    for reference in settings.profile.compare_with:
        read_keep_list(reference)
    if settings.profile.scores is not None:
        return
    description = describe_model(settings.model)
    schemes = {scheme.name: scheme for scheme in schemes_of(settings, further)}
    every = find_operators(description.skeleton, "full")
    if settings.task.name == "quantize":
        _require_tools(settings, description, every)
    units = _foreseen(settings, description, schemes)
    _require_plans(settings, units, terms_of(settings, schemes, description.family))
    _require_writable(settings, units, schemes, every)
    processor = processor_of(description)
    seen = {sample.id for sample in load_calibration(settings.calibration, processor).samples}
    held_out(settings.calibration, processor, 1, seen)


def _require_tools(settings: Settings, description: ModelDescription, every: Sequence[Operator]) -> None:
    if INC in settings.profile.quantize_with:
        require_inc_able(settings, description.family, every)


def require_bound(direction: str, metric: str) -> None:
    """Refuse scores whose sum says nothing of the error of what is quantized together.

    Raises:
        ProfileError: they are of the other direction, or of what no plan is measured in.
    """
    if direction != "requantize" or metric not in MEASURED:
        raise ProfileError(
            f"profile.budget=error bounds a measured error, and these scores are direction={direction}, "
            f"metric={metric}; take scores of direction=requantize in {', '.join(MEASURED)}, or another budget"
        )


def require_inc_able(settings: Settings, family: Family, every: Sequence[Operator]) -> None:
    """Refuse what Neural Compressor is not given.

    Args:
        every: operators of the whole model.

    Raises:
        ProfileError: a streamed model or one that is not in float32, a mixture of experts, or a component that the
            family has no towers for.
    """
    model, component = settings.model, settings.component.name
    if model.placement == "streamed":
        raise ProfileError("Neural Compressor needs the whole model in memory; take model.placement=resident")
    if model.dtype != "float32":
        raise ProfileError(f"Neural Compressor's INT8 is made of float32, not {model.dtype}; take model.dtype=float32")
    require_modules([op for op in every if component in (op.component, "full")], "Neural Compressor")
    if not family.towers and (component != "lm" or family.visual is None):
        raise ProfileError(
            f"Neural Compressor is not given the {component} component of {family.name}, which it would have to be "
            "taken apart for; take profile.quantize_with=[compressed_tensors]"
        )


def terms_of(settings: Settings, schemes: Mapping[str, Scheme], family: Family) -> Terms:
    """What prices depend on, by the settings."""
    wanted = settings.profile
    costs = {} if wanted.costs is None else read_costs(wanted.costs)
    return Terms(schemes, wanted.high_bits, settings.device, lengths_of(wanted, family), costs)


def storable(settings: Settings, units: Sequence[Unit], schemes: Mapping[str, Scheme]) -> list[Unit]:
    """The units without the choices that a checkpoint, where one is to be written, could not hold them in.

    Where no tool is asked for by name, one is to be written if it can hold the schemes at all.
    """
    tools = settings.profile.quantize_with
    able = not any(map(never_storable, schemes.values()))
    if settings.task.name != "quantize" or not (CHECKPOINT in tools or (not tools and able)):
        return list(units)
    return units_without(units, lambda op, choice: not_storable(op, schemes[choice]))


def _foreseen(settings: Settings, description: ModelDescription, schemes: Mapping[str, Scheme]) -> list[Unit]:
    """The units that a sweep without failures leads to; what scores they will have is open."""
    found = find_operators(description.skeleton, settings.component.name)
    selected = select_operators(found, settings.operators, settings.seed)
    tables = {name: pd.DataFrame([_row(op, scheme) for op in selected]) for name, scheme in schemes.items()}
    choices = settings.profile.choices or (settings.quant.name, LEAVE)
    units = units_from_scores(found, tables, choices, settings.profile.spaces)
    return storable(settings, units, schemes)


def _row(op: Operator, scheme: Scheme) -> dict[str, object]:
    reason = not_offered([op], scheme)
    return {"op": op.path, "status": "scored" if reason is None else "skipped", "reason": reason or "", "score": 1.0}


def _require_plans(settings: Settings, units: Sequence[Unit], terms: Terms) -> None:
    wanted = settings.profile
    budgets = [Budget(wanted.cost, value) for value in wanted.values]
    if not wanted.choices and wanted.budget == ERROR:
        require_bound(settings.strategy.direction, ranking_metric(settings))
    elif not wanted.choices:
        budgets = [Budget(wanted.budget, wanted.value)]
    for budget in budgets:
        select(units, budget, terms)


def _require_words(whole: Profile, row: Consumer, every: Sequence[Operator]) -> None:
    require_able(whole, row)
    row.load()(whole, every)


def _require_tool(asked: Sequence[str], whole: Profile, every: Sequence[Operator]) -> None:
    """Refuse what a tool that is asked for by name cannot do, or where none is, what no tool can."""
    checks = {
        INC: lambda: _require_words(whole, FORMATS[INC_FORMAT], every),
        CHECKPOINT: lambda: require_storable(whole),
    }
    reasons = []
    for tool in asked or checks:
        try:
            checks[tool]()
        except ProfileError as error:
            if asked:
                raise
            reasons.append(f"{tool}: {error}")
    if len(reasons) == len(checks):
        raise no_tool(reasons)


def no_tool(reasons: Sequence[str]) -> ProfileError:
    """What task=quantize ends with where each tool says why it cannot."""
    return ProfileError(f"no tool can quantize the model as the profile says; {'; '.join(reasons)}")


def _require_writable(
    settings: Settings, units: Sequence[Unit], schemes: Mapping[str, Scheme], every: Sequence[Operator]
) -> None:
    """Put all operators that can be in a scheme into it, and ask those who were named whether they can say that."""
    wanted = settings.profile
    formats = [FORMATS[name] for name in wanted.formats]
    operators = tuple(op for unit in units for op in unit.members)
    taken = []
    for name, scheme in schemes.items():
        low = {op.path for unit in units if name in unit.scores for op in unit.members}
        if not low:
            continue
        taken.append(scheme)
        whole = Profile(scheme, operators, frozenset({op.path for op in operators} - low), wanted.high_bits, "foreseen")
        for row in formats:
            _require_words(whole, row, every)
        if settings.task.name == "quantize":
            _require_tool(wanted.quantize_with, whole, every)
    if len(taken) > 1:
        given = [FORMATS[INC_FORMAT]] if settings.task.name == "quantize" and INC in wanted.quantize_with else []
        for row in (*formats, *given):
            require_able(dataclasses.replace(whole, others={operators[0].path: taken[0]}), row)
