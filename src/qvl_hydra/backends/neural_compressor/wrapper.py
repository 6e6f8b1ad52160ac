"""The module that Neural Compressor is given: one component of a Qwen-VL model, its inputs already floating point.

Its sub-modules stand at their Hugging Face paths, so that operator names map back by themselves. The embedding table
is left out: token embeddings are computed before, and Neural Compressor counts an `Embedding` as an operator. All
samples of a call go through one after the other, unpadded, and what they give is joined in `output`, the module where
Neural Compressor compares.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.models.forward import logits, text_inputs

OUTPUT = "output"


@dataclass(frozen=True)
class WrapperInput:
    """One sample as the wrapper takes it.

    Attributes:
        embeds: token embeddings; for `lm` with the image features in place. None for `vision`.
        places: for `full`, which tokens take image features.
        rows: of the output: tokens, or merged image features.
    """

    sample: Sample
    rows: int
    embeds: Float[Tensor, "1 token hidden"] | None
    places: Bool[Tensor, "token"] | None


class WrapperBatch:
    """Samples of one call. It stands where Neural Compressor expects a tensor (see `inc_hawq`)."""

    def __init__(self, inputs: Sequence[WrapperInput]) -> None:
        self.inputs = tuple(inputs)
        self.requires_grad = False
        self.shape = (len(self.inputs),)

    def to(self, device: torch.device | str) -> WrapperBatch:
        return self


class ComponentWrapper(nn.Module):
    """One component of a Qwen-VL model.

    Copies of it share the weights (nothing writes to them) and have modules, hooks and gradients of their own. Neural
    Compressor copies the model for each operator: with shared weights that costs no memory, and the Hugging Face model
    itself is never in its hands.

    Args:
        module: a Qwen-VL model for conditional generation.
        component: `lm`, `vision` or `full`.
    """

    graph = None  # Neural Compressor's `hawq_v2` fuses, and fails on, a model without an attribute of this name

    def __init__(self, module: Any, component: str) -> None:
        super().__init__()
        self.component = component
        self.config = module.config
        model: Any = nn.Module()
        self.model = model
        if component != "lm":
            model.visual = _sharing_copy(module.model.visual)
            model.visual.patch_embed = _PatchEmbed(model.visual.patch_embed.proj)
        if component != "vision":
            model.language_model = _sharing_copy(module.model.language_model)
            model.language_model.embed_tokens = None
            self.lm_head = _sharing_copy(module.lm_head)
        self.output = nn.Identity()
        last = module.model.visual.merger.mlp[-1] if component == "vision" else module.lm_head
        self.width: int = last.out_features

    def forward(self, batch: WrapperBatch) -> Float[Tensor, "token value"]:
        """Logits at every position, or merged image features, of all samples one behind the other."""
        joined: Tensor = self.output(torch.cat([self._one(item) for item in batch.inputs]))
        return joined

    def _one(self, item: WrapperInput) -> Float[Tensor, "token value"]:
        if self.component == "vision":
            return self._features(item.sample)
        embeds = item.embeds
        assert embeds is not None
        if item.places is not None and item.sample.pixel_values is not None:
            places = item.places[None, :, None].expand_as(embeds)
            embeds = embeds.masked_scatter(places, self._features(item.sample))
        return logits(self, embeds, item.sample)[0]

    def _features(self, sample: Sample) -> Float[Tensor, "image_token hidden"]:
        # models.forward.vision_features asks the patch embedding for its weight, which a quantized one has not.
        visual: Any = self.model.visual
        features: Tensor = visual(sample.pixel_values, grid_thw=sample.image_grid_thw).pooler_output
        return features

    def __deepcopy__(self, memo: dict[int, Any]) -> ComponentWrapper:
        for parameter in self.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
        fresh = self.__class__.__new__(self.__class__)
        memo[id(self)] = fresh
        fresh.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return fresh


class _PatchEmbed(nn.Module):
    """The patch embedding of the vision tower; the model's own asks its weight for a dtype, which an int8 one lacks."""

    def __init__(self, proj: nn.Conv3d) -> None:
        super().__init__()
        self.proj = proj
        self.patch = (proj.in_channels, *proj.kernel_size)
        self.width = proj.out_channels

    def forward(self, pixels: Float[Tensor, "patch value"]) -> Float[Tensor, "patch width"]:
        embedded: Tensor = self.proj(pixels.view(-1, *self.patch))
        return embedded.view(-1, self.width)


def _sharing_copy(module: Any) -> Any:
    """The module tree anew, around the same weights."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.data, requires_grad=False) for parameter in module.parameters()
    }
    return copy.deepcopy(module, memo)


@torch.no_grad()
def wrapper_input(module: Any, sample: Sample, component: str) -> WrapperInput:
    """What the wrapper takes for a sample, computed by the model itself in float."""
    if component == "vision":
        assert sample.image_grid_thw is not None
        merged = sample.patches // module.model.visual.spatial_merge_size**2
        return WrapperInput(sample, merged, None, None)
    tokens = len(sample.input_ids)
    if component == "lm":
        return WrapperInput(sample, tokens, text_inputs(module, sample), None)
    embeds = module.model.language_model.embed_tokens(sample.input_ids)[None]
    return WrapperInput(sample, tokens, embeds, sample.input_ids == module.config.image_token_id)


def usable(samples: Sequence[Sample], component: str) -> tuple[Sample, ...]:
    """The samples that reach the component: the vision tower needs an image."""
    return tuple(sample for sample in samples if component != "vision" or sample.pixel_values is not None)
