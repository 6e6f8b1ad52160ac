"""What rounding explains: a consumer's operator and our QDQ of it, on the same input, may differ by whole steps of the
input's or the weight's grid, and only where a value lies in the middle of two integers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.models.forward import reference_output
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import Operator, find_operators
from qvl_hydra.operators.kinds import as_tokens
from qvl_hydra.profiles.apply import quantizer_key
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.apply import quantized
from qvl_hydra.quantization.formats.integer import qdq_static
from qvl_hydra.quantization.qdq import OperatorQuantizer, quantized_operator
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat

W8A8 = Scheme("w8a8_static", WeightFormat(8), ActivationFormat(8))
W8A8_SYMMETRIC = Scheme("w8a8_symmetric", WeightFormat(8), ActivationFormat(8, symmetric=True))
W8A8_DYNAMIC = Scheme("w8a8_dynamic", WeightFormat(8), ActivationFormat(8, symmetric=True, dynamic=True))
MIDDLE = 1e-3  # of a step: how near to a half a value must lie for the order of operations to decide


def some_profile(model: LoadedModel, scheme: Scheme, component: str = "full", convolutions: bool = True) -> Profile:
    """A profile that tells the towers apart: same-named MLPs of both, one quantized where the other is not."""
    operators = find_operators(model.module, component)
    high = {op.path for op in operators if _kept(op) or (op.kind != "Linear" and not convolutions)}
    return Profile(scheme, tuple(operators), frozenset(high), 16, "test")


def _kept(op: Operator) -> bool:
    if op.component == "vision":
        return op.block == 1 and op.role in ("gate_proj", "up_proj", "qkv")
    return op.block == 0 and op.role in ("q_proj", "k_proj", "v_proj", "down_proj")


@contextmanager
def applied(module: nn.Module, profile: Profile, quantizers: Mapping[str, OperatorQuantizer]) -> Iterator[None]:
    """Within the context the model's own forward computes the profile's low operators in its schemes."""
    with quantized(module, {op.path: quantizers[quantizer_key(profile, op, quantizers)] for op in profile.low}):
        yield


@torch.no_grad()
def operator_inputs(
    module: nn.Module, run: Callable[[], object], profile: Profile
) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of every quantized operator in one run of a consumer's model."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for op in profile.low:

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, path: str = op.path) -> None:
            seen[path] = inputs[0].detach().clone(), output.detach().clone()

        handles.append(module.get_submodule(op.path).register_forward_hook(hook))
    run()
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def assert_only_rounding(
    model: LoadedModel,
    consumer: nn.Module,
    profile: Profile,
    quantizers: Mapping[str, OperatorQuantizer],
    consumer_weights: Mapping[str, Tensor],
    sample: Sample,
) -> None:
    """Every quantized operator computes what QDQ computes, up to values in the middle of two integers.

    Args:
        consumer: its model, at Hugging Face paths.
        quantizers: ours, with static inputs.
        consumer_weights: the dequantized weights that the consumer computes with.
    """
    seen = operator_inputs(consumer, lambda: reference_output(consumer, sample, "full"), profile)
    assert set(seen) == {op.path for op in profile.low}
    for path, (x, y) in seen.items():
        target, ours = model.module.get_submodule(path), quantizers[path]
        with_theirs = dataclasses.replace(ours, weight=consumer_weights[path].view_as(target.get_parameter("weight")))
        expected = quantized_operator(target, x, with_theirs)
        values = as_tokens(target, x) / ours.input.scale
        undecided = ((values - values.floor() - 0.5).abs() < MIDDLE).to(y.dtype)
        allowed = undecided @ with_theirs.weight.flatten(1).abs().T * ours.input.scale + 1e-5 * expected.abs().max()
        found = (y - expected).abs().reshape(allowed.shape)
        assert (found <= allowed).all(), f"{path}: off by {float((found - allowed).max())} beyond rounding"
        # The bound must mean something: it is far below what quantizing the input changes.
        changed = (qdq_static(x, ours.input) - x).abs().sum()
        assert float(undecided.sum()) * ours.input.scale < 0.2 * float(changed)


def assert_weights_agree(weight: Tensor, theirs: Tensor, ours: Tensor, scale: Tensor) -> None:
    """Two dequantized weights: at most one step apart, and only where the weight lies in the middle of two integers.

    With symmetric scales of `max / 127.5` the largest weight of each channel always does.

    Args:
        scale: of each output channel, (out, 1).
    """
    steps = weight.detach().flatten(1) / scale
    difference = (theirs.detach().flatten(1) - ours.flatten(1)).abs() / scale
    undecided = (steps - steps.floor() - 0.5).abs() < MIDDLE
    assert (difference[~undecided] < MIDDLE).all()
    assert (difference < 1 + MIDDLE).all()
