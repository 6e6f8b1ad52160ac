"""Neural Compressor's PyTorch FX adaptor, made ready for one component, and what it would quantize there.

As `quantization.fit` does it (`neural_compressor/quantization.py`), up to the point where the strategy has its adaptor
and its first tuning configuration; the tuning loop itself is not entered, it ends without a model when the accuracy
goal is not met. Tracing the whole wrapper fails, and the adaptor then traces its sub-modules one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from neural_compressor.adaptor import pytorch as inc_pytorch
from neural_compressor.config import PostTrainingQuantConfig, TuningCriterion, _Config
from neural_compressor.model import Model
from neural_compressor.strategy import STRATEGIES
from torch import nn

from qvl_hydra.backends.neural_compressor.wrapper import OUTPUT, ComponentWrapper, WrapperBatch
from qvl_hydra.errors import EngineError
from qvl_hydra.operators.discover import Operator
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat

SCHEME = "inc_static"
REDUCED_RANGE: bool = inc_pytorch.REDUCE_RANGE  # 7-bit activations, where the processor has no VNNI
ALGORITHMS = {"minmax": "minmax", "histogram": "kl"}  # our observers, and what Neural Compressor calls them
FLOAT = {"activation": {"dtype": "fp32"}, "weight": {"dtype": "fp32"}}


class Batches:
    """A data loader of (batch, target) pairs, as Neural Compressor reads one."""

    def __init__(self, pairs: Sequence[tuple[WrapperBatch, Any]], batch_size: int) -> None:
        self.pairs = pairs
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[WrapperBatch, Any]]:
        return iter(self.pairs)


@dataclass(frozen=True)
class FxSession:
    """The adaptor and the configuration of the operators asked for.

    Attributes:
        wrapper: in float; every call gets a copy of its own.
        tune_cfg: with exactly the operators asked for, all quantized; the last entry is the wrapper's output, which
            makes it the place where Neural Compressor compares.
        names: Hugging Face path to Neural Compressor's (name, type).
    """

    adaptor: Any
    wrapper: ComponentWrapper
    tune_cfg: dict[str, Any]
    names: dict[str, tuple[str, str]]

    @property
    def qconfigs(self) -> dict[str, Any]:
        """Fresh observer factories of every operator, by Neural Compressor's name."""
        configs = inc_pytorch._cfg_to_qconfig(self.tune_cfg, self.tune_cfg["approach"])
        return {name: config for name, config in configs.items() if config}

    def float_cfg(self) -> dict[str, Any]:
        """The same configuration with every operator in float."""
        return {**self.tune_cfg, "op": dict.fromkeys(self.tune_cfg["op"], FLOAT)}

    def only(self, paths: Sequence[str]) -> FxSession:
        """The same session with these operators alone."""
        wanted = {self.names[path] for path in paths}
        ops = {key: value for key, value in self.tune_cfg["op"].items() if key in wanted or key[0] == OUTPUT}
        names = {path: self.names[path] for path in self.names if path in paths}
        return FxSession(self.adaptor, self.wrapper, {**self.tune_cfg, "op": ops}, names)


def open_session(
    wrapper: ComponentWrapper, operators: Sequence[Operator], scheme: Scheme, batch: WrapperBatch
) -> FxSession:
    """Let Neural Compressor prepare itself for the wrapper.

    Args:
        operators: to be quantized; those that it does not list are missing from `names`.
        scheme: its observer is passed on where Neural Compressor has the same; its formats are Neural Compressor's own.
        batch: any batch the wrapper takes; nothing is calibrated on it yet.

    Raises:
        EngineError: Neural Compressor cannot prepare the model.
    """
    config = PostTrainingQuantConfig(
        approach="static",
        quant_level=1,
        tuning_criterion=TuningCriterion(strategy="mse_v2"),
        excluded_precisions=["bf16"],  # else offered where the processor has it
    )
    config.framework = "pytorch_fx"
    try:
        strategy = STRATEGIES["mse_v2"](
            model=Model(copy.deepcopy(wrapper), conf=config),
            conf=_Config(quantization=config, benchmark=None, pruning=None, distillation=None, nas=None),
            q_dataloader=Batches([(batch, 0)], 1),
        )
        strategy._prepare_tuning()
        initial = strategy.initial_tuning_cfg()[2]
        initial["calib_sampling_size"] = 1
        tune_cfg = strategy._tune_cfg_converter(initial)
    except Exception as error:  # whatever it stumbles on is its own
        raise EngineError(f"Neural Compressor cannot prepare this model: {type(error).__name__}: {error}") from error
    listed = {name.removesuffix(".module"): (name, kind) for name, kind in tune_cfg["op"]}
    names = {op.path: listed[op.path] for op in operators if op.path in listed}
    tune_cfg["op"] = {key: value for key, value in tune_cfg["op"].items() if key in names.values()}
    for value in tune_cfg["op"].values():
        value["activation"]["algorithm"] = ALGORITHMS.get(scheme.observer, "kl")
    tune_cfg["op"][(OUTPUT, nn.Identity.__name__)] = FLOAT
    strategy.adaptor.tune_cfg = tune_cfg
    return FxSession(strategy.adaptor, wrapper, tune_cfg, names)


def scheme_notes(scheme: Scheme) -> list[str]:
    """A sentence for the user where the scheme asked for is not what Neural Compressor runs."""
    different = differences(scheme)
    if not different:
        return []
    return [f"quant={scheme.name}, but Neural Compressor ran its own scheme, inc_static: {'; '.join(different)}"]


def differences(scheme: Scheme) -> list[str]:
    """Where the scheme asked for is not what Neural Compressor runs, in words."""
    found = []
    if scheme.weight != WeightFormat(8):
        found.append("its weights are 8-bit, symmetric, with one scale an output channel")
    if scheme.input != ActivationFormat(8):
        found.append("its inputs are unsigned 8-bit with one static asymmetric range a tensor")
    if scheme.output != ActivationFormat(8):
        found.append("its operators' outputs are quantized too, unsigned 8-bit with one static asymmetric range")
    if scheme.observer not in ALGORITHMS:
        found.append(f"it has no {scheme.observer} observer and took its default, the histogram (`kl`)")
    return found
