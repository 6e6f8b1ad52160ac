"""Number formats against compressed-tensors' own fake-quantize, bit for bit; and against their definitions."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qvl_hydra.entry.compose import scheme_settings
from qvl_hydra.models import memory
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.quantization.formats import float4, float8
from qvl_hydra.quantization.formats.table import FORMATS, format_faults, refusal, weight_bits
from qvl_hydra.quantization.qdq import largest_value, qdq_activation, qdq_weight, weight_change
from qvl_hydra.quantization.scheme import Scheme, WeightFormat, scheme_from_settings
from tests import toys

PRESETS = {
    "fp8": "FP8", "fp8_dynamic": "FP8_DYNAMIC", "fp8_block": "FP8_BLOCK", "nvfp4": "NVFP4", "mxfp4": "MXFP4",
    "mxfp8": "MXFP8", "w8a8_int": "W8A8",
}  # fmt: skip


def scheme(name: str) -> Scheme:
    return scheme_from_settings(scheme_settings(name))


def hard_cases() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(256, 384, generator=draw)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -1.25, -2.5, -5.0, 448.0, 6.5, 7.0, 1e-3])
    zeros = normal.clone()
    zeros[::3] = 0
    return {
        "normal": normal,
        "wide": normal * torch.logspace(-6, 6, 384),
        "ties": ties.repeat(128, 24),
        "zeros": zeros,
        "all zero": torch.zeros(128, 128),
        "subnormal": normal * 1e-40,
        "large": normal * 1e30,
        "ragged rows": normal[:200],
    }


CASES = hard_cases()


def peers_weight(weight: Tensor, args: Any) -> Tensor:
    """compressed-tensors' fake-quantize of a weight, scales by its own min-max."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    whole = generate_gparam(weight.amin(), weight.amax()) if args.strategy == "tensor_group" else None
    if args.strategy == "tensor":
        low, high = weight.amin().view(1), weight.amax().view(1)
    elif args.strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    elif args.strategy == "block":
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 128, 0, -weight.shape[0] % 128))
        blocks = padded.view(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        groups = weight.unflatten(-1, (-1, args.group_size))
        low, high = groups.amin(-1), groups.amax(-1)
    scale, zero = calculate_qparams(low, high, args, global_scale=whole)
    return fake_quantize(weight, scale, zero, args, global_scale=whole)


def peers_activation(x: Tensor, args: Any, observed: Tensor) -> Tensor:
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils.helpers import (
        calculate_qparams,
        compute_dynamic_scales_and_zp,
        generate_gparam,
    )

    whole = generate_gparam(observed.amin(), observed.amax()) if args.strategy == "tensor_group" else None
    if args.dynamic:
        scale, zero = compute_dynamic_scales_and_zp(x[None], args, torch.nn.Module(), global_scale=whole)
        return fake_quantize(x[None], scale, zero, args, global_scale=whole)[0]
    scale, zero = calculate_qparams(observed.amin().view(1), observed.amax().view(1), args)
    return fake_quantize(x, scale, zero, args)


def preset(name: str) -> Any:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    return preset_name_to_scheme(PRESETS[name], ["Linear"])


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("name", list(PRESETS))
def test_weights_are_compressed_tensors_bit_for_bit(name: str, case: str) -> None:
    args, weight, form = preset(name).weights, CASES[case], scheme(name).weight
    assert form is not None
    assert torch.equal(qdq_weight(weight, form), peers_weight(weight.clone(), args))


@pytest.mark.parametrize("name", list(PRESETS))
def test_weights_of_the_bundled_model_are_compressed_tensors(name: str, tiny_model: LoadedModel) -> None:
    args, own = preset(name).weights, scheme(name)
    assert own.weight is not None
    seen = 0
    for op in find_operators(tiny_model.module, "full"):
        if refusal(own, op.kind, op.in_features, op.out_features) is None and op.kind == "Linear":
            weight = tiny_model.module.get_submodule(op.path).weight.detach()
            assert torch.equal(qdq_weight(weight, own.weight), peers_weight(weight.clone(), args)), op.path
            seen += 1
    assert seen > 30


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "w8a8_int"])
def test_activations_are_compressed_tensors_bit_for_bit(name: str, case: str) -> None:
    """With a batch dimension: without one, its "one a token" is one a tensor, which no kernel does."""
    args, x, form = preset(name).input_activations, CASES[case], scheme(name).input
    assert form is not None
    observed = x * 0.7  # what calibration saw, so that some values lie beyond it
    params = None if form.dynamic else FORMATS[form.number].static(observed.amin(), observed.amax(), form)
    assert torch.equal(qdq_activation(x, form, params), peers_activation(x.clone(), args, observed))


def test_integer_tokens_have_the_runtimes_scale() -> None:
    """vLLM's kernel takes max / 127, where compressed-tensors takes max / 127.5."""
    form = scheme("w8a8_int").input
    found = qdq_activation(torch.tensor([[127.0, 1.4, -0.6], [0.0, 0.0, 0.0]]), form, None)
    assert found.tolist() == [[127.0, 1.0, -1.0], [0.0, 0.0, 0.0]]


def test_float4_values_by_hand() -> None:
    found = float4.rounded(torch.tensor([0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01, 9.0, -0.3, -7.0]))
    assert found.tolist() == [0.0, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, -0.5, -6.0]


def every_tie() -> Tensor:
    """All values of bfloat16, NaN and infinities among them, with the float32 before and after each."""
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    return torch.cat([halves, halves + 1, halves - 1]).view(torch.float32)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    both_nan = found.isnan() & expected.isnan()
    return bool((both_nan | (found.view(torch.int32) == expected.view(torch.int32))).all())


def test_float8_is_rounded_as_a_cast_rounds() -> None:
    x = every_tie()
    assert same_bits(float8.rounded(x), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_float4_is_rounded_to_the_nearest_code() -> None:
    """The nearest of eight values, of two as near the one with the even code, which stands first."""
    x = every_tie()
    values = np.array([0.0, 1.0, 2.0, 4.0, 0.5, 1.5, 3.0, 6.0])
    away = np.abs(x.double().abs().clamp(max=6.0).numpy()[:, None] - values)
    expected = torch.from_numpy(values[away.argmin(1)]).float().copysign(x).masked_fill(x.isnan(), torch.nan)
    assert same_bits(float4.rounded(x), expected)


@pytest.mark.parametrize("name", [*PRESETS, "w4a16"])
def test_a_large_weight_in_parts_changes_as_in_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form, weight = scheme(name).weight, CASES["wide"]
    assert form is not None
    whole = weight_change(weight, form)
    monkeypatch.setitem(memory.PART_VALUES, "cpu", 3 * weight.shape[1])
    assert torch.equal(weight_change(weight, form), whole)
    torch.testing.assert_close(whole, qdq_weight(weight, form) - weight)


def test_fused_weights_share_the_tensor_scale() -> None:
    form = scheme("nvfp4").weight
    assert form is not None
    small, large = CASES["normal"], CASES["normal"] * 7
    together = qdq_weight(torch.cat([small, large]), form)
    shared = largest_value([small, large])
    assert torch.equal(qdq_weight(small, form, shared), together[: len(small)])
    assert not torch.equal(qdq_weight(small, form), together[: len(small)])


def test_shapes_that_a_format_cannot_take_are_named() -> None:
    assert refusal(scheme("nvfp4"), "Linear", 3420, 1280) == (
        "3420 inputs are no multiple of the 16 that share a scale in nvfp4"
    )
    assert refusal(scheme("nvfp4"), "Linear", 4304, 1152) is None
    assert refusal(scheme("mxfp8"), "Linear", 4304, 1152) is not None
    assert refusal(scheme("fp8_block"), "Linear", 192, 128) is not None
    assert refusal(scheme("fp8_dynamic"), "Linear", 3420, 1280) is None
    assert refusal(scheme("fp8_dynamic"), "Conv3d", 1176, 1280) == (
        "Conv3d has no float8_e4m3: runtimes have it for linear operators"
    )
    assert refusal(scheme("w8a8_static"), "Conv3d", 1176, 1280) is None


@pytest.mark.parametrize(
    ("name", "bits"),
    [("nvfp4", 4.5), ("mxfp4", 4.25), ("mxfp8", 8.25), ("w4a16", 4.125), ("fp8", 8.0), ("fp8_dynamic", 8 + 16 / 1024)],
)
def test_bits_count_scales(name: str, bits: float) -> None:
    assert weight_bits(scheme(name), 1024, 16) == bits
    assert weight_bits(Scheme("x", None, None), 1024, 16) == 16


@pytest.mark.parametrize(
    ("name", "changes", "fault"),
    [
        ("w8a8_static", {"weight_granularity": "tensor"}, "quant.weight_granularity=tensor, but int has channel"),
        ("w8a8_static", {"input_group_size": 32}, "but int has none with input_granularity=tensor; take null"),
        ("w8a8_dynamic", {"input_group_size": 32}, "but int has none with input_granularity=token; take null"),
        ("fp8_dynamic", {"weight_group_size": 64}, "but float8_e4m3 has none with weight_granularity=channel"),
        ("fp8", {"input_group_size": 64}, "quant.input_group_size=64, but float8_e4m3 has none with input_gr"),
        ("nvfp4", {"input_granularity": "token"}, "quant.input_granularity=token, but nvfp4 has tensor"),
        ("nvfp4", {"weight_group_size": 32}, "quant.weight_group_size=32, but nvfp4 has groups of 16; take null"),
        ("mxfp4", {"input_granularity": "tensor"}, "quant.input_granularity=tensor, but mxfp4 has token"),
        ("mxfp8", {"weight_granularity": "block"}, "quant.weight_granularity=block, but mxfp8 has channel"),
        ("fp8", {"input_format": "int7"}, "quant.input_format=int7; allowed: int, float8_e4m3, nvfp4, mxfp4, mxfp8"),
    ],
)
def test_what_a_format_would_not_read_is_refused(name: str, changes: dict[str, Any], fault: str) -> None:
    """It was: an integer's `tensor` and `block` were scored as `channel`, and NVFP4's `token` ended in a traceback."""
    own = scheme_settings(name)
    assert format_faults(own) == []
    (found,) = format_faults(dataclasses.replace(own, **changes))
    assert fault in found


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("fp8_dynamic", {"input_group_size": 64}),
        ("w8a8_dynamic", {"weight_group_size": 64}),
        ("nvfp4", {"input_bits": None, "input_granularity": "token"}),
        ("mxfp8", {"weight_group_size": 32}),
    ],
)
def test_what_a_format_has_is_taken(name: str, changes: dict[str, Any]) -> None:
    assert format_faults(dataclasses.replace(scheme_settings(name), **changes)) == []


def test_a_format_added_to_the_table_is_all_that_a_scheme_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "halves", toys.FORMAT)
    form = WeightFormat(9, number="halves")
    assert qdq_weight(torch.tensor([[0.2, 0.3, 1.1]]), form).tolist() == [[0.0, 0.5, 1.0]]
