"""auto-round's `layer_config`, run without tuning."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qvl_hydra.calibration.encode import Processor
from qvl_hydra.calibration.sample import Sample, collate
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles.formats import auto_round
from tests.profiles.rounding import W8A8_DYNAMIC, some_profile

pytestmark = [pytest.mark.autoround, pytest.mark.slow]


def test_layer_config_decides_what_is_quantized(
    tiny_model: LoadedModel,
    tiny_processor: Processor,
    tiny_samples: tuple[Sample, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    autoround: Any = pytest.importorskip("auto_round")
    monkeypatch.chdir(tmp_path)  # it keeps a work space where it stands
    profile = some_profile(tiny_model, W8A8_DYNAMIC, convolutions=False)
    everything = find_operators(tiny_model.module, "full")
    layers = json.loads(auto_round.render(profile, everything).files["layer_config.json"])
    before = {op.path: tiny_model.module.get_submodule(op.path).weight.bfloat16() for op in everything}
    rounder = autoround.AutoRound(
        copy.deepcopy(tiny_model.module),
        tokenizer=tiny_processor.tokenizer,
        scheme="INT8",
        layer_config=layers,
        iters=0,
        disable_opt_rtn=True,
        dataset=[collate([sample]) for sample in tiny_samples],
        nsamples=len(tiny_samples),
        seqlen=8,
        device_map="cpu",
        quant_nontext_module=True,
        enable_torch_compile=False,
    )
    found, resolved = rounder.quantize()
    low = {op.path for op in profile.low}
    assert {path for path, layer in resolved.items() if layer["bits"] == 8 and layer["act_bits"] == 8} == low
    for op in everything:
        target = found.get_submodule(op.path)
        weight = getattr(target, "orig_layer", target).weight.detach().bfloat16()
        if op.path in low:
            assert not torch.equal(weight, before[op.path]), op.path
            # At most 256 values a channel, within two steps of what they were: rounding, clipping of the far end of
            # the full range, and bfloat16 on both sides.
            assert max(len(row.unique()) for row in weight) <= 256
            step = before[op.path].float().abs().amax(1, keepdim=True) / 127
            assert ((weight.float() - before[op.path].float()).abs() <= 2 * step).all(), op.path
        else:
            assert torch.equal(weight, before[op.path]), op.path
