"""Writes ONNX models: weights inside the file, or all of them in one file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from onnx import ModelProto, TensorProto
from torch import Tensor

PROTOBUF_LIMIT = 1_900_000_000  # bytes; a protobuf message ends at 2**31, and the graph needs some of it
ALIGNMENT = 4096  # bytes; weights begin on a page, so that they can be mapped
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.bool: TensorProto.BOOL,
}


def data_file(path: Path) -> Path:
    """The file that holds a model's external weights."""
    return path.with_name(path.name + ".data")


def weight_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that these tensors take in a file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_model(proto: ModelProto, tensors: Mapping[str, Tensor], path: Path, external: bool) -> None:
    """Write a model whose weights are PyTorch tensors, one tensor in memory at a time.

    Args:
        proto: the graph; gets an initializer for each of `tensors`.
        external: weights go to `<path>.data`; they do in any case when they exceed what one file can hold.
    """
    if external or weight_bytes(tensors) > PROTOBUF_LIMIT:
        with data_file(path).open("wb") as stream:
            for name, tensor in tensors.items():
                stream.seek(-stream.tell() % ALIGNMENT, 1)
                offset = stream.tell()
                data = raw_bytes(tensor)
                stream.write(data)
                _initializer(proto, name, tensor, None, (data_file(path).name, offset, len(data)))
    else:
        for name, tensor in tensors.items():
            _initializer(proto, name, tensor, raw_bytes(tensor), None)
    onnx.save(proto, path)


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values as little-endian bytes, row by row."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


def _initializer(
    proto: ModelProto, name: str, tensor: Tensor, data: memoryview | None, place: tuple[str, int, int] | None
) -> None:
    item = proto.graph.initializer.add()
    item.name = name
    item.data_type = TYPES[tensor.dtype]
    item.dims.extend(tensor.shape)
    if data is not None:
        item.raw_data = data.tobytes()
    if place is not None:
        item.data_location = TensorProto.EXTERNAL
        for key, value in zip(("location", "offset", "length"), place, strict=True):
            entry = item.external_data.add()
            entry.key, entry.value = key, str(value)
