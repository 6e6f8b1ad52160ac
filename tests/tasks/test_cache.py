"""Scores that a finished run measured are taken by whoever asks for the same, whatever it does with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from qvl_hydra.runs import resume, versions
from qvl_hydra.runs.files import read_table
from qvl_hydra.runs.folder import RunFolder, SampleScore, earlier_runs
from qvl_hydra.runs.resume import source_of
from qvl_hydra.tasks import measured as taken
from qvl_hydra.tasks.prepare import may_reuse
from tests.program import composed, run_here

LINE = "component=lm calibration.size=4 strategy.estimator=sketch tracking.enabled=false"
PROFILE = f"task=profile {LINE} profile.evaluation_size=4 profile.baselines=false profile.candidates=1"
Here = Callable[[str], str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    def run(line: str) -> str:
        status, text = run_here(line, tmp_path, monkeypatch, capsys)
        assert status == 0, text
        return text

    return run


@pytest.fixture
def measured(here: Here, tmp_path: Path) -> Path:
    """A finished run."""
    here(f"{LINE} hydra.run.dir=outputs/first")
    return tmp_path / "outputs" / "first"


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taken, "load_engine", lambda name: pytest.fail("measured again"))


def test_the_same_command_measures_nothing(
    measured: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        refuse(patched)
        text = here(f"{LINE} hydra.run.dir=outputs/second")
        assert f"scores are those of {measured}" in text
        again = tmp_path / "outputs" / "second"
        for name in ("scores.parquet", "sample_scores.parquet", "families.parquet"):
            assert_frame_equal(pd.read_parquet(again / name), pd.read_parquet(measured / name), check_exact=True)
        first, second = (json.loads((path / "run.json").read_text()) for path in (measured, again))
        assert any("cache=off" in note for note in second.pop("notes"))
        for key in set(first) - {"notes", "wall_s", "peak_memory_bytes"}:
            assert first[key] == second[key], key
        assert "a finished run of the same settings, so that nothing" in here(f"{LINE} dry_run=true")
    assert "scores are those of" not in here(f"{LINE} cache=off")
    assert "scores are those of" not in here(f"{LINE} resume=never")
    assert "scores are those of" not in here(f"{LINE} seed=1")


def test_a_second_budget_measures_no_score(measured: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither after a sweep nor after another profile, nor in a job beside it."""
    refuse(monkeypatch)
    for value in (0.2, 0.4):
        assert "scores are those of" in here(f"{PROFILE} profile.value={value}")
    assert here(f"-m {PROFILE} profile.value=0.5,0.6").count("scores are those of") == 2


@pytest.mark.parametrize(
    "strategy",
    ["strategy.estimator=exact", "strategy=hawq_v2", "strategy.estimator=auto"],
)
def test_twice_the_samples_measure_the_new_half_only(
    strategy: str, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are those of a run that measured all by itself; ranges that are static come from all samples."""
    line = f"component=lm {strategy} operators.max_ops=6 quant=w8a8_int tracking.enabled=false"
    here(f"{line} calibration.size=3 hydra.run.dir=outputs/few")
    here(f"{line} calibration.size=6 cache=off hydra.run.dir=outputs/whole")
    shutil.rmtree(tmp_path / "outputs" / "whole" / "parts")
    measured: list[str] = []
    write = RunFolder.write

    def noted(folder: RunFolder, unit: str, scores: list[SampleScore]) -> None:
        measured.extend(score.sample for score in scores if not unit.startswith("exact0"))
        write(folder, unit, scores)

    monkeypatch.setattr(RunFolder, "write", noted)
    few = tmp_path / "outputs" / "few"
    assert f"scores of 3 of the samples, which {few} has measured" in here(f"{line} calibration.size=6 dry_run=true")
    assert f"scores of 3 samples are those of {few}" in here(f"{line} calibration.size=6 hydra.run.dir=outputs/grown")
    samples = json.loads((tmp_path / "outputs" / "whole" / "calibration.json").read_text())["scored"]
    assert set(measured) == set(samples[3:])
    grown, whole = (pd.read_parquet(tmp_path / "outputs" / name / "scores.parquet") for name in ("grown", "whole"))
    assert_frame_equal(grown, whole, rtol=2e-3)
    assert "scores of 3 samples" not in here(f"{line} calibration.size=6 calibration.seed=1")
    assert "scores of 3 samples" not in here(f"{line.replace('w8a8_int', 'w8a8_static')} calibration.size=6")


def interrupted(folder: RunFolder, unit: str, scores: list[SampleScore]) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def schemes_written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The schemes in which anything is measured."""
    found: list[str] = []
    write = RunFolder.write

    def noted(folder: RunFolder, unit: str, scores: list[SampleScore]) -> None:
        found.extend(score.scheme for score in scores)
        write(folder, unit, scores)

    monkeypatch.setattr(RunFolder, "write", noted)
    return found


@pytest.mark.parametrize("strategy", ["strategy.estimator=auto", "strategy=hawq_v2"])  # the first is sketch and exact
def test_a_further_scheme_measures_itself_only(
    strategy: str,
    here: Here,
    tmp_path: Path,
    schemes_written: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Scores are those of a run that measured both, static ranges included, also where that run is killed."""
    line = f"component=lm {strategy} calibration.size=3 operators.max_ops=10 quant=w8a8_static tracking.enabled=false"
    both = f"{line} quant.also=[fp8]"
    here(f"{line} hydra.run.dir=outputs/one")
    here(f"{both} cache=off hydra.run.dir=outputs/whole")
    shutil.rmtree(tmp_path / "outputs" / "whole" / "parts")
    schemes_written.clear()
    one = tmp_path / "outputs" / "one"
    assert f"scores in w8a8_static, which {one} has measured" in here(f"{both} dry_run=true")
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "write", interrupted)
        assert run_here(f"{both} hydra.run.dir=outputs/killed", tmp_path, monkeypatch, capsys)[0] == 130
    assert f"scores in w8a8_static are those of {one}" in here(f"{both} hydra.run.dir=outputs/grown")
    assert set(schemes_written) == {"fp8"}
    for name in ("scores.parquet", "scores_fp8.parquet"):
        grown, whole = (read_table(tmp_path / "outputs" / folder / name) for folder in ("grown", "whole"))
        assert_frame_equal(grown, whole, rtol=1e-5)
    told, apart = (json.loads((tmp_path / "outputs" / name / "run.json").read_text()) for name in ("grown", "whole"))
    for key in ("engine", "estimator", "metric", "scheme", "n_scored"):
        assert told.get(key) == apart.get(key)
    schemes_written.clear()
    other = line.replace("w8a8_static", "fp8")
    assert "scores in fp8 are those of" in here(f"{other} hydra.run.dir=outputs/back")
    assert not schemes_written
    back = read_table(tmp_path / "outputs" / "back" / "scores.parquet")
    assert_frame_equal(back, read_table(tmp_path / "outputs" / "grown" / "scores_fp8.parquet"))
    if "auto" in strategy:
        details = json.loads((tmp_path / "outputs" / "back" / "run.json").read_text())["details"]
        assert details["exact_operators"] == (back["estimator"] == "exact").sum()


def test_other_choices_of_a_profile_measure_what_is_new(here: Here, schemes_written: list[str]) -> None:
    line = f"{PROFILE} profile.values=[6]"
    here(f"{line} profile.choices=[w4a16,w8a8_int,leave]")
    schemes_written.clear()
    assert "scores in w4a16 are those of" in here(f"{line} profile.choices=[w4a16,fp8_dynamic,leave]")
    assert set(schemes_written) == {"fp8_dynamic"}
    schemes_written.clear()
    assert "scores in fp8_dynamic, w4a16 are those of" in here(f"{line} profile.choices=[w4a16,fp8_dynamic,mxfp8]")
    assert set(schemes_written) == {"mxfp8"}


def test_other_choices_leave_a_folder_as_it_was(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"{PROFILE} profile.values=[6] hydra.run.dir=outputs/own profile.choices"
    here(f"{line}=[w4a16,leave]")
    before = {path: path.read_bytes() for path in (tmp_path / "outputs" / "own").glob("*.*") if path.suffix != ".log"}
    for choices in ("[w8a8_int,leave]", "[w4a16,w8a8_int]"):
        status, text = run_here(f"{line}={choices}", tmp_path, monkeypatch, capsys)
        assert status == 2
        assert "holds the results of a run with other settings" in text
    assert {path: path.read_bytes() for path in before} == before


def test_what_cannot_be_read_is_passed_over(measured: Path, here: Here) -> None:
    next((measured / "parts").glob("*.parquet")).write_bytes(b"no parquet")
    assert "scores are those of" not in here(f"{LINE} hydra.run.dir=outputs/second")


def test_other_code_and_backends_with_files_of_their_own_measure_again(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, kept = tmp_path / "own", json.loads((measured / "fingerprint.json").read_text())
    settings = composed(*LINE.split())
    earlier = earlier_runs([measured.parent])
    assert source_of(settings, earlier, own, kept["fingerprint"], may_reuse(settings)) == (measured, True)
    other = composed(*LINE.replace("sketch", "exact").split(), "backend=onnxrt")
    assert source_of(other, earlier, own, kept["fingerprint"], may_reuse(other)) == (None, False)
    assert kept["fingerprint"] == resume.fingerprint_of(settings, (), *hashes(measured))
    monkeypatch.setattr("qvl_hydra.runs.resume.code_sha", lambda: "edited")
    assert kept["fingerprint"] != resume.fingerprint_of(settings, (), *hashes(measured))
    assert len(versions.code_sha()) == 16


def hashes(folder: Path) -> tuple[str, str]:
    record = json.loads((folder / "run.json").read_text())
    return record["model_sha"], record["calibration_sha"]
