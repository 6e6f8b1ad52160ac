"""Scores that finished runs have measured, taken by a run that asks for the same and perhaps for more."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qvl_hydra.runs.files import written_whole
from qvl_hydra.runs.folder import (
    FINGERPRINT,
    PARTS,
    SECONDS,
    RunFolder,
    copy_parts,
    find_finished,
    free_runs,
    is_finished,
    part_of,
    read_or_empty,
)

REUSED = "reused"  # where a run keeps whose scores it has that it did not measure itself
APART = "apart"  # hash of all that decides a result but the schemes, beside a run's fingerprint
SCHEMES = "schemes"  # hash of each scheme there, by name


def reuse(source: Path, target: RunFolder) -> None:
    """Take over the parts of a finished run, which keeps them, and note whose they are."""
    copy_parts(source, target)
    target.remember(REUSED, {"folder": str(source.absolute())})


def extend(source: Path, target: RunFolder, samples: int, of_all: tuple[str, ...]) -> None:
    """Take over the scores of a finished run of the first samples, and note whose they are, and of how many.

    Args:
        of_all: how the names begin of what was seen of all samples of that run, and must be measured again.
    """
    copy_parts(source, target, lambda name: not name.startswith(of_all))
    target.remember(REUSED, {"folder": str(source.absolute()), "samples": samples})


def find_smaller(
    earlier: Sequence[tuple[float, Path, str]], fingerprint_of: Callable[[int], str], count: int, exclude: Path
) -> tuple[Path, int] | None:
    """The finished run of most samples below so many, and of how many.

    Args:
        earlier, exclude: see `find_resumable`.
        fingerprint_of: what a run of so many samples must have.
    """
    sizes = {folder: samples_of(folder) for _, folder, _ in earlier}
    for size in sorted({size for size in sizes.values() if 0 < size < count}, reverse=True):
        own = [run for run in earlier if sizes[run[1]] == size]
        if (found := find_finished(own, fingerprint_of(size), exclude)) is not None:
            return found, size
    return None


def samples_of(folder: Path) -> int:
    """Calibration samples of a run; 0 where it does not say, and where `take_schemes` brought in some scores."""
    size = read_or_empty(folder / "calibration.json").get("size")
    taken = any((folder / PARTS).glob(f"{REUSED}-*.parquet"))
    return size if isinstance(size, int) and not taken else 0


def take_schemes(
    source: Path, target: RunFolder, schemes: Collection[str], by_scheme: Collection[str], report: str
) -> None:
    """Take over the scores that a finished run has in some schemes, and note whose they are, and of which.

    Args:
        by_scheme: names under which a run remembers something of each scheme.
        report: name under which it remembers what its engine said.
    """
    own = (f"{report}.json", f"{SECONDS}.json")  # of this run alone
    copy_parts(source, target, lambda name: name.endswith(".json") and name not in own)
    for name in by_scheme:
        if known := target.recall(name, {}):
            target.remember(name, {scheme: own for scheme, own in known.items() if scheme in schemes})
    origin = RunFolder(source)
    for path in sorted(origin.parts.glob("*.parquet")):
        table = part_of(path)
        with written_whole(target.parts / f"{REUSED}-{path.name}") as beside:
            pq.write_table(table.filter(pc.is_in(table["scheme"], pa.array(sorted(schemes)))), beside)
    said = origin.recall(report)
    target.remember(REUSED, {"folder": str(source.absolute()), "schemes": sorted(schemes), "report": said})


def find_schemes(
    earlier: Sequence[tuple[float, Path, str]], apart: str, schemes: Mapping[str, str], exclude: Path
) -> tuple[Path, list[str]] | None:
    """The finished run that has most of the schemes, with nothing else that decides different; and which it has.

    Args:
        earlier, exclude: see `find_resumable`.
        apart, schemes: as the run that asks would keep them.
    """
    found = sorted(_with_schemes(earlier, apart, schemes, exclude), key=lambda run: -len(run[1]))
    return next((run for run in found if is_finished(run[0])), None)


def _with_schemes(
    earlier: Sequence[tuple[float, Path, str]], apart: str, schemes: Mapping[str, str], exclude: Path
) -> Iterator[tuple[Path, list[str]]]:
    for run in earlier:
        kept = read_or_empty(run[1] / FINGERPRINT)
        theirs = kept.get(SCHEMES, {})
        names = [name for name, own in schemes.items() if theirs.get(name) == own]
        if kept.get(APART) != apart or not names or not any(free_runs([run], run[2], exclude)):
            continue
        if len(theirs) == len(names) or not RunFolder(run[1]).recall("failed"):  # perhaps in a scheme not wanted
            yield run[1], names
