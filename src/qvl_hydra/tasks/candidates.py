"""The best few plans of a budget, measured on the scored samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qvl_hydra.profiles.measure import measure_profiles, steps
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.qdq import OperatorQuantizer
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.screen import Screen
from qvl_hydra.settings import Settings
from qvl_hydra.tasks.prepare import Prepared

# Metrics that a profile's error is measured in, and what of a measurement decides: of KL at the answer, whose mean is
# that of the few samples which lose most, what is typical of samples.
MEASURED = {"squared_error": "squared_error", "kl": "kl", "kl_answer": "kl_typical"}
IN_WORDS = {
    "squared_error": "squared error", "kl": "KL", "kl_answer": "KL at the answer (geometric mean over samples)",
}  # fmt: skip


def best_measured(
    settings: Settings,
    prepared: Prepared,
    plans: Sequence[Sequence[Profile]],
    metric: str,
    quantizers: Mapping[str, OperatorQuantizer],
    folder: RunFolder,
    screen: Screen,
) -> tuple[list[Profile], str]:
    """Of the best plans of each budget the one whose error on the scored samples is least; held-out ones only report.

    Args:
        plans: of each budget, in the order of their sums of scores.
        metric: that decides, one of `MEASURED`.

    Returns:
        The plan of each budget, and a sentence for the user.
    """
    model, samples, component = prepared.model, prepared.scored, settings.component.name
    flat = [plan for own in plans for plan in own]
    different = len({plan.key for plan in flat})
    with screen.working(steps(model, flat, samples, component), f"measuring {different} candidates"):
        found = iter(measure_profiles(model, flat, quantizers, samples, component, screen.step, folder))
    name = MEASURED[metric]
    errors = [[float(getattr(next(found), name)) for _ in own] for own in plans]
    best = [min(range(len(own)), key=own.__getitem__) for own in errors]
    others = sum(index > 0 for index in best)
    less = [1 - own[index] / own[0] for own, index in zip(errors, best, strict=True) if index]
    said = (
        f"of the {settings.profile.candidates} best plans of each budget the one with the least {IN_WORDS[metric]}, "
        f"measured on {len(samples)} scored samples, was taken: another than the sum of scores ranks first for "
        f"{others} of {len(plans)} budgets"
    )
    return (
        [own[index] for own, index in zip(plans, best, strict=True)],
        said + (f", with {100 * sum(less) / len(less):.0f} % less on average" if less else ""),
    )
