"""Turns of a chat, as the data sets of fine-tuning keep them.

Two layouts are read: `messages` of role and content, where content is a text or a list of text and image parts
(OpenAI, transformers, TRL), and `conversations` of from and value (LLaVA, ShareGPT). An image is told by its part, or
by `<image>` in a text, which stands for the next of the line's `images`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvl_hydra.calibration.record import Record, Turn, text_fault

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
MARK = "<image>"


class _NotReadable(ValueError):
    """Why a line is no chat."""


@dataclass
class _Images:
    """The line's own images, taken one by one, and all that turns have named so far."""

    listed: list[Any]
    folder: Path
    found: list[Path | bytes]

    def take(self) -> None:
        if not self.listed:
            raise _NotReadable("an image is spoken of that the line does not list")
        self.add(self.listed.pop(0))

    def add(self, image: object) -> None:
        if isinstance(image, dict):  # {"url": ...}, {"path": ...}
            image = image.get("url") or image.get("path")
        if not isinstance(image, str) or not image:
            raise _NotReadable("an image is neither a path nor base64 data")
        if image.startswith("data:"):
            try:
                self.found.append(base64.b64decode(image.partition("base64,")[2], validate=True))
            except (binascii.Error, ValueError) as error:
                raise _NotReadable(f"an image's data is not base64 ({error})") from error
        elif image.startswith(("http://", "https://")):
            raise _NotReadable(f"image {image[:80]} is an address; give a file")
        else:
            self.found.append(self.folder / image.removeprefix("file://"))


def chat_record(name: str, content: dict[str, Any], folder: Path) -> Record:
    """A line with `messages` or `conversations`: its last turn, where the assistant's, is the answer.

    Earlier turns, of either side, are what is asked. Images that no turn speaks of stand before the first text of the
    user, in their order.

    Args:
        folder: relative paths of images are taken from here.
    """
    images = content.get("images", content.get("image"))
    listed = [] if images is None else list(images) if isinstance(images, list) else [images]
    held = _Images(listed, folder, [])
    try:
        turns = [_turn(item, held) for item in _messages(content)]
        answer = _answer(turns)
        if not any(turn.role == "user" for turn in turns):
            raise _NotReadable("no turn of the user")
        turns = _with_unspoken(turns, held)
    except _NotReadable as reason:
        return Record(name, fault=str(reason))
    return Record(name, tuple(turns), answer, tuple(held.found))


def _messages(content: dict[str, Any]) -> list[Any]:
    key = "messages" if "messages" in content else "conversations"
    messages = content[key]
    if not isinstance(messages, list) or not messages:
        raise _NotReadable(f"{key} is no list of turns")
    return messages


def _turn(item: object, images: _Images) -> Turn:
    if not isinstance(item, dict):
        raise _NotReadable("a turn is no JSON object with role and content")
    said = item.get("role", item.get("from"))
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise _NotReadable(f"a turn's role is {str(said)[:40]!r}; expected system, user or assistant")
    content = item.get("content", item.get("value"))
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return Turn(role, tuple(piece for part in parts for piece in _pieces(part, role, images)))


def _pieces(part: object, role: str, images: _Images) -> Iterator[str | None]:
    """The texts of one part, and None for each image."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in ("text", "image", "image_url"):
        raise _NotReadable(f"a part of a turn is {str(kind or part)[:40]!r}; expected text or image")
    if kind == "text":
        text = part.get("text")
        if fault := text_fault(**{f"text of a turn of the {role}": text}):
            raise _NotReadable(fault)
        pieces = str(text).split(MARK) if role == "user" and images.listed else [str(text)]
        for number, piece in enumerate(pieces):
            if number:
                images.take()
                yield None
            if piece.strip():
                yield piece.strip()
        return
    if role != "user":
        raise _NotReadable(f"a turn of the {role} holds an image")
    image = next((part[key] for key in ("image", "image_url", "path", "url") if part.get(key)), None)
    images.take() if image is None else images.add(image)
    yield None


def _answer(turns: list[Turn]) -> str | None:
    """The text of the last turn, which is taken off, where it is the assistant's."""
    if turns[-1].role != "assistant":
        return None
    return "".join(piece for piece in turns.pop().content if piece)


def _with_unspoken(turns: list[Turn], images: _Images) -> list[Turn]:
    """The turns with the images that none of them speaks of, in the place of their first ones."""
    if not images.listed:
        return turns
    if images.found:
        raise _NotReadable(f"{len(images.listed)} images more than its turns speak of")
    first = next(number for number, turn in enumerate(turns) if turn.role == "user")
    while images.listed:
        images.take()
    shown = Turn("user", (*[None] * len(images.found), *turns[first].content))
    return [*turns[:first], shown, *turns[first + 1 :]]
