"""Chats of fine-tuning's data sets: read as records, and through the checkpoint's own template."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl_hydra.calibration.chat import chat_record
from qvl_hydra.calibration.encode import Processor
from qvl_hydra.calibration.record import Record, Turn
from qvl_hydra.calibration.sources import load_calibration
from qvl_hydra.errors import CalibrationError
from qvl_hydra.settings import CalibrationSettings

PNG = io.BytesIO()
Image.new("RGB", (64, 48), "red").save(PNG, "PNG")
DATA = "data:image/png;base64," + base64.b64encode(PNG.getvalue()).decode()


def _user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


SAYS = {"role": "assistant", "content": "A ring."}
SHOWN = (Turn("user", (None, "What?")),)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        pytest.param(
            {"messages": [_user({"type": "image", "image": "file:///a.png"}, _text("What?")), SAYS]},
            Record("x", SHOWN, "A ring.", (Path("/a.png"),)), id="qwen",
        ),
        pytest.param(
            {"messages": [_user(_text("What?"), {"type": "image_url", "image_url": {"url": DATA}}), SAYS]},
            Record("x", (Turn("user", ("What?", None)),), "A ring.", (PNG.getvalue(),)), id="openai",
        ),
        pytest.param(
            {"messages": [_user({"type": "image"}, _text("What?")), SAYS], "images": ["a.png"]},
            Record("x", SHOWN, "A ring.", (Path("d/a.png"),)), id="trl",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": "<image>What?"}, SAYS], "images": [{"path": "a.png"}]},
            Record("x", SHOWN, "A ring.", (Path("d/a.png"),)), id="marks",
        ),
        pytest.param(
            {"conversations": [
                {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A ring."},
                {"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "Red."},
            ], "image": "a.png", "id": 7},
            Record(
                "x", (*SHOWN, Turn("assistant", ("A ring.",)), Turn("user", ("Which colour?",))), "Red.",
                (Path("d/a.png"),),
            ), id="llava",
        ),
        pytest.param(
            {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}, SAYS],
             "images": ["a.png", "b.png"]},
            Record(
                "x", (Turn("system", ("Be brief.",)), Turn("user", (None, None, "What?"))), "A ring.",
                (Path("d/a.png"), Path("d/b.png")),
            ), id="unspoken",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": "What does <image> mean?"}]},
            Record("x", (Turn("user", ("What does <image> mean?",)),), None), id="no_answer",
        ),
    ],
)  # fmt: skip
def test_layouts(line: dict[str, Any], expected: Record) -> None:
    assert chat_record("x", line, Path("d")) == expected


@pytest.mark.parametrize(
    ("messages", "images", "fault"),
    [
        ([], [], "messages is no list of turns"),
        ("What?", [], "messages is no list of turns"),
        (["What?"], [], "a turn is no JSON object with role and content"),
        ([{"role": "tool", "content": "x"}], [], "a turn's role is 'tool'; expected system, user or assistant"),
        ([{"role": ["user"], "content": "x"}], [], "a turn's role is"),
        ([SAYS], [], "no turn of the user"),
        ([_user(_text("x")), {"role": "assistant", "content": None}], [], "text of a turn of the assistant is missing"),
        ([_user(_text("\ud800"))], [], "half of a letter"),
        ([_user({"type": "video", "video": "a.mp4"})], [], "a part of a turn is 'video'; expected text or image"),
        ([_user("x")], [], "a part of a turn is 'x'; expected text or image"),
        ([_user({"type": "image"})], [], "an image is spoken of that the line does not list"),
        ([_user({"type": "image", "image": 3})], [], "an image is neither a path nor base64 data"),
        ([_user({"type": "image", "image": "http://a/b.png"})], [], "image http://a/b.png is an address; give a file"),
        ([_user({"type": "image", "image": "data:image/png;base64,%"})], [], "an image's data is not base64"),
        ([_user({"type": "image"}, _text("x"))], ["a", "b"], "1 images more than its turns speak of"),
        ([_user(_text("x")), {"role": "assistant", "content": [{"type": "image"}]}], ["a"], "assistant holds an image"),
    ],
)
def test_what_is_no_chat_is_named(messages: Any, images: list[str], fault: str) -> None:
    assert fault in str(chat_record("x", {"messages": messages, "images": images}, Path("d")).fault)


def test_turns_go_through_the_template(tmp_path: Path, one_processor: Processor) -> None:
    """The last answer alone is labelled; a template that refuses some turns makes a bad sample, not the end."""
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.png")
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A ring."},
        {"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": " Red.\n"},
    ]  # fmt: skip
    (tmp_path / "data.jsonl").write_text(json.dumps({"conversations": turns, "image": "a.png"}))
    settings = CalibrationSettings(source="jsonl", size=1, path=str(tmp_path / "data.jsonl"))
    (sample,) = load_calibration(settings, one_processor).samples
    tokenizer = one_processor.tokenizer
    assert sample.image_grid_thw is not None
    pads = int((sample.input_ids == one_processor.config.image_token_id).sum())
    assert pads == int(sample.image_grid_thw.prod()) // one_processor.config.vision_config.spatial_merge_size**2
    shown = f"<|vision_start|>{tokenizer.decode([one_processor.config.image_token_id]) * pads}<|vision_end|>"
    assert tokenizer.decode(sample.input_ids) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{shown}What?<|im_end|>\n"
        "<|im_start|>assistant\nA ring.<|im_end|>\n<|im_start|>user\nWhich colour?<|im_end|>\n"
        "<|im_start|>assistant\nRed.<|im_end|>"
    )
    assert tokenizer.decode(sample.input_ids[sample.labels >= 0]) == "Red.<|im_end|>"

    strict = one_processor.tokenizer.chat_template
    assert isinstance(strict, str)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + strict
    try:
        with pytest.raises(CalibrationError, match=r"(?s)1 bad sample.*data\.jsonl:1: .*no system"):
            load_calibration(settings, one_processor)
    finally:
        tokenizer.chat_template = strict
