"""What was seen is never held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvl_hydra.calibration.encode import load_processor
from qvl_hydra.calibration.held_out import held_out, seen_by
from qvl_hydra.calibration.sources import load_calibration
from qvl_hydra.errors import CalibrationError
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.settings import CalibrationSettings


def test_a_profile_of_fewer_samples_than_its_sweep_holds_out_what_the_sweep_did_not_see(
    tiny_model: LoadedModel, tmp_path: Path
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"what is {i}", "answer": str(i)}) + "\n" for i in range(20)))
    processor = load_processor(tiny_model.description.folder)
    sweep = load_calibration(CalibrationSettings("jsonl", size=12, path=str(path)), processor)
    content = {"samples": [s.id for s in sweep.samples], "scored": [s.id for s in sweep.samples[:4]]}
    (tmp_path / "calibration.json").write_text(json.dumps(content))
    seen = seen_by([tmp_path, tmp_path / "nowhere"])
    small = CalibrationSettings("jsonl", size=4, path=str(path))
    found = held_out(small, processor, 6, seen)
    assert len(found) == 6
    assert not {sample.id for sample in found} & seen
    assert len(held_out(small, processor, 50, seen)) == 8, "as many as there are"
    with pytest.raises(CalibrationError, match="no sample left that scores and ranges have not seen"):
        held_out(small, processor, 1, {f"texts.jsonl:{i}" for i in range(1, 21)})


def test_the_bundled_source_has_a_split_of_its_own(tiny_model: LoadedModel) -> None:
    processor = load_processor(tiny_model.description.folder)
    settings = CalibrationSettings("bundled", size=4)
    first = held_out(settings, processor, 3, set())
    assert not {s.id for s in first} & {s.id for s in load_calibration(settings, processor).samples}
    assert [s.id for s in held_out(settings, processor, 2, {first[0].id})] == [s.id for s in first[1:]]
