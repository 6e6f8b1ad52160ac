"""Scores that finished runs have measured, taken by a run that asks for the same and perhaps for more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qvl_hydra.runs.files import write_json
from qvl_hydra.runs.folder import RunFolder, copy_parts, find_finished, read_or_empty

REUSED = "reused.json"  # whose scores a run has that measured none itself


def reuse(source: Path, target: RunFolder) -> None:
    """Take over the parts of a finished run, which keeps them, and note whose they are."""
    copy_parts(source, target)
    write_json(target.path / REUSED, {"folder": str(source.absolute())})


def extend(source: Path, target: RunFolder, samples: int, of_all: tuple[str, ...]) -> None:
    """Take over the scores of a finished run of the first samples, and note whose they are, and of how many.

    Args:
        of_all: how the names begin of what was seen of all samples of that run, and must be measured again.
    """
    copy_parts(source, target, lambda name: not name.startswith(of_all))
    write_json(target.path / REUSED, {"folder": str(source.absolute()), "samples": samples})


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
    """Calibration samples of a run; 0 where it does not say."""
    size = read_or_empty(folder / "calibration.json").get("size")
    return size if isinstance(size, int) else 0
