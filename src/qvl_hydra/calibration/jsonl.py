"""Calibration source `jsonl`: one JSON object a line with image, prompt and answer, a chat, or a text alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from qvl_hydra.calibration.chat import chat_record
from qvl_hydra.calibration.order import shuffled
from qvl_hydra.calibration.record import Record, text_fault
from qvl_hydra.settings import CalibrationSettings


def check(settings: CalibrationSettings) -> list[str]:
    """Files that are missing, before anything is read."""
    faults = []
    if not Path(settings.path or "").expanduser().is_file():
        faults.append(f"calibration.path={settings.path}: no such file; give a .jsonl with image, prompt, answer")
    if settings.images and not Path(settings.images).expanduser().is_dir():
        faults.append(f"calibration.images={settings.images}: no such folder; null means the .jsonl file's own")
    return faults


def read(settings: CalibrationSettings, token_side: int | None) -> Iterator[Record]:
    """One record a line that is not blank, in an order drawn from the seed.

    `image` is a path, a list of paths, or null or absent for a text-only sample; relative paths are taken from
    `calibration.images`, else from the file's own folder. `prompt` may be absent: then it is `calibration.prompt`.
    `answer` may be null where nobody knows one. In their place a line may have a chat, as `messages` or
    `conversations`, or `text`, which is taken as it is.
    """
    path = Path(settings.path or "").expanduser()
    folder = Path(settings.images).expanduser() if settings.images else path.parent
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")  # a text may hold other ends of line
    rows = [{"name": f"{path.name}:{number}", "line": line} for number, line in enumerate(lines, 1) if line.strip()]
    for row in shuffled(rows, settings.seed):
        yield _record(row["name"], row["line"], folder, settings)


def _record(name: str, line: str, folder: Path, settings: CalibrationSettings) -> Record:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Record(name, fault=f"not valid JSON ({error})")
    if not isinstance(content, dict):
        return Record(name, fault="not a JSON object with image, prompt, answer")
    if not content.keys() & {"prompt", "answer"} and content.keys() & {"messages", "conversations"}:
        return chat_record(name, content, folder)
    if not content.keys() & {"image", "prompt", "answer"} and "text" in content:
        text = content["text"]
        return Record(name, fault=fault) if (fault := text_fault(text=text)) else Record(name, text=str(text))
    if "answer" not in content:
        there = ", ".join(content)[:100] or "nothing"
        return Record(name, fault=f"no answer (the line has {there}); give one, or null where nobody knows it")
    prompt, answer = content.get("prompt", settings.prompt), content["answer"]
    if fault := text_fault(prompt=prompt) if answer is None else text_fault(prompt=prompt, answer=answer):
        return Record(name, fault=fault)
    images = content.get("image")
    paths = [] if images is None else images if isinstance(images, list) else [images]
    if not all(isinstance(item, str) and item for item in paths):
        return Record(name, fault="image is neither a path, nor a list of paths, nor null")
    return Record(name, str(prompt), answer and str(answer).strip(), tuple(folder / item for item in paths))
