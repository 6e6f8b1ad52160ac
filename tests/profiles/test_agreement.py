"""Tools' outputs beside QDQ: the walk against whole forwards, and resident against streamed models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.models.forward import reference_output
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.profiles import agreement
from qvl_hydra.profiles.agreement import Agreement, compare, steps
from qvl_hydra.profiles.apply import Quantizers
from qvl_hydra.profiles.checkpoint import write_checkpoint
from qvl_hydra.profiles.profile import Profile
from tests.conftest import load_tiny
from tests.profiles.rounding import W8A8_SYMMETRIC, applied, some_profile
from tests.profiles.test_compressed_tensors import mixed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("component", ["vision", "lm", "full"])
def test_the_walk_is_the_models_own_forward(
    tiny_samples: tuple[Sample, ...], component: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in groups of samples; the tool is QDQ itself in every second sample, and the float model in the others."""
    model, streamed = (load_tiny(dtype=dtype, placement=placement) for placement in ("resident", "streamed"))
    samples = [sample for sample in tiny_samples if component != "vision" or sample.pixel_values is not None]
    profile = some_profile(model, W8A8_SYMMETRIC, component)
    quantizers = Quantizers(model, profile.operators, samples, component, [W8A8_SYMMETRIC])

    @torch.no_grad()
    def outputs(sample: Sample) -> torch.Tensor:
        if samples.index(sample) % 2:
            return reference_output(model.module, sample, component).float()
        with applied(model.module, profile, quantizers):
            return reference_output(model.module, sample, component).float()

    expected = whole_forwards(model, samples, component, outputs, profile, quantizers)
    assert compare(outputs, model, profile, quantizers, samples, component) == expected
    monkeypatch.setattr(agreement, "STATE_BYTES", 1)
    done: list[None] = []
    assert compare(outputs, streamed, profile, quantizers, samples, component, lambda: done.append(None)) == expected
    assert len(done) == steps(streamed, samples, component)
    assert expected.identical == (len(samples) + 1) // 2
    assert 0 < expected.relative_difference < 1


@torch.no_grad()
def whole_forwards(
    model: LoadedModel,
    samples: Sequence[Sample],
    component: str,
    outputs: Callable[[Sample], torch.Tensor],
    profile: Profile,
    quantizers: Quantizers,
) -> Agreement:
    """The same by the model's own forwards."""
    largest = apart = effect = 0.0
    identical = 0
    for sample in samples:
        reference = reference_output(model.module, sample, component).float()
        with applied(model.module, profile, quantizers):
            ours = reference_output(model.module, sample, component).float()
        theirs = outputs(sample)
        identical += bool(torch.equal(theirs, ours))
        largest = max(largest, float((theirs - ours).abs().max()))
        apart += float((theirs - ours).double().square().sum())
        effect += float((ours - reference).double().square().sum())
    return Agreement(len(profile.low), largest, (apart / effect) ** 0.5, identical, len(samples))


@pytest.mark.compressed_tensors
@pytest.mark.parametrize("names", [["w4a16_g32", "w8a8_int"], ["nvfp4", "fp8_dynamic"]], ids="-".join)
def test_a_streamed_model_writes_the_checkpoint_of_a_resident_one(
    tiny_samples: tuple[Sample, ...], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte but for the order of the config's keys, and whatever a killed run left."""
    pytest.importorskip("compressed_tensors")
    found = []
    for placement, at_once in (("resident", 1 << 29), ("streamed", 1)):
        monkeypatch.setattr("qvl_hydra.profiles.checkpoint.PART_BYTES", at_once)
        model, folder = load_tiny(dtype="bfloat16", placement=placement), tmp_path / placement
        profile, _ = mixed(model, tiny_samples, names)
        (tmp_path / f"{placement}.parts").mkdir()
        (tmp_path / f"{placement}.parts" / "0.safetensors").write_text("half a file")
        quantizers = Quantizers(model, profile.operators, tiny_samples, "full", list(profile.schemes.values()))
        done: list[None] = []
        write_checkpoint(model, profile, quantizers, folder, lambda done=done: done.append(None))
        assert len(done) == len(profile.low)
        config = json.loads((folder / "config.json").read_text())
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        found.append(files | {"config.json": config})
        assert sorted(path.name for path in tmp_path.glob(f"{placement}*")) == [placement]
        assert config["dtype"] == config["vision_config"]["dtype"] == "bfloat16"
    assert found[0] == found[1]
