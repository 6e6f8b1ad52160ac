"""The three-file layout of the community's Qwen2-VL exports, built small and without this project's exporter.

Token embedding, vision encoder with the grid as an input, and a decoder with past keys and values; made by
`torch.onnx.export` from plain wrappers around the Hugging Face model, as the conversion scripts of such exports do.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache


class Embedding(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed = model.model.language_model.embed_tokens

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed(input_ids)


class VisionEncoder(nn.Module):
    """Patches of any number of images in a row, attention masked to each image, angles computed from the grid."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.visual = model.model.visual

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        image, row, column = places(image_grid_thw, pixel_values.shape[0])
        inv_freq = self.visual.rotary_pos_emb.inv_freq
        angles = torch.cat([row[:, None] * inv_freq, column[:, None] * inv_freq], dim=-1)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        mask = (image[:, None] != image[None, :]).to(pixel_values.dtype) * -1e30
        hidden = self.visual.patch_embed(pixel_values)
        for block in self.visual.blocks:
            block.attn.forward = partial(attend, block.attn, cos=angles.cos(), sin=angles.sin(), mask=mask)
            hidden = block(hidden, cu_seqlens=None)
            del block.attn.forward
        return self.visual.merger(hidden)


def places(grid: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image, row and column of each patch; 2 x 2 neighbours stand behind each other."""
    ends = (grid[:, 0] * grid[:, 1] * grid[:, 2]).cumsum(0)
    number = torch.arange(count)
    image = (number[:, None] >= ends[None, :]).sum(1)
    start = torch.cat([torch.zeros(1, dtype=ends.dtype), ends])[image]
    inside, width = number - start, grid[image, 2]
    group, part = inside // 4, inside % 4
    pairs = width // 2
    row = 2 * (group // pairs) + part // 2
    column = 2 * (group % pairs) + part % 2
    return image, row.float(), column.float()


def attend(attention: Any, hidden_states: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, **_: Any) -> Tensor:
    count = hidden_states.shape[0]
    qkv = attention.qkv(hidden_states).reshape(count, 3, attention.num_heads, -1)
    query, key, value = qkv[:, 0], qkv[:, 1], qkv[:, 2]

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    query, key, value = (part.transpose(0, 1) for part in (turn(query), turn(key), value))
    weights = torch.softmax(query @ key.transpose(1, 2) * attention.head_dim**-0.5 + mask, dim=-1)
    return attention.proj((weights @ value).transpose(0, 1).reshape(count, -1))


class Decoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.model.language_model
        self.lm_head = model.lm_head

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> Any:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(key, value, layer)
        length, total = inputs_embeds.shape[1], attention_mask.shape[1]
        number = torch.arange(total)
        visible = (number[None, :] <= number[total - length :, None])[None, None] & (attention_mask > 0)[:, None, None]
        mask = (~visible).to(inputs_embeds.dtype) * -1e30
        hidden = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask={"full_attention": mask},
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        present = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        return (self.lm_head(hidden), *present)


def export(module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], axes: dict[str, Any], path: Path) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, tuple(inputs.values()), str(path), input_names=list(inputs), output_names=outputs,
            dynamic_axes=axes, opset_version=17, dynamo=False,
        )  # fmt: skip


def write_layout(model: Any, folder: Path) -> None:
    """Write the three files of a Qwen2-VL model."""
    folder.mkdir(parents=True, exist_ok=True)
    text = model.config.text_config
    before = text._attn_implementation
    model.model.language_model.config._attn_implementation = "eager"
    rows = {0: "batch_size", 1: "sequence_length"}
    ids = torch.ones(2, 5, dtype=torch.long)
    export(Embedding(model), {"input_ids": ids}, ["inputs_embeds"], {"input_ids": rows, "inputs_embeds": rows},
           folder / "embed_tokens.onnx")  # fmt: skip
    grid = torch.tensor([[1, 4, 6], [1, 4, 4]])
    pixels = torch.randn(40, 1176)
    export(
        VisionEncoder(model), {"pixel_values": pixels, "image_grid_thw": grid}, ["image_features"],
        {"pixel_values": {0: "patches"}, "image_grid_thw": {0: "images"}, "image_features": {0: "merged"}},
        folder / "vision_encoder.onnx",
    )  # fmt: skip
    heads, size = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    inputs = {
        "inputs_embeds": torch.randn(2, 5, text.hidden_size),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
        "position_ids": torch.arange(3, 8).expand(3, 2, 5).contiguous(),
    }
    axes: dict[str, Any] = {
        "inputs_embeds": rows, "position_ids": {1: "batch_size", 2: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: "total_sequence_length"}, "logits": rows,
    }  # fmt: skip
    outputs = ["logits"]
    for layer in range(text.num_hidden_layers):
        for part in ("key", "value"):
            inputs[f"past_key_values.{layer}.{part}"] = torch.randn(2, heads, 3, size)
            axes[f"past_key_values.{layer}.{part}"] = {0: "batch_size", 2: "past_sequence_length"}
            outputs.append(f"present.{layer}.{part}")
            axes[outputs[-1]] = {0: "batch_size", 2: "total_sequence_length"}
    export(Decoder(model), inputs, outputs, axes, folder / "decoder_model_merged.onnx")
    model.model.language_model.config._attn_implementation = before
