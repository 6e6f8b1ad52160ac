"""From settings to what every task works on: model, operators, calibration samples, schemes."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qvl_hydra.backends.neural_compressor.memory import inc_extra_bytes
from qvl_hydra.backends.protocol import pick_device
from qvl_hydra.calibration.encode import Processor, load_processor
from qvl_hydra.calibration.sample import CalibrationSet, Sample
from qvl_hydra.calibration.sources import check_calibration, load_calibration
from qvl_hydra.errors import MissingExtraError, ModelError, QvlHydraError
from qvl_hydra.models.load import (
    BUNDLED,
    LoadedModel,
    ModelDescription,
    describe_model,
    is_local,
    load_model,
    model_folder,
    require_memory,
)
from qvl_hydra.operators.discover import Operator, find_operators, select_operators
from qvl_hydra.quantization.scheme import Scheme, scheme_from_settings
from qvl_hydra.runs.folder import FINGERPRINT
from qvl_hydra.settings import QuantSettings, Settings

ONNX_BACKENDS = ("onnxrt", "inc_onnxrt")  # their device is ONNX Runtime's, which the engine checks
CPU_BACKENDS = (*ONNX_BACKENDS, "inc_fx")  # hold the PyTorch model on the CPU, wherever they compute
TEXT_SHAPE = "tiny_qwen2_5_vl"  # bundled model whose tokenizer a bare shape for text takes
TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
BACKEND_PACKAGES = {
    "inc_fx": ("neural_compressor", "neural-compressor", "inc"),
    "inc_onnxrt": ("neural_compressor", "neural-compressor", "inc"),
    "onnxrt": ("onnxruntime", "onnxruntime-gpu", "onnx"),
    "modelopt": ("modelopt", "nvidia-modelopt", "modelopt"),
}


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
    if not settings.backend.faults() and settings.backend.name not in ONNX_BACKENDS:
        checks.append(lambda: pick_device(settings.backend.device))
    if needs_model and not settings.calibration.faults():
        checks.append(lambda: check_calibration(settings.calibration))
    if needs_model and not settings.model.faults() and is_local(settings.model.path):
        checks.append(lambda: model_folder(settings.model))
    for check in checks:
        try:
            check()
        except QvlHydraError as error:
            faults.append(str(error))
    module, package, extra = BACKEND_PACKAGES.get(settings.backend.name, ("", "", ""))
    if module and importlib.util.find_spec(module) is None:
        faults.append(str(MissingExtraError(package, extra, f"backend={settings.backend.name}")))
    if settings.resume not in ("auto", "never") and not (Path(settings.resume).expanduser() / FINGERPRINT).is_file():
        faults.append(f"resume={settings.resume}: no unfinished run there; allowed: auto, never, or a run's folder")
    return faults


def prepare(settings: Settings, further_schemes: Sequence[QuantSettings] = ()) -> Prepared:
    """Select operators, check memory, read samples, and load the model last.

    Raises:
        QvlHydraError: anything missing, unreadable, empty or too large, named.
    """
    description = describe_model(settings.model)
    foreign = _foreign_graph(settings, description)
    if settings.component.name not in description.family.components:
        components = ", ".join(description.family.components)
        raise ModelError(f"{description.source} is a {description.family.name} model: it has component={components}")
    found = foreign.operators if foreign else find_operators(description.skeleton, settings.component.name)
    operators = tuple(select_operators(found, settings.operators, settings.seed))
    if foreign is None:
        require_memory(description, working_bytes(settings, description, operators), f"backend={settings.backend.name}")
    processor = processor_of(description)
    calibration = load_calibration(settings.calibration, processor)
    if foreign is not None:
        model = foreign.model
    else:
        on_cpu = settings.backend.name in CPU_BACKENDS
        device = torch.device("cpu") if on_cpu else pick_device(settings.backend.device)
        model = load_model(description, device, settings.seed)
    batches = settings.strategy.confidence_batches
    count = len(calibration.samples) if batches is None else batches * settings.calibration.batch_size
    schemes = tuple(
        scheme_from_settings(dataclasses.replace(quant, perturb=settings.quant.perturb))
        for quant in (settings.quant, *further_schemes)
    )
    return Prepared(description, model, processor, operators, calibration, calibration.samples[:count], schemes)


@dataclass(frozen=True)
class _ForeignGraph:
    """An ONNX graph that this project did not export: its own operators, and a model without weights beside it."""

    operators: list[Operator]
    model: LoadedModel


def _foreign_graph(settings: Settings, description: ModelDescription) -> _ForeignGraph | None:
    graph, component = settings.backend.graph, settings.component.name
    if graph is None or settings.backend.name not in ONNX_BACKENDS:
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


def working_bytes(settings: Settings, description: ModelDescription, operators: Sequence[Operator]) -> int:
    """Memory that a backend needs beside the weights, at least; negative where it holds less than all weights."""
    weights = description.weight_bytes
    if settings.model.placement == "streamed":
        kinds = ("DecoderLayer", "VisionBlock")
        parts = [child for child in description.skeleton.modules() if type(child).__name__.endswith(kinds)]
        largest = max(sum(p.numel() for p in part.parameters()) for part in parts)
        text = description.config.get_text_config()
        table = text.vocab_size * text.hidden_size
        return max(3 * largest, 2 * table) * torch.float32.itemsize - weights
    if settings.backend.name == "inc_fx":
        return inc_extra_bytes(operators, 0, 0, settings.strategy.name, settings.strategy.direction)
    if settings.backend.name in ONNX_BACKENDS:
        return 2 * sum(p.numel() for p in description.skeleton.parameters()) * torch.float32.itemsize
    if settings.strategy.name == "hawq_v2":
        largest = max(op.n_params for op in operators)
        return 5 * largest * torch.float32.itemsize
    return math.ceil(0.1 * weights)
