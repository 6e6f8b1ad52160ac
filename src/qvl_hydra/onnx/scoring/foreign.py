"""Graphs that others exported: their operators, and their inputs for a sample.

One file, or the layout of the community's exports for browsers and mobile devices: `embed_tokens.onnx`,
`vision_encoder.onnx` and `decoder_model_merged.onnx` in a folder, the decoder with past keys and values as inputs.
Source: the model cards of onnx-community's Qwen2-VL exports. One file because the names of a layout, its inputs and
its refusals are one contract with graphs that this package does not write.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ValueInfoProto, helper
from torch import nn

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import ExportError
from qvl_hydra.models.load import LoadedModel, ModelDescription
from qvl_hydra.onnx.export.manifest import Manifest, read_manifest
from qvl_hydra.onnx.export.torchscript import in_order, node_scope
from qvl_hydra.onnx.scoring.graph import Graph, WeightedNode, read_graph, weighted_nodes
from qvl_hydra.onnx.scoring.scorable import ROW_AXES, UNROWED, Arrays, Scorable, split_rows
from qvl_hydra.onnx.scoring.session import Device, open_session
from qvl_hydra.operators.discover import Operator, find_operators

# Names of the three files, the plain float one first; a folder `onnx` below is looked into as well.
FILES = {
    "lm": ("decoder_model_merged.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx", "model.onnx"),
    "vision": ("vision_encoder.onnx", "vision_model.onnx"),
    "full": ("model.onnx",),
    "embed": ("embed_tokens.onnx",),
}
FLAGS = ("use_cache_branch", "num_logits_to_keep", "cache_position")
GRID_NAMES = ("image_grid_thw", "grid_thw")


def find_graph(path: str | Path, component: str) -> tuple[Path, Manifest | None]:
    """The ONNX file that `backend.graph` means for a component, and its manifest when this project exported it.

    Raises:
        ExportError: there is none, or the folder holds an export of another component.
    """
    given = Path(path).expanduser()
    if given.is_file():
        manifest = read_manifest(given.parent)
        return given, manifest if manifest is not None and manifest.graph == given.name else None
    if not given.is_dir():
        raise ExportError(
            f"backend.graph={path}: no such file or folder; give an ONNX file or the folder that holds it"
        )
    for folder in (given, given / component):
        manifest = read_manifest(folder)
        if manifest is not None and manifest.component == component:
            return folder / manifest.graph, manifest
    found = _in_folder(given, component)
    if found is None:
        manifest = read_manifest(given)
        holds = f"an export of component={manifest.component}" if manifest else f"none of {', '.join(FILES[component])}"
        raise ExportError(
            f"backend.graph={path}, component={component}: the folder holds {holds}; give the file itself"
        )
    return found, None


def _in_folder(folder: Path, part: str) -> Path | None:
    candidates = [base / name for base in (folder, folder / "onnx") for name in FILES[part]]
    return next((path for path in candidates if path.is_file()), None)


def is_foreign(path: str | Path, component: str) -> bool:
    """Whether `backend.graph` is a graph without a manifest of this project; see `find_graph`."""
    return find_graph(path, component)[1] is None


def graph_operators(path: str | Path, component: str, skeleton: nn.Module | None = None) -> list[Operator]:
    """The operators of a graph: every product with a constant weight, in graph order.

    An operator gets its Hugging Face path where the node's scope names one module of the skeleton with that weight's
    shape; else the node's own name.

    Args:
        path: file or folder.
        skeleton: the Hugging Face model of the same shape, without weights.

    Raises:
        ExportError: no such graph, or it has no such product (quantized already, say).
    """
    file, _ = find_graph(path, component)
    graph = read_graph(file)
    known = [] if skeleton is None else find_operators(skeleton, component)
    found = [_operator(node, component, known) for node in weighted_nodes(graph)]
    if not found:
        inside = sorted({node.op_type for node in graph.proto.graph.node})
        raise ExportError(
            f"{file} has no MatMul, Gemm or Conv with a constant weight to score (it has {', '.join(inside[:8])}); "
            "give the float32 or float16 export, not a quantized one, and no graph with its layers inside an If"
        )
    return found


def _operator(node: WeightedNode, component: str, known: Sequence[Operator]) -> Operator:
    into, out = node.features
    scope = _scope(node)
    matches = [
        op
        for op in known
        if scope and (op.in_features, op.out_features) == (into, out) and _named(op.path.split("."), scope)
    ]
    if len(matches) == 1:
        return replace(matches[0], kind=node.node.op_type)
    block = re.search(r"(?:layers|blocks)\.(\d+)\.", ".".join(scope))
    n_params = into * out + (0 if node.bias is None else out)
    role = scope[-1] if scope else node.node.op_type
    return Operator(
        node.name,
        component,
        int(block.group(1)) if block else None,
        role,
        node.name,
        node.node.op_type,
        into,
        out,
        n_params,
        known[0].family if known else "",
    )


def _scope(node: WeightedNode) -> list[str]:
    """Names of the modules around a node: from metadata (torch's new exporter), else from the node's name."""
    for item in node.node.metadata_props:
        if item.key == "pkg.torch.onnx.name_scopes":
            scopes = ast.literal_eval(item.value)
            return str(scopes[-2]).split(".") if len(scopes) > 1 else []
    scope = node_scope(node.name)
    return scope.split(".") if scope else []


def _named(path: list[str], scope: list[str]) -> bool:
    """Whether a scope names a module: it may leave out parts of its path, or have a wrapper's names before it."""
    shared = [part for part in scope if part in path]
    return path[-1] == scope[-1] and in_order(shared, path) and _members(path) == _members(scope)


def _members(parts: Sequence[str]) -> list[tuple[str, str]]:
    """Indexed members of containers: `blocks`, `3`."""
    return [pair for pair in pairwise(parts) if pair[1].isdigit()]


def graph_model(description: ModelDescription, path: str | Path, component: str) -> LoadedModel:
    """What stands for the model when a foreign graph is scored: its shape without weights, the graph's hash."""
    file, _ = find_graph(path, component)
    digest = hashlib.sha256(file.read_bytes())
    graph = read_graph(file)
    for tensor in graph.initializers.values():
        for item in tensor.external_data:
            digest.update(f"{item.key}={item.value}".encode())
    for location in sorted(external_files(graph)):
        digest.update(f"{location}:{(graph.folder / location).stat().st_size}".encode())
    return LoadedModel(description.skeleton, description, torch.device("cpu"), digest.hexdigest()[:16])


def external_files(graph: Graph) -> set[str]:
    """Files that hold external weights, relative to the graph's folder."""
    return {
        item.value for tensor in graph.initializers.values() for item in tensor.external_data if item.key == "location"
    }


def foreign_scorable(path: Path, component: str, skeleton: nn.Module, image_token: int, device: Device) -> Scorable:
    """A graph that others exported, ready to be scored.

    Raises:
        ExportError: it has an input that cannot be filled.
    """
    graph = read_graph(path)
    known = find_operators(skeleton, component)
    nodes: dict[str, tuple[WeightedNode, ...]] = {}
    for node in weighted_nodes(graph):
        name = _operator(node, component, known).path
        nodes[name] = (*nodes.get(name, ()), node)
    reader = InputReader(path, graph, image_token, device)
    scorable = Scorable(path, graph, nodes, reader.takes, reader.feeds, graph.outputs[0], None)
    return replace(scorable, rows=1 if _has_fixed_rows(graph) else None)


def _has_fixed_rows(graph: Graph) -> bool:
    """Whether the first dimension of an activation input is a number."""
    return any(
        shape and isinstance(shape[ROW_AXES.get(name, 0) if len(shape) == 3 else 0], int)
        for name, shape in graph.inputs.items()
        if name not in UNROWED and name not in GRID_NAMES
    )


def rows_are_free(run: Callable[[int], Any]) -> bool:
    """Whether two rows in one call give each the output of one row alone; tried, since a graph does not say.

    Args:
        run: the graph's output for so many rows of one sample.
    """
    alone = run(1)
    try:
        both = run(2)
    except Exception:  # whatever the runtime cannot do with two rows
        return False
    if both.size != 2 * alone.size:
        return False
    return bool(np.allclose(split_rows(both, 2), split_rows(alone, 1), rtol=1e-3, atol=1e-4 * np.abs(alone).max()))


class InputReader:
    """Fills a graph's inputs from a sample, by their names.

    Embeddings come from the graphs beside it: token embeddings, with the vision encoder's features in the places of
    image tokens. Keys and values of the past are empty.

    Args:
        path: of the graph.
        image_token: id of the token whose embedding is replaced.
    """

    def __init__(self, path: Path, graph: Graph, image_token: int, device: Device) -> None:
        self.path = path
        self.device = device
        self.image_token = image_token
        self.infos = [item for item in graph.proto.graph.input if item.name not in graph.initializers]
        self.shapes = graph.inputs
        self.sessions: dict[str, tuple[Any, InputReader]] = {}
        self.embedded: dict[str, Any] = {}
        unknown = [info.name for info in self.infos if not _fills(info.name)]
        if unknown:
            raise ExportError(f"{path}: cannot fill the inputs {', '.join(unknown)}; known are {', '.join(KNOWN)}")

    def takes(self, sample: Sample) -> bool:
        """Whether the sample suits the graph's fixed sizes, and has the image it asks for."""
        return self._inputs(sample) is not None

    def feeds(self, sample: Sample) -> Arrays:
        """Inputs with one row."""
        found = self._inputs(sample)
        assert found is not None, "the graph does not take this sample"
        return found

    def _inputs(self, sample: Sample) -> Arrays | None:
        feeds: Arrays = {}
        for info in self.infos:
            value = self._value(info, sample)
            if value is None or not _suits(value.shape, self.shapes[info.name]):
                return None
            feeds[info.name] = value.astype(helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type))
        return feeds

    def _value(self, info: ValueInfoProto, sample: Sample) -> Any:
        name, tokens = info.name, len(sample.input_ids)
        shape = self.shapes[name]
        if name == "input_ids":
            return sample.input_ids[None].numpy()
        if name == "inputs_embeds":
            return self._embeddings(sample)
        if name == "attention_mask":
            return np.ones((1, tokens))
        if name == "position_ids":
            return sample.position_ids[:, None].numpy() if len(shape) == 3 else np.arange(tokens)[None]
        if name in GRID_NAMES:
            return None if sample.image_grid_thw is None else sample.image_grid_thw.numpy()
        if name == "pixel_values":
            pixels = None if sample.pixel_values is None else sample.pixel_values.numpy()
            return pixels if pixels is None or len(shape) == 2 else pixels[None]
        if name.startswith("past_key_values"):
            return np.zeros([1] + [size if isinstance(size, int) else 0 for size in shape[1:]])
        if name == "cache_position":
            return np.arange(tokens)
        # use_cache_branch, num_logits_to_keep: no cache, all logits
        return np.zeros([size if isinstance(size, int) else 1 for size in shape])

    def _embeddings(self, sample: Sample) -> Any:
        if sample.id not in self.embedded:
            embeds = self._beside("embed", sample).copy()
            if sample.pixel_values is not None:
                features = self._beside("vision", sample)
                embeds[0, (sample.input_ids == self.image_token).numpy()] = features.reshape(-1, features.shape[-1])
            self.embedded[sample.id] = embeds
        return self.embedded[sample.id]

    def _beside(self, part: str, sample: Sample) -> Any:
        """Output of the graph beside this one that embeds tokens, or images."""
        if part not in self.sessions:
            file = _in_folder(self.path.parent, part)
            if file is None:
                raise ExportError(
                    f"{self.path} takes inputs_embeds, and none of {', '.join(FILES[part])} is beside it to make them"
                )
            reader = InputReader(file, read_graph(file), self.image_token, self.device)
            self.sessions[part] = open_session(file, self.device), reader
        session, reader = self.sessions[part]
        feeds = reader._inputs(sample)
        if feeds is None:
            raise ExportError(f"{reader.path} does not take sample {sample.id}: its input sizes are fixed to others")
        return session.run(None, feeds)[0]

    def close(self) -> None:
        """Give the memory of the embedding graphs back; embeddings made so far stay."""
        self.sessions.clear()


KNOWN = (
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "pixel_values", *GRID_NAMES, "past_key_values.*",
    *FLAGS,
)  # fmt: skip


def _fills(name: str) -> bool:
    return name in KNOWN or name.startswith("past_key_values")


def _suits(given: Sequence[int], wanted: Sequence[int | str]) -> bool:
    return len(given) == len(wanted) and all(
        not isinstance(size, int) or size == have for have, size in zip(given, wanted, strict=True)
    )
