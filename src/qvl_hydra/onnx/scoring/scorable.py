"""A graph that can be scored: its operators by name, and its inputs for a sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import ExportError
from qvl_hydra.onnx.export.check import as_arrays
from qvl_hydra.onnx.export.manifest import Manifest
from qvl_hydra.onnx.export.towers import sample_inputs
from qvl_hydra.onnx.export.vision import LAYOUT_AXES
from qvl_hydra.onnx.scoring.graph import Graph, WeightedNode, read_graph, weighted_nodes

Arrays = dict[str, Any]
ROW_AXES = {"position_ids": 1}  # M-RoPE positions have the three dimensions first; other inputs have rows first
# Inputs that hold for all rows alike.
UNROWED = frozenset({"use_cache_branch", "num_logits_to_keep", "cache_position", *LAYOUT_AXES})


@dataclass(frozen=True)
class Scorable:
    """One graph with what scoring it takes.

    Attributes:
        nodes: the products of each operator, by operator path.
        takes: whether a sample suits the graph's fixed sizes, and has the images it asks for.
        feeds: a sample's inputs with one row.
        output: name of the output that scores are measured on.
        rows: most rows that a call may have; None where they are free.
    """

    path: Path
    graph: Graph
    nodes: Mapping[str, tuple[WeightedNode, ...]]
    takes: Callable[[Sample], bool]
    feeds: Callable[[Sample], Arrays]
    output: str
    rows: int | None


def own_scorable(path: Path, manifest: Manifest, module: nn.Module) -> Scorable:
    """A graph that this project exported; embeddings for `lm` come from the model itself.

    Raises:
        ExportError: the graph is not the one that the manifest is of.
    """
    graph = read_graph(path)
    found = {node.name: node for node in weighted_nodes(graph)}
    nodes: dict[str, tuple[WeightedNode, ...]] = {}
    for operator, names in manifest.operator_nodes().items():
        missing = [name for name in names if name not in found]
        if missing:
            raise ExportError(f"{path} has no node {missing[0]}, which its manifest names; export it again")
        nodes[operator] = tuple(found[name] for name in names)
    grid = manifest.grid

    def takes(sample: Sample) -> bool:
        given = sample.image_grid_thw
        return manifest.component == "lm" or (given is not None and grid in (None, given.tolist()))

    made: dict[str, Arrays] = {}  # each sample is fed more than once: timed, observed, scored

    def feeds(sample: Sample) -> Arrays:
        if sample.id not in made:
            made[sample.id] = as_arrays(sample_inputs(module, sample, manifest.component, grid is None))
        return made[sample.id]

    return Scorable(path, graph, nodes, takes, feeds, manifest.output, None)


def repeat_rows(feeds: Mapping[str, Any], rows: int) -> Arrays:
    """The inputs of one row, `rows` times behind each other."""
    if rows == 1:
        return dict(feeds)
    return {
        name: value
        if name in UNROWED
        else np.concatenate([value] * rows, axis=ROW_AXES.get(name, 0) if value.ndim == 3 else 0)
        for name, value in feeds.items()
    }


def split_rows(output: Any, rows: int) -> Any:
    """An output as (row, token, value), whether its first dimension is rows or the tokens of all rows in a run."""
    return output.reshape(rows, -1, output.shape[-1])


def units_of(scorable: Scorable, groups: Sequence[Sequence[str]]) -> list[list[WeightedNode]]:
    """The products of each group of operators, those that the graph does not hold left out."""
    return [[node for path in group for node in scorable.nodes.get(path, ())] for group in groups]
