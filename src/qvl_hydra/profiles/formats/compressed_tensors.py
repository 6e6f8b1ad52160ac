"""compressed-tensors: the `quantization_config` of a checkpoint's `config.json`, read by transformers and vLLM.

One config group targets the class `Linear`, several name their operators one by one; everything that stays in high
precision is listed in `ignore` by its full name, so that no pattern can reach the other tower. vLLM's class of the head
has no `Linear` in its name and its mapper leaves the bare name alone: the head is a target of its own, by a pattern.
transformers matches Hugging Face module paths; vLLM renames them with its own mapper and is also given the list in its
own names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from qvl_hydra.families.record import HEAD
from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.formats.rendered import Rendered, refuse, require_linear
from qvl_hydra.profiles.names import listed, rename, router_of
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.formats.float8 import BLOCK
from qvl_hydra.quantization.formats.table import FORMATS
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
    groups = {"group_0": config_group(profile, "compressed_tensors")}
    if profile.others:
        groups = _groups(profile, convention)
    elif HEAD in {op.path for op in profile.low}:
        groups["group_0"]["targets"].append(HEAD_TARGET)
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if profile.others else checkpoint_format(profile),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored(profile, operators, convention),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


HEAD_TARGET = f"re:.*{HEAD}$"


def _groups(profile: Profile, convention: str) -> dict[str, Any]:
    """One config group a scheme; its operators are named one by one, so that no pattern reaches another's."""
    found = {}
    for index, alone in enumerate(profile.by_scheme()):
        group = config_group(alone, "compressed_tensors")
        targets = [HEAD_TARGET if op.path == HEAD else listed(op, convention) for op in alone.low]
        found[f"group_{index}"] = group | {"targets": targets, "format": checkpoint_format(alone)}
    return found


STORED = {  # how a number format's weights are stored, by compressed-tensors' names
    "float8_e4m3": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
}
SCALES = {"nvfp4": "torch.float8_e4m3fn", "mxfp4": "torch.uint8", "mxfp8": "torch.uint8"}  # dtypes


def checkpoint_format(profile: Profile) -> str:
    """How weights are stored: whole INT8 numbers beside quantized inputs, packed ones for weights alone."""
    scheme = profile.scheme
    if scheme.weight is not None and scheme.weight.number in STORED:
        return STORED[scheme.weight.number]
    whole = scheme.input is not None and scheme.weight is not None and scheme.weight.bits == 8
    return "int-quantized" if whole else "pack-quantized"


def config_group(profile: Profile, format_name: str) -> dict[str, Any]:
    """The scheme of the quantized operators.

    Args:
        format_name: of the format that asks, for messages.

    Raises:
        ProfileError: a convolution is quantized, or the weights are not.
    """
    require_linear(profile, format_name, experts=True)
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
    """Entries for all Linear operators and experts that are not quantized, and for every router."""
    low = {op.path for op in profile.low}
    left = [op for op in operators if not op.kind.startswith("Conv")]
    routers = {router_of(op): op for op in left if op.experts > 1}
    named = [rename(op, convention, path) for path, op in routers.items()]
    return [listed(op, convention) for op in left if op.path not in low] + named


def _weights(form: WeightFormat) -> dict[str, Any]:
    if form.number in STORED:
        return _floating(form.number, form.granularity) | {"dynamic": False}
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
    if form.number in STORED:
        granularity = ("token" if form.group_size is None else "group") if form.dynamic else "tensor"
        content = _floating(form.number, granularity) | {"dynamic": form.dynamic}
        if content["strategy"] == "group" and content["group_size"] is None:
            content["group_size"] = form.group_size
        return content | ({"dynamic": "local"} if content["strategy"] == "tensor_group" else {})
    return {
        "num_bits": form.bits,
        "type": "int",
        "symmetric": form.symmetric,
        "strategy": "token" if form.dynamic else "tensor",
        "dynamic": form.dynamic,
    }


def _floating(number: str, granularity: str) -> dict[str, Any]:
    """A floating format: those whose groups are part of it have their own strategy."""
    row = FORMATS[number]
    strategy = granularity if row.group is None else "tensor_group" if row.tensor_scale else "group"
    content: dict[str, Any] = {"num_bits": row.bits, "type": "float", "symmetric": True, "strategy": strategy}
    content["group_size"] = row.group
    if number in SCALES:
        content["scale_dtype"] = content["zp_dtype"] = SCALES[number]
    if strategy == "block":
        content["block_structure"] = [BLOCK, BLOCK]
    return content
