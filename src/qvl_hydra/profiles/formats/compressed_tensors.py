"""compressed-tensors: the `quantization_config` of a checkpoint's `config.json`, read by transformers and vLLM.

One config group targets the class `Linear`; everything that stays in high precision is listed in `ignore` by its full
name, so that no pattern can reach the other tower. transformers matches Hugging Face module paths; vLLM renames them
with its own mapper and is also given the list in its own names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.formats.rendered import Rendered, refuse, require_linear
from qvl_hydra.profiles.names import rename
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.scheme import ActivationFormat, WeightFormat


def render(profile: Profile, operators: Sequence[Operator]) -> Rendered:
    """`quantization_config.json` in Hugging Face names and `quantization_config.vllm.json` in vLLM's."""
    files = {
        "quantization_config.json": quantization_config(profile, operators, "hugging_face"),
        "quantization_config.vllm.json": quantization_config(profile, operators, "vllm"),
    }
    return Rendered({name: json.dumps(content, indent=2) + "\n" for name, content in files.items()})


def quantization_config(profile: Profile, operators: Sequence[Operator], convention: str) -> dict[str, Any]:
    """The dictionary itself.

    Raises:
        ProfileError: a convolution is quantized, or the weights are not.
    """
    return {
        "quant_method": "compressed-tensors",
        "format": checkpoint_format(profile),
        "quantization_status": "compressed",
        "config_groups": {"group_0": config_group(profile, "compressed_tensors")},
        "ignore": ignored(profile, operators, convention),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def checkpoint_format(profile: Profile) -> str:
    """How weights are stored: whole INT8 numbers beside quantized inputs, packed ones for weights alone."""
    scheme = profile.scheme
    whole = scheme.input is not None and scheme.weight is not None and scheme.weight.bits == 8
    return "int-quantized" if whole else "pack-quantized"


def config_group(profile: Profile, format_name: str) -> dict[str, Any]:
    """The scheme of the quantized operators.

    Args:
        format_name: of the format that asks, for messages.

    Raises:
        ProfileError: a convolution is quantized, or the weights are not.
    """
    require_linear(profile, format_name)
    scheme = profile.scheme
    if scheme.weight is None:
        raise refuse(profile, format_name, "weights in float", "take a scheme that quantizes weights")
    return {
        "targets": ["Linear"],
        "weights": _weights(scheme.weight),
        "input_activations": _activation(scheme.input),
        "output_activations": _activation(scheme.output),
    }


def ignored(profile: Profile, operators: Sequence[Operator], convention: str) -> list[str]:
    """Names of all Linear operators of the model that are not quantized."""
    low = {op.path for op in profile.low}
    return [rename(op.path, convention) for op in operators if op.kind == "Linear" and op.path not in low]


def _weights(form: WeightFormat) -> dict[str, Any]:
    return {
        "num_bits": form.bits,
        "type": "int",
        "symmetric": form.symmetric,
        "strategy": "channel" if form.group_size is None else "group",
        "group_size": form.group_size,
        "dynamic": False,
    }


def _activation(form: ActivationFormat | None) -> dict[str, Any] | None:
    if form is None:
        return None
    return {
        "num_bits": form.bits,
        "type": "int",
        "symmetric": form.symmetric,
        "strategy": "token" if form.dynamic else "tensor",
        "dynamic": form.dynamic,
    }
