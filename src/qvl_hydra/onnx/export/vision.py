"""The vision tower in a form that exports: attention by windows as one batched product, with a batch dimension.

Hugging Face's tower takes the patches of all images in a row and cuts them into attention windows by lengths that it
computes from the grid: one split, one attention and one concatenation a window, thousands of nodes in a graph. Here
what depends on the grid (order of patches, rotary angles, windows) is computed beforehand, and is constant in the graph
(`FixedVisionTower`, one resolution) or an input of it (`FreeVisionTower`, any). Norms, products and MLPs are the
tower's own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

Layout = dict[str, Tensor]
KINDS = ("windowed", "full")  # of attention: each patch within its window, or within its whole image


def _window_axes(kind: str) -> dict[str, dict[int, str]]:
    grid = {0: f"{kind}_window", 1: f"{kind}_place"}
    return {
        f"{kind}_places": grid,  # patch at each place of a window; short windows repeat their first patch
        f"{kind}_padding": grid,  # whether a place is such a repetition
        f"{kind}_back": {0: "patch"},  # where each patch is among the places
    }


# What depends on the grid, with its free dimensions.
LAYOUT_AXES: dict[str, dict[int, str]] = {
    "patch_order": {0: "patch"},  # patch at each place of the sequence that the blocks see
    "merged_order": {0: "merged"},  # where each merged patch is in that sequence
    "rotary_cos": {0: "patch"},  # (patch, 1, head dimension)
    "rotary_sin": {0: "patch"},
    **{name: axes for kind in KINDS for name, axes in _window_axes(kind).items()},
}


class _LayoutSeen(Exception):
    """Ends the observed forward after its last block."""


def block_kinds(visual: Any) -> list[str]:
    """For each block whether its attention is windowed or full."""
    full = getattr(visual, "fullatt_block_indexes", range(len(visual.blocks)))
    return ["full" if index in full else "windowed" for index in range(len(visual.blocks))]


def layout_names(visual: Any) -> list[str]:
    """Names of the layout's tensors that this tower uses: Qwen2-VL's has full attention only."""
    kinds = set(block_kinds(visual))
    return [name for name in LAYOUT_AXES if name.split("_")[0] not in set(KINDS) - kinds]


@torch.no_grad()
def tower_layout(visual: Any, grid: Int64[Tensor, "image 3"]) -> Layout:
    """What the tower's own forward derives from a grid, observed.

    The patches carry their own number, and the blocks do nothing but look. Watching the forward, and not calling what
    it calls, holds for every release of transformers.

    Returns:
        The tensors of `layout_names`.
    """
    patches = int(grid.prod(-1).sum())
    weight = visual.patch_embed.proj.weight
    numbers = torch.arange(patches, device=weight.device, dtype=torch.float64)
    seen: dict[str, Any] = {}
    lengths: list[list[int]] = []

    def watch(hidden_states: Tensor, *, cu_seqlens: Tensor, position_embeddings: Any, **_: Any) -> Tensor:
        seen["order"], seen["angles"] = hidden_states[:, 0].round().long(), position_embeddings
        lengths.append(cu_seqlens.diff().tolist())
        if len(lengths) == len(visual.blocks):
            raise _LayoutSeen
        return hidden_states

    watched = [visual.patch_embed, *visual.blocks]
    try:
        visual.patch_embed.forward = lambda pixels: numbers[:, None].expand(-1, weight.shape[0])
        for block in visual.blocks:
            block.forward = watch
        pixels = torch.zeros(patches, weight[0].numel(), device=weight.device, dtype=weight.dtype)
        visual(pixels, grid_thw=grid.to(weight.device))
    except _LayoutSeen:
        pass
    finally:
        for module in watched:
            module.__dict__.pop("forward", None)
    cos, sin = seen["angles"]
    unit = int(visual.spatial_merge_size) ** 2
    layout = {
        "patch_order": seen["order"],
        "merged_order": torch.argsort(seen["order"][::unit] // unit),
        "rotary_cos": cos.float()[:, None],
        "rotary_sin": sin.float()[:, None],
    }
    for kind, found in zip(block_kinds(visual), lengths, strict=True):
        layout |= {f"{kind}_{name}": value.to(weight.device) for name, value in _windows(found).items()}
    return layout


def _windows(lengths: list[int]) -> Layout:
    starts = torch.tensor((0, *lengths[:-1])).cumsum(0)[:, None]
    places = torch.arange(max(lengths))
    padding = places >= torch.tensor(lengths)[:, None]
    return {
        "places": torch.where(padding, starts, starts + places),
        "padding": padding,
        "back": (~padding).flatten().nonzero()[:, 0],
    }


def rotate(x: Float[Tensor, "*n dim"], cos: Tensor, sin: Tensor) -> Float[Tensor, "*n dim"]:
    """Rotary embedding of queries or keys in float32, the halves of a head paired."""
    values = x.float()
    first, second = values.chunk(2, dim=-1)
    return (values * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def windowed_attention(
    attention: Any, hidden: Float[Tensor, "row patch hidden"], layout: Layout, kind: str
) -> Float[Tensor, "row patch hidden"]:
    """Attention of one block, each patch within its window, with the block's own projections.

    Args:
        attention: the block's Hugging Face attention module.
        kind: of the block's windows.
    """
    places, padding = layout[f"{kind}_places"], layout[f"{kind}_padding"]
    qkv = attention.qkv(hidden).reshape(-1, hidden.shape[1], 3, attention.num_heads, attention.head_dim)
    query = rotate(qkv[:, :, 0], layout["rotary_cos"], layout["rotary_sin"])
    key = rotate(qkv[:, :, 1], layout["rotary_cos"], layout["rotary_sin"])

    def windows(x: Float[Tensor, "row patch head dim"]) -> Float[Tensor, "row window head place dim"]:
        chosen = x[:, places.flatten()]
        return chosen.reshape(-1, *places.shape, attention.num_heads, attention.head_dim).transpose(2, 3)

    weights = torch.matmul(windows(query), windows(key).transpose(-1, -2)) * attention.head_dim**-0.5
    weights = weights + padding[:, None, None].to(weights.dtype) * torch.finfo(weights.dtype).min
    weights = torch.softmax(weights, dim=-1, dtype=torch.float32).to(hidden.dtype)
    mixed = torch.matmul(weights, windows(qkv[:, :, 2])).transpose(2, 3)
    mixed = mixed.reshape(-1, places.shape[0] * places.shape[1], hidden.shape[2])
    result: Tensor = attention.proj(mixed[:, layout[f"{kind}_back"]])
    return result


class FreeVisionTower(nn.Module):
    """Merged image features of every row, for images of any grid, whose layout comes with them.

    Args:
        visual: the Hugging Face vision tower; its attention must be replaced by `exportable_attention` while this runs.
    """

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual: Any = visual
        self.names = layout_names(visual)

    def forward(
        self, pixel_values: Float[Tensor, "row patch value"], *layout: Tensor
    ) -> Float[Tensor, "row merged hidden"]:
        given = dict(zip(self.names, layout, strict=True))
        patches = given["patch_order"].shape[0]
        hidden = self.visual.patch_embed(pixel_values.reshape(-1, pixel_values.shape[-1]))
        hidden = hidden.reshape(-1, patches, hidden.shape[-1])[:, given["patch_order"]]
        for block in self.visual.blocks:
            hidden = block(hidden, cu_seqlens=None, position_embeddings=given)
        merged = self.visual.merger(hidden)
        return merged.reshape(-1, given["merged_order"].shape[0], merged.shape[-1])[:, given["merged_order"]]


class FixedVisionTower(nn.Module):
    """Merged image features of every row, for images of one grid; the layout is held in buffers, and so in the graph.

    Args:
        visual: as of `FreeVisionTower`.
    """

    def __init__(self, visual: Any, layout: Layout) -> None:
        super().__init__()
        self.tower = FreeVisionTower(visual)
        for name, value in layout.items():
            self.register_buffer(name, value)

    def forward(self, pixel_values: Float[Tensor, "row patch value"]) -> Float[Tensor, "row merged hidden"]:
        features: Tensor = self.tower(pixel_values, *(getattr(self, name) for name in self.tower.names))
        return features


@contextmanager
def exportable_attention(visual: Any) -> Iterator[None]:
    """Within the context the tower's blocks attend by `windowed_attention`; afterwards as before."""
    try:
        for block, kind in zip(visual.blocks, block_kinds(visual), strict=True):
            block.attn.forward = _forward(block.attn, kind)
        yield
    finally:
        for block in visual.blocks:
            block.attn.__dict__.pop("forward", None)


def _forward(attention: Any, kind: str) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, *, position_embeddings: Layout, **_: Any) -> Tensor:
        return windowed_attention(attention, hidden_states, position_embeddings, kind)

    return forward
