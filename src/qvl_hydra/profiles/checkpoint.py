"""Writes a compressed-tensors checkpoint that plain transformers and vLLM load, in one scheme or several.

Quantized experts are stored one by one, as vLLM reads them; transformers does not.

The numbers are those of our QDQ: weights go through the package's own compressors with the scales that QDQ took, static
inputs have their scale and zero point. Operators that are not quantized are stored as they are. What is made is put on
the disk as it is made, so that neither the rounded weights nor the stored ones have to fit in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qvl_hydra.families.record import HEAD
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.models.stream import Checkpoint
from qvl_hydra.operators.discover import Operator, find_operators
from qvl_hydra.profiles.apply import quantizer_key
from qvl_hydra.profiles.formats.compressed_tensors import checkpoint_format, config_group, quantization_config
from qvl_hydra.profiles.names import modules_of_experts
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.profiles.storable import require_storable, unpacked_narrow
from qvl_hydra.quantization.apply import shared_largest
from qvl_hydra.quantization.formats.table import FORMATS
from qvl_hydra.quantization.qdq import OperatorQuantizer, weight_scales

BESIDE = ("*.json", "*.jinja", "*.txt", "*.model")  # tokenizer, templates, image processor
PART_BYTES = 1 << 29  # of what is made, in memory at most before it goes to the disk


def write_checkpoint(
    model: LoadedModel,
    profile: Profile,
    quantizers: Mapping[str, OperatorQuantizer],
    folder: Path,
    each: Callable[[], None] = lambda: None,
) -> None:
    """Write the model with the profile's low operators in their schemes. Needs `compressed_tensors`.

    Args:
        model: the float model, resident or streamed.
        quantizers: of every low operator, see `quantizer_key`; asked for once each, and not kept.
        folder: made if need be; holds weights, config, tokenizer and image processor afterwards. While it is written
            the quantized weights are on the disk twice.
        each: called after each low operator.

    Raises:
        ProfileError: what such a checkpoint cannot hold, naming the operators.
    """
    every = find_operators(model.module, "full")
    require_storable(profile)
    config = quantization_config(profile, every, "hugging_face")
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in BESIDE:
        for path in model.description.folder.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
    with _emptied(folder.with_name(f"{folder.name}.parts")) as parts:
        state = _state(model, profile, every, quantizers, parts, each)
        # Under transformers' own names: what they rename, versions before 5.21 load in the dtype that it is stored in
        # (float32 scales into a model in bfloat16), and experts they would turn from what `_experts` gives.
        model.module.save_pretrained(folder, state_dict=state, save_original_format=False)  # type: ignore[operator]
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = config
    text = content.get("text_config", content)  # a model for text alone has one config
    dtype = torch.bfloat16 if unpacked_narrow(profile) else model.dtype
    for part in (content, text, content.get("vision_config", text)):
        part["dtype"] = str(dtype).removeprefix("torch.")
    if any(op.path == HEAD for op in profile.low):  # a quantized head shares nothing with the embedding any more
        content["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def _state(
    model: LoadedModel,
    profile: Profile,
    every: Sequence[Operator],
    quantizers: Mapping[str, OperatorQuantizer],
    parts: Path,
    each: Callable[[], None],
) -> dict[str, Tensor]:
    """All that is stored, by name; what is made or read for it lies in files below `parts`."""
    low, experts = {op.path for op in profile.low}, [op for op in every if op.experts > 1]
    others = {f"{path}.weight" for path in (*low, *(op.path for op in experts))}
    high = {name: tensor for name, tensor in model.module.state_dict().items() if name not in others}
    streamed = {name: tensor for name, tensor in high.items() if tensor.is_meta}
    made = [_compressed(model, part, quantizers, each) for part in profile.by_scheme()]
    kept = _experts(model, [op for op in experts if op.path not in low])
    found = _on_disk(chain(*made, kept, _read(model, streamed)), parts)
    return {name: tensor for name, tensor in high.items() if not tensor.is_meta} | found


def _compressed(
    model: LoadedModel, profile: Profile, quantizers: Mapping[str, OperatorQuantizer], each: Callable[[], None]
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
                assert quantizer.weight is not None
                tensors = {"weight": quantizer.weight} | _scales(model.module, op, quantizer, largest.get(op.group))
                for path, own in _modules(op, tensors):
                    for name, tensor in compressor.compress(own, group).items():
                        yield f"{path}.{name}", tensor
                each()


def _modules(op: Operator, tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What is stored of an operator by module: itself, or each product of each of its experts."""
    if op.experts == 1:
        yield op.path, tensors
        return
    paths = modules_of_experts(op, range(op.experts))
    parted = {
        name: tensor.chunk(len(paths)) if len(tensor) % len(paths) == 0 else [tensor] * len(paths)
        for name, tensor in tensors.items()
    }
    for index, path in enumerate(paths):
        yield path, {name: found[index].clone() for name, found in parted.items()}


def _experts(model: LoadedModel, operators: Sequence[Operator]) -> Iterator[tuple[str, Tensor]]:
    """Experts that are not quantized, (expert, in, out) as published checkpoints have them, and vLLM reads them."""
    for op in operators:
        with model.weights([op.path]):
            weight = model.module.get_submodule(op.path).get_parameter("weight")
            yield op.path, weight.unflatten(0, (op.experts, -1)).mT


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
