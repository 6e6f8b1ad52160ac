"""task=export_onnx as a user runs it: a graph of an image size, and sizes and families that it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvl_hydra.runs.record import read_record
from tests.program import run_here

pytest.importorskip("onnxscript")
LINE = "task=export_onnx component=vision calibration.size=2 tracking.enabled=false hydra.run.dir=run"


def test_the_vision_tower_of_an_image_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = "export.image_height=56 export.image_width=84"
    status, text = run_here(f"{LINE} {size}", tmp_path, monkeypatch, capsys)
    assert status == 0, text
    record = read_record(tmp_path / "run")
    assert record.task == "export_onnx"
    assert record.further["image_size"] == [[56, 84]]
    assert Path(record.further["graph"]).is_file()
    assert record.further["relative_difference"] < 1e-4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("export.image_height=60 export.image_width=84", "covers 28 x 28 pixels; give multiples of 28"),
        ("model=tiny_qwen3_vl", "not for qwen3_vl (docs/onnx.md)"),
    ],
)
def test_what_it_refuses(
    change: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = run_here(f"{LINE} {change}", tmp_path, monkeypatch, capsys)
    assert status == 2
    assert told in text
