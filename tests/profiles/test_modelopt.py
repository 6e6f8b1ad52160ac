"""ModelOpt's `quant_cfg`, applied with `mtq.quantize`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import yaml

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.models.forward import reference_output
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.profiles.formats import modelopt
from qvl_hydra.quantization.formats.record import QuantParams
from qvl_hydra.quantization.qdq import OperatorQuantizer
from tests.profiles.rounding import W8A8, W8A8_SYMMETRIC, assert_only_rounding, assert_weights_agree, some_profile

pytestmark = pytest.mark.modelopt
LARGEST = 127  # its scales are amax / 127, ours amax / 127.5


def test_quantize_takes_the_profile_and_computes_what_qdq_computes(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...]
) -> None:
    mtq: Any = pytest.importorskip("modelopt.torch.quantization")
    profile = some_profile(tiny_model, W8A8)
    config = yaml.safe_load(modelopt.render(profile, profile.operators).files["quant_cfg.yaml"])

    def calibrate(module: torch.nn.Module) -> None:
        with torch.no_grad():
            for sample in tiny_samples:
                reference_output(module, sample, "full")

    found = mtq.quantize(copy.deepcopy(tiny_model.module), config, calibrate)
    enabled = {
        name.rsplit(".", 1)[0]
        for name, module in found.named_modules()
        if type(module).__name__ == "TensorQuantizer" and module.is_enabled
    }
    assert enabled == {op.path for op in profile.low}
    quantizers, weights = {}, {}
    for op in profile.low:
        target = found.get_submodule(op.path)
        scale = target.weight_quantizer.amax.reshape(-1, 1) / LARGEST
        flat = target.weight.detach().flatten(1)
        integers = torch.round(flat / scale).clamp(-LARGEST - 1, LARGEST)
        ranges = QuantParams(float(target.input_quantizer.amax) / LARGEST, 0, -LARGEST - 1, LARGEST)
        weight = (integers * scale).view_as(target.weight)
        quantizers[op.path] = OperatorQuantizer(W8A8_SYMMETRIC, weight, ranges)
        weights[op.path] = target.weight_quantizer(target.weight).detach()
        assert_weights_agree(target.weight, weights[op.path], weight, scale)
        # Calibrated on the same samples, its range is ours.
        assert torch.allclose(scale * LARGEST, flat.abs().amax(1, keepdim=True))
    for sample in tiny_samples[:3]:
        assert_only_rounding(tiny_model, found, profile, quantizers, weights, sample)
