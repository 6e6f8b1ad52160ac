"""Settings, samples and run folders from anybody: each is taken or refused with a message; nothing else is raised.

`make test` tries a few of each; `make test-slow` many.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from qvl_hydra.calibration.coco_captions import read as read_coco
from qvl_hydra.calibration.encode import Processor
from qvl_hydra.calibration.jsonl import read as read_jsonl
from qvl_hydra.calibration.record import Record
from qvl_hydra.calibration.sample import BadSample, Sample
from qvl_hydra.calibration.sources import load_calibration, sample_of
from qvl_hydra.comparison.reading import read_run
from qvl_hydra.errors import QvlHydraError
from qvl_hydra.settings import CalibrationSettings, Settings, build_settings, judge_settings
from tests.made_up_runs import write_run
from tests.test_settings import SMALLEST, config

SHORT, LONG = 60, 3_000
PATIENCE_MS = 10_000

_odd_text = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", " ", "\x00", "../..", "a" * 5000, "*", "[", "1e400", "nan", "null", "\ud800", "a/b\x00c"]),
)
_numbers = st.one_of(
    st.integers(),
    st.integers(-3, 40),
    st.floats(),
    st.sampled_from([2**31, 2**63, 10**30, -(10**30), math.inf, -math.inf, math.nan]),
)
_scalars = st.one_of(st.none(), st.booleans(), _numbers, _odd_text)
ANYTHING = st.recursive(
    _scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_odd_text, inner, max_size=4)),
    max_leaves=8,
)


def hunted(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many examples, the same ones at every run; an answer within ten seconds."""
    return settings(
        max_examples=count,
        deadline=PATIENCE_MS,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


COUNTS = [
    pytest.param(SHORT, id="short"),
    pytest.param(LONG, id="long", marks=pytest.mark.slow),
]


def keys(sound: Settings) -> list[tuple[str, str]]:
    """Every key of every group."""
    return [(group, name) for group, value in vars(sound).items() if hasattr(value, "__dict__") for name in vars(value)]


KEYS = keys(build_settings(SMALLEST))


@pytest.mark.parametrize("count", COUNTS)
def test_settings_are_taken_or_refused(count: int) -> None:
    @hunted(count * 10)
    @given(st.dictionaries(st.sampled_from(KEYS), ANYTHING, min_size=1, max_size=4))
    def hunt(changes: dict[tuple[str, str], Any]) -> None:
        changed = config(**{f"{group}__{name}": value for (group, name), value in changes.items()})
        found, faults = judge_settings(changed)
        assert isinstance(found, Settings) or faults
        assert all(isinstance(fault, str) and fault for fault in faults)

    hunt()


@pytest.mark.parametrize("count", COUNTS)
def test_whatever_stands_for_the_settings_is_taken_or_refused(count: int) -> None:
    groups = st.sampled_from([*vars(build_settings(SMALLEST)), "further", "_target_", "hydra"])

    @hunted(count)
    @given(st.dictionaries(groups, ANYTHING, max_size=6))
    def hunt(given_config: dict[str, Any]) -> None:
        found, faults = judge_settings(given_config)
        assert isinstance(found, Settings) or faults

    hunt()


def judged(record: Record, processor: Processor) -> None:
    """A record ends as a sample or as a named bad one."""
    result = sample_of(record, processor, None)
    assert isinstance(result, Sample) or (isinstance(result, BadSample) and result.reason.encode())
    assert record.name


_parts = st.dictionaries(
    st.sampled_from(["type", "text", "image", "image_url", "url"]),
    st.one_of(st.sampled_from(["text", "image", "image_url"]), _odd_text, ANYTHING),
)
_turns = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value"]),
    st.one_of(st.sampled_from(["user", "assistant", "human", "<image>\nx"]), st.lists(_parts, max_size=3), ANYTHING),
)
_rows = st.one_of(
    ANYTHING,
    st.fixed_dictionaries(
        {"messages": st.one_of(ANYTHING, st.lists(_turns, max_size=3))},
        optional={"images": ANYTHING, "conversations": ANYTHING},
    ),
    st.fixed_dictionaries({}, optional={"image": ANYTHING, "prompt": ANYTHING, "answer": ANYTHING}),
    st.fixed_dictionaries({"prompt": _odd_text, "answer": st.one_of(_odd_text, st.none())}),
    st.fixed_dictionaries({"text": st.one_of(_odd_text, ANYTHING)}),
)


@pytest.mark.parametrize("count", COUNTS)
def test_every_line_of_a_jsonl_is_a_sample_or_named(count: int, tmp_path: Path, tiny_processor: Processor) -> None:
    path = tmp_path / "data.jsonl"
    chosen = CalibrationSettings(source="jsonl", path=str(path), size=1)

    @hunted(count)
    @given(st.lists(st.one_of(_rows.map(json.dumps), _odd_text), min_size=1, max_size=4), st.binary(max_size=6))
    def hunt(lines: list[str], noise: bytes) -> None:
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + b"\n" + noise)
        for record in read_jsonl(chosen, None):
            judged(record, tiny_processor)
        with contextlib.suppress(QvlHydraError):  # refused with a message
            load_calibration(chosen, tiny_processor)

    hunt()


_images = st.one_of(ANYTHING, st.lists(st.fixed_dictionaries({"id": _scalars, "file_name": _scalars}), max_size=4))
_notes = st.one_of(
    ANYTHING, st.lists(st.fixed_dictionaries({"id": _scalars, "image_id": _scalars, "caption": ANYTHING}), max_size=4)
)


@pytest.mark.parametrize("count", COUNTS)
def test_every_caption_file_is_read_or_refused(count: int, tmp_path: Path, tiny_processor: Processor) -> None:
    path = tmp_path / "captions.json"
    chosen = CalibrationSettings(source="coco_captions", annotations=str(path), images=str(tmp_path), size=1)

    @hunted(count)
    @given(st.one_of(ANYTHING, st.fixed_dictionaries({"images": _images, "annotations": _notes})))
    def hunt(content: Any) -> None:
        path.write_text(json.dumps(content))
        with contextlib.suppress(QvlHydraError):  # refused with a message
            for record in read_coco(chosen, None):
                judged(record, tiny_processor)

    hunt()


@pytest.mark.parametrize("count", COUNTS)
def test_run_folders_are_read_or_called_damaged(count: int, tmp_path: Path) -> None:
    sound = write_run(tmp_path / "sound")
    files = sorted(path.name for path in sound.iterdir() if path.is_file() and path.stat().st_size)
    hurt = tmp_path / "hurt"

    @hunted(count)
    @given(st.sampled_from(files), st.data())
    def hunt(name: str, data: st.DataObject) -> None:
        shutil.rmtree(hurt, ignore_errors=True)
        shutil.copytree(sound, hurt)
        file = hurt / name
        way = data.draw(st.sampled_from(["gone", "folder", "bytes", "flipped", "cut", "content"]))
        content = bytearray(file.read_bytes())
        if way == "gone":
            file.unlink()
        elif way == "folder":
            file.unlink()
            file.mkdir()
        elif way == "bytes":
            file.write_bytes(data.draw(st.binary(max_size=60)))
        elif way == "flipped":
            for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
                content[place] ^= data.draw(st.integers(1, 255))
            file.write_bytes(content)
        elif way == "cut":
            file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        else:
            wrong = data.draw(ANYTHING)
            text = json.dumps(wrong) if name.endswith(".json") else yaml.safe_dump(wrong)
            file.write_bytes(text.encode("utf-8", "surrogatepass"))
        with contextlib.suppress(QvlHydraError):  # refused with a message
            run = read_run(hurt)
            run.samples()

    hunt()
