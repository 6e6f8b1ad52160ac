"""ONNX Runtime sessions: the provider asked for, or a plain word on why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qvl_hydra.errors import EngineError, MissingExtraError
from qvl_hydra.onnx.scoring.graph import read_graph
from qvl_hydra.onnx.scoring.switched import SwitchedGraph

try:
    import onnxruntime
except ImportError as error:
    raise MissingExtraError("onnxruntime", "onnx", "running ONNX graphs") from error

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@dataclass(frozen=True)
class Device:
    """Where sessions run.

    Attributes:
        threads: of the CPU provider; None is its own choice.
        note: why it is not CUDA where `auto` was asked for; None otherwise.
    """

    provider: str
    index: int
    threads: int | None
    note: str | None

    @property
    def providers(self) -> list[Any]:
        return [(CUDA, {"device_id": self.index}), CPU] if self.provider == CUDA else [CPU]


def pick_provider(device: str, threads: int | None) -> Device:
    """The provider for `backend.device`, tried on a graph of one node.

    ONNX Runtime names CUDA as available where its library is built for it, whether or not there is a GPU, a driver
    and CUDA's own libraries, and falls back in silence; so a session is opened and asked what it runs on.

    Raises:
        EngineError: CUDA was asked for and does not come up.
    """
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return Device(CPU, 0, threads, None)
    problem = _cuda_problem(int(index or 0))
    if problem is None:
        return Device(CUDA, int(index or 0), threads, None)
    if kind == "cuda":
        raise EngineError(f"backend.device={device}: {problem}; take backend.device=auto or cpu")
    return Device(CPU, 0, threads, f"CPU provider of ONNX Runtime, since {problem}")


@contextmanager
def quiet_runtime() -> Iterator[None]:
    """Silence ONNX Runtime for a while; its usual level is put back, since it cannot be asked which one it has."""
    onnxruntime.set_default_logger_severity(4)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(2)


def _cuda_problem(index: int) -> str | None:
    version = onnxruntime.__version__
    if CUDA not in onnxruntime.get_available_providers():
        return f"onnxruntime {version} is a build without CUDA (install onnxruntime-gpu in its place)"
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "probe", [value], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    try:
        with quiet_runtime():  # it names every library that is missing, in colour
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=[(CUDA, {"device_id": index})]
            )
            if CUDA in session.get_providers():
                session.run(None, {"x": np.zeros(1, dtype=np.float32)})
                return None
    except Exception as error:  # the provider's own errors have no common base
        return f"CUDA device {index} does not start in onnxruntime {version}: {str(error).splitlines()[0]}"
    return (
        f"onnxruntime {version} finds no CUDA device {index} or not the CUDA and cuDNN libraries it was built for "
        "(see nvidia-smi, and its release notes for the versions)"
    )


def open_session(
    model: bytes | Path,
    device: Device,
    folder: str | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
    fold: bool = True,
) -> Any:
    """A session over a model's file or bytes.

    Args:
        folder: what external data in `model` bytes is relative to.
        arrays: values of initializers that stand as external in the model; must outlive the session.
        fold: let the runtime compute constant parts beforehand.
    """
    if isinstance(model, Path) and (graph := read_graph(model)).folder != model.parent:  # its weights are linked
        model, folder = graph.proto.SerializeToString(), str(graph.folder)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Threads that wait spinning take the cores from whoever else works, and from each other where cores are few.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if device.threads is not None:
        options.intra_op_num_threads = device.threads
    if isinstance(model, bytes):
        # Prepared graphs have thousands of small nodes of unknown shape. Planning which buffers they could share takes
        # time that grows with their square, and finds next to nothing; freed buffers are taken up again at run time.
        options.enable_mem_reuse = options.enable_mem_pattern = False
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    if arrays:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in arrays.values()]
        options.add_external_initializers(list(arrays), values)
    source = str(model) if isinstance(model, Path) else model
    disabled = None if fold else ["ConstantFolding"]
    return onnxruntime.InferenceSession(source, options, providers=device.providers, disabled_optimizers=disabled)


def open_switched(graph: SwitchedGraph, device: Device) -> Any:
    """A session over a prepared graph. Integer weights stay integers: folded, they would double the weights."""
    return open_session(graph.proto.SerializeToString(), device, graph.folder, graph.arrays, fold=False)
