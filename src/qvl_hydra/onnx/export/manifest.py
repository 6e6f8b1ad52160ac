"""The manifest beside an exported graph: what it is, how it was made and checked, and which module each product is."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvl_hydra.errors import ExportError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Product:
    """One MatMul, Gemm or Conv node of the graph.

    Attributes:
        path: Hugging Face path of the module it belongs to: the operator's own, or that of the attention for a product
            of two activations; None where the exporter left no trace.
        operator: whether it is the product of an operator, with that operator's weight.
    """

    op_type: str
    path: str | None
    operator: bool


@dataclass(frozen=True)
class Manifest:
    """What is known of one exported graph.

    Attributes:
        graph, weights: files beside the manifest; no weights file where they are inside the graph.
        grid: frames, patch rows and columns of each image that the graph is fixed to; None for `lm`.
        image_size: height and width in pixels of each of these images.
        inputs: shape of each input, free dimensions by name.
        checked: what the comparison with PyTorch found.
        nodes: by node name.
    """

    component: str
    family: str
    model: str
    model_sha: str
    graph: str
    weights: str | None
    weight_bytes: int
    exporter: str
    opset: int
    versions: dict[str, str]
    grid: list[list[int]] | None
    image_size: list[list[int]] | None
    inputs: dict[str, list[int | str]]
    output: str
    checked: dict[str, Any]
    nodes: dict[str, Product]

    def operator_nodes(self) -> dict[str, list[str]]:
        """Node names of each operator, by Hugging Face path."""
        found: dict[str, list[str]] = {}
        for name, product in self.nodes.items():
            if product.operator and product.path is not None:
                found.setdefault(product.path, []).append(name)
        return found


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`."""
    text = json.dumps(dataclasses.asdict(manifest), indent=2)
    (folder / MANIFEST).write_text(text + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder that this project exported into; None where there is none.

    Raises:
        ExportError: the file is there and is no manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        nodes = {name: Product(**product) for name, product in content.pop("nodes").items()}
        return Manifest(**content, nodes=nodes)
    except (ValueError, TypeError, KeyError) as error:
        raise ExportError(
            f"{path} is no manifest of an exported graph ({error}); export again, or take the file away to score the "
            "graph by its node names"
        ) from error
