"""One plain forward of one sample: the outputs that scores are measured on."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from qvl_hydra.calibration.sample import Sample


def vision_features(module: nn.Module, sample: Sample) -> Float[Tensor, "image_token hidden"]:
    """Merged image features of all images of a sample, in the model's own order.

    Args:
        module: a Qwen-VL model for conditional generation, on its device.
        sample: with at least one image.
    """
    assert sample.pixel_values is not None
    assert sample.image_grid_thw is not None
    visual: Any = module.get_submodule("model.visual")
    weight = visual.patch_embed.proj.weight
    pixels = sample.pixel_values.to(device=weight.device, dtype=weight.dtype)
    features: Tensor = visual(pixels, grid_thw=sample.image_grid_thw.to(weight.device)).pooler_output
    return features


def text_inputs(module: nn.Module, sample: Sample) -> Float[Tensor, "1 token hidden"]:
    """Token embeddings with the image features in their places."""
    table: Any = module.get_submodule("model.language_model.embed_tokens")
    ids = sample.input_ids.to(table.weight.device)
    embeds: Tensor = table(ids)[None]
    if sample.pixel_values is None:
        return embeds
    features = vision_features(module, sample).to(embeds.dtype)
    config: Any = module.config
    places = (ids == config.image_token_id)[None, :, None].expand_as(embeds)
    return embeds.masked_scatter(places, features)


def logits(
    module: nn.Module, embeds: Float[Tensor, "row token hidden"], sample: Sample
) -> Float[Tensor, "row token vocab"]:
    """Logits at every position, from embeddings; one row a copy of the sample."""
    positions = sample.position_ids.to(embeds.device)[:, None].expand(3, embeds.shape[0], -1)
    language, head = module.get_submodule("model.language_model"), module.get_submodule("lm_head")
    hidden = language(inputs_embeds=embeds, position_ids=positions, use_cache=False)
    result: Tensor = head(hidden.last_hidden_state)
    return result


def reference_output(module: nn.Module, sample: Sample, component: str) -> Float[Tensor, "token value"]:
    """The output `F_s` of a sample that a component is scored on.

    Args:
        component: `vision` gives merged image features; `lm` and `full` give logits at every position.
    """
    if component == "vision":
        return vision_features(module, sample)
    return logits(module, text_inputs(module, sample), sample)[0]
