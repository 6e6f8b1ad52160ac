"""TensorRT-LLM: `quant_cfg.json` and `hf_quant_config.json` beside a mixed-precision checkpoint.

Schema only: TensorRT-LLM needs an NVIDIA GPU and was not loaded. The schema is that of `process_layer_quant_config` in
ModelOpt (which writes these files) and of the reader in TensorRT-LLM's `tensorrt_llm/_torch/model_config.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.formats.rendered import Rendered, refuse, require_linear
from qvl_hydra.profiles.names import rename
from qvl_hydra.profiles.profile import Profile


def render(profile: Profile, operators: Sequence[Operator]) -> Rendered:
    """Both files, in the names of the checkpoints on the hub."""
    low = {op.path for op in profile.low}
    kept = [rename(op, "checkpoint") for op in operators if op.path not in low]
    quantization = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "exclude_modules": kept}
    content = {
        "quant_cfg.json": quant_cfg(profile),
        "hf_quant_config.json": {"producer": {"name": "qvl_hydra"}, "quantization": quantization},
    }
    notes = ["not loaded here: the schema only was followed"]
    if profile.scheme.input is not None and not profile.scheme.input.symmetric:
        notes.append("inputs are quantized symmetrically: its INT8 has no zero point")
    return Rendered({name: json.dumps(value, indent=2) + "\n" for name, value in content.items()}, tuple(notes))


def quant_cfg(profile: Profile) -> dict[str, Any]:
    """The dictionary of quantized layers.

    Raises:
        ProfileError: a convolution is quantized, or the scheme has no algorithm of that name.
    """
    require_linear(profile, "tensorrt_llm")
    layers = {rename(op, "checkpoint"): _algorithm(profile) for op in profile.low}
    return {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": layers}


def _algorithm(profile: Profile) -> dict[str, Any]:
    weight, inputs, output = profile.scheme.weight, profile.scheme.input, profile.scheme.output
    if weight is not None and weight.symmetric and output is None:
        if weight.bits == 8 and weight.group_size is None and (inputs is None or inputs.bits == 8):
            if inputs is None:
                return {"quant_algo": "W8A16"}
            per_token = "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"
            return {"quant_algo": per_token if inputs.dynamic else "W8A8_SQ_PER_CHANNEL"}
        if weight.bits == 4 and inputs is None and weight.group_size is not None:
            return {"quant_algo": "W4A16_GPTQ", "group_size": weight.group_size, "has_zero_point": False}
    raise refuse(profile, "tensorrt_llm", "this scheme", "take w8a8_static, w8a8_dynamic, w8a16 or w4a16")
