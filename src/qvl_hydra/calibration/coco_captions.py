"""Calibration source `coco_captions`: COCO's caption json with its image folder, or a data set with such columns."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Image as ImageFeature
from datasets import IterableDataset, IterableDatasetDict, load_dataset

from qvl_hydra.calibration.order import shuffled
from qvl_hydra.calibration.record import Record, text_fault
from qvl_hydra.errors import CalibrationError
from qvl_hydra.settings import CalibrationSettings

SPLITS = ("validation", "val", "test", "train")  # of a data set, the first one there is taken
CAPTION_COLUMNS = ("caption", "captions", "sentences", "text", "answer")
SHUFFLE_BUFFER = 1000  # rows a streamed data set is shuffled within


def check(settings: CalibrationSettings) -> list[str]:
    """Files that are missing, before anything is read."""
    if settings.dataset:
        return []
    faults = []
    if not Path(settings.annotations or "").expanduser().is_file():
        faults.append(f"calibration.annotations={settings.annotations}: no such file; give COCO's captions_*.json")
    if not Path(settings.images or "").expanduser().is_dir():
        faults.append(f"calibration.images={settings.images}: no such folder; give the folder of COCO's images")
    return faults


def read(settings: CalibrationSettings, token_side: int | None) -> Iterator[Record]:
    """One record an image, with its first caption, in an order drawn from the seed.

    Raises:
        CalibrationError: the json is not COCO's, or the data set cannot be had or lacks the columns.
    """
    return _read_dataset(settings) if settings.dataset else _read_files(settings)


def _read_files(settings: CalibrationSettings) -> Iterator[Record]:
    path, folder = Path(settings.annotations or "").expanduser(), Path(settings.images or "").expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        images = {str(image["id"]): image["file_name"] for image in content["images"]}
        captions: dict[Any, tuple[Any, Any]] = {}
        for note in content["annotations"]:
            key, number = str(note["image_id"]), _number(note["id"])
            if key not in captions or number < captions[key][0]:
                captions[key] = (number, note["caption"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CalibrationError(
            f"calibration.annotations={path}: not a COCO caption file ({type(error).__name__}: {error}); it needs "
            "images with id and file_name, and annotations with id, image_id and caption"
        ) from error
    rows = [
        {"key": str(key), "file": images.get(key), "caption": captions.get(key, (None, None))[1]}
        for key in sorted({*images, *captions})
    ]
    for row in shuffled(rows, settings.seed):
        file = row["file"] if isinstance(row["file"], str) and row["file"] else None
        yield _record(file or f"image {row['key']}", folder / file if file else None, row["caption"], settings)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.inf


def _read_dataset(settings: CalibrationSettings) -> Iterator[Record]:
    rows = _open_dataset(str(settings.dataset))
    columns = rows.column_names or list(next(iter(rows), {}))
    caption = next((name for name in CAPTION_COLUMNS if name in columns), None)
    if caption is None or "image" not in columns:
        raise CalibrationError(
            f"calibration.dataset={settings.dataset}: columns are {', '.join(columns)}; needed are image and one of "
            + ", ".join(CAPTION_COLUMNS)
        )
    rows = rows.cast_column("image", ImageFeature(decode=False))  # a corrupt one then spoils its own row only
    for index, row in enumerate(rows.shuffle(seed=settings.seed, buffer_size=SHUFFLE_BUFFER)):
        image = row["image"] or {}
        name = image.get("path") or f"row {index} in shuffled order"
        content = image.get("bytes") or (Path(image["path"]) if image.get("path") else None)
        yield _record(name, content, _first_caption(row[caption]), settings)


def _open_dataset(name: str) -> IterableDataset:
    """Open a data set as a stream, so that a few samples do not cost the download of all."""
    try:
        found = load_dataset(name, streaming=True)
    except Exception as error:  # the loaders and the hub client raise a dozen unrelated kinds
        raise CalibrationError(
            f"calibration.dataset={name}: cannot be opened ({type(error).__name__}: {error}); give a data set id of "
            "the hub or a local data set folder, or calibration.annotations and calibration.images"
        ) from error
    if isinstance(found, IterableDatasetDict):
        return found[next((split for split in SPLITS if split in found), next(iter(found)))]
    return found


def _first_caption(value: object) -> object:
    """The first caption of a cell that holds one text, a list of texts, or a mapping with such under `raw`."""
    while isinstance(value, list | tuple | Mapping):
        value = value.get("raw") if isinstance(value, Mapping) else next(iter(value), None)
    return value


def _record(name: str, image: Path | bytes | None, caption: object, settings: CalibrationSettings) -> Record:
    if image is None:
        return Record(name, fault="a caption without an image")
    if fault := text_fault(prompt=settings.prompt, caption=caption):
        return Record(name, fault=fault)
    return Record(name, settings.prompt, str(caption).strip(), (image,))
