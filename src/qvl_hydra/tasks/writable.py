"""What the tools and formats that were asked for by name cannot be given: refused before anything is scored, or taken
from the choices of the operators that it is about.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence

from qvl_hydra.models.load import describe_model
from qvl_hydra.operators.discover import Operator, find_operators, select_operators
from qvl_hydra.profiles.checkpoint import not_storable, require_storable
from qvl_hydra.profiles.formats.table import FORMATS
from qvl_hydra.profiles.formats.written import require_able
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.profiles.units import Unit, units_without
from qvl_hydra.quantization.formats.table import not_offered
from qvl_hydra.quantization.scheme import Scheme, scheme_from_settings
from qvl_hydra.settings import QuantSettings, Settings

CHECKPOINT = "compressed_tensors"  # the entry of `profile.quantize_with` that writes one


def require_writable(settings: Settings, further: Sequence[QuantSettings]) -> None:
    """Put every operator into each scheme that it may have, and ask whether that could be written.

    Only what is asked for by name is refused, and only where scores are still to be measured: with scores at hand, the
    plan itself is soon told.

    Args:
        further: schemes of `profile.choices` beside `settings.quant`.

    Raises:
        ProfileError: what cannot be written, naming the operators.
        QvlHydraError: the model cannot be described.
    """
    wanted = settings.profile
    if settings.task.name == "sweep" or wanted.scores is not None:
        return
    formats = [FORMATS[name] for name in wanted.formats]
    checkpoint = _writes_checkpoint(settings)
    if not (formats or checkpoint):
        return
    skeleton = describe_model(settings.model).skeleton
    every = find_operators(skeleton, "full")
    operators = select_operators(find_operators(skeleton, settings.component.name), settings.operators, settings.seed)
    schemes = [scheme_from_settings(quant) for quant in (settings.quant, *further)]
    if wanted.choices:
        schemes = [scheme for scheme in schemes if scheme.name in wanted.choices]
    for scheme in schemes:
        offered = _offered(operators, scheme, _allowed(settings, operators))
        for row in formats:
            require_able(offered, row)
            row.load()(offered, every)
        if checkpoint:
            kept = [op.path for op in operators if not_storable(op, scheme) is not None]
            require_storable(dataclasses.replace(offered, high=offered.high | {*kept}), every)
    several = dataclasses.replace(offered, others={op.path: schemes[0] for op in offered.low[:1]})
    for row in formats if len(schemes) > 1 else ():
        require_able(several, row)


def storable(settings: Settings, units: Sequence[Unit], schemes: Mapping[str, Scheme]) -> list[Unit]:
    """The units without the choices that a checkpoint, where one is asked for by name, could not hold them in."""
    if not _writes_checkpoint(settings):
        return list(units)
    return units_without(units, lambda op, choice: not_storable(op, schemes[choice]))


def _writes_checkpoint(settings: Settings) -> bool:
    return settings.task.name == "quantize" and CHECKPOINT in settings.profile.quantize_with


def _allowed(settings: Settings, operators: Sequence[Operator]) -> Callable[[Operator], Sequence[str]]:
    """The choices of an operator; of several spaces that match, the last."""
    choices = settings.profile.choices or [settings.quant.name]
    spaces = settings.profile.spaces
    last = {op.path: own.choices for own in spaces for op in operators if fnmatch.fnmatchcase(op.path, own.match)}
    return lambda op: last.get(op.path, choices)


def _offered(operators: Sequence[Operator], scheme: Scheme, allowed: Callable[[Operator], Sequence[str]]) -> Profile:
    """Everything that can be in a scheme in it."""
    high = [op.path for op in operators if not_offered([op], scheme) is not None or scheme.name not in allowed(op)]
    return Profile(scheme, tuple(operators), frozenset(high), 16, "asked for")
