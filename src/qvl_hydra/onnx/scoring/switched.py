"""Prepares a graph so that one session scores every operator: quantize-dequantize behind a switch that is an input.

Rows of a batch are variants of one sample. The input `switch` says which operators are quantized in which row:

    y = product(x)                                    every row, as before
    rows = rows of operator i in the switch
    y[rows] = qdq_output(product_quantized(qdq_input(x[rows])))

so a row costs one forward, and an operator's quantized product is computed for the rows that ask for it alone; where
none does, the tensors between are empty. Weights are held as integers with their scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from qvl_hydra.onnx.export.integers import integer_weight
from qvl_hydra.onnx.scoring.graph import Graph, WeightedNode
from qvl_hydra.onnx.scoring.nodes import Builder, activation_qdq
from qvl_hydra.quantization.formats.record import QuantParams
from qvl_hydra.quantization.scheme import Scheme, WeightFormat

SWITCH = "switch"  # input: (line, row) of bool
Ranges = Mapping[str, tuple[QuantParams | None, QuantParams | None]]


@dataclass(frozen=True)
class SwitchedGraph:
    """A prepared graph.

    Attributes:
        proto: the model; its `switch` input has one line a unit.
        folder: of the external weights it refers to.
        arrays: integer weights, handed to the session beside the model.
    """

    proto: ModelProto
    folder: str
    arrays: dict[str, np.ndarray]


def switched(graph: Graph, units: Sequence[Sequence[WeightedNode]], scheme: Scheme, ranges: Ranges) -> SwitchedGraph:
    """Prepare a graph.

    Args:
        graph: is not changed.
        units: what one line of the switch puts into the scheme together: one operator, or a fused group.
        ranges: static input and output parameters by node name.
    """
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    switch = helper.make_tensor_value_info(SWITCH, TensorProto.BOOL, [len(units), "variant"])
    proto.graph.input.append(switch)
    work = _Preparation(graph, proto, scheme, ranges)
    head = work.builder("switch")
    count = head.add("Gather", [head.add("Shape", [SWITCH]), head.integers(1)])
    lines = {node.output: (line, node) for line, unit in enumerate(units) for node in unit}
    nodes = list(head.nodes)
    for node in graph.proto.graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        nodes.append(copy)
        if node.output and node.output[0] in lines:
            line, found = lines[node.output[0]]
            copy.output[0] = _before(found)
            nodes.extend(work.branch(found, line, count))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return SwitchedGraph(proto, str(graph.folder), work.arrays)


def _before(found: WeightedNode) -> str:
    """Name of an operator's output before rows of it are replaced."""
    return f"{found.output}/float"


@dataclass
class _Preparation:
    """The graph under preparation.

    Attributes:
        arrays: integer weights so far.
        runs: for an activation how many places of its first dimension make a row, and their numbers in it.
    """

    graph: Graph
    proto: ModelProto
    scheme: Scheme
    ranges: Ranges
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    runs: dict[str, tuple[str, str]] = field(default_factory=dict)

    def builder(self, prefix: str) -> Builder:
        return Builder(self.proto.graph, prefix, self.graph.opset)

    def branch(self, found: WeightedNode, line: int, count: str) -> list[NodeProto]:
        """The nodes that replace the rows of an operator's output which its line of the switch asks for.

        Their arithmetic is float32 whatever the graph's, as that of `quantization.qdq.quantized_operator`.
        """
        build = self.builder(f"quantized/{found.name}")
        kind = found.weight.data_type

        def in_float(name: str) -> str:
            return name if kind == TensorProto.FLOAT else build.add("Cast", [name], to=TensorProto.FLOAT)

        scheme, (inputs, output) = self.scheme, self.ranges.get(found.name, (None, None))
        places = self._places(build, found, line, count)
        x = in_float(build.add("Gather", [found.input, places]))
        x = activation_qdq(build, x, scheme.input, inputs, _token_axes(found))
        weight = in_float(found.node.input[1]) if scheme.weight is None else self._weight(build, found, scheme.weight)
        product = NodeProto()
        product.CopyFrom(found.node)
        product.name = y = f"{build.prefix}/product"
        del product.input[:]
        product.input.extend([x, weight, *(in_float(name) for name in found.node.input[2:] if name)])
        product.output[0] = y
        build.nodes.append(product)
        if found.add is not None:
            bias = next(name for name in found.add.input if name != found.node.output[0])
            y = build.add("Add", [y, in_float(bias)])
        y = activation_qdq(build, y, scheme.output, output, [-1])
        y = y if kind == TensorProto.FLOAT else build.add("Cast", [y], to=kind)
        column = build.add("Reshape", [places, build.integers(-1, 1)])
        build.add("ScatterND", [_before(found), column, y], found.output)
        return build.nodes

    def _places(self, build: Builder, found: WeightedNode, line: int, count: str) -> str:
        """Places of the asked rows in the first dimension of the operator's input and output.

        A row is a run of places: one place where the first dimension is the batch, many where it is patches.
        """
        if found.input not in self.runs:
            places = build.add("Gather", [build.add("Shape", [found.input]), build.integers(0)])
            each = build.add("Div", [places, count])
            numbers = [build.constant(np.array(0)), build.add("Squeeze", [each]), build.constant(np.array(1))]
            self.runs[found.input] = each, build.add("Range", numbers)
        each, inside = self.runs[found.input]
        asked = build.add("Gather", [SWITCH, build.constant(np.array(line, dtype=np.int64))])
        rows = build.add("Transpose", [build.add("NonZero", [asked])])  # (row, 1)
        spread = build.add("Add", [build.add("Mul", [rows, each]), inside])
        return build.add("Reshape", [spread, build.integers(-1)])

    def _weight(self, build: Builder, found: WeightedNode, form: WeightFormat) -> str:
        """Nodes that give the QDQ weight from its integers, in float32 and the layout that the product takes."""
        held = self.graph.array(found.weight)
        rounded = integer_weight(held.reshape(held.shape[0], -1) if found.output_first else held.T, form)
        inputs_first = found.output_first == found.turned  # in the product, after a transposition in between
        if inputs_first:
            rounded = rounded.transposed
        name = f"{build.prefix}/integers"
        self._hand_over(name, np.ascontiguousarray(rounded.integers))

        def of_inputs(value: np.ndarray) -> str:
            constant = build.constant(np.ascontiguousarray(value))
            if rounded.group is None:
                return constant
            return build.add("Gather", [constant, build.constant(rounded.group)], axis=0 if inputs_first else 1)

        value = build.add("Cast", [name], to=TensorProto.FLOAT)
        if not form.symmetric:
            value = build.add("Sub", [value, of_inputs(rounded.zero_point)])
        value = build.add("Mul", [value, of_inputs(rounded.scale)])
        if found.node.op_type == "Conv":
            value = build.add("Reshape", [value, build.integers(*held.shape)])
        return value

    def _hand_over(self, name: str, integers: np.ndarray) -> None:
        """Keep integers outside the model: with all operators' they would exceed what a protobuf message holds."""
        self.arrays[name] = integers
        kind = helper.np_dtype_to_tensor_dtype(integers.dtype)
        item = self.proto.graph.initializer.add(name=name, data_type=kind, data_location=TensorProto.EXTERNAL)
        item.dims.extend(integers.shape)
        item.external_data.add(key="location", value="handed over in memory")


def _token_axes(found: WeightedNode) -> list[int]:
    """Axes of the input that hold one token's values (a convolution's patch is one token)."""
    return list(range(1, len(found.weight.dims))) if found.node.op_type == "Conv" else [-1]
