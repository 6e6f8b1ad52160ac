"""Stages of Qwen2-VL and Qwen2.5-VL: a vision tower that may walk its patches window by window, and one merger."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from qvl_hydra.families.stages import (
    BlockInputs,
    Inputs,
    Segment,
    Stages,
    State,
    VisionInputs,
    join,
    recording,
    repeat_rows,
    replaced,
)
from qvl_hydra.families.text import language_segments

VISUAL = "model.visual"


def stages(module: Any) -> Stages:
    """Stages of a `Qwen2VLForConditionalGeneration` or `Qwen2_5_VLForConditionalGeneration`; see `Stages`."""
    visual: Any = module.get_submodule(VISUAL)

    def embed(x: State, context: Inputs) -> State:
        assert context.vision is not None
        rows, patches, _ = x.shape
        embedded: Tensor = visual.patch_embed(x.reshape(rows * patches, -1))
        return embedded.view(rows, patches, -1)[:, context.vision.order]

    def merge(x: State, context: Inputs) -> State:
        assert context.vision is not None
        rows = x.shape[0]
        merged: Tensor = visual.merger(x.reshape(rows * x.shape[1], -1))
        return merged.view(rows, -1, merged.shape[-1])[:, context.vision.back]

    def record(grid: Int64[Tensor, "image 3"], dtype: torch.dtype, inputs: BlockInputs) -> VisionInputs:
        """With numbered patches, whose places after all of it tell what it did to their order."""
        patches = int(grid.prod(-1).sum())
        merged = patches // visual.spatial_merge_size**2
        seen: list[Tensor] = []

        def number_features(x: Tensor) -> Tensor:
            seen.append(x[:, 0].long())
            return torch.arange(merged, device=x.device, dtype=torch.float64)[:, None]

        with ExitStack() as stack:
            stack.enter_context(recording(visual.blocks, f"{VISUAL}.blocks", inputs))
            stack.enter_context(replaced(visual.patch_embed, lambda x: x))
            stack.enter_context(replaced(visual.merger, number_features))
            numbers = torch.arange(patches, device=grid.device, dtype=torch.float64)
            result = visual(numbers[:, None].repeat(1, 2), grid_thw=grid)
        return VisionInputs(order=seen[0], back=result.pooler_output[:, 0].long())

    paths = [f"{VISUAL}.blocks.{index}" for index in range(len(visual.blocks))]
    vision = (
        Segment(f"{VISUAL}.patch_embed", True, (f"{VISUAL}.patch_embed",), embed),
        *(vision_block(module, path) for path in paths),
        Segment(f"{VISUAL}.merger", True, (f"{VISUAL}.merger",), merge),
    )
    return Stages(vision, (join(),), language_segments(module), record)


def vision_block(module: Any, path: str) -> Segment:
    """A vision block over all rows at once, packed."""
    block = module.get_submodule(path)

    def run(x: State, context: Inputs) -> State:
        rows, patches, width = x.shape
        inputs = repeat_rows(context.block_inputs[path], rows, patches)
        y: Tensor = block(x.reshape(rows * patches, width), **inputs)
        return y.view(rows, patches, width)

    return Segment(path, True, (path,), run)
