"""kill -9 at random moments, then the same command: the result of an undisturbed run, and nothing left behind."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from pandas.testing import assert_frame_equal

from tests.program import finish, start

CASES = {
    "profile": "task=profile strategy.estimator=sketch calibration.size=4 profile.value=0.2 profile.evaluation_size=32",
    "exact": "experiment=lm_mse_v2 strategy.estimator=exact operators.max_ops=12 calibration.size=6",
    "auto": "experiment=lm_mse_v2 operators.max_ops=24 calibration.size=6",
    "sketch": "component=full strategy.estimator=sketch calibration.size=6",
    "hessian": "experiment=lm_hawq_v2 strategy.curvature=hessian operators.max_ops=6 calibration.size=4",
    "onnxrt": "experiment=lm_onnx_mse_v2 operators.max_ops=4 calibration.size=4",
    "inc_fx": "experiment=lm_inc_fx operators.max_ops=4 calibration.size=4",
    "inc_onnxrt": "backend=inc_onnxrt quant=inc_static strategy=mse_v2 operators.max_ops=4 calibration.size=4",
    "quantize": "task=quantize profile.quantize_with=[compressed_tensors] strategy.estimator=sketch calibration.size=4 "
    "profile.value=0.2 profile.evaluation_size=16",
    "multirun": "-m experiment=lm_mse_v2 operators.max_ops=6 calibration.size=4 seed=1,2",
}
AT_ONCE, MANY = 1, 13  # kills of one case


def results(folder: Path) -> list[pd.DataFrame]:
    """The tables of every finished job below a folder, in the order of their settings."""
    found = {}
    for path in folder.rglob("run.json"):
        if json.loads(path.read_text()).get("status") == "complete" and path.parent.name != "comparison":
            end = path.parent / "end.json"
            if end.exists() and json.loads(end.read_text())["end"] == "FINISHED":
                seed = (path.parent / "config.yaml").read_text().split("\nseed:")[1].split()[0]
                found[seed] = path.parent
    names = ("scores.parquet", "sample_scores.parquet", "profiles.parquet")
    return [pd.read_parquet(found[s] / name) for s in sorted(found) for name in names if (found[s] / name).exists()]


def hunt(case: str, kills: int, folder: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"{case}: seed {seed}")
    draw = random.Random(seed)
    line = CASES[case]
    calm = folder / "calm"
    calm.mkdir()
    began = time.monotonic()
    status, text = finish(start(line, calm))
    whole = time.monotonic() - began
    assert status == 0, text
    expected = results(calm)
    assert expected
    for number in range(kills):
        place = folder / str(number)
        place.mkdir()
        process = start(line, place)
        moment = draw.uniform(0.3, 1.0) * whole  # the imports are the first third
        time.sleep(moment)
        process.kill()
        finish(process)
        status, text = finish(start(line, place))
        where = f"{case}, seed {seed}, kill {number} after {moment:.2f} s of {whole:.2f} s: {text}"
        assert status == 0, where
        found = results(place)
        assert len(found) == len(expected), where
        for mine, other in zip(found, expected, strict=True):
            assert_frame_equal(mine, other, check_exact=True, obj=where)
        client = MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        running = client.search_runs(experiments, "attributes.status = 'RUNNING'")
        assert not running, where


@pytest.mark.parametrize("case", ["profile"])
def test_a_kill_costs_nothing(case: str, tmp_path: Path) -> None:
    hunt(case, AT_ONCE, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_many_kills_cost_nothing(case: str, tmp_path: Path) -> None:
    hunt(case, MANY, tmp_path)
