"""llm-compressor's recipe, run by `oneshot`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from qvl_hydra.calibration.encode import Processor
from qvl_hydra.calibration.sample import Sample, collate
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles.apply import Quantizers
from qvl_hydra.profiles.formats import llm_compressor
from tests.profiles.rounding import W8A8, assert_only_rounding, assert_weights_agree, some_profile

pytestmark = pytest.mark.llmcompressor


def test_oneshot_takes_the_recipe_and_computes_what_qdq_computes(
    tiny_model: LoadedModel, tiny_processor: Processor, tiny_samples: tuple[Sample, ...], tmp_path: Path
) -> None:
    llmcompressor: Any = pytest.importorskip("llmcompressor")
    profile = some_profile(tiny_model, W8A8, convolutions=False)
    everything = find_operators(tiny_model.module, "full")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(llm_compressor.render(profile, everything).files["recipe.yaml"])
    found = llmcompressor.oneshot(
        model=copy.deepcopy(tiny_model.module),
        dataset=DataLoader([collate([sample]) for sample in tiny_samples], batch_size=None),
        recipe=str(recipe),
        pipeline="basic",
        processor=tiny_processor.tokenizer,
    )
    quantized = {name for name, module in found.named_modules() if hasattr(module, "quantization_scheme")}
    assert quantized == {op.path for op in profile.low}
    quantizers = Quantizers(tiny_model, profile.operators, tiny_samples, "full", [W8A8])
    weights = {}
    for op in profile.low:
        target, ours = found.get_submodule(op.path), quantizers[op.path]
        assert float(target.input_scale) == pytest.approx(ours.input.scale, rel=1e-5)
        assert int(target.input_zero_point) + 128 == ours.input.zero_point
        integers = torch.round(target.weight.detach() / target.weight_scale).clamp(-128, 127)
        weights[op.path] = integers * target.weight_scale
        assert_weights_agree(target.weight, weights[op.path], ours.weight, target.weight_scale)
    for sample in tiny_samples[:3]:
        assert_only_rounding(tiny_model, found, profile, quantizers, weights, sample)
    found.save_pretrained(tmp_path / "saved", save_compressed=True)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert saved["format"] == "int-quantized"
