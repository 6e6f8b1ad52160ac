"""What a run takes from finished ones, and which of them it does not."""

from __future__ import annotations

from pathlib import Path

from qvl_hydra.runs.files import write_json
from qvl_hydra.runs.folder import RunFolder, SampleScore
from qvl_hydra.runs.reuse import reuse, samples_of, take_schemes


def test_a_run_with_schemes_of_another_is_not_grown(tmp_path: Path) -> None:
    """Its parts are not named as its engine would; nor are those of a run that took them from it in turn."""
    source, grown, again = (RunFolder(tmp_path / name) for name in ("source", "grown", "again"))
    for folder in (source, grown, again):
        write_json(folder.path / "calibration.json", {"size": 4})
    scores = [SampleScore("op", "sample", None, 1.0, "kl", "exact", scheme) for scheme in ("fp8", "w4a16")]
    source.write("exact-00000", scores)
    assert samples_of(source.path) == 4
    take_schemes(source.path, grown, ["fp8"], ["ranges"], "report")
    assert set(grown.frame()["scheme"]) == {"fp8"}
    reuse(grown.path, again)
    assert (samples_of(grown.path), samples_of(again.path)) == (0, 0)
