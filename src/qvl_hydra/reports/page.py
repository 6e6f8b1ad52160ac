"""The frame of a report: one HTML page with its style and script inside, and small building blocks of HTML.

Every text that comes from a run goes through `text`, so that a name cannot become markup.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from qvl_hydra.runs.files import write_atomically


@dataclass(frozen=True)
class Section:
    """One titled part of a page; `body` is HTML."""

    title: str
    body: str


@dataclass(frozen=True)
class Column:
    """One column of a table: its heading, and what it holds: text, module paths (`code`), sentences (`wide`), numbers.

    A number may come with its interval, as `(value, low, high)`.
    """

    title: str
    number: bool = False
    code: bool = False
    wide: bool = False


def text(value: object) -> str:
    """A value as HTML text, escaped, safe inside quotes too."""
    return html.escape(str(value), quote=True)


def number(value: object, digits: int = 3) -> str:
    """A number with so many significant digits; empty for what is none."""
    if value is None or not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def page(title: str, sections: Iterable[Section]) -> str:
    """The whole page. It loads nothing: neither style, script, font nor picture from anywhere."""
    folder = resources.files("qvl_hydra.reports")
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    body = "\n".join(f"<section><h2>{text(part.title)}</h2>\n{part.body}\n</section>" for part in sections if part.body)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{text(title)}</title>\n<style>\n{style}</style></head>\n"
        f"<body><main><h1>{text(title)}</h1>\n{body}\n</main>\n<script>\n{script}</script></body></html>\n"
    )


def write_page(path: Path, title: str, sections: Iterable[Section]) -> Path:
    """Write the page whole and return its path."""
    write_atomically(path, page(title, sections).encode())
    return path


def facts(values: Mapping[str, object]) -> str:
    """Short facts as tiles; what has no value is left out."""
    tiles = [
        f"<div><dt>{text(key)}</dt><dd>{text(value)}</dd></div>"
        for key, value in values.items()
        if value not in (None, "")
    ]
    return f'<dl class="facts">{"".join(tiles)}</dl>'


def notes(lines: Iterable[str]) -> str:
    """Sentences as a list; nothing when there are none."""
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[object]],
    *,
    identity: str | None = None,
    classes: Sequence[str] | None = None,
) -> str:
    """A table; with an `identity` it is sorted by its headings and searched.

    Args:
        rows: one value a column; numbers are shown short and sorted by their full value.
        classes: CSS class of each row.
    """
    head = "".join(
        f'<th scope="col"{" class=num" if column.number else ""}>{text(column.title)}</th>' for column in columns
    )
    lines = []
    for index, row in enumerate(rows):
        css = f' class="{text(classes[index])}"' if classes else ""
        lines.append(f"<tr{css}>{''.join(_cell(*pair) for pair in zip(columns, row, strict=True))}</tr>")
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    if identity is None:
        return f'<div class="scroll"><table class="data">{body}</table></div>'
    search = f'<input type="search" data-table="{text(identity)}" placeholder="Search" aria-label="Search the table">'
    return f'{search}<div class="scroll"><table class="data sortable" id="{text(identity)}">{body}</table></div>'


def _cell(column: Column, value: object) -> str:
    if not column.number:
        css = ' class="op"' if column.code else ' class="wide"' if column.wide else ""
        return f"<td{css}>{text('' if value is None else value)}</td>"
    value, low, high = value if isinstance(value, tuple) else (value, None, None)
    if not isinstance(value, int | float):
        return f'<td class="num" data-v="">{text("" if value is None else value)}</td>'
    ends = [number(end, 3) for end in (low, high)]
    interval = f' <span class="note">({ends[0]} to {ends[1]})</span>' if all(ends) else ""
    exact = repr(value) if math.isfinite(value) else ""
    return f'<td class="num" data-v="{text(exact)}">{number(value, 4)}{interval}</td>'
