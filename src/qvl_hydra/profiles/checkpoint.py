"""Writes a compressed-tensors checkpoint (`int-quantized`) that plain transformers loads and runs.

Weights of quantized operators are INT8 with a scale an output channel, static inputs have a scale and a zero point;
everything else is stored as it is. The numbers are exactly those of our QDQ.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qvl_hydra.errors import ProfileError
from qvl_hydra.families.record import HEAD
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles.formats.compressed_tensors import checkpoint_format, quantization_config
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.formats.integer import affine_params
from qvl_hydra.quantization.qdq import OperatorQuantizer
from qvl_hydra.quantization.scheme import WeightFormat

BESIDE = ("*.json", "*.jinja", "*.txt", "*.model")  # tokenizer, templates, image processor


def write_checkpoint(
    model: LoadedModel, profile: Profile, quantizers: Mapping[str, OperatorQuantizer], folder: Path
) -> None:
    """Write the model with the profile's low operators in INT8.

    Args:
        model: the float model, resident.
        quantizers: of every low operator.
        folder: made if need be; holds weights, config, tokenizer and image processor afterwards.

    Raises:
        ProfileError: the scheme is not W8A8 per channel, outputs are quantized, or a convolution is.
    """
    if checkpoint_format(profile) != "int-quantized" or profile.scheme.output is not None:
        raise ProfileError(
            f"the compressed-tensors checkpoint holds W8A8 (int-quantized), not {profile.scheme.name}; "
            "take quant=w8a8_static or quant=w8a8_dynamic"
        )
    config = quantization_config(profile, find_operators(model.module, "full"), "hugging_face")
    state = dict(model.module.state_dict())
    for op in profile.low:
        state |= _quantized_tensors(model.module, op.path, quantizers[op.path])
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in BESIDE:
        for path in model.description.folder.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
    model.module.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = config
    if HEAD in {op.path for op in profile.low}:  # a quantized head shares nothing with the embedding any more
        content["tie_word_embeddings"] = content["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def _quantized_tensors(module: nn.Module, path: str, quantizer: OperatorQuantizer) -> dict[str, Tensor]:
    form = quantizer.scheme.weight
    assert form is not None
    assert quantizer.weight is not None
    weight = module.get_submodule(path).get_parameter("weight")
    scale = weight_scale(weight, form)
    # Rounding undoes the product exactly: a QDQ weight is a whole number of scales.
    tensors = {
        f"{path}.weight": torch.round(quantizer.weight.float() / scale).to(torch.int8),
        f"{path}.weight_scale": scale,
    }
    if quantizer.input is not None:
        shift = 0 if quantizer.input.qmin < 0 else 2 ** (8 - 1)  # its integers are signed, ours start at 0
        tensors[f"{path}.input_scale"] = torch.tensor([quantizer.input.scale])
        if shift:
            zero_point = torch.tensor([quantizer.input.zero_point - shift], dtype=torch.int8)
            tensors[f"{path}.input_zero_point"] = zero_point
    return tensors


def weight_scale(weight: Tensor, form: WeightFormat) -> Tensor:
    """The scale of each output channel, as in `qdq_weight`: float32, (out, 1)."""
    low, high = torch.aminmax(weight.detach().float(), dim=1)
    return affine_params(low, high, form.limits, form.symmetric)[0][:, None]
