"""One plain forward of one sample: the outputs that scores are measured on."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.families.record import HEAD
from qvl_hydra.families.table import family_of


def vision_features(module: nn.Module, sample: Sample) -> Float[Tensor, "image_token width"]:
    """Everything that the vision tower gives for all images of a sample, in the model's own order.

    Args:
        module: of a family with a vision tower, on its device.
        sample: with at least one image.

    Returns:
        Merged features, and behind them in the width those that leave the tower on the way, where there are any.
    """
    assert sample.pixel_values is not None
    assert sample.image_grid_thw is not None
    visual: Any = module.get_submodule(_family(module).visual or "")
    weight = visual.patch_embed.proj.weight
    pixels = sample.pixel_values.to(device=weight.device, dtype=weight.dtype)
    output = visual(pixels, grid_thw=sample.image_grid_thw.to(weight.device))
    beside = getattr(output, "deepstack_features", None) or []
    features: Tensor = torch.cat([output.pooler_output, *beside], dim=-1) if beside else output.pooler_output
    return features


def text_inputs(module: nn.Module, sample: Sample) -> Float[Tensor, "1 token width"]:
    """Token embeddings with the image features in their places.

    Features that leave the vision tower on the way stand behind the embeddings in the width, zero at text tokens.
    """
    table: Any = module.get_submodule(f"{_family(module).language}.embed_tokens")
    ids = sample.input_ids.to(table.weight.device)
    embeds: Tensor = table(ids)[None]
    if sample.pixel_values is None:
        return embeds
    features = vision_features(module, sample).to(embeds.dtype)
    embeds = functional.pad(embeds, (0, features.shape[-1] - embeds.shape[-1]))
    return embeds.masked_scatter(image_places(module, sample)[..., None].expand_as(embeds), features)


def image_places(module: nn.Module, sample: Sample) -> Tensor:
    """Which tokens take image features, (1, token)."""
    config: Any = module.config
    return (sample.input_ids.to(next(module.parameters()).device) == config.image_token_id)[None]


def logits(
    module: nn.Module, embeds: Float[Tensor, "row token width"], sample: Sample
) -> Float[Tensor, "row token vocab"]:
    """Logits at every position, from what `text_inputs` gives; one row a copy of the sample."""
    rows = embeds.shape[0]
    positions = sample.position_ids.to(embeds.device)[:, None].expand(-1, rows, -1)
    language: Any = module.get_submodule(_family(module).language)
    width = language.config.hidden_size
    beside: dict[str, Any] = {}
    if embeds.shape[-1] > width:
        places = image_places(module, sample).to(embeds.device).expand(rows, -1)
        embeds, *features = embeds.split(width, dim=-1)
        beside = {"visual_pos_masks": places, "deepstack_visual_embeds": [part[places] for part in features]}
    if len(positions) == 1:  # text alone has one axis
        positions = positions[0]
    hidden = language(inputs_embeds=embeds, position_ids=positions, use_cache=False, **beside)
    result: Tensor = module.get_submodule(HEAD)(hidden.last_hidden_state)
    return result


def reference_output(module: nn.Module, sample: Sample, component: str) -> Float[Tensor, "token value"]:
    """The output `F_s` of a sample that a component is scored on.

    Args:
        component: `vision` gives everything that the vision tower does; `lm` and `full` give logits at every position.
    """
    if component == "vision":
        return vision_features(module, sample)
    return logits(module, text_inputs(module, sample), sample)[0]


def _family(module: Any) -> Any:
    return family_of(module.config)
