"""Calibration sets from every source, with bad samples named, and the same samples for the same seed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qvl_hydra.calibration import bundled, coco_captions, imagefolder, jsonl
from qvl_hydra.calibration.encode import EncodingError, Processor, encode, encode_text, with_pixel_limits
from qvl_hydra.calibration.record import Record, read_image, writable
from qvl_hydra.calibration.sample import BadSample, CalibrationSet, Sample, samples_sha
from qvl_hydra.errors import CalibrationError
from qvl_hydra.settings import CalibrationSettings

LOG = logging.getLogger(__name__)
NAMED_IN_WARNING = 3


@dataclass(frozen=True)
class Source:
    """Where samples come from.

    Attributes:
        check: names what is missing, without reading anything.
        read: yields records in an order drawn from `calibration.seed`, the same for every `calibration.size`; told the
            pixels a side that one image token sees, if any.
    """

    check: Callable[[CalibrationSettings], list[str]]
    read: Callable[[CalibrationSettings, int | None], Iterator[Record]]


SOURCES = {
    "bundled": Source(bundled.check, bundled.read),
    "coco_captions": Source(coco_captions.check, coco_captions.read),
    "imagefolder": Source(imagefolder.check, imagefolder.read),
    "jsonl": Source(jsonl.check, jsonl.read),
}


def check_calibration(settings: CalibrationSettings) -> None:
    """Refuse what can be seen to be missing before a model is loaded.

    Raises:
        CalibrationError: every missing file and folder.
    """
    if faults := SOURCES[settings.source].check(settings):
        raise CalibrationError("\n".join(faults))


def load_calibration(settings: CalibrationSettings, processor: Processor) -> CalibrationSet:
    """The first `calibration.size` good samples of a source, in the order of `calibration.seed`.

    A smaller size gives the first samples of a larger one. Records that cannot be used (corrupt image, missing file,
    empty caption, too long) are passed over and named; with `on_bad=fail` they are an error that lists every one met.

    Raises:
        CalibrationError: something is missing, samples are bad and `on_bad=fail`, or there are fewer than `size`.
    """
    check_calibration(settings)
    processor = with_pixel_limits(processor, settings.min_pixels, settings.max_pixels)
    samples: list[Sample] = []
    bad: list[BadSample] = []
    for record in SOURCES[settings.source].read(settings, processor.token_side):
        result = sample_of(record, processor, settings.max_length)
        if isinstance(result, Sample):
            samples.append(result)
        else:
            bad.append(result)
        if len(samples) == settings.size:
            break
    _judge(settings, len(samples), bad)
    return CalibrationSet(tuple(samples), settings.source, samples_sha(samples), tuple(bad))


def sample_of(record: Record, processor: Processor, max_length: int | None) -> Sample | BadSample:
    """A record as tensors, or why it cannot be used."""
    if record.fault is not None:
        return BadSample(record.name, record.fault)
    most = getattr(processor.config.get_text_config(), "max_position_embeddings", None)
    try:
        if record.text is not None:
            limits = [limit for limit in (most, max_length) if limit is not None]
            return encode_text(processor, record.name, record.text, min(limits, default=None))
        images = [read_image(image) for image in record.images]
        sample = encode(processor, record.name, record.prompt, record.answer, images)
    except (OSError, EncodingError) as error:
        return BadSample(record.name, writable(str(error)))
    length = len(sample.input_ids)
    if most is not None and length > most:
        return BadSample(record.name, f"{length} tokens, above the model's {most} positions")
    if max_length is not None and length > max_length:
        return BadSample(record.name, f"{length} tokens, above calibration.max_length={max_length}")
    return sample


def _judge(settings: CalibrationSettings, good: int, bad: list[BadSample]) -> None:
    listed = "".join(f"\n  - {item.name}: {item.reason}" for item in bad)
    origin = settings.dataset or settings.annotations or settings.path or settings.source
    if bad and settings.on_bad == "fail":
        raise CalibrationError(
            f"calibration={settings.source} ({origin}) has {_count(bad)}; mend or remove what is listed, "
            f"or set calibration.on_bad=skip:{listed}"
        )
    if good < settings.size:
        found = f"only {good} good samples" if good else "no good sample"
        wish = f"calibration.size={settings.size}"
        remedy = f"set calibration.size={good} or add samples" if good else "add samples"
        raise CalibrationError(
            f"calibration={settings.source} ({origin}) has {found} and {_count(bad)}, but {wish}; {remedy}{listed}"
        )
    if bad:
        names = ", ".join(f"{item.name} ({item.reason})" for item in bad[:NAMED_IN_WARNING])
        more = f" and {len(bad) - NAMED_IN_WARNING} more" if len(bad) > NAMED_IN_WARNING else ""
        LOG.warning("calibration=%s: skipped %s: %s%s", settings.source, _count(bad), names, more)


def _count(bad: list[BadSample]) -> str:
    return "1 bad sample" if len(bad) == 1 else f"{len(bad)} bad samples"
