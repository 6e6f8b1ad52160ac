"""`run.json`: what a run says of itself, one record, written whole and read back by type."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qvl_hydra.errors import RunFolderError
from qvl_hydra.runs.files import damaged, read_json, write_json

RUN_FILE = "run.json"
VERSION = 1  # of the record; raised when a key changes its meaning


@dataclass(frozen=True)
class RunRecord:
    """The content of `run.json`; keys without a value are not written.

    Attributes:
        task: as `task.name`.
        status: `partial` while a sweep goes on, or after it was stopped.
        error: why it failed.
        estimator: what the scores were measured with.
        scheme: that the operators were put into; a backend may have one of its own.
        forward_equivalents: `engine_s` divided by `forward_s`.
        wall_s, engine_s, forward_s: seconds of all, of measuring, and of one plain forward of the scored samples.
        notes: sentences for the user.
        n_sweep_notes: how many of them the sweep said, whose scores a profile's own follow.
        details: further numbers of the engine.
        further: what only this task has: `profile`, `quantize`, the numbers of a comparison or of an export.
        version: of this record.
    """

    task: str
    status: Literal["complete", "partial", "failed"]
    error: str | None = None
    model: str | None = None
    component: str | None = None
    strategy: str | None = None
    direction: str | None = None
    backend: str | None = None
    device: str | None = None
    estimator: str | None = None
    scheme: str | None = None
    n_ops: int | None = None
    n_scored: int | None = None
    n_skipped: int | None = None
    n_failed: int | None = None
    n_samples: int | None = None
    calibration_size: int | None = None
    calibration_seed: int | None = None
    calibration_bad: int | None = None
    wall_s: float | None = None
    engine_s: float | None = None
    forward_s: float | None = None
    forward_equivalents: float | None = None
    peak_memory_bytes: int | None = None
    model_sha: str | None = None
    calibration_sha: str | None = None
    fingerprint: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    n_sweep_notes: int | None = None
    details: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    further: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def plain(self) -> dict[str, Any]:
        """Keys and values as they are written."""
        own = {name: value for name, value in vars(self).items() if name != "further" and value not in (None, {}, [])}
        return {**self.further, **own}


def write_record(folder: Path, record: RunRecord) -> None:
    """Write `run.json`, whole."""
    write_json(folder / RUN_FILE, record.plain())


def read_record(folder: Path) -> RunRecord | None:
    """The record in a folder; None while there is none.

    Raises:
        RunFolderError: it is damaged, or of a newer version of this program.
    """
    path = folder / RUN_FILE
    content = read_json(path)
    if not content and not path.exists():
        return None
    hints = typing.get_type_hints(RunRecord)
    known = {item.name for item in dataclasses.fields(RunRecord)} - {"further"}
    own = {name: content[name] for name in known if content.get(name) is not None}
    for name, value in own.items():
        if not _is(hints[name], value):
            raise damaged(path, f"{name} is {value!r}")
    if missing := [name for name in ("task", "status") if name not in own]:
        raise damaged(path, f"it lacks {', '.join(missing)}")
    if own.get("version", VERSION) > VERSION:
        raise damaged(path, f"it is of a newer version of this program ({own['version']})")
    return RunRecord(**own, further={name: value for name, value in content.items() if name not in known})


def record_of(folder: Path) -> RunRecord:
    """The record in the folder of a run that has a result.

    Raises:
        RunFolderError: there is none, or see `read_record`.
    """
    found = read_record(folder)
    if found is None:
        raise RunFolderError(f"{folder} has no {RUN_FILE}; give the folder of a run that has a result")
    return found


def _is(hint: Any, value: Any) -> bool:
    """Whether a JSON value is of a field's type."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_is(part, value) for part in parts if part is not types.NoneType)
    if origin is Literal:
        return value in parts
    if origin is dict:
        return isinstance(value, Mapping) and all(_is(parts[1], item) for item in value.values())
    if origin is list:
        return isinstance(value, list) and all(_is(parts[0], item) for item in value)
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))
