"""Files of a run folder: written whole, and read with a word on what is damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from qvl_hydra.errors import RunFolderError

DEEPEST = 100  # levels of a file's content; what these readers are given has five
# Columns of the tables of a run folder, wherever they stand.
TEXTS = ("op", "component", "role", "group", "status", "reason", "metric", "unit", "estimator", "scheme", "sample")
NUMBERS = ("score", "score_low", "score_high", "rank", "block", "n_params", "value", "probe")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write so that the file appears with all its content, on the disk, or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    yield beside
    with beside.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(beside, path)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole."""
    with written_whole(path) as beside:
        beside.write_bytes(data)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, whole."""
    write_atomically(path, (json.dumps(content, indent=2, sort_keys=True, default=str) + "\n").encode())


def write_parquet(path: Path, frame: pd.DataFrame) -> None:
    """Write a table as parquet, whole."""
    with written_whole(path) as beside:
        frame.to_parquet(beside, index=False)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping that a JSON file holds; empty when the file is not there.

    Raises:
        RunFolderError: it cannot be read, or holds something else.
    """
    content = read_value(path, {})
    if not isinstance(content, dict):
        raise damaged(path, f"it holds a {type(content).__name__}, not keys and values")
    return content


def read_value(path: Path, default: Any = None) -> Any:
    """Whatever a JSON file holds; `default` when it is not there.

    Raises:
        RunFolderError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; empty when the file is not there or empty. Only plain values are read.

    Raises:
        RunFolderError: it cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise damaged(path, "it refers to its own parts, which a few lines can make without end")
        content = yaml.safe_load(text)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise damaged(path, error) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise damaged(path, f"it holds a {type(content).__name__}, not keys and values")
    return {str(key): value for key, value in content.items()}


def read_table(path: Path, columns: tuple[str, ...] = ()) -> pd.DataFrame:
    """The table that a parquet file holds.

    Args:
        columns: that it must have.

    Raises:
        RunFolderError: it cannot be read, or lacks a column.
    """
    try:
        table = pq.read_table(path)
        table.validate(full=True)  # texts that are none would end the process that reads them, not this call
        frame = table.to_pandas()
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise damaged(path, error) from error
    for field in table.schema:
        if field.name in TEXTS and not (_is_text(field.type) or pa.types.is_null(field.type)):
            raise damaged(path, f"{field.name} holds {field.type}, no text")
        if field.name in NUMBERS and not (_is_number(field.type) or pa.types.is_null(field.type)):
            raise damaged(path, f"{field.name} holds {field.type}, no numbers")
    if missing := [name for name in columns if name not in frame.columns]:
        raise damaged(path, f"it lacks the columns {', '.join(missing)}")
    return frame


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def damaged(path: Path, reason: object) -> RunFolderError:
    """The error that a file of a run folder is not what a run wrote there."""
    said = " ".join(str(reason).split())[:200] or type(reason).__name__
    return RunFolderError(
        f"{path} is damaged ({said}); take another run folder, or move this one away and run again"
    )
