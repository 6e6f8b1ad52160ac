"""Calibration source `imagefolder`: a folder of images with captions beside them, or sorted into class folders.

Follows the layout of the `imagefolder` loader of `datasets`: `metadata.jsonl` or `metadata.csv` with `file_name` and a
caption column, else the name of the folder an image lies in is its class. The loader itself gives up as a whole on one
missing file; here each file stands for itself.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from qvl_hydra.calibration.order import shuffled
from qvl_hydra.calibration.record import Record, text_fault
from qvl_hydra.errors import CalibrationError
from qvl_hydra.settings import CalibrationSettings

LONGEST_CELL = 1 << 24  # letters
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
    for row in shuffled(rows, settings.seed):
        yield _record(folder, row["file"], row["caption"], settings)


def _captioned(metadata: Path) -> list[dict[str, Any]]:
    try:
        csv.field_size_limit(LONGEST_CELL)
        with metadata.open(encoding="utf-8", errors="replace", newline="") as stream:
            rows = list(csv.DictReader(stream)) if metadata.suffix == ".csv" else list(_objects(stream))
        column = next((name for name in CAPTION_COLUMNS if any(name in row for row in rows)), None)
        if column is None:
            if not rows:
                return []
            raise KeyError(f"no column {' or '.join(CAPTION_COLUMNS)}")
        return [{"file": row.get("file_name"), "caption": row.get(column)} for row in rows]
    except (csv.Error, KeyError) as error:
        raise CalibrationError(
            f"{metadata}: cannot be read ({type(error).__name__}: {error}); every row needs file_name and one of "
            + ", ".join(CAPTION_COLUMNS)
        ) from error


def _objects(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """What each line holds; a line that holds no object has neither file nor caption."""
    for line in lines:
        if line.strip():
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                content = None
            yield content if isinstance(content, dict) else {}


def _classes(folder: Path) -> list[dict[str, Any]]:
    Image.init()
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in Image.EXTENSION and path.is_file())
    names = [path.relative_to(folder) for path in files]
    return [{"file": str(name), "caption": name.parent.name.replace("_", " ") or None} for name in names]


def _record(folder: Path, name: Any, caption: object, settings: CalibrationSettings) -> Record:
    if not isinstance(name, str) or not name:
        return Record("a row of the metadata", fault="file_name is no text")
    if fault := text_fault(prompt=settings.prompt, caption=caption):
        hint = "; add metadata.jsonl with file_name and text, or sort the images into class folders"
        return Record(name, fault=fault + (hint if caption is None else ""))
    return Record(name, settings.prompt, str(caption).strip(), (folder / name,))
