"""docs/extending.md, executed: one addition to every table, and a sweep and a profile with them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from qvl_hydra.backends.table import BACKENDS
from qvl_hydra.entry.compose import with_choices
from qvl_hydra.errors import SettingsError
from qvl_hydra.estimators.table import ESTIMATORS
from qvl_hydra.families.table import FAMILIES
from qvl_hydra.models.load import model_folder
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles.costs import COSTS
from qvl_hydra.profiles.formats.table import FORMATS as CONSUMERS
from qvl_hydra.quantization.formats.table import FORMATS
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.runs.record import record_of
from qvl_hydra.screen import Screen
from qvl_hydra.settings import ModelSettings, Settings
from qvl_hydra.tasks import profile, sweep
from tests import toys
from tests.families.shapes import load_made_up
from tests.program import composed


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(FAMILIES, toys.FAMILY), (FORMATS, toys.FORMAT), (ESTIMATORS, toys.ESTIMATOR), (BACKENDS, toys.BACKEND),
            (COSTS, toys.COST), (CONSUMERS, toys.CONSUMER)]  # fmt: skip
    for table, row in rows:
        monkeypatch.setitem(table, row.name, row)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistral")
    toys.tiny_mistral().save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(model_folder(ModelSettings("", "bundled:tiny_qwen2_5_vl")) / file, folder / file)
    texts = [{"prompt": f"What is {number}?", "answer": f"red cube {number}"} for number in range(40)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return folder


def settings_of(*overrides: str) -> Settings:
    own = ["component=lm", "calibration.size=4", "profile.evaluation_size=4", "tracking.enabled=false"]
    return composed(*own, *overrides)


def run(path: Path, task: object, *overrides: str) -> pd.DataFrame:
    settings, further = with_choices(settings_of(*overrides))
    task.run(settings, RunFolder(path), Screen(console=Console(file=io.StringIO())), further)  # type: ignore[attr-defined]
    return pd.read_parquet(path / "scores.parquet")


def test_a_family_a_format_and_an_estimator(checkpoint: Path, tmp_path: Path) -> None:
    scheme = ["quant=w4a16", "quant.name=halves", "quant.weight_format=halves", "quant.weight_group_size=null"]
    model = ["model=text", f"model.path={checkpoint}", "model.dtype=float32"]
    samples = ["calibration=jsonl", f"calibration.path={checkpoint / 'texts.jsonl'}"]
    table = run(tmp_path, sweep, *model, *samples, *scheme, "strategy.estimator=weight_error")
    module = load_made_up(checkpoint).module
    operators = find_operators(module, "lm")
    assert table["op"].tolist() == [op.path for op in operators]
    assert len(operators) == 2 * 7 + 1
    for op, score in zip(operators, table["score"], strict=True):
        weight = module.get_submodule(op.path).weight.detach()  # type: ignore[union-attr]
        expected = float(((weight * 2).round() / 2 - weight).double().square().sum())
        assert score == pytest.approx(expected, rel=1e-5)
    assert record_of(tmp_path).scheme == "halves"
    exact = run(tmp_path / "exact", sweep, *model, *samples, *scheme, "strategy.estimator=exact")
    assert exact["status"].eq("scored").all(), "the format and the family under an estimator that was there"


def test_a_backend(tmp_path: Path) -> None:
    table = run(tmp_path, sweep, "backend.name=rehearsal", "operators.max_ops=5")
    assert table["score"].tolist() == [1, 2, 3, 4, 5]
    assert record_of(tmp_path).backend == "rehearsal"
    with pytest.raises(SettingsError, match=r"mse_v2, but backend=rehearsal has kl; mse_v2 is done by .*torch"):
        settings_of("backend.name=rehearsal", "strategy=mse_v2")


def test_a_cost_and_a_consumer(tmp_path: Path) -> None:
    run(tmp_path, profile, "task=profile", "strategy.estimator=sketch", "operators.blocks=0-1", "quant=w8a8_int",
        "profile.choices=[w8a8_int,w4a16]", "profile.cost=exotic", "profile.values=[3]",
        "profile.formats=[lines]")  # fmt: skip
    chosen = json.loads((tmp_path / "profile.json").read_text())["choices"]
    assert len(chosen.get("w4a16", [])) <= 3
    written = dict(line.split() for line in (tmp_path / "exports" / "lines" / "plan.txt").read_text().splitlines())
    assert {path for path, scheme in written.items() if scheme == "w8a8_int"} == set(chosen["w8a8_int"])


@pytest.mark.parametrize(
    ("override", "told"),
    [("strategy.estimator=typo", "auto, exact, sketch, gradient, weight_error"), ("backend.name=typo", "rehearsal"),
     ("profile.budget=typo", "exotic, error"), ("profile.formats=[typo]", "lines"), ("model.family=typo", "mistral")],
)  # fmt: skip
def test_additions_are_told_where_something_else_is_asked_for(override: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        settings_of(override)
