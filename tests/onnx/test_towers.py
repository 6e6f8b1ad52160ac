"""The modules that are exported, against the model's own forward; the model stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import ExportError
from qvl_hydra.models.forward import reference_output
from tests.backends.neural_compressor.inc_job import make_sample, small_model

pytest.importorskip("onnx")

from qvl_hydra.onnx.export.towers import causal_mask, exportable, sample_inputs
from qvl_hydra.onnx.export.vision import block_kinds, tower_layout

pytestmark = pytest.mark.onnx
FAMILIES = ["qwen2_5_vl", "qwen2_vl"]
# Rows and columns in patches: whole windows of 4 x 4 patches, cut windows, one window, two images of different size.
GRIDS = [[[1, 8, 8]], [[1, 6, 10]], [[1, 4, 4]], [[1, 2, 4]], [[1, 6, 4], [1, 4, 8]]]


def model_of(family: str) -> nn.Module:
    return small_model(family, layers=2, depth=2)


def image_sample(model: nn.Module, grid: list[list[int]]) -> Sample:
    sizes = torch.tensor(grid)
    patches = int(sizes.prod(-1).sum())
    pixels = torch.randn(patches, 1176, generator=torch.Generator().manual_seed(0))
    ids = torch.full((patches // 4,), model.config.image_token_id)
    return Sample("image", ids, torch.zeros(3, len(ids), dtype=torch.long), ids, pixels, sizes)


@pytest.mark.parametrize("free", [True, False], ids=["free", "fixed"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_vision_tower_equals_the_models_own_on_every_grid(family: str, grid: list[list[int]], free: bool) -> None:
    model = model_of(family)
    sample = image_sample(model, grid)
    expected = reference_output(model, sample, "vision")
    with exportable(model, "vision", None if free else sample.image_grid_thw) as target:
        inputs = sample_inputs(model, sample, "vision", free)
        assert list(inputs) == target.input_names
        found = target.module(*inputs.values())
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_rows_of_the_vision_tower_do_not_see_each_other() -> None:
    model = model_of("qwen2_5_vl")
    first, second = (image_sample(model, [[1, 6, 10]]) for _ in range(2))
    with exportable(model, "vision", first.image_grid_thw) as target:
        pixels = torch.stack([first.pixel_values, 3 * second.pixel_values.flip(0)])
        together = target.module(pixels)
        torch.testing.assert_close(together[1:], target.module(pixels[1:]))
        torch.testing.assert_close(together[:1], target.module(pixels[:1]))


@pytest.mark.parametrize("component", ["lm", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_and_whole_model_equal_the_models_own(family: str, component: str) -> None:
    model = model_of(family)
    for seed in (0, 2):
        sample = make_sample(model, seed)
        expected = reference_output(model, sample, component)
        with exportable(model, component, None) as target:
            found = target.module(*sample_inputs(model, sample, component, True).values())
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("component", ["lm", "vision", "full"])
def test_the_model_is_bit_for_bit_as_before(component: str) -> None:
    model = model_of("qwen2_5_vl")
    sample = make_sample(model, 0)
    before = reference_output(model, sample, component)
    with exportable(model, component, sample.image_grid_thw) as target:
        target.module(*sample_inputs(model, sample, component, False).values())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert torch.equal(before, reference_output(model, sample, component))


def test_a_layout_leaves_the_tower_as_it_was_even_when_the_forward_fails() -> None:
    model = model_of("qwen2_5_vl")
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever transformers makes of a grid of 3 x 3
        tower_layout(model.model.visual, torch.tensor([[1, 3, 3]]))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_block_kinds() -> None:
    assert block_kinds(model_of("qwen2_5_vl").model.visual) == ["windowed", "full"]
    assert block_kinds(model_of("qwen2_vl").model.visual) == ["full", "full"]


def test_causal_mask_hides_the_future_and_padding() -> None:
    mask = causal_mask(torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.float32)
    assert mask.shape == (2, 1, 3, 3)
    visible = mask[:, 0] == 0
    assert visible.tolist() == [
        [[True, False, False], [True, True, False], [True, True, True]],
        [[True, False, False], [True, True, False], [True, True, False]],
    ]


def test_sliding_windows_are_refused() -> None:
    model = model_of("qwen2_5_vl")
    model.model.language_model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ExportError, match="sliding_attention"), exportable(model, "lm", None):
        pass
