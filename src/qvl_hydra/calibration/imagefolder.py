"""Calibration source `imagefolder`: a folder of images with captions beside them, or sorted into class folders.

Follows the layout of the `imagefolder` loader of `datasets`: `metadata.jsonl` or `metadata.csv` with `file_name` and a
caption column, else the name of the folder an image lies in is its class. The loader itself gives up as a whole on one
missing file; here each file stands for itself.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset
from PIL import Image

from qvl_hydra.calibration.record import Record, text_fault
from qvl_hydra.errors import CalibrationError
from qvl_hydra.settings import CalibrationSettings

CAPTION_COLUMNS = ("text", "caption", "answer")


def check(settings: CalibrationSettings) -> list[str]:
    """A folder that is missing, before anything is read."""
    if Path(settings.path or "").expanduser().is_dir():
        return []
    return [f"calibration.path={settings.path}: no such folder; give a folder of images"]


def read(settings: CalibrationSettings, token_side: int | None) -> Iterator[Record]:
    """One record an image, in an order drawn from the seed.

    Raises:
        CalibrationError: the metadata file cannot be read or has no column of captions.
    """
    folder = Path(settings.path or "").expanduser()
    metadata = next((path for name in ("metadata.jsonl", "metadata.csv") if (path := folder / name).is_file()), None)
    rows = _captioned(metadata) if metadata else _classes(folder)
    for row in Dataset.from_list(rows).shuffle(seed=settings.seed) if rows else ():
        yield _record(folder, row["file"], row["caption"], settings)


def _captioned(metadata: Path) -> list[dict[str, str | None]]:
    try:
        with metadata.open(encoding="utf-8", newline="") as stream:
            is_csv = metadata.suffix == ".csv"
            rows = list(csv.DictReader(stream)) if is_csv else [json.loads(line) for line in stream if line.strip()]
        column = next((name for name in CAPTION_COLUMNS if rows and name in rows[0]), None)
        if rows and column is None:
            raise KeyError(f"no column {' or '.join(CAPTION_COLUMNS)}")
        return [{"file": row["file_name"], "caption": row.get(column)} for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(
            f"{metadata}: cannot be read ({type(error).__name__}: {error}); every row needs file_name and one of "
            + ", ".join(CAPTION_COLUMNS)
        ) from error


def _classes(folder: Path) -> list[dict[str, str | None]]:
    Image.init()
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in Image.EXTENSION and path.is_file())
    names = [path.relative_to(folder) for path in files]
    return [{"file": str(name), "caption": name.parent.name.replace("_", " ") or None} for name in names]


def _record(folder: Path, name: str, caption: str | None, settings: CalibrationSettings) -> Record:
    if fault := text_fault(settings.prompt, caption):
        hint = "; add metadata.jsonl with file_name and text, or sort the images into class folders"
        return Record(name, fault=fault.replace("answer", "caption") + (hint if caption is None else ""))
    return Record(name, settings.prompt, str(caption).strip(), (folder / name,))
