"""A run's folder: per-sample scores on disk as soon as they exist, a lock, and what a resumed run needs.

Scores are written in parts, one file a unit of work (a sample, a group of samples, a batch), each whole or absent:
written beside and renamed. A killed run leaves its parts; the same run started again skips them. One file because the
names of the parts, their lock and their adoption by a later run keep one promise.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from qvl_hydra.errors import RunFolderError
from qvl_hydra.runs.files import damaged, read_json, read_value, write_json, written_whole
from qvl_hydra.runs.lock import Lock, LockedError, is_held
from qvl_hydra.scores.shrink import CROSS, ORIGINS, shrunk

PARTS = "parts"
FINGERPRINT = "fingerprint.json"
LOCK = "run.lock"
SWEEP_LOCK = "sweep.lock"
END = "end.json"  # how the command in this folder ended: there only when it did
MADE_BEFORE = ("run.log", ".hydra")  # by Hydra, before a job begins
RESUMED_FROM = "resumed_from.json"
SWEEP = "sweep.json"
SECONDS = "seconds"


@dataclass(frozen=True)
class SampleScore:
    """One number: one operator on one calibration sample, under one metric, scheme and estimator.

    Attributes:
        op: module path of the operator, or of the fused group.
        sample: id of the sample (of the batch, for engines that score whole batches).
        probe: random probe it comes from; None for exact measurements.
        value: in the unit of the metric; higher is more sensitive.
        metric: squared_error, kl, loss_change, trace or omega.
        estimator: exact or sketch, or what the backend calls its own.
        scheme: name of the quantization scheme.
        weight_cross, activation_cross: a sketch's products between different tokens, by what makes them: not in
            `value`, but brought in by `scores.shrink` once all operators are known.
        signed: of a probe, the first-order effect with its sign: the root of the unbiased value.
        from_image, from_text, from_answer: of a probe, the squares of the effects that come in at such tokens.
    """

    op: str
    sample: str
    probe: int | None
    value: float
    metric: str
    estimator: str
    scheme: str
    weight_cross: float | None = None
    activation_cross: float | None = None
    signed: float | None = None
    from_image: float | None = None
    from_text: float | None = None
    from_answer: float | None = None


PART_COLUMNS = tuple(item.name for item in fields(SampleScore))
COLUMNS = tuple(name for name in PART_COLUMNS if name not in CROSS)  # of `RunFolder.frame`
NUMBERS = ("value", "signed", *ORIGINS, *CROSS)
PART_SCHEMA = pa.schema(
    [
        (name, pa.int64() if name == "probe" else pa.float64() if name in NUMBERS else pa.string())
        for name in PART_COLUMNS
    ]
)


class RunFolder:
    """The folder of one run: where engines put scores, and where a resumed run finds them.

    Engines use `done`, `write`, `skip`, `fail`, `remember` and `recall`; they never touch the files themselves.

    Attributes:
        after_write: called when scores were written, so that what exists can be shown while the run goes on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.after_write: Callable[[], None] = lambda: None
        self.parts = path / PARTS
        self.parts.mkdir(parents=True, exist_ok=True)
        self._began: float | None = None

    def done(self, unit: str) -> bool:
        """Whether the scores of this unit of work are on disk already."""
        return (self.parts / f"{unit}.parquet").exists()

    def write(self, unit: str, scores: Iterable[SampleScore]) -> None:
        """Put the scores of one unit of work on disk, whole."""
        rows = list(scores)
        columns = {name: [getattr(score, name) for score in rows] for name in PART_COLUMNS}
        with written_whole(self.parts / f"{unit}.parquet") as beside:
            pq.write_table(pa.table(columns, PART_SCHEMA), beside)
        self._keep_seconds()
        self.after_write()

    def write_finite(self, unit: str, scores: Sequence[SampleScore]) -> None:
        """As `write`; an operator with a value that is not finite fails, and leaves the others alone."""
        finite = [score for score in scores if math.isfinite(score.value)]
        if len(finite) < len(scores):
            broken = [score for score in scores if not math.isfinite(score.value)]
            self._note("failed", {s.op: f"{s.metric} is {s.value} on sample {s.sample}" for s in reversed(broken)})
        self.write(unit, finite)

    def skip(self, op: str, reason: str) -> None:
        """Note that an operator will not be scored, and why."""
        self._note("skipped", {op: reason})

    def fail(self, op: str, error: str) -> None:
        """Note that an operator's measurement failed, and how."""
        self._note("failed", {op: error})

    def endings(self) -> dict[str, tuple[str, str]]:
        """For each operator that was skipped or failed: which of both, and the reason."""
        found: dict[str, tuple[str, str]] = {}
        for status in ("skipped", "failed"):
            for op, reason in self.recall(status, {}).items():
                found[op] = (status, reason)
        return found

    def remember(self, name: str, content: Any) -> None:
        """Keep a small JSON value that a resumed run must find again (a chunk size, a random order)."""
        write_json(self.parts / f"{name}.json", content)

    def recall(self, name: str, default: Any = None) -> Any:
        """The value kept under this name, or `default`."""
        return read_value(self.parts / f"{name}.json", default)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count the seconds within as measuring; whoever resumes the run goes on counting."""
        self._began = time.perf_counter() - self.seconds
        try:
            yield
        finally:
            self._keep_seconds()
            self._began = None

    @property
    def seconds(self) -> float:
        """Seconds that measuring took so far, those of an interrupted run before this one included."""
        return float(self.recall(SECONDS, 0.0)) if self._began is None else time.perf_counter() - self._began

    def _keep_seconds(self) -> None:
        if self._began is not None:
            write_json(self.parts / f"{SECONDS}.json", self.seconds)

    def frame(self) -> pd.DataFrame:
        """All scores on disk so far, one row a score, in the order of their units' names; sketches are combined."""
        tables = [part_of(path) for path in sorted(self.parts.glob("*.parquet"))]
        kept = pa.concat_tables([PART_SCHEMA.empty_table(), *tables])
        return shrunk(kept.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get))

    def _note(self, status: str, reasons: dict[str, str]) -> None:
        """Keep why operators ended; of several reasons the first."""
        known = self.recall(status, {})
        if not reasons.keys() <= known.keys():
            self.remember(status, {**reasons, **known})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; the lock falls with the process, however it ends.

        Raises:
            RunFolderError: another run holds it.
        """
        try:
            lock = Lock(self.path / LOCK)
        except LockedError as error:
            raise RunFolderError(
                f"another run is writing in {self.path} ({error}); wait for it, or give this one its own hydra.run.dir"
            ) from error
        with closing(lock):
            yield


def part_of(path: Path) -> pa.Table:
    """The scores of one unit of work.

    Raises:
        RunFolderError: the file cannot be read.
    """
    try:
        return pq.read_table(path, schema=PART_SCHEMA)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged(path, error) from error


def refuse_foreign_folder(path: Path) -> None:
    """Leave a folder alone that holds files and is no run's; called before anything is written there.

    Raises:
        RunFolderError: it does.
    """
    if (path / LOCK).exists() or not path.is_dir():
        return
    foreign = sorted(item.name for item in path.iterdir() if item.name not in MADE_BEFORE)
    if foreign:
        raise RunFolderError(
            f"{path} holds files that no run wrote ({', '.join(foreign[:3])}); give hydra.run.dir a folder of its own"
        )


def adopt(source: Path, target: RunFolder) -> None:
    """Take over the parts of another, unfinished run, and note whose they were.

    The other folder keeps its files but is no longer offered for resumption.
    """
    copy_parts(source, target)
    write_json(target.path / RESUMED_FROM, {"folder": str(source.absolute())})
    if not _is_complete(source):
        (source / FINGERPRINT).rename(source / "resumed.json")


def copy_parts(source: Path, target: RunFolder, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Copy what a run folder has measured and remembers, as far as its name is wanted."""
    for path in (source / PARTS).iterdir():
        if not wanted(path.name):
            continue
        if path.is_dir():
            shutil.copytree(path, target.parts / path.name, dirs_exist_ok=True)
        elif path.suffix != ".tmp":
            shutil.copy2(path, target.parts / path.name)


def earlier_runs(roots: Sequence[Path]) -> list[tuple[float, Path, str]]:
    """Run folders below the roots (`outputs`, `multirun`), each with its age and fingerprint; the latest first."""
    found = [
        (path.stat().st_mtime, path.parent, str(read_or_empty(path).get("fingerprint")))
        for root in roots
        if root.is_dir()
        for path in root.rglob(FINGERPRINT)
    ]
    return sorted(found, reverse=True)


def find_finished(earlier: Sequence[tuple[float, Path, str]], fingerprint: str, exclude: Path) -> Path | None:
    """The latest finished run folder of the same fingerprint whose parts can be read.

    Args:
        earlier, fingerprint, exclude: see `find_resumable`; other jobs of a multirun are candidates here.
    """
    return next((folder for folder in free_runs(earlier, fingerprint, exclude) if is_finished(folder)), None)


def is_finished(folder: Path) -> bool:
    """Whether a run went to its end, and left parts that can all be read."""
    try:
        return _is_complete(folder) and not RunFolder(folder).frame().empty
    except RunFolderError:
        return False


def find_resumable(earlier: Sequence[tuple[float, Path, str]], fingerprint: str, exclude: Path) -> Path | None:
    """The latest unfinished run folder of the same fingerprint that no process holds.

    A finished job of a multirun that was stopped counts too: the same multirun started again takes its scores.

    Args:
        earlier: as `earlier_runs` has them.
        fingerprint: hash of all settings that decide the result.
        exclude: the folder of the run that asks; jobs of its own multirun are no candidates either.
    """
    for folder in free_runs(earlier, fingerprint, exclude):
        beside = _sweep_of(folder) == _sweep_of(exclude) is not None
        if not beside and not (_is_complete(folder) and not _in_stopped_sweep(folder)):
            return folder
    return None


def free_runs(earlier: Sequence[tuple[float, Path, str]], fingerprint: str, exclude: Path) -> Iterator[Path]:
    """Run folders with parts of this fingerprint that no process holds."""
    for _, folder, own in earlier:
        asked_for = own == fingerprint and folder.resolve() != exclude.resolve()
        if asked_for and any((folder / PARTS).glob("*.parquet")) and not _is_locked(folder):
            yield folder


def note_sweep(sweep_folder: Path, ended: bool, swept: Sequence[str] | None = None) -> None:
    """Note in a multirun's folder that it began, or that it went through all its jobs.

    Args:
        swept: keys with a value a job; None keeps those that are noted.
    """
    sweep_folder.mkdir(parents=True, exist_ok=True)
    write_json(sweep_folder / SWEEP, {"ended": ended, "swept": swept_keys(sweep_folder) if swept is None else swept})


def swept_keys(sweep_folder: Path) -> list[str]:
    """The keys in which the jobs of a multirun differ, as its command line has them."""
    return list(read_or_empty(sweep_folder / SWEEP).get("swept", []))


def _sweep_of(folder: Path) -> Path | None:
    return folder.parent.resolve() if (folder.parent / SWEEP).exists() else None


def _in_stopped_sweep(folder: Path) -> bool:
    sweep = _sweep_of(folder)
    return sweep is not None and not read_or_empty(sweep / SWEEP).get("ended", True)


def _is_complete(folder: Path) -> bool:
    """Whether the command that made the folder went to its end; a result alone can be that of a part of it."""
    return (
        read_or_empty(folder / "run.json").get("status") == "complete"
        and read_or_empty(folder / END).get("end") == "FINISHED"
    )


def read_or_empty(path: Path) -> dict[str, Any]:
    """A JSON file's content; empty when it is not there, or not readable: such a folder is no candidate."""
    try:
        return read_json(path)
    except RunFolderError:
        return {}


def _is_locked(folder: Path) -> bool:
    return is_held(folder / LOCK)


def hold(lock: Path) -> Lock:
    """Hold a lock file until the process ends, or what is given back is let go.

    Raises:
        RunFolderError: another process holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        return Lock(lock)
    except LockedError as error:
        raise RunFolderError(
            f"another command is at work in {lock.parent} ({error}); wait for it, or take another folder"
        ) from error
