"""Puts operators of a model into their schemes, and takes them out again; observes activation ranges.

The plain way, over the model's own forward, one sample at a time. The block walker of the native engine does the same
block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.models.forward import reference_output
from qvl_hydra.operators.discover import Operator
from qvl_hydra.operators.kinds import apply_operator, as_tokens, outputs, some_copies
from qvl_hydra.quantization.formats.record import QuantParams
from qvl_hydra.quantization.formats.table import FORMATS
from qvl_hydra.quantization.observers import RangeObserver
from qvl_hydra.quantization.qdq import OperatorQuantizer, largest_value, qdq_weight, quantized_operator
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme

Forward = Callable[[nn.Module, Tensor], Tensor]  # of a sub-module and its input
Compute = Callable[[nn.Module, Tensor, OperatorQuantizer | None], Tensor]  # the same in a scheme, or in float
GATHERED = 0.9  # of all copies: where more are in one scheme, it is computed for all, as to gather them costs more
Ranges = Mapping[str, tuple[QuantParams | None, QuantParams | None]]  # operator path -> input, output


@contextmanager
def replaced_forwards(module: nn.Module, forwards: Mapping[str, Forward]) -> Iterator[None]:
    """Let sub-modules compute with other functions for a while; the module itself stays as it is.

    Args:
        module: root of the paths.
        forwards: for each path a function of the sub-module and its input.
    """
    changed: list[nn.Module] = []
    try:
        for path, function in forwards.items():
            target = module.get_submodule(path)
            target.forward = lambda x, _target=target, _function=function: _function(_target, x)  # type: ignore[method-assign]
            changed.append(target)
        yield
    finally:
        for target in changed:
            del target.forward


def unread_output(module: nn.Module, x: Float[Tensor, "*token in"]) -> Float[Tensor, "*token out"]:
    """Zeros for the output of a linear operator that nobody reads."""
    return x.new_zeros(*x.shape[:-1], outputs(module))


def shared_largest(module: nn.Module, operators: Sequence[Operator], scheme: Scheme) -> dict[str, Tensor]:
    """The largest |weight| of what a runtime fuses, by group, where it gives that one tensor scale."""
    if scheme.weight is None or FORMATS[scheme.weight.number].tensor_scale is None:
        return {}
    groups: dict[str, list[Tensor]] = {}
    for op in operators:
        groups.setdefault(op.group, []).append(module.get_submodule(op.path).get_parameter("weight"))
    return {name: largest_value(weights) for name, weights in groups.items()}


@contextmanager
def quantized(module: nn.Module, quantizers: Mapping[str, OperatorQuantizer]) -> Iterator[None]:
    """Let the operators named compute in their schemes; afterwards the model is bit for bit as before."""

    def forward_of(quantizer: OperatorQuantizer) -> Forward:
        return lambda target, x: quantized_operator(target, x, quantizer)

    with replaced_forwards(module, {path: forward_of(quantizer) for path, quantizer in quantizers.items()}):
        yield


def operator_output(module: nn.Module, x: Tensor, quantizer: OperatorQuantizer | None) -> Tensor:
    """Output of an operator in its scheme, or in float."""
    if quantizer is None:
        return apply_operator(module, x, module.weight)  # type: ignore[arg-type]
    return quantized_operator(module, x, quantizer)


def mixed_forward(wanted: Sequence[OperatorQuantizer | None], compute: Compute = operator_output) -> Forward:
    """The forward of an operator whose input holds as many copies, one behind the other, each in its own scheme.

    Args:
        wanted: of each copy its quantizer, or None for float.
    """
    places: dict[int, list[int]] = {}
    for place, quantizer in enumerate(wanted):
        places.setdefault(id(quantizer), []).append(place)
    most, *others = sorted(places.values(), key=len, reverse=True)
    of_all = len(most) > GATHERED * len(wanted)

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        outputs: Tensor | None = None
        if of_all:
            outputs = compute(module, x, wanted[most[0]]).unflatten(0, (len(wanted), -1))
        inputs = x.unflatten(0, (len(wanted), -1))  # vision rows arrive packed one behind the other
        for own in others if of_all else [most, *others]:
            with some_copies(module, own, len(wanted)):
                part = compute(module, inputs[own].flatten(0, 1), wanted[own[0]]).unflatten(0, (len(own), -1))
            outputs = part.new_empty(len(wanted), *part.shape[1:]) if outputs is None else outputs
            outputs[own] = part
        assert outputs is not None
        return outputs.flatten(0, 1)

    return forward


def make_quantizer(
    module: nn.Module, path: str, scheme: Scheme, ranges: Ranges, largest: Tensor | None = None
) -> OperatorQuantizer:
    """The quantizer of one operator: its QDQ weight and the parameters of its static activations.

    Args:
        largest: see `qdq_weight`.
    """
    weight: Tensor = module.get_submodule(path).weight  # type: ignore[assignment]
    rounded = None if scheme.weight is None else qdq_weight(weight, scheme.weight, largest, torch.float32)
    inputs, output = ranges.get(path, (None, None))
    return OperatorQuantizer(scheme, rounded, inputs, output)


class OperatorObserver:
    """Observers of one operator's input and output, as far as the scheme has static ranges there."""

    def __init__(self, scheme: Scheme) -> None:
        self.input = _observer(scheme, scheme.input)
        self.output = _observer(scheme, scheme.output)

    def observe(self, target: nn.Module, x: Tensor, y: Tensor) -> None:
        if self.input is not None:
            self.input.observe(as_tokens(target, x))
        if self.output is not None:
            self.output.observe(y)

    def params(self) -> tuple[QuantParams | None, QuantParams | None]:
        """Raises ValueError when nothing, or something not finite, was seen."""
        return (
            None if self.input is None else self.input.params(),
            None if self.output is None else self.output.params(),
        )


def _observer(scheme: Scheme, form: ActivationFormat | None) -> RangeObserver | None:
    return None if form is None or form.dynamic else RangeObserver(form, scheme)


@torch.no_grad()
def observe_ranges(
    module: nn.Module, paths: Iterable[str], samples: Iterable[Sample], component: str, scheme: Scheme
) -> dict[str, tuple[QuantParams | None, QuantParams | None]]:
    """Static ranges of every operator's input and output, with the whole model in float.

    Args:
        paths: operators to observe.
        samples: calibration samples; text-only ones do not reach the vision tower.

    Returns:
        For each operator its input's and output's parameters; None where the scheme has none.

    Raises:
        ValueError: an operator was never reached, or saw a value that is not finite.
    """
    observers = {path: OperatorObserver(scheme) for path in paths}

    def forward_of(observer: OperatorObserver) -> Forward:
        def forward(target: nn.Module, x: Tensor) -> Tensor:
            y = type(target).forward(target, x)
            observer.observe(target, x, y)
            return y

        return forward

    with replaced_forwards(module, {path: forward_of(observer) for path, observer in observers.items()}):
        for sample in samples:
            if component != "vision" or sample.pixel_values is not None:
                reference_output(module, sample, component)
    return {path: observer.params() for path, observer in observers.items()}
