"""QDQ against formulas written out, and against PyTorch's observers and quantized tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver
from torch.nn import functional

from qvl_hydra.quantization.formats.integer import affine_params, qdq_rows, qdq_static
from qvl_hydra.quantization.formats.record import QuantParams
from qvl_hydra.quantization.qdq import OperatorQuantizer, qdq_activation, qdq_weight, quantized_operator
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat

UNSIGNED, SIGNED = (0, 255), (-128, 127)
KINDS = {
    "mixed": lambda g: torch.randn(64, 33, generator=g) * 3,
    "positive": lambda g: torch.rand(64, 33, generator=g) + 2,
    "negative": lambda g: -torch.rand(64, 33, generator=g) - 0.5,
    "zero": lambda g: torch.zeros(64, 33),
    "tiny": lambda g: torch.randn(64, 33, generator=g) * 1e-9,
    "outlier": lambda g: torch.randn(64, 33, generator=g) + 3000 * torch.eye(64, 33),
}


def values(kind: str) -> Tensor:
    return KINDS[kind](torch.Generator().manual_seed(1))


def test_a_value_is_rounded_to_even_and_cut_off() -> None:
    """Scale 1/2, zero point 10, integers 0 to 15: -5 to 2.5 in steps of a half."""
    params = QuantParams(scale=0.5, zero_point=10, qmin=0, qmax=15)
    x = torch.tensor([0.0, 0.25, 0.75, -0.25, 0.3, 2.5, 2.6, 100.0, -5.0, -5.2, -100.0])
    expected = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.5, 2.5, 2.5, 2.5, -5.0, -5.0, -5.0])
    assert torch.equal(qdq_static(x, params), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("limits", [UNSIGNED, SIGNED, (-127, 127), (-8, 7)])
def test_rounding_is_bit_for_bit_pytorchs(kind: str, symmetric: bool, limits: tuple[int, int]) -> None:
    x = values(kind)
    scale, zero_point = affine_params(*torch.aminmax(x, dim=1), limits, symmetric)
    if not symmetric or limits != UNSIGNED:
        peer = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, *limits)
        assert torch.equal(qdq_rows(x, limits, symmetric), peer)
    for row, zero in zip(scale.tolist(), zero_point.tolist(), strict=True):
        if limits[0] <= zero <= limits[1]:
            peer = torch.fake_quantize_per_tensor_affine(x, row, zero, *limits)
            assert torch.equal(qdq_static(x, QuantParams(row, zero, *limits)), peer)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # said once a process, by the peer
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_parameters_are_those_of_pytorchs_observer(kind: str, symmetric: bool) -> None:
    x = values(kind)
    limits = SIGNED if symmetric else UNSIGNED
    observer = MinMaxObserver(
        dtype=torch.qint8 if symmetric else torch.quint8,
        qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
    )
    observer(x)
    expected_scale, expected_zero = observer.calculate_qparams()
    scale, zero = affine_params(x.min(), x.max(), limits, symmetric)
    assert torch.equal(scale, expected_scale.reshape(()))
    assert int(zero) == int(expected_zero)
    params = QuantParams(float(scale), int(zero), *limits)
    dtype = torch.qint8 if symmetric else torch.quint8
    peer = torch.quantize_per_tensor(x, float(expected_scale), int(expected_zero), dtype).dequantize()
    assert torch.equal(qdq_static(x, params), peer)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_pytorchs_observer_a_channel(kind: str) -> None:
    weight = values(kind)
    observer = PerChannelMinMaxObserver(ch_axis=0, dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    observer(weight)
    scale, zero = observer.calculate_qparams()
    peer = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8).dequantize()
    assert torch.equal(qdq_weight(weight, WeightFormat(8)), peer)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_are_the_formula(bits: int, symmetric: bool) -> None:
    weight = values("mixed")
    levels = 2**bits - 1
    expected = []
    for row in weight.double().numpy():
        if symmetric:
            scale = np.abs(row).max() / (levels / 2)
            expected.append(np.clip(np.round(row / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale)
        else:
            low, high = min(row.min(), 0), max(row.max(), 0)
            scale = (high - low) / levels
            zero = np.clip(np.round(-low / scale), 0, levels)
            expected.append((np.clip(np.round(row / scale) + zero, 0, levels) - zero) * scale)
    found = qdq_weight(weight, WeightFormat(bits, symmetric)).double().numpy()
    off = np.abs(found - np.array(expected)) > 1e-5
    if symmetric:  # a channel's largest value lies half way between two integers: float32 may take the other one
        off &= weight.abs().numpy() < weight.abs().amax(1, keepdim=True).numpy()
    assert not off.any()


@pytest.mark.parametrize("size", [1, 5, 8, 11, 33, 100])
def test_groups_are_channels_of_their_own(size: int) -> None:
    """33 inputs are no multiple of most sizes: the last group is shorter."""
    weight = values("mixed")
    expected = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for first in range(0, weight.shape[1], size):
            group = weight[row : row + 1, first : first + size]
            expected[row, first : first + size] = qdq_weight(group, WeightFormat(4))[0]
    assert torch.equal(qdq_weight(weight, WeightFormat(4, group_size=size)), expected)


def test_groups_lose_less_than_channels() -> None:
    weight = values("outlier")
    ordinary = weight.abs() < 100  # whose steps the outlier of their channel makes coarse
    whole, grouped = (
        (qdq_weight(weight, WeightFormat(4, group_size=size)) - weight)[ordinary].square().sum() for size in (None, 8)
    )
    assert grouped < whole / 3


def test_a_convolutions_weight_has_a_scale_an_output_channel() -> None:
    weight = torch.randn(6, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = qdq_weight(weight, WeightFormat(8))
    for channel in range(6):
        scale = weight[channel].abs().max() / 127.5
        assert (found[channel] / scale - (found[channel] / scale).round()).abs().max() < 1e-3
        assert (found[channel] - weight[channel]).abs().max() <= scale * 0.5001
    assert torch.equal(qdq_weight(weight, WeightFormat(8, group_size=10_000)), found)


@pytest.mark.parametrize("symmetric", [False, True])
def test_dynamic_ranges_are_taken_from_each_token(symmetric: bool) -> None:
    form = ActivationFormat(8, symmetric, dynamic=True)
    x = values("outlier").view(4, 16, 33)
    found = qdq_activation(x, form, None)
    for row in range(4):
        for token in range(16):
            one = x[row, token]
            observer = MinMaxObserver(
                dtype=torch.qint8 if symmetric else torch.quint8,
                qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
            )
            observer(one)
            scale, zero = observer.calculate_qparams()
            dtype = torch.qint8 if symmetric else torch.quint8
            peer = torch.quantize_per_tensor(one, float(scale), int(zero), dtype).dequantize()
            assert torch.equal(found[row, token], peer)


def test_no_format_and_dtype() -> None:
    x = values("mixed")
    assert qdq_activation(x, None, None) is x
    for dtype in (torch.bfloat16, torch.float16):
        assert qdq_static(x.to(dtype), QuantParams(0.1, 3, 0, 255)).dtype == dtype
        assert qdq_rows(x.to(dtype), UNSIGNED, False).dtype == dtype
        assert qdq_weight(x.to(dtype), WeightFormat(4, group_size=8)).dtype == dtype


def test_qdq_of_qdq_changes_nothing() -> None:
    params = QuantParams(0.037, 100, 0, 255)
    once = qdq_static(values("mixed"), params)
    assert torch.equal(qdq_static(once, params), once)


STATIC = Scheme("s", WeightFormat(8), ActivationFormat(8), ActivationFormat(8))


def test_a_linear_operator_step_by_step() -> None:
    generator = torch.Generator().manual_seed(3)
    linear = nn.Linear(33, 7)
    x = torch.randn(2, 5, 33, generator=generator)
    inputs, outputs = QuantParams(0.03, 120, 0, 255), QuantParams(0.02, 130, 0, 255)
    weight = qdq_weight(linear.weight, WeightFormat(8))

    def rounded(value: Tensor, params: QuantParams) -> Tensor:
        return torch.quantize_per_tensor(value, params.scale, params.zero_point, torch.quint8).dequantize()

    expected = rounded(functional.linear(rounded(x, inputs), weight, linear.bias), outputs)
    found = quantized_operator(linear, x, OperatorQuantizer(STATIC, weight, inputs, outputs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("part", ["weight", "input", "output"])
def test_each_part_of_a_scheme_works_alone(part: str) -> None:
    linear, x = nn.Linear(33, 7), values("mixed")
    params = QuantParams(0.03, 120, 0, 255)
    form = ActivationFormat(8)
    scheme = Scheme(
        "one", WeightFormat(4) if part == "weight" else None, form if part == "input" else None,
        form if part == "output" else None,
    )  # fmt: skip
    rounded = qdq_weight(linear.weight, WeightFormat(4))
    quantizer = OperatorQuantizer(scheme, rounded if part == "weight" else None, params, params)
    expected = {
        "weight": functional.linear(x, rounded, linear.bias),
        "input": linear(qdq_static(x, params)),
        "output": qdq_static(linear(x), params),
    }[part]
    torch.testing.assert_close(quantized_operator(linear, x, quantizer), expected, rtol=0, atol=1e-6)


def test_a_convolution_takes_each_patch_as_a_token() -> None:
    """The patch embedding: kernel as large as the patch, so that it is a linear over the patch's values."""
    convolution = nn.Conv3d(3, 8, kernel_size=(2, 4, 4), stride=(2, 4, 4), bias=False)
    patches = torch.randn(5, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    form = ActivationFormat(8, symmetric=True, dynamic=True)
    weight = qdq_weight(convolution.weight, WeightFormat(8))
    found = quantized_operator(convolution, patches, OperatorQuantizer(Scheme("d", WeightFormat(8), form), weight))
    inputs = qdq_rows(patches.flatten(1), SIGNED, True)
    expected = functional.linear(inputs, weight.flatten(1))
    torch.testing.assert_close(found.flatten(1), expected, rtol=0, atol=1e-5)


def test_the_arithmetic_of_a_half_precision_model_is_float32() -> None:
    linear, x = nn.Linear(33, 7).bfloat16(), values("mixed").bfloat16()
    weight = qdq_weight(linear.weight.float(), WeightFormat(8))
    scheme = Scheme("d", WeightFormat(8), ActivationFormat(8, True, True))
    found = quantized_operator(linear, x, OperatorQuantizer(scheme, weight))
    exact = functional.linear(qdq_rows(x.float(), SIGNED, True), weight, linear.bias.float())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())
