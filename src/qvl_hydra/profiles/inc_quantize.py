"""Runs a profile through Neural Compressor: its INT8 model, saved and loaded again, and our QDQ in the same numbers.

Neural Compressor's PyTorch FX path calibrates and converts the operators that `op_name_dict` leaves in INT8. What it
computes (input, weight and output quantized, int8 kernels) is then repeated by QDQ with the scales and zero points
read from the converted model, so that the only difference left is rounding inside the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from qvl_hydra.backends.neural_compressor.session import guest  # says what to install when Neural Compressor is missing
from qvl_hydra.calibration.sample import Sample

# isort: split
from neural_compressor import quantization
from neural_compressor.config import PostTrainingQuantConfig
from neural_compressor.utils.pytorch import load

from qvl_hydra.backends.neural_compressor.adaptor import Batches
from qvl_hydra.backends.neural_compressor.wrapper import ComponentWrapper, WrapperBatch, usable, wrapper_input
from qvl_hydra.errors import ProfileError
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles.formats.neural_compressor import op_name_dict
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.formats.record import QuantParams
from qvl_hydra.quantization.qdq import OperatorQuantizer
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat

UNSIGNED = (0, 255)  # of torch.quint8
INC_STATIC = Scheme("inc_static", WeightFormat(8), ActivationFormat(8), ActivationFormat(8), "histogram")


@dataclass(frozen=True)
class IncModel:
    """What Neural Compressor made of a profile.

    Attributes:
        converted: the component with INT8 operators; takes a `WrapperBatch`.
        reloaded: the same, read back from the saved file.
        quantizers: the converted operators in our terms.
    """

    converted: nn.Module
    reloaded: nn.Module
    quantizers: dict[str, OperatorQuantizer]


def quantize_with_inc(
    model: LoadedModel, profile: Profile, samples: Sequence[Sample], component: str, folder: Path
) -> IncModel:
    """Let Neural Compressor quantize the profile, save it and load it again.

    Args:
        model: the float model, on the CPU; it leaves as it came.
        samples: calibration samples.
        folder: where `best_model.pt` goes.

    Raises:
        ProfileError: Neural Compressor quantized other operators than the profile says.
        MissingExtraError: it is not installed.
    """
    module = model.module
    config = PostTrainingQuantConfig(
        approach="static",
        op_name_dict=op_name_dict(profile, find_operators(module, "full")),
        excluded_precisions=["bf16"],  # else offered where the processor has it
        calibration_sampling_size=[len(samples)],
        quant_level=1,
    )
    inputs = [wrapper_input(module, sample, component) for sample in usable(samples, component)]
    batches = Batches([(WrapperBatch([item]), 0) for item in inputs], 1)
    with guest():
        fitted = quantization.fit(ComponentWrapper(module, component), config, calib_dataloader=batches)
        if fitted is None:
            raise ProfileError("Neural Compressor returned no model for this profile; its log says why")
        folder.mkdir(parents=True, exist_ok=True)
        fitted.save(str(folder))
        reloaded = load(str(folder), ComponentWrapper(module, component), dataloader=batches)
    quantizers = converted_quantizers(fitted.model)
    _require_same(profile, quantizers)
    return IncModel(fitted.model, reloaded, quantizers)


def converted_quantizers(model: nn.Module) -> dict[str, OperatorQuantizer]:
    """The INT8 operators of a converted model, by Hugging Face path, in our terms."""
    found = {}
    for owner_name, owner in model.named_modules():
        if not isinstance(owner, GraphModule):
            continue
        for node in owner.graph.nodes:
            target = owner.get_submodule(str(node.target)) if node.op == "call_module" else None
            if target is not None and "quantized" in type(target).__module__:
                path = f"{owner_name}.{node.target}".removesuffix(".module")
                found[path] = _quantizer(owner, node, target)
    return found


def _quantizer(owner: GraphModule, node: Node, target: Any) -> OperatorQuantizer:
    before = node.args[0]
    assert isinstance(before, Node)
    assert before.target is torch.quantize_per_tensor, f"{node.name} takes its input from {before.target}"
    scale, zero_point = (_attribute(owner, argument) for argument in before.args[1:3])
    return OperatorQuantizer(
        INC_STATIC,
        target.weight().dequantize(),
        QuantParams(float(scale), int(zero_point), *UNSIGNED),
        QuantParams(float(target.scale), int(target.zero_point), *UNSIGNED),
    )


def _attribute(owner: GraphModule, argument: Any) -> Any:
    return getattr(owner, str(argument.target)) if isinstance(argument, Node) else argument


def _require_same(profile: Profile, quantizers: dict[str, OperatorQuantizer]) -> None:
    low = {op.path for op in profile.low}
    missing, extra = sorted(low - quantizers.keys()), sorted(quantizers.keys() - low)
    if missing or extra:
        said = [f"left {', '.join(missing[:5])} in float"] * bool(missing)
        said += [f"quantized {', '.join(extra[:5])}"] * bool(extra)
        raise ProfileError(
            f"Neural Compressor {' and '.join(said)} against the profile; leave these out of the sweep with "
            "operators.exclude, or quantize with another tool (profile.quantize_with=[compressed_tensors])"
        )
