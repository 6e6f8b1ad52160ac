"""From settings to what every task works on: model, operators, calibration samples, schemes."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qvl_hydra.backends.protocol import pick_device
from qvl_hydra.backends.table import BACKENDS
from qvl_hydra.calibration.encode import Processor, load_processor
from qvl_hydra.calibration.sample import CalibrationSet, Sample
from qvl_hydra.calibration.sources import check_calibration, load_calibration
from qvl_hydra.errors import MissingExtraError, ModelError, QvlHydraError, SettingsError
from qvl_hydra.families.record import Family
from qvl_hydra.families.table import FAMILIES
from qvl_hydra.models.load import (
    BUNDLED,
    LoadedModel,
    ModelDescription,
    describe_model,
    free_models,
    is_local,
    load_model,
    model_folder,
    require_memory,
)
from qvl_hydra.operators.discover import Operator, find_operators, select_operators, uncovered
from qvl_hydra.profiles.names import router_of
from qvl_hydra.quantization.formats.table import format_faults, not_offered
from qvl_hydra.quantization.scheme import Scheme, scheme_from_settings
from qvl_hydra.reference import load
from qvl_hydra.runs.folder import FINGERPRINT
from qvl_hydra.settings import QuantSettings, Settings

TEXT_SHAPE = "tiny_qwen2_5_vl"  # bundled model whose tokenizer a bare shape for text takes
TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclass(frozen=True)
class Prepared:
    """What a task works on.

    Attributes:
        operators: those selected, in data order.
        scored: the samples that scores are measured on.
        schemes: the scheme to score, then further ones.
    """

    description: ModelDescription
    model: LoadedModel
    processor: Processor
    operators: tuple[Operator, ...]
    calibration: CalibrationSet
    scored: tuple[Sample, ...]
    schemes: tuple[Scheme, ...]


def environment_faults(settings: Settings) -> list[str]:
    """What the settings ask for that is not there: model folder, files, device, packages. Nothing large is read."""
    faults: list[str] = []
    needs_model = settings.task.name != "compare"
    checks: list[Callable[[], object]] = []  # of values that are sound in themselves
    row = BACKENDS.get(settings.backend.name)
    if row is not None and not settings.backend.faults() and not row.foreign_device:
        checks.append(lambda: pick_device(settings.device_name(torch.cuda.device_count())))
    if needs_model and not settings.calibration.faults():
        checks.append(lambda: check_calibration(settings.calibration))
    if needs_model and not settings.model.faults() and is_local(settings.model.path):
        checks.append(lambda: model_folder(settings.model))
    for check in checks:
        try:
            check()
        except QvlHydraError as error:
            faults.append(str(error))
        except (OSError, ValueError) as error:  # a name of 300 letters, or with a zero byte
            faults.append(f"a path of the settings cannot be looked at ({error})")
    module, package, extra = row.package if row and row.package else ("", "", "")
    if module and importlib.util.find_spec(module) is None:
        faults.append(str(MissingExtraError(package, extra, f"backend={settings.backend.name}")))
    faults += format_faults(settings.quant)
    if settings.resume not in ("auto", "never") and not (Path(settings.resume).expanduser() / FINGERPRINT).is_file():
        faults.append(f"resume={settings.resume}: no unfinished run there; allowed: auto, never, or a run's folder")
    return faults


def prepare(
    settings: Settings,
    further_schemes: Sequence[QuantSettings] = (),
    loaded: Callable[[ModelDescription, torch.device, int], LoadedModel] = load_model,
) -> Prepared:
    """Select operators, check memory, read samples, and load the model last.

    Args:
        loaded: makes a described model on a device, with a seed for random weights.

    Raises:
        QvlHydraError: anything missing, unreadable, empty or too large, named.
    """
    free_models()
    description, row = describe_model(settings.model), BACKENDS[settings.backend.name]
    _refuse_family(settings, description.family)
    foreign = _foreign_graph(settings, description)
    found = foreign.operators if foreign else find_operators(description.skeleton, settings.component.name)
    operators = tuple(select_operators(found, settings.operators, settings.seed))
    schemes = schemes_of(settings, further_schemes)
    _refuse_schemes(operators, schemes)
    if foreign is None:
        extra = load(row.memory)(settings, description, operators)
        require_memory(description, extra, f"backend={row.name}")
    processor = processor_of(description)
    calibration = load_calibration(settings.calibration, processor)
    if foreign is not None:
        model = foreign.model
    else:
        name = "cpu" if row.device == "cpu" else settings.device_name(torch.cuda.device_count())
        device = pick_device(name)
        model = loaded(description, device, settings.seed)
    batches = settings.strategy.confidence_batches
    count = len(calibration.samples) if batches is None else batches * settings.calibration.batch_size
    return Prepared(description, model, processor, operators, calibration, calibration.samples[:count], schemes)


def schemes_of(settings: Settings, further: Sequence[QuantSettings]) -> tuple[Scheme, ...]:
    """The scheme to score, then further ones, all of them with `quant.perturb`."""
    every = (settings.quant, *further)
    return tuple(scheme_from_settings(dataclasses.replace(own, perturb=settings.quant.perturb)) for own in every)


def _refuse_schemes(operators: Sequence[Operator], schemes: Sequence[Scheme]) -> None:
    for scheme in schemes:
        reasons = [not_offered([op], scheme) for op in operators]
        if all(reasons):
            raise SettingsError([f"no operator can be in {scheme.name}: {operators[-1].path} is {reasons[-1]}"])


def may_reuse(settings: Settings) -> bool:
    """Whether scores of a finished run will do: all that it leaves is in the parts that its shards would leave."""
    return settings.cache == "on" and BACKENDS[settings.backend.name].shards


def _refuse_family(settings: Settings, family: Family) -> None:
    """Refuse what a model family has not, once the checkpoint has said which family it is."""
    faults = []
    if settings.component.name not in family.components:
        has = ", ".join(family.components)
        faults.append(f"component={settings.component.name}, but a {family.name} model has {has}")
    if family.visual is None and settings.calibration.source != "jsonl":
        faults.append(
            f"calibration={settings.calibration.source} has images, and a {family.name} model reads text alone; take "
            "calibration=jsonl calibration.path=<file of prompts and answers>"
        )
    exports = settings.task.name == "export_onnx"
    if (exports or BACKENDS[settings.backend.name].towers) and not family.towers:
        able = ", ".join(row.name for row in FAMILIES.values() if row.towers)
        what = "task=export_onnx" if exports else f"backend={settings.backend.name}"
        instead = "backend=torch scores it without a graph" if exports else "take backend=torch"
        faults.append(
            f"{what} takes the towers of a model apart, which is written for {able}, not for {family.name} "
            f"(docs/onnx.md); {instead}"
        )
    if faults:
        raise ModelError("; ".join(faults))


@dataclass(frozen=True)
class _ForeignGraph:
    """An ONNX graph that this project did not export: its own operators, and a model without weights beside it."""

    operators: list[Operator]
    model: LoadedModel


def _foreign_graph(settings: Settings, description: ModelDescription) -> _ForeignGraph | None:
    graph, component = settings.backend.graph, settings.component.name
    if graph is None or not BACKENDS[settings.backend.name].foreign_device:
        return None
    from qvl_hydra.onnx.scoring.foreign import graph_model, graph_operators, is_foreign  # needs onnx

    if not is_foreign(graph, component):
        return None
    return _ForeignGraph(
        graph_operators(graph, component, description.skeleton), graph_model(description, graph, component)
    )


def processor_of(description: ModelDescription) -> Processor:
    """The checkpoint's own processor; a bare shape takes the bundled one of its family, and its special tokens."""
    if (description.folder / "tokenizer_config.json").exists() or description.settings.weights == "pretrained":
        return load_processor(description.folder)
    bundled = model_folder(
        dataclasses.replace(description.settings, path=f"{BUNDLED}{description.family.proxy_shape or TEXT_SHAPE}")
    )
    processor = load_processor(bundled)
    if description.family.visual is None:
        return dataclasses.replace(processor, image_processor=None, config=description.config, rope_shell=None)
    for name in TOKEN_IDS:
        setattr(description.config, name, getattr(processor.config, name))
    return processor


def not_quantized(settings: Settings, prepared: Prepared) -> list[str]:
    """Notes of weights that no operator multiplies by, so that what hides elsewhere is not left out in silence."""
    if settings.backend.graph is not None:
        return []
    found = uncovered(prepared.description.skeleton, settings.component.name)
    named = ", ".join(f"{path} ({share:.0%} of the weights)" for path, share in found.items())
    said = [f"in no operator, so never quantized: {named}"] if found else []
    routers = {router_of(op) for op in prepared.operators if op.experts > 1}
    if routers:
        said.append(f"what chooses among experts stays in high precision: {len(routers)} routers, first {min(routers)}")
    return said
