"""Reads an ONNX graph: its weights without loading them all, and its weighted operators (MatMul, Gemm, Conv).

Works on graphs of any exporter. A weight is an initializer that reaches the operator directly, or through nodes that
only name or transpose it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvl_hydra.errors import ExportError, MissingExtraError

try:
    import onnx
    from onnx import external_data_helper, numpy_helper
except ImportError as error:
    raise MissingExtraError("onnx", "onnx", "reading and writing ONNX graphs") from error

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

WEIGHTED = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True)
class WeightedNode:
    """A product with a constant weight, and the addition of its bias where that is a node of its own.

    Attributes:
        name: of the node, made from its output where the exporter gave none.
        node: the product.
        add: the node that adds the bias, or None.
        weight: initializer that holds the weight.
        turned: whether the weight reaches the product through a transposition.
        bias: initializer of the bias, or None.
    """

    name: str
    node: NodeProto
    add: NodeProto | None
    weight: TensorProto
    turned: bool
    bias: TensorProto | None

    @property
    def input(self) -> str:
        """Name of the activation that goes in."""
        return str(self.node.input[0])

    @property
    def output(self) -> str:
        """Name of the activation that comes out, bias added."""
        return str((self.add or self.node).output[0])

    @property
    def output_first(self) -> bool:
        """Whether output channels are the weight's first dimension, as it is stored."""
        if self.node.op_type == "Conv":
            return True
        if self.node.op_type == "Gemm":
            return bool(attribute(self.node, "transB", 0)) != self.turned
        return self.turned

    @property
    def features(self) -> tuple[int, int]:
        """Width of a token before and after."""
        dims = list(self.weight.dims)
        if not self.output_first:
            dims.reverse()
        return int(np.prod(dims[1:])), int(dims[0])


@dataclass
class Graph:
    """An ONNX model without the data of its external weights.

    Attributes:
        proto: the model; external tensors hold their place in a file instead of data.
        folder: what external data locations are relative to.
    """

    proto: ModelProto
    folder: Path
    initializers: dict[str, TensorProto] = field(init=False)
    consumers: dict[str, list[NodeProto]] = field(init=False)
    producers: dict[str, NodeProto] = field(init=False)

    def __post_init__(self) -> None:
        self.initializers = {item.name: item for item in self.proto.graph.initializer}
        self.consumers = defaultdict(list)
        self.producers = {}
        for node in self.proto.graph.node:
            for name in node.input:
                self.consumers[name].append(node)
            for name in node.output:
                self.producers[name] = node

    @property
    def inputs(self) -> dict[str, list[int | str]]:
        """Shape of each input that is no initializer: sizes, or names of free dimensions."""
        return {
            item.name: [
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in item.type.tensor_type.shape.dim
            ]
            for item in self.proto.graph.input
            if item.name not in self.initializers
        }

    @property
    def outputs(self) -> list[str]:
        return [item.name for item in self.proto.graph.output]

    @property
    def opset(self) -> int:
        return next(item.version for item in self.proto.opset_import if item.domain in ("", "ai.onnx"))

    def array(self, tensor: TensorProto) -> np.ndarray:
        """The values of an initializer; external ones are read (mapped, not copied) from their file."""
        if not external_data_helper.uses_external_data(tensor):
            return numpy_helper.to_array(tensor)
        place = {item.key: item.value for item in tensor.external_data}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        shape = tuple(tensor.dims)
        path = self.folder / place["location"]
        return np.memmap(path, dtype=dtype, mode="r", offset=int(place.get("offset", 0)), shape=shape)


def read_graph(path: Path) -> Graph:
    """Read a model file without its external weights.

    Raises:
        ExportError: the file is missing or no ONNX model, or a file of its weights is missing.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such file; give an ONNX file, or the folder that holds it")
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own errors, which change their class between releases
        raise ExportError(f"{path}: no ONNX model ({type(error).__name__}: {error})") from error
    if not proto.graph.node:
        raise ExportError(f"{path}: the ONNX model has no nodes")
    lifted(proto.graph)
    return Graph(proto, _followed(proto, path))


def _followed(proto: ModelProto, path: Path) -> Path:
    """The folder that external weights lie in, their locations relative to it, links followed.

    ONNX Runtime takes no file from outside of one folder, and a hub's cache links every file to a folder of blobs.
    """
    places = [
        item
        for tensor in proto.graph.initializer
        if external_data_helper.uses_external_data(tensor)
        for item in tensor.external_data
        if item.key == "location"
    ]
    named = sorted({place.value for place in places})
    if outside := [name for name in named if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ExportError(f"{path}: its weights are named outside of its folder: {', '.join(outside)}")
    if missing := [name for name in named if not (path.parent / name).is_file()]:
        raise ExportError(f"{path}: its weights are missing; put {', '.join(missing)} beside it")
    files = {name: (path.parent / name).resolve() for name in named}
    if all(file.is_relative_to(path.parent.resolve()) for file in files.values()):
        return path.parent
    folder = Path(os.path.commonpath([file.parent for file in files.values()]))
    for place in places:
        place.value = str(files[place.value].relative_to(folder))
    return folder


def lifted(graph: GraphProto) -> None:
    """Turn `Constant` nodes that hold a tensor into initializers, in place."""
    kept = []
    for node in graph.node:
        value = next((item for item in node.attribute if item.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            tensor = graph.initializer.add()
            tensor.CopyFrom(value.t)
            tensor.name = node.output[0]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def weighted_nodes(graph: Graph) -> Iterator[WeightedNode]:
    """Every product with a constant weight, in graph order."""
    for node in graph.proto.graph.node:
        if node.op_type not in WEIGHTED or node.domain not in ("", "ai.onnx"):
            continue
        found = constant(graph, node.input[1])
        if found is None:
            continue
        weight, turned = found
        if len(weight.dims) < 2:
            continue
        bias, add = None, None
        if len(node.input) > 2 and node.input[2]:
            held = constant(graph, node.input[2])
            bias = None if held is None else held[0]
        elif node.op_type == "MatMul":
            add, bias = _bias_after(graph, node)
        yield WeightedNode(node.name or f"{node.op_type}:{node.output[0]}", node, add, weight, turned, bias)


def constant(graph: Graph, name: str) -> tuple[TensorProto, bool] | None:
    """The initializer behind a name, and whether it comes transposed; None where the value is computed."""
    turned = False
    while name not in graph.initializers:
        producer = graph.producers.get(name)
        if producer is None or producer.op_type not in ("Identity", "Transpose"):
            return None
        if producer.op_type == "Transpose":
            if list(attribute(producer, "perm", [1, 0])) != [1, 0]:
                return None
            turned = not turned
        name = producer.input[0]
    return graph.initializers[name], turned


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """An attribute of a node, or `default`."""
    found = next((item for item in node.attribute if item.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def _bias_after(graph: Graph, node: NodeProto) -> tuple[NodeProto | None, TensorProto | None]:
    """The addition of a constant vector that alone consumes the product, and the vector."""
    consumers = graph.consumers[node.output[0]]
    if len(consumers) != 1 or consumers[0].op_type != "Add" or node.output[0] in graph.outputs:
        return None, None
    other = next((name for name in consumers[0].input if name != node.output[0]), None)
    held = None if other is None else constant(graph, other)
    if held is None or len(held[0].dims) != 1:
        return None, None
    return consumers[0], held[0]
