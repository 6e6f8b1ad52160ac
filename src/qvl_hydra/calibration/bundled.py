"""Calibration source `bundled`: rendered scenes, made on the spot (scenes.py)."""

from __future__ import annotations

import io
from collections.abc import Iterator

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature

from qvl_hydra.calibration.record import Record
from qvl_hydra.calibration.scenes import SceneExample, Split, scene_examples
from qvl_hydra.settings import CalibrationSettings

FEATURES = Features(
    {"id": Value("string"), "image": ImageFeature(decode=False), "prompt": Value("string"), "answer": Value("string")}
)


def bundled_dataset(split: Split, size: int, seed: int) -> Dataset:
    """The first `size` scenes of a split as a data set with columns id, image (PNG), prompt, answer."""
    return Dataset.from_list([_row(example) for example in scene_examples(split, size, seed)], features=FEATURES)


def _row(example: SceneExample) -> dict[str, object]:
    png = io.BytesIO()
    example.image.save(png, format="PNG")
    image = {"bytes": png.getvalue(), "path": f"{example.id}.png"}
    return {"id": example.id, "image": image, "prompt": example.prompt, "answer": example.answer}


def check(settings: CalibrationSettings) -> list[str]:
    """Nothing can be missing: the scenes are drawn by the package."""
    return []


def read(settings: CalibrationSettings) -> Iterator[Record]:
    """Scenes in the order their seed draws them, which is random already."""
    for row in bundled_dataset(settings.split, settings.size, settings.seed):
        yield Record(row["id"], row["prompt"], row["answer"], (row["image"]["bytes"],))
