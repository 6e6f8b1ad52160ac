"""Writes a compressed-tensors checkpoint that plain transformers and vLLM load, in one scheme or several.

The numbers are those of our QDQ: weights go through the package's own compressors with the scales that QDQ took, static
inputs have their scale and zero point. Operators that are not quantized are stored as they are. What is made is put on
the disk as it is made, so that neither the rounded weights nor the stored ones have to fit in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qvl_hydra.errors import ProfileError
from qvl_hydra.families.record import HEAD
from qvl_hydra.models.load import LoadedModel, ModelDescription
from qvl_hydra.models.stream import Checkpoint
from qvl_hydra.operators.discover import Operator, find_operators
from qvl_hydra.profiles.apply import quantizer_key, shared_largest
from qvl_hydra.profiles.formats.compressed_tensors import checkpoint_format, config_group, quantization_config
from qvl_hydra.profiles.profile import Profile, require_modules
from qvl_hydra.quantization.formats.table import FORMATS
from qvl_hydra.quantization.qdq import OperatorQuantizer, weight_scales
from qvl_hydra.quantization.scheme import Scheme

CPU_MULTIPLE = 32  # of the outputs of packed integers in vLLM's CPU build
NARROW = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")
BESIDE = ("*.json", "*.jinja", "*.txt", "*.model")  # tokenizer, templates, image processor
PART_BYTES = 1 << 29  # of what is made, in memory at most before it goes to the disk


def write_checkpoint(
    model: LoadedModel, profile: Profile, quantizers: Mapping[str, OperatorQuantizer], folder: Path
) -> None:
    """Write the model with the profile's low operators in their schemes. Needs `compressed_tensors`.

    Args:
        model: the float model, resident or streamed.
        quantizers: of every low operator, see `quantizer_key`; asked for once each, and not kept.
        folder: made if need be; holds weights, config, tokenizer and image processor afterwards. While it is written
            the quantized weights are on the disk twice.

    Raises:
        ProfileError: what such a checkpoint cannot hold, naming the operators.
    """
    every = find_operators(model.module, "full")
    require_modules(every, "compressed-tensors")
    require_storable(profile)
    config = quantization_config(profile, every, "hugging_face")
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in BESIDE:
        for path in model.description.folder.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
    low = {f"{op.path}.weight" for op in profile.low}
    high = {name: tensor for name, tensor in model.module.state_dict().items() if name not in low}
    resident = {name: tensor for name, tensor in high.items() if not tensor.is_meta}
    streamed = {name: tensor for name, tensor in high.items() if tensor.is_meta}
    made = [_compressed(model, part, quantizers) for part in profile.by_scheme()]
    with _emptied(folder.with_name(f"{folder.name}.parts")) as parts:
        state = resident | _on_disk(chain(*made, _read(model, streamed)), parts)
        model.module.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = config
    text = content.get("text_config", content)  # a model for text alone has one config
    dtype = torch.bfloat16 if unpacked_narrow(profile) else model.dtype
    for part in (content, text, content.get("vision_config", text)):
        part["dtype"] = str(dtype).removeprefix("torch.")
    if HEAD in {op.path for op in profile.low}:  # a quantized head shares nothing with the embedding any more
        content["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def not_loaded(profile: Profile) -> list[str]:
    """Where runtimes refuse a checkpoint that transformers loads, a sentence each."""
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
    if op.kind != "Linear":
        return f"a compressed-tensors checkpoint holds linear modules only, and it is a {op.kind}"
    group = None if scheme.weight is None else scheme.weight.group_size
    if group is not None and op.in_features % group:
        return f"a compressed-tensors checkpoint holds whole groups of {group} only, and it has {op.in_features} inputs"
    return None


def _compressed(
    model: LoadedModel, profile: Profile, quantizers: Mapping[str, OperatorQuantizer]
) -> Iterator[tuple[str, Tensor]]:
    """What is stored of the operators of a profile of one scheme, by name, as it is made."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    stored = checkpoint_format(profile)
    compressor = BaseCompressor.get_value_from_registry(stored)
    group = QuantizationScheme.model_validate(config_group(profile, "compressed_tensors") | {"format": stored})
    fused: dict[str, list[Operator]] = {}
    for op in profile.low:
        fused.setdefault(op.group, []).append(op)
    for together in fused.values():
        with model.weights([op.path for op in together]):
            largest = shared_largest(model.module, together, profile.scheme)
            for op in together:
                quantizer = quantizers[quantizer_key(profile, op, quantizers)]
                # The rounded weight, a whole number of scales: the package's rounding leaves it.
                tensors = {"weight": quantizer.weight} | _scales(model.module, op, quantizer, largest.get(op.group))
                for name, tensor in compressor.compress(tensors, group).items():
                    yield f"{op.path}.{name}", tensor


def _read(model: LoadedModel, wanted: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Weights of a streamed model, one by one; a tied head is stored where the checkpoint has one.

    Args:
        wanted: by name, for their shapes.
    """
    checkpoint = model.checkpoint
    for name, tensor in wanted.items():
        if isinstance(checkpoint, Checkpoint) and name in checkpoint.places:
            yield name, checkpoint.read(name, tensor.shape, torch.device("cpu"), model.dtype)


@contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """A folder for the while; what a killed run left there goes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _on_disk(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> dict[str, Tensor]:
    """Tensors that take no memory: each in one of some files, and mapped from there."""
    mapped: dict[str, Tensor] = {}
    waiting: dict[str, Tensor] = {}

    def put_away() -> None:
        path = folder / f"{len(mapped)}.safetensors"
        save_file(waiting, path)
        mapped.update(load_file(path))
        waiting.clear()

    for name, tensor in tensors:
        waiting[name] = tensor.contiguous()
        if sum(item.nbytes for item in waiting.values()) >= PART_BYTES:
            put_away()
    if waiting:
        put_away()
    return mapped


def _scales(
    module: nn.Module, op: Operator, quantizer: OperatorQuantizer, largest: Tensor | None
) -> dict[str, Tensor]:
    scheme, inputs = quantizer.scheme, quantizer.input
    assert scheme.weight is not None
    weight = module.get_submodule(op.path).get_parameter("weight")
    row = FORMATS[scheme.weight.number]
    found: dict[str, Any] = {"weight_scale": weight_scales(weight, scheme.weight, largest)}
    if row.tensor_scale is not None:
        assert largest is not None
        found["weight_global_scale"] = row.tensor_scale(largest).reshape(1)
    if scheme.input is None or inputs is None:
        return found
    whole = FORMATS[scheme.input.number].tensor_scale is not None
    found["input_global_scale" if whole else "input_scale"] = torch.tensor([inputs.scale])
    if not scheme.input.symmetric:
        shift = 0 if inputs.qmin < 0 else 2 ** (scheme.input.bits - 1)  # its integers are signed, ours start at 0
        found["input_zero_point"] = torch.tensor([inputs.zero_point - shift], dtype=torch.int8)
    return found
