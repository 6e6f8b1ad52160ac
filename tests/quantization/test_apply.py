"""Operators put into their schemes and taken out again; ranges observed on the way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.entry.compose import scheme_settings
from qvl_hydra.models.forward import reference_output
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.quantization.apply import make_quantizer, observe_ranges, quantized, replaced_forwards
from qvl_hydra.quantization.formats.integer import qdq_static
from qvl_hydra.quantization.qdq import qdq_weight
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat, scheme_from_settings
from qvl_hydra.settings import QuantSettings


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def untouched(module: nn.Module, state: dict[str, Tensor]) -> bool:
    changed = [
        part for part in module.modules() if "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks
    ]
    return not changed and all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@torch.no_grad()
def test_a_scheme_is_as_if_done_by_hand_and_leaves_no_trace(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...]
) -> None:
    """Every operator of the model with its input and output rounded by hooks and its weight replaced."""
    module, sample = tiny_model.module, tiny_samples[0]
    scheme = scheme_from_settings(scheme_settings("inc_static"))
    paths = [op.path for op in find_operators(module, "full")]
    ranges = observe_ranges(module, paths, tiny_samples, "full", scheme)
    before, plain = state_of(module), reference_output(module, sample, "full")
    with quantized(module, {path: make_quantizer(module, path, scheme, ranges) for path in paths}):
        found = reference_output(module, sample, "full")
    assert untouched(module, before)
    assert torch.equal(reference_output(module, sample, "full"), plain)

    hooks = []
    for path in paths:
        part, (inputs, output) = module.get_submodule(path), ranges[path]
        assert inputs is not None
        assert output is not None
        part.weight.data = qdq_weight(part.weight, WeightFormat(8))
        hooks.append(part.register_forward_pre_hook(lambda _, x, p=inputs: (qdq_static(x[0], p),)))
        hooks.append(part.register_forward_hook(lambda _, __, y, p=output: qdq_static(y, p)))
    expected = reference_output(module, sample, "full")
    for hook in hooks:
        hook.remove()
    module.load_state_dict(before)
    assert untouched(module, before)
    assert not torch.equal(found, plain)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_exception_inside_restores_too(tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...]) -> None:
    module = tiny_model.module
    scheme = Scheme("w", WeightFormat(4), None)
    paths = [op.path for op in find_operators(module, "full")]
    before = state_of(module)
    with pytest.raises(KeyboardInterrupt), quantized(module, {p: make_quantizer(module, p, scheme, {}) for p in paths}):
        raise KeyboardInterrupt
    assert untouched(module, before)
    forwards = dict.fromkeys((paths[0], "nowhere"), lambda _, x: x)
    with pytest.raises(AttributeError), replaced_forwards(module, forwards):
        pass
    assert untouched(module, before)


@pytest.mark.parametrize("component", ["lm", "vision", "full"])
@torch.no_grad()
def test_ranges_are_the_least_and_largest_value_met(
    component: str, tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...]
) -> None:
    module = tiny_model.module
    form = ActivationFormat(8)
    scheme = Scheme("s", WeightFormat(8), form, form)
    paths = [op.path for op in find_operators(module, component)]
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    hooks = [
        module.get_submodule(path).register_forward_hook(
            lambda _, x, y, path=path: seen[path].append(torch.stack([x[0].min(), x[0].max(), y.min(), y.max()]))
        )
        for path in paths
    ]
    samples = [sample for sample in tiny_samples if sample.pixel_values is not None]
    for sample in samples:
        reference_output(module, sample, component)
    for hook in hooks:
        hook.remove()
    ranges = observe_ranges(module, paths, tiny_samples, component, scheme)
    assert set(ranges) == set(paths)
    for path in paths:
        met = torch.stack(seen[path])
        for params, low, high in zip(ranges[path], met[:, [0, 2]].amin(0), met[:, [1, 3]].amax(0), strict=True):
            assert params is not None
            width = float(high.clamp(min=0) - low.clamp(max=0))
            assert params.scale == pytest.approx(width / 255, rel=1e-6)
            assert params.zero_point == round(-min(float(low), 0) / params.scale)


def test_an_operator_that_nothing_reaches(tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...]) -> None:
    scheme = scheme_from_settings(scheme_settings("w8a8_static"))
    with pytest.raises(ValueError, match="not finite"):
        observe_ranges(tiny_model.module, ["lm_head"], tiny_samples, "vision", scheme)


def test_dynamic_and_weight_only_schemes_need_no_ranges(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...]
) -> None:
    for name in ("w8a8_dynamic", "w8a16", "w4a16"):
        scheme = scheme_from_settings(scheme_settings(name))
        assert not scheme.needs_ranges
        ranges = observe_ranges(tiny_model.module, ["lm_head"], tiny_samples[:1], "lm", scheme)
        assert ranges == {"lm_head": (None, None)}
    assert scheme_from_settings(scheme_settings("w8a8_static")).needs_ranges


def test_the_named_schemes() -> None:
    """What the names say: bits of the weight, bits of the activations, how their ranges come about."""
    expected = {
        "w8a8_static": Scheme("w8a8_static", WeightFormat(8), ActivationFormat(8)),
        "inc_static": Scheme("inc_static", WeightFormat(8), ActivationFormat(8), ActivationFormat(8), "histogram"),
        "w8a8_dynamic": Scheme("w8a8_dynamic", WeightFormat(8), ActivationFormat(8, symmetric=True, dynamic=True)),
        "w8a16": Scheme("w8a16", WeightFormat(8), None),
        "w4a16": Scheme("w4a16", WeightFormat(4, group_size=128), None),
    }
    for name, scheme in expected.items():
        assert scheme_from_settings(scheme_settings(name)) == scheme


@pytest.mark.parametrize("perturb", ["weight", "activation"])
def test_parts_of_a_scheme_are_scored_apart(perturb: str) -> None:
    settings = QuantSettings("s", output_bits=8, perturb=perturb)  # type: ignore[arg-type]
    scheme = scheme_from_settings(settings)
    assert (scheme.weight is None) == (perturb == "activation")
    assert (scheme.input is None) == (perturb == "weight") == (scheme.output is None)


@pytest.mark.parametrize(
    ("bits", "symmetric", "limits"), [(8, True, (-128, 127)), (8, False, (0, 255)), (4, True, (-8, 7))]
)
def test_limits(bits: int, symmetric: bool, limits: tuple[int, int]) -> None:
    assert WeightFormat(bits, symmetric).limits == limits
    assert ActivationFormat(bits, symmetric).limits == limits
