"""Held-out samples: those that no score, range, proxy or selection has seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path

from qvl_hydra.calibration.encode import Processor, with_pixel_limits
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.calibration.sources import SOURCES, sample_of
from qvl_hydra.errors import CalibrationError
from qvl_hydra.runs.files import read_json
from qvl_hydra.settings import CalibrationSettings


def held_out(
    settings: CalibrationSettings, processor: Processor, count: int, seen: Collection[str]
) -> tuple[Sample, ...]:
    """The first good samples of a source, in its order, that are not among those seen.

    Args:
        settings: of the calibration; the bundled source has a split of its own for evaluation.
        count: at most so many.
        seen: ids of all samples that scores, ranges or a selection come from.

    Raises:
        CalibrationError: none is left.
    """
    if settings.source == "bundled":
        settings = dataclasses.replace(settings, split="evaluation", size=count + len(seen))
    processor = with_pixel_limits(processor, settings.min_pixels, settings.max_pixels)
    found: list[Sample] = []
    for record in SOURCES[settings.source].read(settings, processor.token_side):
        if record.name in seen:
            continue
        sample = sample_of(record, processor, settings.max_length)
        if isinstance(sample, Sample):
            found.append(sample)
        if len(found) == count:
            break
    if not found:
        raise CalibrationError(
            f"calibration={settings.source} has no sample left that scores and ranges have not seen ({len(seen)} were);"
            " give it more samples, or measure scores on fewer (calibration.size)"
        )
    return tuple(found)


def seen_by(folders: Iterable[Path]) -> set[str]:
    """Ids of the samples that runs calibrated or scored on, by their `calibration.json`."""
    seen: set[str] = set()
    for folder in folders:
        content = read_json(folder / "calibration.json")
        seen |= {*content.get("samples", ()), *content.get("scored", ())}
    return seen
