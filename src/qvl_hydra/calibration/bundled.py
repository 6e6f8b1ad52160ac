"""Calibration source `bundled`: rendered scenes, made on the spot (scenes.py)."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from qvl_hydra.calibration.record import Record
from qvl_hydra.calibration.scenes import CELL, SceneExample, Split, enlarged, scene_examples
from qvl_hydra.settings import CalibrationSettings

FEATURES = Features(
    {"id": Value("string"), "image": ImageFeature(decode=False), "prompt": Value("string"), "answer": Value("string")}
)


def bundled_dataset(split: Split, size: int, seed: int, cell: int = CELL) -> Dataset:
    """The first `size` scenes of a split as a data set with columns id, image (PNG), prompt, answer.

    Args:
        cell: pixels a side of a scene's cell.
    """
    return Dataset.from_list([_row(example, cell) for example in scene_examples(split, size, seed)], features=FEATURES)


def _row(example: SceneExample, cell: int) -> dict[str, object]:
    png = io.BytesIO()
    image = example.image if cell == CELL else Image.fromarray(enlarged(np.asarray(example.image), cell))
    image.save(png, format="PNG")
    file = {"bytes": png.getvalue(), "path": f"{example.id}.png"}
    return {"id": example.id, "image": file, "prompt": example.prompt, "answer": example.answer}


def check(settings: CalibrationSettings) -> list[str]:
    """Nothing can be missing: the scenes are drawn by the package."""
    return []


def read(settings: CalibrationSettings, token_side: int | None) -> Iterator[Record]:
    """Scenes in the order their seed draws them, which is random already; a cell is what one image token sees."""
    for row in bundled_dataset(settings.split, settings.size, settings.seed, token_side or CELL):
        yield Record(row["id"], row["prompt"], row["answer"], (row["image"]["bytes"],))
