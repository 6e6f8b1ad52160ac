"""Export by tracing (`torch.onnx.export(dynamo=False)`): quick, and lean enough for weights of many gigabytes.

The graph is exported without its weights; they are then written straight from the model's tensors, those of linear
layers transposed on the way, as `MatMul` takes them. So the graph never passes through one protobuf message with
its weights, which may not exceed 2 GB, and nothing is held twice but the tensor that is being written.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import torch
from onnx import ModelProto
from torch import Tensor, nn

from qvl_hydra.onnx.export.towers import Exportable
from qvl_hydra.onnx.export.weights import write_model
from qvl_hydra.onnx.scoring.graph import WEIGHTED, Graph, lifted

NAME = "torchscript"
OPSETS = range(14, 21)


@torch.no_grad()
def export(target: Exportable, inputs: Mapping[str, Tensor], path: Path, opset: int, external: bool) -> dict[str, str]:
    """Write the graph of `target`.

    Args:
        inputs: examples, with two rows.
        path: of the ONNX file.
        external: whether weights go to a file of their own.

    Returns:
        For each product's node the module of `target.module` it belongs to.
    """
    with tempfile.TemporaryDirectory() as scratch, quiet():
        bare = Path(scratch) / "graph.onnx"
        torch.onnx.export(
            target.module,
            tuple(inputs.values()),
            str(bare),
            input_names=target.input_names,
            output_names=[target.output_name],
            dynamic_axes=target.axes,
            opset_version=opset,
            dynamo=False,
            export_params=False,
            do_constant_folding=False,
        )
        proto = onnx.load(bare)
    lifted(proto.graph)
    modules = _modules(proto, target.module)
    weights = _take_weights(proto, target)
    write_model(proto, weights, path, external)
    return modules


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters, which warn of their own internals and print their stages."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _take_weights(proto: ModelProto, target: Exportable) -> dict[str, Tensor]:
    """Turn the inputs that stand for parameters into initializers to come, transposed where only so used.

    Returns:
        The tensor of each initializer that has no data in `proto`.
    """
    tensors = {**dict(target.module.named_parameters()), **dict(target.module.named_buffers())}
    graph = Graph(proto, Path())
    for name in {name for node in proto.graph.node if node.op_type == "Identity" for name in node.input} & set(tensors):
        _bypass_identities(graph, name)
    given = set(target.input_names)
    kept = [item for item in proto.graph.input if item.name in given]
    names = [item.name for item in proto.graph.input if item.name not in given]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    graph = Graph(proto, Path())
    weights: dict[str, Tensor] = {}
    dropped: set[str] = set()
    for name in names:
        consumers = graph.consumers[name]
        turning = [node for node in consumers if node.op_type == "Transpose" and tensors[name].ndim == 2]
        for node in turning:
            weights[node.output[0]] = tensors[name].T
            dropped.update(node.output)
        if len(turning) < len(consumers):
            weights[name] = tensors[name]
    rest = [node for node in proto.graph.node if not dropped.intersection(node.output)]
    del proto.graph.node[:]
    proto.graph.node.extend(rest)
    return weights


def _bypass_identities(graph: Graph, name: str) -> None:
    """Let the consumers of a parameter's copies take the parameter itself (equal parameters are exported as one)."""
    for identity in [node for node in graph.consumers[name] if node.op_type == "Identity"]:
        for consumer in graph.consumers[identity.output[0]]:
            for place, given in enumerate(consumer.input):
                if given == identity.output[0]:
                    consumer.input[place] = name
        graph.proto.graph.node.remove(identity)


def _modules(proto: ModelProto, root: nn.Module) -> dict[str, str]:
    """The module of each product's node, from the scope in the node's name: `/vision/blocks.0/attn/qkv/MatMul`.

    A scope leaves out modules that were not called themselves: here `vision.visual.blocks.0.attn.qkv`.
    """
    paths = [(name, name.split(".")) for name, _ in root.named_modules() if name]
    found: dict[str, str] = {}
    for node in proto.graph.node:
        scope = node_scope(node.name).split(".")
        if node.op_type in WEIGHTED and scope[-1]:
            owners = [path for path, parts in paths if parts[-1] == scope[-1] and in_order(scope, parts)]
            if owners:
                found[node.name] = min(owners, key=len)
    return found


def in_order(some: list[str], parts: list[str]) -> bool:
    """Whether `parts` holds all of `some`, in their order."""
    rest = iter(parts)
    return all(part in rest for part in some)


def node_scope(name: str) -> str:
    """The module path in a traced node's name.

    `/merger/mlp/mlp.0/Gemm` is `merger.mlp.0`: a called container stands before its member's name, which has
    it too.
    """
    parts: list[str] = []
    for part in name.strip("/").split("/")[:-1]:
        if parts and part.startswith(parts[-1] + "."):
            parts.pop()
        parts.append(part)
    return ".".join(parts)
