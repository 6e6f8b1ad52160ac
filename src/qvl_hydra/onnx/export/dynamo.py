"""Export through `torch.export` (`torch.onnx.export(dynamo=True)`), the exporter that PyTorch goes on with.

Ten to thirty times slower than tracing, and it holds transposed weights beside the model's own.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qvl_hydra.onnx.export.torchscript import quiet
from qvl_hydra.onnx.export.towers import Exportable

NAME = "dynamo"
OPSETS = range(18, 24)


@torch.no_grad()
def export(target: Exportable, inputs: Mapping[str, Tensor], path: Path, opset: int, external: bool) -> dict[str, str]:
    """Write the graph of `target`; arguments and result as in `torchscript.export`."""
    free = {
        name: dict.fromkeys(target.axes[name], torch.export.Dim.DYNAMIC)  # type: ignore[attr-defined]
        for name in target.input_names
    }
    with quiet():
        program = torch.onnx.export(
            target.module,
            (),
            kwargs=dict(inputs),
            input_names=target.input_names,
            output_names=[target.output_name],
            dynamic_shapes=free,
            opset_version=opset,
            dynamo=True,
        )
        assert program is not None
        program.save(path, external_data=external)
    found: dict[str, str] = {}
    for node in program.model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        if len(scopes) > 1 and node.name:
            found[node.name] = scopes[-2]  # the last scope is the operation itself
    return found
