"""Quantize-dequantize spelt out as ONNX nodes of float operators: the arithmetic of `quantization.qdq`.

Every number of bits is served alike, and no runtime replaces scale, round and clip with an integer kernel that rounds
in its own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, helper, numpy_helper

from qvl_hydra.quantization.formats.integer import SMALLEST_SCALE
from qvl_hydra.quantization.formats.record import QuantParams
from qvl_hydra.quantization.scheme import ActivationFormat

AXES_AS_INPUT = 18  # opset from which reductions take their axes as an input


class Builder:
    """Collects nodes and constants under one prefix.

    Args:
        graph: gets the constants.
        prefix: of all names.
        opset: of the graph.
    """

    def __init__(self, graph: GraphProto, prefix: str, opset: int) -> None:
        self.graph = graph
        self.prefix = prefix
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self.constants = 0

    def constant(self, value: np.ndarray) -> str:
        """Name of a new initializer."""
        name = f"{self.prefix}/constant{self.constants}"
        self.constants += 1
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def number(self, value: float) -> str:
        return self.constant(np.array(value, dtype=np.float32))

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, dtype=np.int64))

    def add(self, op_type: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """Append a node; the name of its output."""
        name = f"{self.prefix}/{op_type}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output or name], name=name, **attributes))
        return output or name

    def reduce(self, op_type: str, x: str, axes: Sequence[int]) -> str:
        """A reduction over some axes, which stay as one."""
        if self.opset < AXES_AS_INPUT:
            return self.add(op_type, [x], axes=list(axes), keepdims=1)
        return self.add(op_type, [x, self.integers(*axes)], keepdims=1)


def activation_qdq(
    build: Builder, x: str, form: ActivationFormat | None, params: QuantParams | None, axes: Sequence[int]
) -> str:
    """Nodes of `quantization.qdq.qdq_activation`; the name of `x` itself where the scheme leaves it in float.

    Args:
        x: a float32 value.
        axes: that hold the values of one token, for a format with dynamic ranges.
    """
    if form is None:
        return x
    if form.dynamic:
        return _dynamic(build, x, form, axes)
    assert params is not None, "a static format was used before its range was observed"
    return _static(build, x, params)


def _static(build: Builder, x: str, params: QuantParams) -> str:
    """`qdq_static`; the zero point goes into the limits, which changes no value: all of them are whole numbers."""
    inverse = float(np.float32(1.0) / np.float32(params.scale))
    rounded = build.add("Round", [build.add("Mul", [x, build.number(inverse)])])
    low, high = params.qmin - params.zero_point, params.qmax - params.zero_point
    clipped = build.add("Clip", [rounded, build.number(low), build.number(high)])
    return build.add("Mul", [clipped, build.number(params.scale)])


def _dynamic(build: Builder, x: str, form: ActivationFormat, axes: Sequence[int]) -> str:
    """`qdq_rows`: scale and zero point of each token from the token itself."""
    zero = build.number(0.0)
    low = build.add("Min", [build.reduce("ReduceMin", x, axes), zero])
    high = build.add("Max", [build.reduce("ReduceMax", x, axes), zero])
    qmin, qmax = form.limits
    limits = build.number(qmin), build.number(qmax)
    if form.symmetric:
        reach = build.add("Max", [build.add("Neg", [low]), high])
        raw = build.add("Div", [reach, build.number((qmax - qmin) / 2)])
    else:
        raw = build.add("Div", [build.add("Sub", [high, low]), build.number(qmax - qmin)])
    scale = build.add("Max", [raw, build.number(SMALLEST_SCALE)])
    rounded = build.add("Round", [build.add("Mul", [x, build.add("Reciprocal", [scale])])])
    if form.symmetric:
        return build.add("Mul", [build.add("Clip", [rounded, *limits]), scale])
    offset = build.add("Round", [build.add("Div", [low, scale])])
    zero_point = build.add("Clip", [build.add("Sub", [limits[0], offset]), *limits])
    integers = build.add("Clip", [build.add("Add", [rounded, zero_point]), *limits])
    return build.add("Mul", [build.add("Sub", [integers, zero_point]), scale])
