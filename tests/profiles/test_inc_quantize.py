"""A profile through Neural Compressor: converted, saved, loaded again, and computed by QDQ in the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import ProfileError
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.formats.integer import qdq_static
from qvl_hydra.quantization.qdq import quantized_operator
from tests.profiles.rounding import W8A8, some_profile

pytestmark = pytest.mark.inc


@pytest.mark.parametrize(("which", "component"), [("small_model", "lm"), ("tiny_model", "full")])
def test_the_converted_model_is_the_profile(
    request: pytest.FixtureRequest, small_samples: tuple[Sample, ...], which: str, component: str, tmp_path: Path
) -> None:
    pytest.importorskip("neural_compressor")
    from qvl_hydra.backends.neural_compressor.wrapper import WrapperBatch, wrapper_input
    from qvl_hydra.profiles.inc_quantize import quantize_with_inc

    model: LoadedModel = request.getfixturevalue(which)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    profile = some_profile(model, W8A8, component)
    made = quantize_with_inc(model, profile, small_samples[:4], component, tmp_path)
    assert set(made.quantizers) == {op.path for op in profile.low}
    assert (tmp_path / "best_model.pt").exists()
    after = model.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for sample in small_samples[4:8]:
        batch = WrapperBatch([wrapper_input(model.module, sample, component)])
        with torch.no_grad():
            assert torch.equal(made.converted(batch), made.reloaded(batch))


def test_an_operator_computes_what_qdq_computes(
    small_model: LoadedModel, small_samples: tuple[Sample, ...], tmp_path: Path
) -> None:
    """Alone, on the same input: equal, or one step of the output apart where it lies between two."""
    pytest.importorskip("neural_compressor")
    from qvl_hydra.profiles.inc_quantize import quantize_with_inc

    profile = some_profile(small_model, W8A8, "lm")
    made = quantize_with_inc(small_model, profile, small_samples[:4], "lm", tmp_path)
    generator = torch.Generator().manual_seed(0)
    for op in profile.low:
        target, ours = small_model.module.get_submodule(op.path), made.quantizers[op.path]
        holder, _, last = op.path.rpartition(".")
        traced = made.converted.get_submodule(op.path)
        int8 = traced.module if hasattr(traced, "module") else traced
        x = torch.randn(1, 9, op.in_features, generator=generator) * ours.input.scale * 60
        grid = qdq_static(x, ours.input)
        packed = torch.quantize_per_tensor(grid, ours.input.scale, ours.input.zero_point, torch.quint8)
        with torch.no_grad():
            theirs, expected = int8(packed).dequantize(), quantized_operator(target, x, ours)
        steps = (theirs - expected).abs() / ours.output.scale
        assert (steps < 1.001).all(), (holder, last)
        assert (steps > 0.5).float().mean() < 0.01


def test_what_it_leaves_in_float_is_an_error(
    small_model: LoadedModel, small_samples: tuple[Sample, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("neural_compressor")
    from qvl_hydra.profiles import inc_quantize

    operators = find_operators(small_model.module, "lm")
    everything = Profile(W8A8, tuple(operators), frozenset(), 16, "test")
    held = Profile(W8A8, tuple(operators), frozenset({operators[3].path}), 16, "test")
    told = inc_quantize.op_name_dict(held, find_operators(small_model.module, "full"))
    monkeypatch.setattr(inc_quantize, "op_name_dict", lambda *_: told)
    with pytest.raises(ProfileError, match=rf"left {operators[3].path} in float"):
        inc_quantize.quantize_with_inc(small_model, everything, small_samples[:2], "lm", tmp_path)
