"""dry_run=true: what a command would measure and reuse, and the memory, disk and time that it would take."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from qvl_hydra.backends.table import BACKENDS
from qvl_hydra.blockwise.stopwatch import synchronize
from qvl_hydra.blockwise.walker import Context, Walker
from qvl_hydra.calibration.held_out import held_out
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.estimators.groups import shard_of
from qvl_hydra.estimators.table import work_of
from qvl_hydra.families.stages import Segment, State
from qvl_hydra.models.load import LoadedModel, outline_model
from qvl_hydra.models.memory import GIB, free_memory_bytes
from qvl_hydra.profiles.baselines import MOST
from qvl_hydra.profiles.storable import unpacked_bytes
from qvl_hydra.reference import load
from qvl_hydra.runs.folder import PARTS
from qvl_hydra.runs.resume import Asked, other_schemes, smaller_run, source_of
from qvl_hydra.screen import Screen
from qvl_hydra.settings import QuantSettings, Settings
from qvl_hydra.tasks.beforehand import CHECKPOINT, refuse_beforehand
from qvl_hydra.tasks.choose import FRONT
from qvl_hydra.tasks.measured import asked_of
from qvl_hydra.tasks.prepare import Prepared, may_reuse, not_quantized, prepare
from qvl_hydra.tasks.quantize import PACKAGES
from qvl_hydra.tasks.sweep import job_of

ROW_BYTES = 150  # of a score on disk: in its part, in the tables and with the tracker
SHOWN_ROLES = 8
SPREAD = 1.25  # the longest sample is timed, too, where it is so much longer than the one in the middle


def foretell(settings: Settings, further: Sequence[QuantSettings], own: Path, screen: Screen) -> None:
    """Say what a run would do; nothing is written, and weights are read for a few parts alone.

    Args:
        further: schemes beside `settings.quant`.
        own: the folder that the run would have.

    Raises:
        QvlHydraError: whatever would refuse the run: model, memory, samples, operators, formats.
    """
    if settings.task.name in ("profile", "quantize"):
        refuse_beforehand(settings, further)
    prepared = prepare(settings, further, outline_model)
    said = {"model": _model(settings, prepared), "operators": _operators(settings, prepared)}
    scores = settings.profile.scores if settings.task.name != "sweep" else None
    if scores is not None:
        said["scores"] = f"those of {scores}; none is measured"
    else:
        said |= _scoring(settings, prepared, asked_of(settings, further, prepared), own)
    if settings.task.name == "quantize":
        said["writes"] = _writes(settings, prepared, own)
    said["memory"] = _memory(settings, prepared)
    if BACKENDS[settings.backend.name].estimators == () and not settings.backend.graph:
        said["time"] = _time(settings, prepared, scores is None)
    else:
        said["time"] = f"not known before for backend={settings.backend.name}"
    screen.say(f"task={settings.task.name} would do this; nothing was measured or written")
    for name, text in said.items():
        screen.say(f"  {name:<10} {text}")
    for note in not_quantized(settings, prepared):
        screen.say(f"  {'note':<10} {note}")


def _model(settings: Settings, prepared: Prepared) -> str:
    model, weights = settings.model, prepared.description.weight_bytes
    return (
        f"{model.name} (family {prepared.description.family.name}), {model.weights} weights in {model.dtype}, "
        f"{weights / GIB:.2f} GiB, {model.placement} on {prepared.model.device}"
    )


def _operators(settings: Settings, prepared: Prepared) -> str:
    roles = Counter(op.role for op in prepared.operators)
    named = ", ".join(f"{count} {role}" for role, count in roles.most_common(SHOWN_ROLES))
    more = f", {len(roles) - SHOWN_ROLES} further kinds" if len(roles) > SHOWN_ROLES else ""
    return f"{len(prepared.operators)} of component={settings.component.name}: {named}{more}"


def _own(settings: Settings, prepared: Prepared) -> list[Sample]:
    """The samples that this run, perhaps a shard, would score."""
    return list(prepared.scored[shard_of(len(prepared.scored), settings.part)])


def _scoring(settings: Settings, prepared: Prepared, asked: Asked, own: Path) -> dict[str, str]:
    """How scores are measured, on what, what is there already, and what they take on the disk."""
    strategy, calibration = settings.strategy, prepared.calibration
    scored = _own(settings, prepared)
    schemes = [scheme.name for scheme in prepared.schemes]
    row = strategy.row
    source, finished = source_of(settings, asked.earlier, own, asked.fingerprint, may_reuse(settings))
    reused = "nothing: no run of the same settings is here"
    if source is not None:
        parts = len(list((source / PARTS).glob("*.parquet")))
        how = "a finished run of the same settings, so that nothing is measured" if finished else "which did not finish"
        reused = f"{parts} parts of {source}, {how}"
    elif (others := other_schemes(asked, own)) is not None:
        reused = f"scores in {', '.join(others[1])}, which {others[0]} has measured"
    elif (smaller := smaller_run(asked, own)) is not None:
        reused = f"scores of {smaller[1]} of the samples, which {smaller[0]} has measured"
    tokens = sorted(sample.longest for sample in scored)
    bad = f", {len(calibration.bad)} bad ones left out" if calibration.bad else ""
    rows = len(prepared.operators) * len(scored) * len(schemes) * max(strategy.probes, 1)
    return {
        "samples": (
            f"{len(calibration.samples)} of calibration={calibration.source} for ranges{bad}, {len(scored)} of them "
            f"scored, of {tokens[0]} to {tokens[-1]} tokens or patches"
        ),
        "scores": (
            f"strategy={strategy.name} by {row.name} on backend={settings.backend.name}, in {', '.join(schemes)}, at "
            f"positions={strategy.positions}"
        ),
        "reused": reused,
        "disk": f"about {max(1, math.ceil(rows * ROW_BYTES / 1e6))} MB below {own.parent}",
    }


def _writes(settings: Settings, prepared: Prepared, own: Path) -> str:
    """The model that is made, and what comparing it takes; transformers does not read quantized experts."""
    wanted = settings.profile.quantize_with
    tools = ", ".join(wanted) or "each tool"
    said = f"a model by {tools} of at most {prepared.description.weight_bytes / GIB:.2f} GiB, below {own.parent}"
    if (wanted and CHECKPOINT not in wanted) or any(op.experts > 1 for op in prepared.operators):
        return said
    loaded = unpacked_bytes(prepared.description) / GIB
    return f"{said}; transformers loads a checkpoint to compare it where {loaded:.2f} GiB are free for that"


def _memory(settings: Settings, prepared: Prepared) -> str:
    row = BACKENDS[settings.backend.name]
    extra = load(row.memory)(settings, prepared.description, prepared.operators)
    need = prepared.description.weight_bytes + extra
    free = settings.model.memory_limit_gib or free_memory_bytes() / GIB
    return f"at least {need / GIB:.2f} GiB, of {free:.1f} GiB that are free"


def _time(settings: Settings, prepared: Prepared, scoring: bool) -> str:
    strategy, samples = settings.strategy, _own(settings, prepared)
    row = strategy.row
    seconds = mean_seconds(prepared.model, settings.component.name, samples)
    found = [f"a plain forward of one sample takes {_clock(seconds)}, by one part of each kind, timed here"]
    if scoring:
        work = work_of(row)
        if work is None:
            found.append(f"how many {row.name} takes shows when its results are good enough")
        else:
            job = job_of(settings, prepared, Path())
            forwards = len(prepared.calibration.samples) + work(job) * len(samples) / len(prepared.scored)
            longer = ", longer where many operators score alike" if row.races else ""
            found.append(f"scoring takes about {forwards:.0f} of them: {_clock(forwards * seconds)}{longer}")
    if settings.task.name != "sweep":
        seen = {sample.id for sample in prepared.calibration.samples}
        unseen = held_out(settings.calibration, prepared.processor, settings.profile.evaluation_size, seen)
        walks = [(plans, count) for plans, count in _plans(settings, len(samples), len(unseen)) if plans]
        named = " and ".join(f"{plans} plans on {count} samples" for plans, count in walks)
        most = sum(plans * count for plans, count in walks)
        found.append(f"at most {named} are measured, about one a sample and plan: {_clock(most * seconds)}")
    return "; ".join(found)


def _plans(settings: Settings, scored: int, unseen: int) -> list[tuple[int, int]]:
    """How many plans a profile measures at most on how many samples, but for the bisection of an error bound.

    The best few of each budget on those that were scored, and on held-out ones what is reported: of task=quantize one
    plan, by each tool and beside the float model.

    Args:
        scored, unseen: samples that scores are measured on, and held-out ones.
    """
    wanted, of_profile = settings.profile, settings.task.name == "profile"
    budgets = (len(wanted.values) or FRONT) if wanted.choices else 1 + len(wanted.spectrum) * of_profile
    few = wanted.candidates if wanted.candidates > 1 else 0
    if not of_profile:
        return [(budgets * few, scored), (3 * (len(wanted.quantize_with) or len(PACKAGES)), unseen)]
    lists, beside = len(wanted.compare_with), MOST if wanted.baselines and not wanted.choices else 0
    families = 2 * wanted.families + 1 if wanted.families else 0
    reported = budgets * (1 + beside) + 2 + 2 * lists + families  # two are the ends: all and nothing quantized
    return [((budgets + lists) * few, scored), (reported, unseen)]


def mean_seconds(model: LoadedModel, component: str, samples: Sequence[Sample]) -> float:
    """Seconds of a plain forward of one of the samples, on average: two of them are timed where lengths differ.

    Time is taken to grow as a power of the length between and beyond the two: at most its square, as attention's.
    """
    ordered = sorted(samples, key=lambda sample: sample.longest)
    middle, longest = ordered[len(ordered) // 2], ordered[-1]
    seconds, ratio, power = sample_seconds(model, component, middle), longest.longest / middle.longest, 1.0
    if ratio > SPREAD:
        power = math.log(sample_seconds(model, component, longest) / seconds) / math.log(ratio)
    power = min(max(power, 0.0), 2.0)
    return seconds * fmean((sample.longest / middle.longest) ** power for sample in samples)


@torch.no_grad()
def sample_seconds(model: LoadedModel, component: str, sample: Sample) -> float:
    """Seconds of a plain forward of one sample through a component, by one segment of each kind.

    Segments whose weights and inputs have the same shapes take the same time, so that one of them is run, twice, and
    the second time counts; a resident model's reading is no part of it.
    """
    walker = Walker(model, "full" if sample.pixel_values is not None else "lm")
    (context,) = walker.contexts([sample])
    (state,) = walker.starts([context])
    own = {segment.name for segment in walker.stages.of(component)}
    known: dict[Any, tuple[float, tuple[int, ...]]] = {}
    total = 0.0
    for segment in walker.segments:
        if walker.skips(segment, sample):
            continue
        kind = _kind(walker, segment, context, state)
        if kind not in known or known[kind][1] != tuple(state.shape):
            began = time.perf_counter()
            with walker.weights(segment):
                read = time.perf_counter() - began
                segment.run(state, context)
                synchronize(model.device)
                began = time.perf_counter()
                state = segment.run(state, context)
                synchronize(model.device)
                seconds = time.perf_counter() - began
            streamed = model.description.settings.placement == "streamed"
            known[kind] = (seconds + read if streamed else seconds, tuple(state.shape))
        if segment.name in own:
            total += known[kind][0]
    return total


def _kind(walker: Walker, segment: Segment, context: Context, state: State) -> Any:
    """What the time of a segment depends on: the shapes of its weights and of all that it is given."""
    weights = [
        (name, tuple(parameter.shape))
        for root in segment.roots
        for name, parameter in walker.module.get_submodule(root).named_parameters()
    ]
    inputs = context.block_inputs.get(segment.name, {})
    given = [(name, tuple(value.shape)) for name, value in inputs.items() if isinstance(value, torch.Tensor)]
    return (segment.vision, tuple(weights), tuple(given), tuple(state.shape))


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    if seconds < 600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
