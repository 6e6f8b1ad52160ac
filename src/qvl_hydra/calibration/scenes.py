"""Small rendered scenes with a question and an answer that can be checked: the bundled models' own task.

A scene is a grid of cells of 28 x 28 pixels (what one merged image token of Qwen2-VL sees; for a family whose tokens
see more the picture is enlarged), each empty or holding one shape in one colour. Everything is drawn with numpy from
integer rules, so the same seed gives the same bytes on every machine: no fonts, no antialiasing, no library version in
between.

The split a scene belongs to is decided by a hash of its layout (grid and objects, not pixels): no layout of the
evaluation split, under any background or shift, is ever seen in training or calibration.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

Split = Literal["train", "calibration", "evaluation"]

CELL = 28  # pixels: patch 14 x merge 2, so that one cell is one merged image token
MARGIN = 3  # pixels kept free around a shape; also the largest shift of a shape inside its cell
GRIDS = ((2, 4), (3, 4), (4, 4), (4, 6))  # (rows, columns): 56 x 112 to 112 x 168 pixels; 3 rows cut a vision window
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 220, 50),
    "white": (245, 245, 245),
}
BACKGROUNDS = (16, 40, 64)  # grey levels
NUMBERS = ("zero", "one", "two", "three", "four")
MAX_OBJECTS = 2  # what a model of this size learns within minutes; training also shows fuller scenes for a while
QUESTION_SHARES = {"caption": 0.4, "shape": 0.2, "count": 0.15, "end": 0.1, "after": 0.15}


@dataclass(frozen=True)
class SceneObject:
    row: int
    column: int
    color: str
    shape: str


@dataclass(frozen=True)
class Layout:
    """A grid and its objects in reading order."""

    rows: int
    columns: int
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class SceneExample:
    """One image, one question about it and its only right answer."""

    id: str
    image: Image.Image
    prompt: str
    answer: str


def split_of(layout: Layout) -> Split:
    """The split a layout belongs to: one eighth calibration, one eighth evaluation, the rest train."""
    bucket = hashlib.sha256(repr(layout).encode()).digest()[0] % 8
    return "evaluation" if bucket == 0 else "calibration" if bucket == 1 else "train"


def shape_mask(shape: str) -> Bool[np.ndarray, "side side"]:
    """The pixels a shape covers in its square, drawn with integers only."""
    side = CELL - 2 * MARGIN
    y, x = np.mgrid[0:side, 0:side]
    dy, dx = 2 * y - (side - 1), 2 * x - (side - 1)  # twice the distance from the centre, in pixels
    radius = dy * dy + dx * dx
    masks = {
        "circle": radius <= side * side,
        "square": (np.abs(dy) <= side - 4) & (np.abs(dx) <= side - 4),
        "triangle": np.abs(dx) <= y,
        "cross": (np.abs(dy) <= 6) | (np.abs(dx) <= 6),
        "ring": (radius <= side * side) & (radius >= (side - 10) ** 2),
    }
    return masks[shape]


_MASKS = {shape: shape_mask(shape) for shape in SHAPES}


def render(layout: Layout, rng: np.random.Generator) -> UInt8[np.ndarray, "height width 3"]:
    """Draw a layout; the background and the shift of each shape inside its cell come from `rng`."""
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    pixels = np.full((layout.rows * CELL, layout.columns * CELL, 3), background, dtype=np.uint8)
    for item in layout.objects:
        down, right = rng.integers(0, 2 * MARGIN + 1, size=2)
        mask = _MASKS[item.shape]
        top, left = item.row * CELL + int(down), item.column * CELL + int(right)
        pixels[top : top + mask.shape[0], left : left + mask.shape[1]][mask] = COLORS[item.color]
    return pixels


def enlarged(pixels: UInt8[np.ndarray, "height width 3"], cell: int) -> UInt8[np.ndarray, "tall wide 3"]:
    """The same picture with cells of another size: the nearest pixel's colour, so that no colour is new."""
    rows, columns = (
        ((np.arange(side * cell // CELL) + 0.5) * CELL / cell).astype(int) for side in pixels.shape[:2]
    )
    return pixels[rows[:, None], columns]


def draw_layout(
    rng: np.random.Generator, max_objects: int = MAX_OBJECTS, grid: tuple[int, int] | None = None
) -> Layout:
    """A random layout with 1 to `max_objects` objects, in a random grid unless one is given."""
    rows, columns = grid or GRIDS[int(rng.integers(len(GRIDS)))]
    count = int(rng.integers(1, max_objects + 1))
    cells = np.sort(rng.choice(rows * columns, size=count, replace=False))
    colors, shapes = rng.integers(len(COLORS), size=count), rng.integers(len(SHAPES), size=count)
    names = tuple(COLORS)
    objects = tuple(
        SceneObject(int(cell) // columns, int(cell) % columns, names[color], SHAPES[shape])
        for cell, color, shape in zip(cells, colors, shapes, strict=True)
    )
    return Layout(rows, columns, objects)


def ask(
    layout: Layout, rng: np.random.Generator, shares: Mapping[str, float] = QUESTION_SHARES, by_shape: bool = False
) -> tuple[str, str]:
    """A question about the layout and its answer; a kind that this layout cannot answer becomes a caption.

    Args:
        shares: how often each kind is asked for.
        by_shape: let questions pick objects by their shape too, not by their colour alone. Training asks such
            questions as well; models of this size answer only four in five of them, so the task does without.
    """
    kind = str(rng.choice(list(shares), p=list(shares.values())))
    chosen = layout.objects[int(rng.integers(len(layout.objects)))]
    color_is_unique = _occurrences(layout, color=chosen.color) == 1
    if kind == "color" and by_shape and _occurrences(layout, shape=chosen.shape) == 1:
        return f"what color is the {chosen.shape}?", chosen.color
    if kind == "shape" and color_is_unique:
        return f"what shape is {chosen.color}?", chosen.shape
    if kind == "after" and (
        color_is_unique or (by_shape and _occurrences(layout, color=chosen.color, shape=chosen.shape) == 1)
    ):
        return _ask_after(layout, chosen)
    if kind == "count":
        return _ask_count(layout, rng, [*COLORS, *SHAPES] if by_shape else list(COLORS))
    if kind == "end":
        place, item = ("first", layout.objects[0]) if rng.random() < 0.5 else ("last", layout.objects[-1])
        return f"what is the {place} object?", f"{item.color} {item.shape}"
    return "describe the image.", ", ".join(f"{item.color} {item.shape}" for item in layout.objects)


def _occurrences(layout: Layout, color: str | None = None, shape: str | None = None) -> int:
    return sum(color in (None, item.color) and shape in (None, item.shape) for item in layout.objects)


def _ask_count(layout: Layout, rng: np.random.Generator, words: list[str]) -> tuple[str, str]:
    word = str(rng.choice(words))
    if rng.random() < 0.3:
        return "how many objects?", NUMBERS[len(layout.objects)]
    found = _occurrences(layout, color=word) if word in COLORS else _occurrences(layout, shape=word)
    return f"how many {word} objects?", NUMBERS[found]


def _ask_after(layout: Layout, chosen: SceneObject) -> tuple[str, str]:
    following = [*layout.objects, None][layout.objects.index(chosen) + 1]
    answer = f"{following.color} {following.shape}" if following else "nothing"
    return f"what comes after the {chosen.color} {chosen.shape}?", answer


def scene_stream(
    split: Split,
    seed: int,
    max_objects: int = MAX_OBJECTS,
    grid: tuple[int, int] | None = None,
    shares: Mapping[str, float] = QUESTION_SHARES,
    by_shape: bool = False,
) -> Iterator[tuple[UInt8[np.ndarray, "height width 3"], str, str]]:
    """Endless (pixels, prompt, answer) of one split, the same for the same arguments."""
    rng = np.random.default_rng([seed, ("train", "calibration", "evaluation").index(split)])
    while True:
        layout = draw_layout(rng, max_objects, grid)
        if split_of(layout) == split:
            yield render(layout, rng), *ask(layout, rng, shares, by_shape)


def scene_examples(split: Split, size: int, seed: int) -> list[SceneExample]:
    """The first `size` different examples of a split; a larger size begins with the smaller one's examples.

    Args:
        split: `train`, `calibration` or `evaluation`; their layouts are disjoint.
        size: how many examples.
        seed: the same seed gives the same bytes.

    Returns:
        Examples whose ids carry the split, their number and the first digits of the content's hash.
    """
    examples: list[SceneExample] = []
    seen: set[str] = set()
    stream = scene_stream(split, seed)
    while len(examples) < size:
        pixels, prompt, answer = next(stream)
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes() + prompt.encode()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            name = f"{split}-{len(examples):05d}-{digest[:8]}"
            examples.append(SceneExample(name, Image.fromarray(pixels), prompt, answer))
    return examples
