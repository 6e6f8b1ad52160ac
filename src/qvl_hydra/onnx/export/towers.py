"""What is exported of a model: a module with the inputs and outputs of the graph, around the model's own modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import ExportError
from qvl_hydra.models.forward import text_inputs
from qvl_hydra.onnx.export.vision import (
    LAYOUT_AXES,
    FixedVisionTower,
    FreeVisionTower,
    exportable_attention,
    layout_names,
    tower_layout,
)

Axes = dict[str, dict[int, str]]
# Dimensions that stay free in the graph: every row is one sample or one variant of it, every length is allowed.
TEXT_AXES: Axes = {"attention_mask": {0: "row", 1: "token"}, "position_ids": {1: "row", 2: "token"}}
INPUT_AXES: dict[str, Axes] = {
    "lm": {"inputs_embeds": {0: "row", 1: "token"}, **TEXT_AXES},
    "vision": {"pixel_values": {0: "row"}},
    "full": {"input_ids": {0: "row", 1: "token"}, **TEXT_AXES, "pixel_values": {0: "row"}},
}
OUTPUT_AXES: dict[str, Axes] = {
    "lm": {"logits": {0: "row", 1: "token"}},
    "vision": {"image_features": {0: "row"}},
    "full": {"logits": {0: "row", 1: "token"}},
}


@dataclass(frozen=True)
class Exportable:
    """A module ready to export.

    Attributes:
        axes: free dimensions of its inputs, in their order, and of its output.
    """

    module: nn.Module
    axes: Axes
    output_name: str

    @property
    def input_names(self) -> list[str]:
        return [name for name in self.axes if name != self.output_name]


class LanguageTower(nn.Module):
    """Language tower and head: embeddings to logits, the causal mask made from `attention_mask` in the graph."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.language_model: Any = model.model.language_model
        self.lm_head: Any = model.lm_head

    def forward(
        self,
        inputs_embeds: Float[Tensor, "row token hidden"],
        attention_mask: Int64[Tensor, "row token"],
        position_ids: Int64[Tensor, "3 row token"],
    ) -> Float[Tensor, "row token vocab"]:
        mask = causal_mask(attention_mask, inputs_embeds.dtype)
        hidden = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask={"full_attention": mask},
            position_ids=position_ids,
            use_cache=False,
        )
        logits: Tensor = self.lm_head(hidden.last_hidden_state)
        return logits


class ImageAndText(nn.Module):
    """The whole model: token ids and the patches of images, to logits."""

    def __init__(self, model: Any, vision: FixedVisionTower | FreeVisionTower) -> None:
        super().__init__()
        self.vision = vision
        self.language = LanguageTower(model)
        self.image_token = model.config.image_token_id

    def forward(
        self,
        input_ids: Int64[Tensor, "row token"],
        attention_mask: Int64[Tensor, "row token"],
        position_ids: Int64[Tensor, "3 row token"],
        pixel_values: Float[Tensor, "row patch value"],
        *layout: Tensor,
    ) -> Float[Tensor, "row token vocab"]:
        features: Tensor = self.vision(pixel_values, *layout)
        embeds = self.language.language_model.embed_tokens(input_ids)
        is_image: Tensor = input_ids == self.image_token
        # The n-th image token of a row takes the n-th feature; others take any, and are not used.
        place = (is_image.long().cumsum(1) - 1).clamp(min=0, max=features.shape[1] - 1)
        placed = torch.gather(features, 1, place[..., None].expand(-1, -1, features.shape[2]))
        embeds = torch.where(is_image[..., None], placed.to(embeds.dtype), embeds)
        logits: Tensor = self.language(embeds, attention_mask, position_ids)
        return logits


def causal_mask(attention_mask: Int64[Tensor, "row token"], dtype: torch.dtype) -> Float[Tensor, "row 1 token token"]:
    """Added to attention scores: 0 where a token may look, the dtype's lowest value where it may not."""
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    allowed = (places[None, :] <= places[:, None])[None, None] & (attention_mask > 0)[:, None, None, :]
    return (~allowed).to(dtype) * torch.finfo(dtype).min


@contextmanager
def exportable(model: Any, component: str, grid: Int64[Tensor, "image 3"] | None) -> Iterator[Exportable]:
    """The component's module for export; the model is afterwards as it was before.

    Args:
        model: a Qwen-VL model in eval mode.
        component: `lm`, `vision` or `full`.
        grid: for `vision` and `full` the grid of the images that the graph is fixed to; None leaves it free, with the
            tensors of `vision.LAYOUT_AXES` as further inputs.

    Raises:
        ExportError: the language tower has sliding-window layers, which are not exported.
    """
    (output,) = OUTPUT_AXES[component]
    inputs = INPUT_AXES[component]
    with ExitStack() as stack:
        if component != "vision":
            stack.enter_context(_eager(model.model.language_model))
        if component == "lm":
            yield Exportable(LanguageTower(model), {**inputs, **OUTPUT_AXES[component]}, output)
            return
        visual = model.model.visual
        stack.enter_context(exportable_attention(visual))
        vision: FixedVisionTower | FreeVisionTower
        if grid is not None:
            vision = FixedVisionTower(visual, tower_layout(visual, grid))
        else:
            vision = FreeVisionTower(visual)
            free = {0: "row", 1: "patch"}
            inputs = {**inputs, "pixel_values": free, **{name: LAYOUT_AXES[name] for name in layout_names(visual)}}
        outputs = (
            {output: {0: "row", 1: "merged"}} if component == "vision" and grid is None else OUTPUT_AXES[component]
        )
        yield Exportable(
            vision if component == "vision" else ImageAndText(model, vision), {**inputs, **outputs}, output
        )


@contextmanager
def _eager(language_model: Any) -> Iterator[None]:
    config = language_model.config
    if set(config.layer_types) != {"full_attention"}:
        raise ExportError(
            f"text_config.layer_types has {sorted(set(config.layer_types))}; only full_attention layers are exported: "
            "set use_sliding_window=false in the checkpoint's config"
        )
    before = config._attn_implementation
    try:
        config._attn_implementation = "eager"
        yield
    finally:
        config._attn_implementation = before


@torch.no_grad()
def sample_inputs(model: Any, sample: Sample, component: str, free: bool) -> dict[str, Tensor]:
    """The graph's inputs for one sample, one row.

    Args:
        sample: with images, for `vision` and `full`.
        free: whether the resolution is free in the graph.
    """
    inputs: dict[str, Tensor] = {}
    if component == "lm":
        inputs["inputs_embeds"] = text_inputs(model, sample)
    elif component == "full":
        inputs["input_ids"] = sample.input_ids[None]
    if component != "vision":
        inputs["attention_mask"] = torch.ones(1, len(sample.input_ids), dtype=torch.long)
        inputs["position_ids"] = sample.position_ids[:, None]
    if component != "lm":
        assert sample.pixel_values is not None
        assert sample.image_grid_thw is not None
        inputs["pixel_values"] = sample.pixel_values[None]
        if free:
            inputs |= tower_layout(model.model.visual, sample.image_grid_thw)
    return inputs
