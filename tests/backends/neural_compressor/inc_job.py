"""Small random Qwen-VL models and hand-made samples, as jobs for the engines that Neural Compressor backs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from qvl_hydra.calibration.sample import CalibrationSet, Sample, samples_sha
from qvl_hydra.estimators.job import SweepJob
from qvl_hydra.families.table import FAMILIES
from qvl_hydra.models.load import LoadedModel, ModelDescription
from qvl_hydra.operators.discover import Operator, find_operators
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat
from qvl_hydra.settings import BackendSettings, ModelSettings, StrategySettings

IMAGE = 5
VOCABULARY = 96
STATIC = Scheme("inc_static", WeightFormat(8), ActivationFormat(8), ActivationFormat(8), "histogram")
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
IDS = {"image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}


def small_model(family: str = "qwen2_5_vl", layers: int = 1, depth: int = 1) -> nn.Module:
    """A model of one decoder block and one vision block; weights large enough for every operator to matter."""
    text = {**TEXT, "num_hidden_layers": layers}
    if family == "qwen2_5_vl":
        vision = {"hidden_size": 32, "out_hidden_size": 48, "depth": depth, "num_heads": 2, "intermediate_size": 56}
        vision |= {"window_size": 56, "fullatt_block_indexes": [depth - 1]}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **IDS)
        cls = Qwen2_5_VLForConditionalGeneration
    else:
        vision = {"embed_dim": 32, "hidden_size": 48, "depth": depth, "num_heads": 2, "mlp_ratio": 2}
        config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **IDS)
        cls = Qwen2VLForConditionalGeneration
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config).eval().requires_grad_(False)
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv3d) and path != "lm_head":
                module.weight.mul_(6.0)
    return model


def make_sample(model: nn.Module, seed: int, image: bool = True) -> Sample:
    """A prompt of random tokens, its length by the seed, with or without one image of 56 x 56 pixels or wider."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.tensor([[1, 4, 4 + 2 * (seed % 3)]]) if image else None
    places = int(grid.prod()) // 4 if grid is not None else 0
    head = torch.randint(10, VOCABULARY, (2 + seed % 4,), generator=generator)
    tail = torch.randint(10, VOCABULARY, (6 + seed % 3,), generator=generator)
    ids = torch.cat([head, torch.full((places,), IMAGE), tail])
    kinds = (ids == IMAGE).int()[None]
    positions, _ = model.model.get_rope_index(ids[None], mm_token_type_ids=kinds, image_grid_thw=grid)
    labels = torch.cat([torch.full((len(ids) - 4,), -100), ids[-4:]])
    pixels = None if grid is None else torch.randn(int(grid.prod()), 1176, generator=generator)
    return Sample(f"sample{seed}", ids, positions[:, 0], labels, pixels, grid)


def make_job(
    workdir: Path,
    component: str = "lm",
    model: nn.Module | None = None,
    roles: Sequence[str] | None = None,
    scheme: Scheme = STATIC,
    strategy: StrategySettings | None = None,
    calibration: int = 3,
    scored: int = 2,
    batch_size: int = 2,
) -> SweepJob:
    """A job over hand-made samples, the second of them without an image.

    Args:
        roles: operators to score, by role; None is all of the component.
    """
    model = model or small_model()
    samples = tuple(make_sample(model, seed, image=seed != 1) for seed in range(calibration))
    settings = ModelSettings(name="small", family="qwen2_5_vl", path="small")
    family = FAMILIES[model.config.model_type]
    description = ModelDescription("small", Path("small"), family, model.config, model, settings)
    operators: list[Operator] = [op for op in find_operators(model, component) if roles is None or op.role in roles]
    return SweepJob(
        model=LoadedModel(model, description, torch.device("cpu"), "sha"),
        component=component,
        operators=tuple(operators),
        calibration=CalibrationSet(samples, "made", samples_sha(samples)),
        scored=samples[:scored],
        batch_size=batch_size,
        schemes=(scheme,),
        strategy=strategy or StrategySettings(name="mse_v2", metric="squared_error", estimator="exact"),
        backend=BackendSettings(name="inc_fx", device="cpu"),
        fuse=False,
        seed=0,
        workdir=workdir,
    )


class Steps:
    """A progress bar that counts."""

    def __init__(self) -> None:
        self.expected = 0
        self.done = 0

    def total(self, steps: int, label: str) -> None:
        self.expected = steps

    def step(self, steps: int = 1) -> None:
        self.done += steps
