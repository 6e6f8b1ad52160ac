"""Stages of Qwen3-VL and Qwen3.5: learned positions, and features that leave the vision tower on the way.

After some blocks a merger of its own makes features of the hidden state (deepstack), and the hidden state goes on
unchanged. These features travel behind it in the width of the state, four patches a token from the first of them on:
`(row, token, 4 x width + features)`. The tower's output is the merged features with those behind them. In the language
tower the first decoder blocks add one each to the hidden state, at the image tokens.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from qvl_hydra.errors import ModelError
from qvl_hydra.families.qwen2_vl import vision_block
from qvl_hydra.families.stages import (
    BlockInputs,
    Inputs,
    Segment,
    Stages,
    State,
    VisionInputs,
    decoder_block,
    join,
    recording,
    replaced,
)
from qvl_hydra.families.text import language_segments

VISUAL, LANGUAGE = "model.visual", "model.language_model"
DEEPSTACK = "deepstack_merger_list"


def stages(module: Any) -> Stages:
    """Stages of a model with this vision tower; see `Stages`."""
    visual: Any = module.get_submodule(VISUAL)
    taps = list(getattr(visual, "deepstack_visual_indexes", ()))
    blocks = len(module.get_submodule(f"{LANGUAGE}.layers"))
    if len(taps) > blocks:
        raise ModelError(
            f"features leave the vision tower at {len(taps)} places, and the language tower has {blocks} blocks to "
            "take them; a shape needs as many (text_config.num_hidden_layers, vision_config.deepstack_visual_indexes)"
        )
    vision = [_patch_embedding(visual)]
    for index in range(len(visual.blocks)):
        left = sum(tap < index for tap in taps)  # features that have left the tower before this block
        vision.append(_beside_features(vision_block(module, f"{VISUAL}.blocks.{index}"), visual, left))
        if index in taps:
            vision.append(_deepstack_merger(visual, taps.index(index), left))
    vision.append(_merger(visual, len(taps)))
    language = [
        _adding_features(module, segment) if index < len(taps) else segment
        for index, segment in enumerate(language_segments(module))
    ]
    return Stages(
        tuple(vision), (join(len(taps)),), tuple(language), _recorder(visual, len(taps)), (f"{VISUAL}.pos_embed",)
    )


def _patch_embedding(visual: Any) -> Segment:
    def run(x: State, context: Inputs) -> State:
        assert context.vision is not None
        assert context.vision.added is not None
        rows, patches, _ = x.shape
        embedded: Tensor = visual.patch_embed(x.reshape(rows * patches, -1))
        return embedded.view(rows, patches, -1) + context.vision.added

    path = f"{VISUAL}.patch_embed"
    return Segment(path, True, (path,), run)


def _apart(x: State, visual: Any, left: int) -> tuple[State, Tensor]:
    """The hidden state with its patches, and the features beside it (of width 0 where none has left yet)."""
    if not left:
        return x, x[..., :0]
    width = visual.config.hidden_size * visual.spatial_merge_unit
    return x[..., :width].reshape(x.shape[0], -1, visual.config.hidden_size), x[..., width:]


def _together(hidden: State, features: Tensor, visual: Any) -> State:
    merged = hidden.reshape(hidden.shape[0], -1, visual.config.hidden_size * visual.spatial_merge_unit)
    return torch.cat([merged, features], dim=-1)


def _beside_features(segment: Segment, visual: Any, left: int) -> Segment:
    """The block, with the features that have left the tower passed by."""
    if not left:
        return segment

    def run(x: State, context: Inputs) -> State:
        hidden, features = _apart(x, visual, left)
        return _together(segment.run(hidden, context), features, visual)

    return Segment(segment.name, True, segment.roots, run)


def _deepstack_merger(visual: Any, place: int, left: int) -> Segment:
    def run(x: State, context: Inputs) -> State:
        hidden, features = _apart(x, visual, left)
        rows, patches, width = hidden.shape
        own: Tensor = visual.deepstack_merger_list[place](hidden.reshape(rows * patches, width))
        own = own.view(rows, -1, own.shape[-1])
        return _together(hidden, own if not left else torch.cat([features, own], dim=-1), visual)

    path = f"{VISUAL}.{DEEPSTACK}.{place}"
    return Segment(path, True, (path,), run)


def _merger(visual: Any, left: int) -> Segment:
    def run(x: State, context: Inputs) -> State:
        hidden, features = _apart(x, visual, left)
        rows, patches, width = hidden.shape
        merged: Tensor = visual.merger(hidden.reshape(rows * patches, width))
        merged = merged.view(rows, -1, merged.shape[-1])
        return torch.cat([merged, features], dim=-1) if left else merged

    path = f"{VISUAL}.merger"
    return Segment(path, True, (path,), run)


def _adding_features(module: Any, segment: Segment) -> Segment:
    """A decoder block that adds the first of the features beside the hidden state to its output."""
    block = decoder_block(module, segment.name)

    def run(x: State, context: Inputs) -> State:
        width = context.text.shape[-1]
        if x.shape[-1] == width:  # no image
            return block.run(x, context)
        y = block.run(x[..., :width], context) + x[..., width : 2 * width]
        return torch.cat([y, x[..., 2 * width :]], dim=-1)

    return Segment(segment.name, False, segment.roots, run)


def _recorder(visual: Any, taps: int) -> Any:
    def record(grid: Int64[Tensor, "image 3"], dtype: torch.dtype, inputs: BlockInputs) -> VisionInputs:
        """With empty patches, so that what the blocks are given is what the tower adds."""
        patches = int(grid.prod(-1).sum())
        with ExitStack() as stack:
            stack.enter_context(recording(visual.blocks, f"{VISUAL}.blocks", inputs))
            stack.enter_context(replaced(visual.patch_embed, lambda x: x))
            mergers = [visual.deepstack_merger_list[place] for place in range(taps)]
            for merger in (visual.merger, *mergers):
                stack.enter_context(replaced(merger, lambda x: x))
            empty = torch.zeros(patches, visual.config.hidden_size, device=grid.device, dtype=dtype)
            result = visual(empty, grid_thw=grid)
        return VisionInputs(added=result.pooler_output)

    return record
