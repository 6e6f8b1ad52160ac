"""Neural Compressor's own scales, zero points and int8 weights, as quantizers of this project.

With them the native engine computes in Neural Compressor's numbers, and the two can be compared to the digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from qvl_hydra.backends.neural_compressor.session import guest  # says what to install when Neural Compressor is missing

# isort: split
from qvl_hydra.backends.neural_compressor.adaptor import SCHEME, FxSession, open_session
from qvl_hydra.backends.neural_compressor.mse import converted, prepared, release
from qvl_hydra.backends.neural_compressor.wrapper import ComponentWrapper, WrapperBatch, usable, wrapper_input
from qvl_hydra.estimators.job import SweepJob
from qvl_hydra.quantization.formats.record import QuantParams
from qvl_hydra.quantization.qdq import OperatorQuantizer
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat


def inc_quantizers(job: SweepJob) -> dict[str, OperatorQuantizer]:
    """What Neural Compressor makes of each operator of a job, calibrated on all its samples.

    Returns:
        A quantizer for each operator that Neural Compressor can quantize.
    """
    wrapper = ComponentWrapper(job.model.module, job.component)
    samples = usable(job.calibration.samples, job.component)
    batches = [WrapperBatch([wrapper_input(job.model.module, sample, job.component)]) for sample in samples]
    with guest():
        session = open_session(wrapper, job.operators, job.scheme, batches[0])
        return read_quantizers(session, batches)


@torch.no_grad()
def read_quantizers(session: FxSession, calibration: Sequence[WrapperBatch]) -> dict[str, OperatorQuantizer]:
    """Quantize every operator of the session at once and read what came out.

    The observers sit in the float model, so an operator's numbers do not depend on which others are quantized.
    """
    model = prepared(session)
    for batch in calibration:
        model(batch)
    ranges = {path: _ranges(model, session, path) for path in session.names}
    converted(session, model)
    scheme = inc_scheme(session)
    found = {}
    for path, (inputs, output) in ranges.items():
        weight = _submodule(model, session.names[path][0]).weight().dequantize()
        found[path] = OperatorQuantizer(scheme, weight, inputs, output)
    del model
    release()
    return found


def inc_scheme(session: FxSession) -> Scheme:
    """The scheme Neural Compressor runs, in this project's terms."""
    kinds = {value["activation"].get("algorithm") for value in session.tune_cfg["op"].values()}
    observer = "minmax" if "minmax" in kinds else "histogram"
    return Scheme(SCHEME, WeightFormat(8), ActivationFormat(8), ActivationFormat(8), observer)  # type: ignore[arg-type]


def _ranges(model: nn.Module, session: FxSession, path: str) -> tuple[QuantParams, QuantParams]:
    """Parameters of an operator's input and output from the observers before and after it."""
    owner, name = _traced_owner(model, session.names[path][0])
    node = next(node for node in owner.graph.nodes if node.op == "call_module" and node.target == name)
    before = node.args[0]
    after = next(user for user in node.users if _is_observer(owner, user))
    return _params(owner.get_submodule(before.target)), _params(owner.get_submodule(after.target))


def _traced_owner(model: nn.Module, name: str) -> tuple[GraphModule, str]:
    """The traced sub-module that holds an operator, and the operator's name in it."""
    parts = name.split(".")
    for length in range(len(parts)):
        module = model.get_submodule(".".join(parts[:length]))
        if isinstance(module, GraphModule):
            return module, ".".join(parts[length:])
    raise AssertionError(f"{name} lies in no traced module")


def _submodule(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _is_observer(owner: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith("activation_post_process")


def _params(observer: Any) -> QuantParams:
    scale, zero_point = observer.calculate_qparams()
    return QuantParams(float(scale), int(zero_point), int(observer.quant_min), int(observer.quant_max))
