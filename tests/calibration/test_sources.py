"""Every source on small made-up files, with each kind of bad sample."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from qvl_hydra.calibration.encode import Processor
from qvl_hydra.calibration.sample import CalibrationSet
from qvl_hydra.calibration.sources import SOURCES, check_calibration, load_calibration
from qvl_hydra.errors import CalibrationError
from qvl_hydra.settings import CalibrationSettings


def _save_image(path: Path, seed: int = 0, size: tuple[int, int] = (70, 90)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _answers(found: CalibrationSet, processor: Processor) -> list[str]:
    decode = processor.tokenizer.decode
    return [decode(s.labels[s.labels != -100]).removesuffix("<|im_end|>") for s in found.samples]


@pytest.fixture
def coco(tmp_path: Path) -> CalibrationSettings:
    """Ten images: seven good; a truncated file, a missing file, an empty caption; one stray caption."""
    for number in range(10):
        _save_image(tmp_path / "images" / f"{number:03d}.jpg", number)
    _truncate(tmp_path / "images" / "007.jpg")
    (tmp_path / "images" / "008.jpg").unlink()
    images = [{"id": 100 + number, "file_name": f"{number:03d}.jpg"} for number in range(10)]
    notes = [{"id": 50 + n, "image_id": 100 + n, "caption": f"second caption of {n}"} for n in range(9)]
    notes += [{"id": n, "image_id": 100 + n, "caption": f"  picture {n} \n"} for n in range(9)]
    notes += [{"id": 70, "image_id": 109, "caption": "  "}, {"id": 71, "image_id": 555, "caption": "a stray"}]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return CalibrationSettings(
        source="coco_captions",
        size=7,
        annotations=str(tmp_path / "captions.json"),
        images=str(tmp_path / "images"),
        prompt="what is in the image?",
    )


@pytest.fixture
def jsonl(tmp_path: Path) -> CalibrationSettings:
    """Nine lines, four good: with an image, with two, and two of text only."""
    _save_image(tmp_path / "a.png", 1)
    _save_image(tmp_path / "b.png", 2)
    (tmp_path / "broken.png").write_text("not an image")
    lines = [
        json.dumps({"image": "a.png", "prompt": "one?", "answer": "red"}),
        json.dumps({"image": ["a.png", "b.png"], "answer": "two images"}),
        json.dumps({"image": None, "prompt": "text?", "answer": "text null"}),
        json.dumps({"prompt": "text?", "answer": "text absent"}),
        json.dumps({"image": "broken.png", "prompt": "one?", "answer": "x"}),
        json.dumps({"image": "missing.png", "prompt": "one?", "answer": "x"}),
        json.dumps({"image": "a.png", "prompt": "one?", "answer": ""}),
        "{not json",
        json.dumps({"image": 3, "prompt": "one?", "answer": "x"}),
        "",
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return CalibrationSettings(source="jsonl", size=4, path=str(tmp_path / "data.jsonl"), prompt="default?")


@pytest.fixture
def imagefolder(tmp_path: Path) -> CalibrationSettings:
    """Five images in class folders and one in none."""
    for number in range(3):
        _save_image(tmp_path / "red_ring" / f"{number}.png", number)
    for number in range(2):
        _save_image(tmp_path / "cross" / f"{number}.jpg", 5 + number)
    _save_image(tmp_path / "stray.png", 9)
    (tmp_path / "cross" / "notes.txt").write_text("no image")
    return CalibrationSettings(source="imagefolder", size=5, path=str(tmp_path))


def test_coco(coco: CalibrationSettings, one_processor: Processor) -> None:
    found = load_calibration(coco, one_processor)
    assert sorted(_answers(found, one_processor)) == [f"picture {n}" for n in range(7)]
    assert all(
        sample.id == f"{answer[-1]:0>3}.jpg"
        for sample, answer in zip(found.samples, _answers(found, one_processor), strict=True)
    )
    assert all("what is in the image?" in one_processor.tokenizer.decode(s.input_ids) for s in found.samples)


def test_coco_bad_samples_are_all_named(coco: CalibrationSettings, one_processor: Processor) -> None:
    wanted = dataclasses.replace(coco, size=8)
    with pytest.raises(CalibrationError) as caught:
        load_calibration(wanted, one_processor)
    message = str(caught.value)
    assert "only 7 good samples and 4 bad samples, but calibration.size=8" in message
    for part in (
        "007.jpg: image",
        "truncated",
        "008.jpg",
        "does not exist",
        "009.jpg: the caption is missing or empty",
        "image 555: a caption without an image",
    ):
        assert part in message


def test_jsonl(jsonl: CalibrationSettings, one_processor: Processor) -> None:
    found = load_calibration(jsonl, one_processor)
    by_answer = dict(zip(_answers(found, one_processor), found.samples, strict=True))
    assert set(by_answer) == {"red", "two images", "text null", "text absent"}
    assert by_answer["text null"].pixel_values is None
    assert by_answer["text absent"].pixel_values is None
    grids = by_answer["two images"].image_grid_thw
    assert grids is not None
    assert grids.shape == (2, 3)
    assert "default?" in one_processor.tokenizer.decode(by_answer["two images"].input_ids)
    assert by_answer["red"].id == "data.jsonl:1"


def test_jsonl_lines_without_an_answer_and_texts_alone(tmp_path: Path, one_processor: Processor) -> None:
    """Null says that nobody knows the answer; a line that has none, whatever else it has, is bad."""
    text = "The red ring stands left of the blue cross.\n" * 3
    image_token = one_processor.tokenizer.decode([one_processor.config.image_token_id])
    lines = [
        {"prompt": "what?", "answer": None}, {"text": text}, {"prompt": "what?", "response": "x"}, {"text": " "},
        {"image": None, "text": "x"}, {"text": f"a {image_token}"}, {},
    ]  # fmt: skip
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    settings = CalibrationSettings(source="jsonl", size=2, path=str(path))
    samples = {sample.id: sample for sample in load_calibration(settings, one_processor).samples}
    asked, alone = samples["data.jsonl:1"], samples["data.jsonl:2"]
    assert (asked.labels == -100).all()
    decode = one_processor.tokenizer.decode
    assert decode(asked.input_ids).endswith("<|im_start|>assistant\n")
    assert decode(alone.input_ids) == text
    assert alone.labels.equal(alone.input_ids)
    cut = load_calibration(dataclasses.replace(settings, max_length=20), one_processor)
    assert {len(sample.input_ids) for sample in cut.samples if sample.id == alone.id} <= {20}
    with pytest.raises(CalibrationError) as caught:
        load_calibration(dataclasses.replace(settings, size=3), one_processor)
    for part in (
        "data.jsonl:3: no answer (the line has prompt, response); give one, or null where nobody knows it",
        "data.jsonl:4: the text is missing or empty",
        "data.jsonl:5: no answer (the line has image, text)",
        "data.jsonl:6: the text holds an image token of its own",
        "data.jsonl:7: no answer (the line has nothing)",
    ):
        assert part in str(caught.value)


def test_names_that_are_no_letters_are_spelled_out(
    imagefolder: CalibrationSettings, one_processor: Processor, tmp_path: Path
) -> None:
    """Of a file whose name is in another encoding, and of half a letter in a line."""
    os.rename(os.fsencode(tmp_path / "cross" / "0.jpg"), os.fsencode(tmp_path / "cross") + b"/\xff.jpg")
    names = {sample.id for sample in load_calibration(imagefolder, one_processor).samples}
    assert r"cross/\udcff.jpg" in names
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"\ud800": 1}, {"image": "\ud800.png", "prompt": "a", "answer": "b"}])))
    with pytest.raises(CalibrationError) as caught:
        load_calibration(CalibrationSettings(source="jsonl", size=1, path=str(path)), one_processor)
    assert str(caught.value).encode().count(rb"\ud800") == 2


def test_jsonl_bad_samples_are_all_named(jsonl: CalibrationSettings, one_processor: Processor) -> None:
    with pytest.raises(CalibrationError) as caught:
        load_calibration(dataclasses.replace(jsonl, size=5), one_processor)
    message = str(caught.value)
    assert "only 4 good samples and 5 bad samples" in message
    for part in (
        "data.jsonl:5: image",
        "broken.png cannot be read",
        "data.jsonl:6: image",
        "does not exist",
        "data.jsonl:7: the answer is missing or empty",
        "data.jsonl:8: not valid JSON",
        "data.jsonl:9: image is",
    ):
        assert part in message


def test_imagefolder_classes(imagefolder: CalibrationSettings, one_processor: Processor) -> None:
    found = load_calibration(imagefolder, one_processor)
    assert sorted(_answers(found, one_processor)) == ["cross"] * 2 + ["red ring"] * 3
    with pytest.raises(CalibrationError, match=r"stray\.png: the caption is missing or empty; add metadata\.jsonl"):
        load_calibration(dataclasses.replace(imagefolder, size=6), one_processor)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_imagefolder_metadata(imagefolder: CalibrationSettings, one_processor: Processor, kind: str) -> None:
    folder = Path(str(imagefolder.path))
    rows = [("stray.png", "a stray one"), ("cross/0.jpg", "a cross"), ("gone.png", "gone"), ("cross/1.jpg", "")]
    if kind == "csv":
        text = "file_name,text\n" + "\n".join(",".join(row) for row in rows)
    else:
        text = "\n".join(json.dumps({"file_name": name, "text": caption}) for name, caption in rows)
    (folder / f"metadata.{kind}").write_text(text)
    found = load_calibration(dataclasses.replace(imagefolder, size=2), one_processor)
    assert sorted(_answers(found, one_processor)) == ["a cross", "a stray one"]
    with pytest.raises(CalibrationError) as caught:
        load_calibration(dataclasses.replace(imagefolder, size=4, on_bad="fail"), one_processor)
    assert "2 bad samples" in str(caught.value)
    assert "gone.png: image" in str(caught.value)
    assert "cross/1.jpg: the caption" in str(caught.value)


@pytest.mark.parametrize("fixture", ["coco", "jsonl", "imagefolder"])
def test_skip_names_and_counts_fail_refuses(
    fixture: str, one_processor: Processor, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    settings: CalibrationSettings = request.getfixturevalue(fixture)
    for seed in range(20):  # an order in which at least one bad sample comes before enough good ones
        shuffled = dataclasses.replace(settings, seed=seed)
        with caplog.at_level(logging.WARNING, logger="qvl_hydra"):
            found = load_calibration(shuffled, one_processor)
        if found.bad:
            break
    assert found.bad
    assert len(found.samples) == settings.size
    assert f"skipped {len(found.bad)} bad sample" in caplog.text
    assert found.bad[0].name in caplog.text
    with pytest.raises(CalibrationError) as caught:
        load_calibration(dataclasses.replace(shuffled, on_bad="fail"), one_processor)
    for item in found.bad:
        assert f"{item.name}: {item.reason}" in str(caught.value)


@pytest.mark.parametrize("fixture", ["coco", "jsonl", "imagefolder", "bundled"])
def test_sizes_are_nested_and_seeds_differ(
    fixture: str, one_processor: Processor, request: pytest.FixtureRequest
) -> None:
    if fixture == "bundled":
        settings = CalibrationSettings(source="bundled", size=6)
    else:
        settings = request.getfixturevalue(fixture)
    whole = load_calibration(settings, one_processor)
    again = load_calibration(settings, one_processor)
    part = load_calibration(dataclasses.replace(settings, size=3), one_processor)
    assert whole.sha == again.sha
    assert whole.sha != part.sha
    assert [s.id for s in part.samples] == [s.id for s in whole.samples[:3]]
    for one, other in zip(part.samples, whole.samples, strict=False):
        assert all(tensor.equal(other.tensors[name]) for name, tensor in one.tensors.items())
    orders = {
        tuple(s.id for s in load_calibration(dataclasses.replace(settings, size=3, seed=seed), one_processor).samples)
        for seed in range(6)
    }
    assert len(orders) > 1


def test_bundled_splits(one_processor: Processor) -> None:
    settings = CalibrationSettings(source="bundled", size=24)
    calibration = load_calibration(settings, one_processor)
    evaluation = load_calibration(dataclasses.replace(settings, split="evaluation"), one_processor)
    assert all(s.id.startswith("calibration-") for s in calibration.samples)
    assert all(s.id.startswith("evaluation-") for s in evaluation.samples)
    assert len({tuple(s.image_grid_thw[0].tolist()) for s in calibration.samples if s.image_grid_thw is not None}) > 1


@pytest.mark.parametrize("captions", [lambda n: f"caption {n}", lambda n: [f"caption {n}", "other"]])
def test_coco_from_a_data_set_folder(
    tmp_path: Path,
    one_processor: Processor,
    captions: Callable[[int], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A data set id is opened with `datasets.load_dataset`; a folder of parquet is the same door without the hub."""
    # The streaming reader of `datasets` sleeps for seconds at its end, against a fault of pyarrow on slow disks.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    _save_image(tmp_path / "one.png", 1)
    content = (tmp_path / "one.png").read_bytes()
    rows = [{"image": {"bytes": content, "path": f"{n}.png"}, "caption": captions(n)} for n in range(5)]
    rows.append({"image": {"bytes": content[:40], "path": "cut.png"}, "caption": captions(9)})
    (tmp_path / "set").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "set" / "validation.parquet")
    settings = CalibrationSettings(source="coco_captions", size=5, dataset=str(tmp_path / "set"))
    found = load_calibration(settings, one_processor)
    assert sorted(_answers(found, one_processor)) == [f"caption {n}" for n in range(5)]
    with pytest.raises(CalibrationError, match=r"cut\.png: image in the data set cannot be read"):
        load_calibration(dataclasses.replace(settings, size=6), one_processor)


def test_data_set_without_the_columns(tmp_path: Path, one_processor: Processor) -> None:
    Dataset.from_list([{"picture": "x", "caption": "y"}]).to_parquet(tmp_path / "train.parquet")
    settings = CalibrationSettings(source="coco_captions", size=1, dataset=str(tmp_path))
    with pytest.raises(CalibrationError, match="columns are picture, caption; needed are image and one of caption"):
        load_calibration(settings, one_processor)


def test_what_is_missing_is_seen_before_reading(tmp_path: Path) -> None:
    coco = CalibrationSettings(
        source="coco_captions", annotations=str(tmp_path / "no.json"), images=str(tmp_path / "no")
    )
    with pytest.raises(CalibrationError, match=r"(?s)no\.json: no such file.*/no: no such folder"):
        check_calibration(coco)
    for source in ("jsonl", "imagefolder"):
        with pytest.raises(CalibrationError, match="no such"):
            check_calibration(CalibrationSettings(source=source, path=str(tmp_path / "gone")))
    check_calibration(CalibrationSettings(source="bundled"))


def test_not_coco_json(coco: CalibrationSettings, one_processor: Processor) -> None:
    Path(str(coco.annotations)).write_text('{"images": [{"file_name": "a.jpg"}], "annotations": []}')
    with pytest.raises(CalibrationError, match="not a COCO caption file"):
        load_calibration(coco, one_processor)


@pytest.mark.parametrize("source", ["jsonl", "imagefolder", "coco_captions"])
def test_empty_sets(source: str, tmp_path: Path, one_processor: Processor) -> None:
    (tmp_path / "data.jsonl").write_text("\n")
    (tmp_path / "captions.json").write_text('{"images": [], "annotations": []}')
    (tmp_path / "images").mkdir()
    path = {"jsonl": "data.jsonl", "imagefolder": "images"}.get(source)
    settings = CalibrationSettings(
        source=source,
        path=str(tmp_path / path) if path else None,
        annotations=str(tmp_path / "captions.json"),
        images=str(tmp_path / "images"),
    )
    with pytest.raises(CalibrationError, match="no good sample and 0 bad samples"):
        load_calibration(settings, one_processor)


def test_too_long_counts_as_bad(one_processor: Processor) -> None:
    settings = CalibrationSettings(source="bundled", size=8)
    lengths = sorted(len(s.input_ids) for s in load_calibration(settings, one_processor).samples)
    limited = dataclasses.replace(settings, max_length=lengths[3], on_bad="fail")
    with pytest.raises(CalibrationError, match=f"above calibration.max_length={lengths[3]}") as caught:
        load_calibration(limited, one_processor)
    assert f"{sum(length > lengths[3] for length in lengths)} bad samples" in str(caught.value)


def test_table_has_every_source_of_the_settings() -> None:
    (field,) = [f for f in dataclasses.fields(CalibrationSettings) if f.name == "source"]
    assert all(f"'{name}'" in str(field.type) or f'"{name}"' in str(field.type) for name in SOURCES)
    assert str(field.type).count(",") + 1 == len(SOURCES)
