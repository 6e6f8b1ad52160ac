"""Neural Compressor's ONNX Runtime adaptor, made ready for a graph of this project or of others.

What it is mended for: it reads `onnx.mapping`, which current onnx no longer has; it cannot find external data, so the
weights are put into the model; with every operator type allowed it writes graphs that ONNX Runtime refuses.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

# isort: split
import onnx
from neural_compressor.adaptor import FRAMEWORKS
from neural_compressor.config import options
from neural_compressor.model.onnx_model import ONNXModel
from onnx import TensorProto, helper

from qvl_hydra.backends.neural_compressor.adaptor import ALGORITHMS
from qvl_hydra.errors import EngineError
from qvl_hydra.models.memory import GIB, free_memory_bytes
from qvl_hydra.onnx.export.weights import PROTOBUF_LIMIT
from qvl_hydra.onnx.scoring.graph import Graph
from qvl_hydra.onnx.scoring.scorable import Arrays, Scorable
from qvl_hydra.onnx.scoring.session import CUDA, Device
from qvl_hydra.quantization.scheme import Scheme

KINDS = ("MatMul", "Gemm", "Conv")
COPIES = 6  # of the graph at once: its own, two deep copies, and serialized ones on their way into sessions
FLOAT = {"activation": {"dtype": "fp32", "quant_mode": "fp32"}, "weight": {"dtype": "fp32"}}
Key = tuple[str, str]  # Neural Compressor's name of an operator: node name, operator type


@contextmanager
def onnx_mapping() -> Iterator[None]:
    """`onnx.mapping`, which Neural Compressor reads two tables of and current onnx no longer has, for a while."""
    if hasattr(onnx, "mapping"):
        yield
        return
    module = types.ModuleType("onnx.mapping")
    known = {
        kind: helper.tensor_dtype_to_np_dtype(kind)
        for kind in (TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32, TensorProto.FLOAT)
    }
    module.TENSOR_TYPE_TO_NP_TYPE = known  # type: ignore[attr-defined]
    module.NP_TYPE_TO_TENSOR_TYPE = {dtype: kind for kind, dtype in known.items()}  # type: ignore[attr-defined]
    onnx.mapping = module  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del onnx.mapping  # type: ignore[attr-defined]


def whole_model(graph: Graph) -> onnx.ModelProto:
    """A graph with its external weights inside, as Neural Compressor can take it.

    Raises:
        EngineError: it exceeds what one protobuf message holds, or memory.
    """
    size = sum(
        int(np.prod(item.dims)) * helper.tensor_dtype_to_np_dtype(item.data_type).itemsize
        for item in graph.initializers.values()
    )
    if size > PROTOBUF_LIMIT:
        raise EngineError(
            f"backend=inc_onnxrt: the graph's weights take {size / GIB:.1f} GiB, and Neural Compressor handles graphs "
            f"of up to {PROTOBUF_LIMIT / GIB:.1f} GiB (one protobuf message); take backend=onnxrt"
        )
    free = free_memory_bytes()
    if COPIES * size > free:
        raise EngineError(
            f"backend=inc_onnxrt needs about {COPIES * size / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free; "
            "take backend=onnxrt"
        )
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    onnx.external_data_helper.load_external_data_for_model(proto, str(graph.folder))
    return proto


class Loader:
    """A data loader of (inputs, label) pairs, one sample a batch, as Neural Compressor reads one."""

    batch_size = 1

    def __init__(self, feeds: Sequence[Arrays]) -> None:
        self.feeds = feeds

    def __iter__(self) -> Iterator[tuple[Arrays, int]]:
        return iter([(feed, 0) for feed in self.feeds])


@dataclass(frozen=True)
class OnnxSession:
    """The adaptor with a graph, and the configuration of the operators that it can quantize.

    Attributes:
        configs: int8 configuration by Neural Compressor's name.
        every: all operators that Neural Compressor sees, quantized or not.
    """

    adaptor: Any
    model: Any
    configs: dict[Key, dict[str, Any]]
    every: tuple[Key, ...]
    loader: Loader

    def tune_cfg(self, quantized: Sequence[Key]) -> dict[str, Any]:
        """A tuning configuration with these operators in int8 and all others in float."""
        ops = {key: self.configs[key] if key in quantized else FLOAT for key in self.every}
        count = len(self.loader.feeds)
        return {"op": ops, "calib_iteration": count, "calib_sampling_size": count, "recipe_cfgs": {}}


def open_session(graph: Scorable, scheme: Scheme, calibration: Sequence[Arrays], device: Device) -> OnnxSession:
    """Let Neural Compressor prepare itself for a graph; call it, and use what it gives, inside `guest`.

    Args:
        scheme: its observer is passed on where Neural Compressor has the same; its formats are Neural Compressor's own.

    Raises:
        EngineError: the graph is too large, or Neural Compressor cannot read it.
    """
    adaptor = FRAMEWORKS["onnxruntime"](
        {
            "device": "gpu" if device.provider == CUDA else "cpu",
            "backend": "onnxrt_cuda_ep" if device.provider == CUDA else "default",
            "approach": "post_training_static_quant",
            "format": "default",
            "domain": "auto",
            # Names of nodes stay as they are, so that scores find their operators.
            "recipes": {"graph_optimization_level": "DISABLE_ALL", "gemm_to_matmul": False},
            "workspace_path": options.workspace,
        }
    )
    adaptor.quantizable_op_types = list(KINDS)
    quantize = adaptor.quantize

    def tidy(*args: Any, **kwargs: Any) -> Any:
        gc.collect()  # its graphs refer to each other in circles and would pile up
        return quantize(*args, **kwargs)

    adaptor.quantize = tidy
    model = ONNXModel(whole_model(graph.graph))
    try:
        listed = adaptor.query_fw_capability(model)["opwise"]
    except Exception as error:  # whatever it stumbles on is its own
        raise EngineError(f"Neural Compressor cannot prepare {graph.path}: {type(error).__name__}: {error}") from error
    wanted = {(node.name, node.node.op_type) for nodes in graph.nodes.values() for node in nodes}
    algorithm = {**ALGORITHMS, "percentile": "percentile"}[scheme.observer]
    configs = {key: _config(choices, algorithm) for key, choices in listed.items() if key in wanted}
    known = {key: config for key, config in configs.items() if config is not None}
    return OnnxSession(adaptor, model, known, tuple(listed), Loader(calibration))


def _config(choices: Sequence[dict[str, Any]], algorithm: str) -> dict[str, Any] | None:
    """The static int8 configuration among those that an operator has, with one weight scale a channel."""
    for choice in choices:
        if choice["activation"].get("quant_mode") == "static":
            weight = {key: value[0] for key, value in choice["weight"].items()}
            activation = {
                key: value if isinstance(value, str) else value[0] for key, value in choice["activation"].items()
            }
            if algorithm in choice["activation"]["algorithm"]:
                activation["algorithm"] = algorithm
            return {"weight": weight, "activation": activation}
    return None
