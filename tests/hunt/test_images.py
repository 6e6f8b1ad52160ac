"""Images from anybody: whatever bytes a file holds, it is an image or a named bad sample."""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path

import pytest
from PIL import Image, features

from qvl_hydra.calibration.record import FORMATS, read_image

SHORT, LONG = 40, 5_000  # corruptions of each format


def encoded(form: str, mode: str) -> bytes | None:
    """A small picture in a format, or None where Pillow was built without it."""
    picture = Image.effect_noise((37, 23), 60).convert("RGB").convert(mode)
    stream = io.BytesIO()
    try:
        picture.save(stream, format=form)
    except (OSError, KeyError, ValueError):
        return None
    return stream.getvalue()


WRITABLE = [(form, mode) for form in (*FORMATS, "AVIF", "ICO", "DDS", "TGA", "EPS", "JPEG2000", "SGI", "PCX", "BLP")
            for mode in ("RGB", "L", "P", "CMYK")]  # fmt: skip


def corrupted(content: bytes, draw: random.Random) -> bytes:
    """The same with some bytes changed, cut off, or something behind it."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        found[draw.randrange(len(found))] = draw.randrange(256)
    if draw.random() < 0.3:
        del found[draw.randrange(len(found)) :]
    return bytes(found) + draw.randbytes(draw.choice([0, 0, 9]))


def hunt(form: str, mode: str, count: int) -> None:
    content = encoded(form, mode)
    if content is None:
        pytest.skip(f"{form} cannot hold {mode}, or is not there")
    draw = random.Random(f"{form} {mode}")
    for number in range(count):
        with contextlib.suppress(OSError):  # a named bad sample
            assert read_image(corrupted(content, draw)).mode == "RGB", number


@pytest.mark.parametrize(("form", "mode"), WRITABLE)
def test_corrupt_images_are_read_or_named(form: str, mode: str) -> None:
    hunt(form, mode, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "mode"), WRITABLE)
def test_many_corrupt_images_are_read_or_named(form: str, mode: str) -> None:
    hunt(form, mode, LONG)


def test_no_format_starts_another_program() -> None:
    """EPS is drawn by Ghostscript."""
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%pipe%touch ran) (w) file\n"
    with pytest.raises(OSError, match="cannot be read"):
        read_image(content)
    assert features.pilinfo is not None  # Pillow itself is there
    assert not Path("ran").exists()
