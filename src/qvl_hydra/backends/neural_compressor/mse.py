"""Neural Compressor's `mse_v2` scores, each operator's own.

`get_mse_order_per_int8` (requantize) and `get_mse_order_per_fp32` (fallback) of `adaptor/torch_utils/util.py` measure
and then return an order. Here each is called for one operator at a time on a float model of its own, which is the
question they answer exactly; the sum of squared differences is taken out where they sort. Activation ranges are
observed on all calibration samples, where their loop would observe them on the batch that it scores.
"""

from __future__ import annotations

import builtins
import copy
import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from neural_compressor.adaptor import pytorch as inc_pytorch
from neural_compressor.adaptor.torch_utils import util
from torch import Tensor, nn
from torch.ao.quantization.fx import utils as fx_utils

from qvl_hydra.backends.neural_compressor.adaptor import FxSession
from qvl_hydra.backends.neural_compressor.session import replaced_globals
from qvl_hydra.backends.neural_compressor.wrapper import WrapperBatch
from qvl_hydra.estimators.metrics import error_counts, error_sums, next_token_labels, output_metrics

CHECK = 1e-3  # relative: the parts of all samples must sum to Neural Compressor's own number (float32 sum)
Metrics = dict[str, float]


@dataclass
class _Loop:
    """Stands in for what Neural Compressor's loop calls: its iterator, its forward, its sort.

    Attributes:
        name: the one operator that the loop may visit.
        outputs: of the float model and of the quantized one, in this order.
        score: the sum of squared differences, as Neural Compressor computed it.
    """

    name: str
    calibration: Sequence[WrapperBatch]
    outputs: list[Tensor] = field(default_factory=list)
    score: float | None = None
    _calls: int = 0
    _loops: int = 0

    def tqdm(self, items: Iterable[Any]) -> list[Any]:
        """The first loop visits the one operator; the second one, which re-measures a few, has nothing to do."""
        self._loops += 1
        return [item for item in items if item[0] == self.name] if self._loops == 1 else []

    def simple_inference(self, model: nn.Module, batch: WrapperBatch) -> Tensor | None:
        """Float model, prepared model (observing), quantized model: called in this order."""
        self._calls += 1
        with torch.no_grad():
            if self._calls == 2:
                for sample in self.calibration:
                    model(sample)
                return None
            output: Tensor = model(batch)
        self.outputs.append(output)
        return output

    def sorted(self, keys: Iterable[Any], key: Callable[[Any], Any], reverse: bool = False) -> list[Any]:
        found = list(keys)
        if self.score is None and found:
            self.score = float(key(found[0]))
        return builtins.sorted(found, key=key, reverse=reverse)


def measure(
    session: FxSession, path: str, direction: str, calibration: Sequence[WrapperBatch], batch: WrapperBatch
) -> list[Metrics]:
    """How far the output is from the float model's, for each sample of the batch.

    Args:
        path: the operator that alone is quantized (`requantize`) or alone stays in float (`fallback`).
        calibration: one sample a batch; activation ranges come from all of them.
        batch: the samples to score.

    Returns:
        For each sample its metrics; the squared errors sum to Neural Compressor's own score.

    Raises:
        RuntimeError: they do not, or Neural Compressor gave no score.
    """
    name = session.names[path][0]
    loop = _Loop(name, calibration)
    model = copy.deepcopy(session.wrapper)
    globals_ = {"tqdm": loop.tqdm, "simple_inference": loop.simple_inference, "sorted": loop.sorted}
    mapping = {name: session.qconfigs[name]}
    with replaced_globals(util, op_cfg_mapping=mapping, **globals_):
        if direction == "requantize":
            util.get_mse_order_per_int8(session.adaptor, model, batch, session.float_cfg())
        else:
            util.get_mse_order_per_fp32(session.adaptor, model, batch, session.tune_cfg)
    if loop.score is None:
        raise RuntimeError(f"Neural Compressor gave no score for {name}")
    found = sample_metrics(loop.outputs[0], loop.outputs[1], batch, session.wrapper.component)
    total = sum(metrics["squared_error"] for metrics in found)
    if abs(total - loop.score) > CHECK * abs(loop.score):
        raise RuntimeError(
            f"the samples' squared errors sum to {total:.6g}, Neural Compressor's score is {loop.score:.6g}"
        )
    del loop, model
    release()
    return found


def all_quantized(session: FxSession, calibration: Sequence[WrapperBatch], batch: WrapperBatch) -> list[Metrics]:
    """The same with every operator of the session quantized: what `fallback` scores are measured from."""
    model = prepared(session)
    with torch.no_grad():
        for sample in calibration:
            model(sample)
        reference = session.wrapper(batch)
        converted(session, model)
        output = model(batch)
    found = sample_metrics(reference, output, batch, session.wrapper.component)
    del model
    release()
    return found


def prepared(session: FxSession) -> nn.Module:
    """A copy of the wrapper with Neural Compressor's observers at every operator of the session."""
    model = copy.deepcopy(session.wrapper)
    configs = inc_pytorch._cfgs_to_fx_cfgs(session.qconfigs, session.tune_cfg["approach"])
    inc_pytorch.PyTorch_FXAdaptor.prepare_sub_graph(session.adaptor.sub_module_list, configs, model, prefix="")
    return model


def converted(session: FxSession, model: nn.Module) -> nn.Module:
    """Turn a prepared model that has observed its samples into Neural Compressor's quantized one, in place."""
    inc_pytorch.PyTorch_FXAdaptor.convert_sub_graph(session.adaptor.sub_module_list, model, prefix="")
    return model


def release() -> None:
    """Give back the memory of models that were prepared or converted and are no longer used.

    They hang in reference cycles, and PyTorch keeps each of them as a key of a cache that only ever grows
    (`functools.cache` on `assert_and_get_unique_device`): left alone they pile up, one model an operator.
    """
    clear = getattr(fx_utils.assert_and_get_unique_device, "cache_clear", None)
    if clear is not None:
        clear()
    gc.collect()


def sample_metrics(
    reference: Float[Tensor, "token value"], output: Float[Tensor, "token value"], batch: WrapperBatch, component: str
) -> list[Metrics]:
    """Metrics of each sample from the joined outputs of all of them."""
    found: list[Metrics] = []
    names = output_metrics(component)
    first = 0
    for item in batch.inputs:
        labels = None if component == "vision" else next_token_labels(item.sample.labels)
        own = slice(first, first + item.rows)
        sums = error_sums(reference[own], output[own][None], labels)[0]
        counts = torch.tensor(error_counts(item.rows, labels), dtype=torch.float64)
        found.append(dict(zip(names, (sums / counts).tolist(), strict=True)))
        first += item.rows
    assert first == len(reference)
    return found
