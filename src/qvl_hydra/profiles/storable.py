"""What a compressed-tensors checkpoint can hold, and what transformers and vLLM make of it."""

from __future__ import annotations

from importlib.metadata import version

import torch
from packaging.version import Version

from qvl_hydra.errors import ProfileError
from qvl_hydra.models.load import ModelDescription
from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.formats.compressed_tensors import checkpoint_format
from qvl_hydra.profiles.names import modules_of_experts
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.formats.float8 import BLOCK
from qvl_hydra.quantization.scheme import Scheme

CPU_MULTIPLE = 32  # of the outputs of packed integers in vLLM's CPU build
READS_BLOCKS = "0.19"  # of compressed-tensors: older ones multiply weights with scales of another shape
NARROW = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")


def not_loaded(profile: Profile) -> list[str]:
    """Where runtimes refuse a checkpoint, a sentence each."""
    packed = [op for part in profile.by_scheme() if checkpoint_format(part) == "pack-quantized" for op in part.low]
    odd = [op for op in packed if op.out_features % CPU_MULTIPLE]
    if not odd:
        return []
    return [
        f"vLLM's CPU build takes packed integers for outputs in multiples of {CPU_MULTIPLE} alone and will not load "
        f"this checkpoint: {odd[0].path} has {odd[0].out_features}{f', and {len(odd) - 1} more' * (len(odd) > 1)}; "
        "on CUDA vLLM pads them. For the CPU, give them other choices with profile.spaces"
    ]


def unlike_qdq(profile: Profile, dtype: torch.dtype) -> list[str]:
    """What transformers computes otherwise than QDQ when it loads the checkpoint, a sentence each.

    Args:
        dtype: the model's.
    """
    found = []
    if unpacked_narrow(profile):
        found.append(
            "compressed-tensors unpacks some of these formats to bfloat16, so that transformers runs the checkpoint in "
            "it: its rounding is part of the difference to QDQ, which is computed in the model's own dtype"
        )
    elif dtype != torch.float32:
        found.append(
            f"transformers and QDQ were compared in {str(dtype).removeprefix('torch.')}: its rounding is part of the "
            "difference, and as large as what a good plan loses; model.dtype=float32 compares without it"
        )
    by_token = [(op, part) for op in profile.low if (part := profile.scheme_of(op).input) is not None
                if part.dynamic and part.group_size is None]  # fmt: skip
    if any(part.number == "int" and part.divide for _, part in by_token):
        found.append(
            "transformers takes a token's INT8 scale as max / 127.5, QDQ and vLLM as max / 127: inputs are rounded to "
            "other grids, and as much as quantizing changes may lie between them"
        )
    if any(op.component == "vision" for op, _ in by_token):
        found.append(
            "transformers takes one scale for all tokens of a vision operator's input, QDQ and vLLM one a token: there "
            "the checkpoint is coarser in transformers than what was scored"
        )
    return found


def not_unpacked(profile: Profile) -> str | None:
    """Why the compressed-tensors that is installed unpacks no such checkpoint for transformers, or None."""
    installed = version("compressed-tensors")
    blocks = any(part.scheme.weight is not None and part.scheme.weight.granularity == "block"
                 for part in profile.by_scheme())  # fmt: skip
    if not blocks or Version(installed) >= Version(READS_BLOCKS):
        return None
    return f"compressed-tensors {installed} unpacks no scales of blocks for transformers; {READS_BLOCKS} and newer do"


def unpacked_bytes(description: ModelDescription) -> int:
    """Memory that transformers takes for a checkpoint of a model: it unpacks what is packed, one part after the other.

    A head that shares its weights with the embedding until it is quantized counts once more.
    """
    largest = max(parameter.numel() for parameter in description.skeleton.parameters())
    return description.weight_bytes + 2 * largest * torch.float32.itemsize


def unpacked_narrow(profile: Profile) -> bool:
    """Whether compressed-tensors unpacks a weight to bfloat16 whatever the model's dtype, so that it runs in that."""
    return any(checkpoint_format(part) in NARROW for part in profile.by_scheme())


def require_storable(profile: Profile) -> None:
    """Refuse schemes that a checkpoint cannot hold.

    Raises:
        ProfileError: naming the operators.
    """
    for part in profile.by_scheme():
        scheme = part.scheme
        if reason := never_storable(scheme):
            raise ProfileError(f"a compressed-tensors checkpoint holds no {scheme.name}: it has {reason}")
        odd = [(op, why) for op in part.low if (why := not_storable(op, scheme)) is not None]
        if odd:
            raise ProfileError(
                f"{odd[0][0].path} in {scheme.name}: {odd[0][1]}{f' ({len(odd)} such operators)' * (len(odd) > 1)}; "
                "take another scheme, or profile.quantize_with=[compressed_tensors], with which they get other choices"
            )


def never_storable(scheme: Scheme) -> str | None:
    """What a checkpoint cannot hold of any operator in a scheme, or None."""
    if scheme.weight is None:
        return "float weights; take schemes that quantize them"
    if scheme.output is not None:
        return "quantized outputs; take a scheme without"
    return None if scheme.weight.symmetric else "weights with zero points; take symmetric ones"


def not_storable(op: Operator, scheme: Scheme) -> str | None:
    """Why a checkpoint cannot hold an operator in a scheme that it holds others in, or None."""
    if op.kind not in ("Linear", "Experts"):
        return f"a compressed-tensors checkpoint holds linear modules only, and it is a {op.kind}"
    if op.experts > 1 and (reason := _no_experts(op, scheme)) is not None:
        return reason
    group = None if scheme.weight is None else scheme.weight.group_size
    if group is not None and op.in_features % group:
        return f"a compressed-tensors checkpoint holds whole groups of {group} only, and it has {op.in_features} inputs"
    return None


def _no_experts(op: Operator, scheme: Scheme) -> str | None:
    """Why vLLM, which alone reads quantized experts, does not read these in a scheme, or None."""
    if scheme.input is not None and scheme.input.number == "int" and not scheme.input.dynamic:
        return "vLLM's experts take INT8 inputs with a scale a token alone, as of w8a8_int"
    rows = op.out_features // len(modules_of_experts(op, [0]))
    if scheme.weight is not None and scheme.weight.granularity == "block" and rows % BLOCK:
        return f"vLLM reads products of experts in whole blocks of {BLOCK} rows, and it has {rows}"
    return None
