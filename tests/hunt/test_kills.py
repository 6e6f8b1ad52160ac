"""kill -9 at random moments, then the same command: the result of an undisturbed run, and nothing left behind."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient
from pandas.testing import assert_frame_equal

from qvl_hydra.tasks.measure_costs import COLUMNS
from qvl_hydra.tracking.content import leaves
from tests.program import finish, start

CASES = {
    "profile": "task=profile strategy.estimator=sketch calibration.size=4 profile.value=0.2 profile.evaluation_size=16",
    "exact": "experiment=lm_mse_v2 strategy.estimator=exact operators.max_ops=12 calibration.size=6",
    "auto": "experiment=lm_mse_v2 operators.max_ops=24 calibration.size=6",
    "sketch": "component=full strategy.estimator=sketch calibration.size=6",
    "hessian": "experiment=lm_hawq_v2 strategy.curvature=hessian operators.max_ops=6 calibration.size=4",
    "onnxrt": "experiment=lm_onnx_mse_v2 operators.max_ops=4 calibration.size=4",
    "inc_fx": "experiment=lm_inc_fx operators.max_ops=4 calibration.size=4",
    "inc_onnxrt": "backend=inc_onnxrt quant=inc_static strategy=mse_v2 operators.max_ops=4 calibration.size=4",
    "modelopt": "backend=modelopt backend.method=gradient calibration.size=4",
    "quantize": "task=quantize profile.quantize_with=[compressed_tensors] strategy.estimator=sketch calibration.size=4 "
    "profile.value=0.2 profile.evaluation_size=16",
    "export_onnx": "task=export_onnx component=lm calibration.size=4",
    "measure_costs": "task=measure_costs component=lm calibration.size=4",
    "compare": "task=compare compare.kind=proxy compare.runs=[{0},{1}] compare.regret_samples=16",
    "multirun": "-m experiment=lm_mse_v2 operators.max_ops=6 calibration.size=4 seed=1,2",
    "sizes": "-m experiment=calibration_sizes operators.max_ops=6 calibration.size=4,8 calibration.seed=0,1",
    "sharded": "-m experiment=sharded strategy.estimator=sketch calibration.size=6 shard=0/2,1/2",
}
BEFORE = {  # runs that a case reads
    "compare": (
        "experiment=lm_mse_v2 operators.max_ops=6 calibration.size=4",
        "experiment=lm_mse_v2 model=tiny_qwen2_vl operators.max_ops=6 calibration.size=4",
    )
}
AT_ONCE, MANY = 1, 13  # kills of one case
TABLES = (
    "scores.parquet", "sample_scores.parquet", "profiles.parquet", "costs.parquet", "comparison.parquet",
    "pairs.parquet", "stability.parquet", "regret.parquet",
)  # fmt: skip
KEYS = ("seed", "shard", "calibration.seed", "calibration.size")  # that tell the jobs of a case apart
UNTIMED = {"costs.parquet": list(COLUMNS)}  # columns of a table that a second run repeats, where the others are timed
GRAPH = ("n_products", "opset", "largest_difference", "weight_bytes")  # of an export's record


def results(folder: Path) -> list[pd.DataFrame]:
    """The tables of every finished job below a folder, and of what followed them, in the order of their settings."""
    found = {}
    for path in folder.rglob("run.json"):
        told, end = json.loads(path.read_text()), path.parent / "end.json"
        job = path.parent.name not in ("comparison", "merged")
        if told.get("status") != "complete" or (
            job and (not end.exists() or json.loads(end.read_text())["end"] != "FINISHED")
        ):
            continue
        own = dict(leaves(yaml.safe_load((path.parent / "config.yaml").read_text()), "."))
        key = (job or path.parent.name, *(str(own.get(name)) for name in KEYS))
        there = [name for name in TABLES if (path.parent / name).exists()]
        tables = [pd.read_parquet(path.parent / name, columns=UNTIMED.get(name)) for name in there]
        if told["task"] == "export_onnx":
            tables.append(pd.DataFrame([{name: told[name] for name in GRAPH}]))
        found[str(key)] = tables
    return [table for key in sorted(found) for table in found[key]]


def prepare(case: str, folder: Path) -> str:
    """Make what a case reads; its command."""
    made = []
    for number, line in enumerate(BEFORE.get(case, ())):
        own = folder / f"before{number}"
        status, text = finish(start(f"{line} hydra.run.dir={own}", folder))
        assert status == 0, text
        made.append(own)
    return CASES[case].format(*made)


def hunt(case: str, kills: int, folder: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"{case}: seed {seed}")
    draw = random.Random(seed)
    line = prepare(case, folder)
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
    if case == "modelopt":
        pytest.importorskip("modelopt")
    hunt(case, MANY, tmp_path)
