"""A small untrained Qwen2.5-VL with its samples, so that these tests need no trained weights."""

from __future__ import annotations

import pytest
import torch

from qvl_hydra.calibration.encode import load_processor
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.calibration.sources import load_calibration
from qvl_hydra.models.load import LoadedModel, describe_model, load_model
from qvl_hydra.settings import CalibrationSettings, ModelSettings


@pytest.fixture(scope="session")
def small_model() -> LoadedModel:
    """Two text layers and two vision blocks of the bundled architecture, random weights. Never left modified."""
    torch.set_num_threads(1)
    settings = ModelSettings(
        "small",
        "bundled:tiny_qwen2_5_vl",
        "qwen2_5_vl",
        weights="random",
        overrides={"text_config.num_hidden_layers": 2, "vision_config.depth": 2},
    )
    model = load_model(describe_model(settings), torch.device("cpu"), seed=0)
    # Random weights give nearly equal logits; larger ones make answers, and errors, differ between samples.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
    return model


@pytest.fixture(scope="session")
def small_samples(small_model: LoadedModel) -> tuple[Sample, ...]:
    processor = load_processor(small_model.description.folder)
    return load_calibration(CalibrationSettings("bundled", size=12), processor).samples
