"""What a calibration source yields: one question with its answer and images, or one text; nothing is read yet."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # no format that starts another program


@dataclass(frozen=True)
class Turn:
    """What one side says in a chat.

    Attributes:
        role: `system`, `user` or `assistant`.
        content: texts, and None in the place of each image.
    """

    role: str
    content: tuple[str | None, ...]


@dataclass(frozen=True)
class Record:
    """One candidate sample of a source.

    Attributes:
        name: names the sample to a person: a file, or a file with its line.
        prompt: what the user asks, after the images; or all turns before the answer, with the images in them.
        answer: None where nobody knows one.
        images: files, or the bytes of image files; empty for a text-only sample.
        fault: why the source already knows that the record cannot be used.
        text: a text that is nobody's turn, in the place of all of these.
    """

    name: str
    prompt: str | tuple[Turn, ...] = ""
    answer: str | None = None
    images: tuple[Path | bytes, ...] = ()
    fault: str | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", writable(self.name))
        if self.fault is not None:
            object.__setattr__(self, "fault", writable(self.fault))


def writable(text: str) -> str:
    """A text that files and screens take: half a letter, or a file name's byte that is none, is spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_image(source: Path | bytes) -> Image.Image:
    """Decode an image to RGB, turned the way its camera held it.

    Raises:
        OSError: the file is missing or is no image that can be read in full.
    """
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError(f"image file {source} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file's odd metadata
            with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders raise a dozen unrelated kinds on a corrupt file
        label = str(source) if isinstance(source, Path) else "in the data set"
        raise OSError(f"image {label} cannot be read: {error}") from error


def text_fault(**texts: object) -> str | None:
    """Why these texts, by what they are, make no sample, or None."""
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            return f"the {name} is missing or empty"
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            return f"the {name} holds half of a letter (a lone surrogate)"
    return None
