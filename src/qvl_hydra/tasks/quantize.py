"""task=quantize: puts a profile through tools that make quantized models, and compares what they compute with our QDQ.

- `inc`: Neural Compressor's PyTorch FX path, saved and loaded again, against QDQ with its own scales;
- `compressed_tensors`: a checkpoint with our scales, in one scheme or several, loaded and run by plain transformers
  where there is memory for that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from qvl_hydra.calibration.sample import Sample, collate
from qvl_hydra.errors import MissingExtraError, ProfileError
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.models.memory import GIB, free_memory_bytes
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles.agreement import Agreement, compare, steps
from qvl_hydra.profiles.checkpoint import write_checkpoint
from qvl_hydra.profiles.formats.table import FORMATS
from qvl_hydra.profiles.formats.written import require_able, write_formats
from qvl_hydra.profiles.profile import Profile, describe
from qvl_hydra.profiles.storable import not_loaded, not_unpacked, unlike_qdq, unpacked_bytes
from qvl_hydra.reports.quantize import quantize_sections
from qvl_hydra.reports.sweep import write_sweep_report
from qvl_hydra.runs.files import write_json
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.runs.record import write_record
from qvl_hydra.screen import Screen
from qvl_hydra.settings import QuantSettings, Settings
from qvl_hydra.tasks import choose
from qvl_hydra.tasks.beforehand import (
    CHECKPOINT,
    INC_FORMAT,
    no_tool,
    refuse_beforehand,
    require_inc_able,
)
from qvl_hydra.tasks.decide import Decision, decide, evaluation_samples
from qvl_hydra.tasks.scored import of_profile

# module, distribution and our extra of what each driver needs
PACKAGES = {
    "inc": ("neural_compressor", "neural-compressor 3.7", "inc"),
    "compressed_tensors": ("compressed_tensors", "compressed-tensors", "profiles"),
}


def run(settings: Settings, folder: RunFolder, screen: Screen, further: Sequence[QuantSettings] = ()) -> None:
    """Decide, quantize with each tool, compare, write, show.

    Args:
        further: schemes of `profile.choices` beside `settings.quant`.

    Raises:
        QvlHydraError: see `decide`; what a tool cannot do; a tool asked for that is not installed.
    """
    began = time.perf_counter()
    for asked in settings.profile.quantize_with:
        _require_package(asked, f"profile.quantize_with={asked}")
    refuse_beforehand(settings, further)
    if settings.profile.choices:
        decision = choose.decide(settings, folder, screen, further)
    else:
        decision = decide(settings, folder, screen)
    samples, few = evaluation_samples(settings, decision.prepared, folder.path)
    results: dict[str, Agreement | str] = {}  # or why it was not compared
    refused: list[str] = []
    notes = [*decision.notes, *few]
    drivers: Sequence[str] = settings.profile.quantize_with or tuple(DRIVERS)
    for name in drivers:
        try:
            results[name] = DRIVERS[name](settings, decision, samples, folder.path / name, screen)
        except (ProfileError, MissingExtraError) as error:
            if settings.profile.quantize_with:
                raise
            refused.append(f"{name}: {error}")
    if not results:
        raise no_tool(refused)
    notes += [*(item for item in results.values() if isinstance(item, str)), *refused]
    if isinstance(results.get(CHECKPOINT), Agreement):
        notes += unlike_qdq(decision.profile, decision.prepared.model.dtype)
    if CHECKPOINT in results:
        notes += not_loaded(decision.profile)
    everything = find_operators(decision.prepared.model.module, "full")
    write_formats(decision.profile, everything, settings.profile.formats, folder.path / "exports")
    write_json(folder.path / "profile.json", {"budget": str(decision.budget), **describe(decision.profile)})
    made = {"n_quantized": len(decision.profile.low)}
    said = {name: made if isinstance(result, str) else asdict(result) for name, result in results.items()}
    write_record(folder.path, of_profile(decision.sweep, "quantize", said, notes, time.perf_counter() - began))
    write_sweep_report(folder.path, extra=quantize_sections(folder.path))
    _show(decision, results, notes, folder.path, screen)


def _with_inc(
    settings: Settings, decision: Decision, samples: Sequence[Sample], folder: Path, screen: Screen
) -> Agreement:
    _require_package("inc", "quantizing with Neural Compressor")
    from qvl_hydra.backends.neural_compressor.wrapper import WrapperBatch, wrapper_input
    from qvl_hydra.profiles.inc_quantize import quantize_with_inc

    model, component = decision.prepared.model, settings.component.name
    if model.device.type != "cpu":
        raise ProfileError(f"Neural Compressor's INT8 runs on the CPU, not on {model.device}; take backend.device=cpu")
    require_inc_able(settings, model.family, find_operators(model.module, "full"))
    require_able(decision.profile, FORMATS[INC_FORMAT])
    made = quantize_with_inc(model, decision.profile, decision.prepared.calibration.samples, component, folder)

    def outputs(module: nn.Module) -> Callable[[Sample], Tensor]:
        return lambda sample: module(WrapperBatch([wrapper_input(model.module, sample, component)]))

    with torch.no_grad():
        apart = max(
            float((outputs(made.converted)(sample) - outputs(made.reloaded)(sample)).abs().max()) for sample in samples
        )
    found = compare(outputs(made.reloaded), model, decision.profile, made.quantizers, samples, component)
    return dataclasses.replace(found, reload_difference=apart)


def _with_compressed_tensors(
    settings: Settings, decision: Decision, samples: Sequence[Sample], folder: Path, screen: Screen
) -> Agreement | str:
    model, profile = decision.prepared.model, decision.profile
    _require_package("compressed_tensors", "writing a checkpoint, and loading it in transformers")
    from loguru import logger

    logger.disable("compressed_tensors")  # it warns of every operator whose last block is smaller
    with screen.working(len(profile.low), "writing the checkpoint"):
        write_checkpoint(model, profile, decision.quantizers, folder, screen.step)
    if (why := _not_run(model, profile)) is not None:
        return why
    reader = model.family.load_class()
    with contextlib.redirect_stderr(io.StringIO()):  # four bars of its own; the last belongs to the first forward
        loaded = reader.from_pretrained(folder).eval().to(model.device)
        forward(loaded, samples[0])
    with screen.working(steps(model, samples, "full"), "comparing it with QDQ"):
        return compare(
            lambda sample: forward(loaded, sample), model, profile, decision.quantizers, samples, "full", screen.step
        )


def _not_run(model: LoadedModel, profile: Profile) -> str | None:
    """Why transformers cannot run a checkpoint here beside the float model, or None."""
    why = None
    free, need = free_memory_bytes(), unpacked_bytes(model.description)
    if model.device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(model.device)[0])
    if any(op.experts > 1 for op in profile.low):
        why = "its quantized experts are stored one by one, as vLLM reads them and transformers does not"
    elif (unread := not_unpacked(profile)) is not None:
        why = unread
    elif free < need:
        why = f"transformers unpacks it, which takes {need / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free"
    return why and f"compressed_tensors: the checkpoint is written, and was not compared with QDQ: {why}"


DRIVERS = {"inc": _with_inc, "compressed_tensors": _with_compressed_tensors}


def _require_package(name: str, purpose: str) -> None:
    module, package, extra = PACKAGES[name]
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(package, extra, purpose)


@torch.no_grad()
def forward(module: nn.Module, sample: Sample) -> Tensor:
    """Logits of a sample by the model's own forward, as a user calls it: (token, vocab)."""
    batch = {name: value.to(module.device) for name, value in collate([sample]).items() if name != "labels"}  # type: ignore[arg-type]
    if len(batch["position_ids"]) == 1:  # text alone has one axis
        batch["position_ids"] = batch["position_ids"][0]
    found: Tensor = module(**batch, use_cache=False).logits[0]
    return found.float()


def _show(
    decision: Decision, results: Mapping[str, Agreement | str], notes: Sequence[str], folder: Path, screen: Screen
) -> None:
    rows = [
        [
            name,
            str(item.n_quantized),
            f"{item.identical} of {item.samples}",
            f"{item.largest_difference:.3g}",
            f"{100 * item.relative_difference:.2g} %",
        ]
        for name, item in results.items()
        if isinstance(item, Agreement)
    ]
    columns = ["tool", "quantized", "samples as QDQ", "largest diff.", "of the effect"]
    if rows:
        screen.table(f"profile {decision.budget}, computed by other tools and by QDQ", columns, rows)
    for note in notes:
        screen.say(note)
    for name in results:
        screen.say(f"{name}: {folder / name}")
