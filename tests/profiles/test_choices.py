"""Plans among several schemes: against every assignment there is, and from settings to files."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from qvl_hydra.entry.compose import config_folder, scheme_settings, settings_from_config, with_choices
from qvl_hydra.errors import ProfileError, SettingsError
from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.choices import LEAVE, ChoiceUnit, assign, choice_units, frontier, plan_profile, undominated
from qvl_hydra.profiles.profile import weight_values
from qvl_hydra.quantization.scheme import Scheme, scheme_from_settings
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.screen import Screen
from qvl_hydra.settings import Settings
from qvl_hydra.tasks import profile, sweep

NAMES = ("nvfp4", "fp8_dynamic")
SCHEMES: dict[str, Scheme] = {name: scheme_from_settings(scheme_settings(name)) for name in NAMES}


def operator(path: str, width: int = 64, group: str | None = None) -> Operator:
    role = path.rsplit(".", 1)[-1]
    return Operator(path, "lm", 0, role, group or path, "Linear", width, width, width * width, "qwen2_5_vl")


def random_units(rng: np.random.Generator, count: int) -> list[ChoiceUnit]:
    units = []
    for index in range(count):
        op = operator(f"op{index}", 16 * int(rng.integers(1, 5)))
        size = weight_values(op)
        scores = {"nvfp4": 10 ** rng.uniform(-4, 0), "fp8_dynamic": 10 ** rng.uniform(-6, -1), LEAVE: 0.0}
        bits = {"nvfp4": 4.5 * size, "fp8_dynamic": 8.1 * size, LEAVE: 16.0 * size}
        if rng.random() < 0.2:
            del scores["nvfp4"], bits["nvfp4"]
        units.append(ChoiceUnit(op.path, (op,), scores, bits, {}))
    return units


@pytest.mark.parametrize("seed", range(8))
def test_no_assignment_within_the_budget_loses_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    units = random_units(rng, 7)
    weights = sum(weight_values(op) for unit in units for op in unit.members)
    value = float(rng.uniform(*frontier(units, 2)))
    plan = assign(units, value)
    spent = sum(unit.bits[plan[unit.name]] for unit in units) / weights
    lost = sum(unit.scores[plan[unit.name]] for unit in units)
    best = min(
        sum(unit.scores[choice] for unit, choice in zip(units, chosen, strict=True))
        for chosen in itertools.product(*(list(unit.scores) for unit in units))
        if sum(unit.bits[choice] for unit, choice in zip(units, chosen, strict=True)) <= value * weights * (1 + 1e-12)
    )
    assert spent <= value * (1 + 1e-9)
    assert lost == pytest.approx(best, rel=1e-6, abs=1e-12)


def test_a_choice_that_costs_more_and_loses_more_is_dropped() -> None:
    unit = ChoiceUnit("a", (operator("a"),), {"x": 1.0, "y": 2.0, LEAVE: 0.0}, {"x": 4.0, "y": 8.0, LEAVE: 16.0}, {})
    assert undominated(unit) == ["x", LEAVE]


def test_the_cheapest_plan_is_the_least_budget() -> None:
    units = random_units(np.random.default_rng(0), 12)
    least, most = frontier(units, 2)
    assert set(assign(units, most).values()) == {LEAVE}
    with pytest.raises(ProfileError, match="not even the cheapest choice of every unit is that small"):
        assign(units, least * 0.99)


def test_a_unit_takes_what_it_can_have() -> None:
    operators = [operator("a.q_proj", group="a.qkv_proj"), operator("a.k_proj", group="a.qkv_proj"), operator("b")]

    def table(status: dict[str, str]) -> pd.DataFrame:
        rows = [(op.path, status.get(op.path, "scored"), 1.0, "not offered: odd") for op in operators]
        return pd.DataFrame(rows, columns=["op", "status", "score", "reason"])

    tables = {"nvfp4": table({"a.k_proj": "skipped"}), "fp8_dynamic": table({})}
    first, second = choice_units(operators, tables, SCHEMES, NAMES, 16)
    assert (first.name, dict(first.scores)) == ("a.qkv_proj", {"fp8_dynamic": 2.0})
    assert "not offered: odd" in first.reasons["nvfp4"]
    assert set(second.scores) == set(NAMES), "leave was not among the choices"
    none = {"nvfp4": table({"b": "failed"}), "fp8_dynamic": table({"b": "failed"})}
    assert dict(choice_units(operators, none, SCHEMES, NAMES, 16)[1].scores) == {LEAVE: 0.0}
    made = plan_profile([first, second], {"a.qkv_proj": "fp8_dynamic", "b": "nvfp4"}, SCHEMES, 16)
    assert [made.scheme_of(op).name for op in operators] == ["fp8_dynamic", "fp8_dynamic", "nvfp4"]
    assert made.average_bits == pytest.approx((2 * (8 + 16 / 64) + 4.5) / 3)


def test_a_thousand_units_with_six_choices_are_solved() -> None:
    rng, units = np.random.default_rng(0), []
    for index in range(1000):
        op = operator(f"op{index}")
        bits = {f"c{k}": float(k + 3) * weight_values(op) for k in range(6)}
        scores = {f"c{k}": float(rng.exponential() * 4.0**-k) for k in range(6)}
        units.append(ChoiceUnit(op.path, (op,), scores, bits, {}))
    plan = assign(units, 5.0)
    assert sum(unit.bits[plan[unit.name]] for unit in units) <= 5.0 * 1000 * 64 * 64 * (1 + 1e-9)


SMALL = [
    "task=profile", "component=lm", "calibration.size=4", "strategy.estimator=sketch", "profile.evaluation_size=6",
    "tracking.enabled=false", "operators.blocks=0-2", "quant=w8a8_int",
]  # fmt: skip


def settings_of(*overrides: str) -> Settings:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return settings_from_config(compose("config", overrides=[*SMALL, *overrides]))


def run(path: Path, *overrides: str) -> str:
    text = io.StringIO()
    settings, further = with_choices(settings_of(*overrides))
    profile.run(settings, RunFolder(path), Screen(console=Console(file=text, width=200)), further)
    return text.getvalue()


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("planned")
    return folder, run(folder, "profile.choices=[w4a16,w8a8_int,leave]")


def test_one_sweep_gives_the_whole_front(planned: tuple[Path, str]) -> None:
    folder, text = planned
    table = pd.read_parquet(folder / "profiles.parquet").sort_values("average_bits")
    assert len(table) >= 9
    assert (table["predicted"].diff().dropna() <= 1e-12).all(), "more bits never predict more loss"
    inner = table.iloc[3]
    assert inner["n_w4a16"] > 0
    assert inner["n_w8a8_int"] > 0
    record = json.loads((folder / "run.json").read_text())
    choices = json.loads((folder / "profile.json").read_text())["choices"]
    assert record["profile"]["n_w4a16"] == len(choices["w4a16"]) > 0
    assert "exported: the plan of" in text
    assert "Precision profile" in (folder / "report.html").read_text()


def test_another_budget_costs_no_scoring(
    planned: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = planned
    monkeypatch.setattr(sweep, "run", lambda *_: pytest.fail("it was scored again"))
    run(tmp_path, "profile.choices=[w4a16,w8a8_int]", f"profile.scores={folder}", "profile.values=[6,7]")
    table = pd.read_parquet(tmp_path / "profiles.parquet")
    for value in (6.0, 7.0):
        (row,) = table[table["value"] == value].to_dict("records")
        assert row["average_bits"] <= value
        assert row["n_high"] == 0, "leave was not offered"
    with pytest.raises(ProfileError, match=r"names mxfp8, which the sweep did not score"):
        run(tmp_path / "other", "profile.choices=[w4a16,mxfp8]", f"profile.scores={folder}")


@pytest.mark.skipif(not __import__("importlib.util").util.find_spec("compressed_tensors"), reason="not installed")
def test_the_mixed_config_names_every_operator_once(planned: tuple[Path, str], tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    run(tmp_path, "profile.choices=[w4a16,w8a8_int,leave]", f"profile.scores={planned[0]}", "profile.values=[7]")
    folder = tmp_path
    content = json.loads((folder / "exports" / "compressed_tensors" / "quantization_config.json").read_text())
    config = QuantizationConfig.model_validate(content)
    assert config.format == "mixed-precision"
    decided = json.loads((folder / "profile.json").read_text())
    targets = [target for group in config.config_groups.values() for target in group.targets]
    assert len(targets) == len(set(targets)) == len(decided["low"])
    assert set(decided["high"]) <= set(config.ignore)
    assert len(config.config_groups) == 2


def test_faults_of_choices_are_told() -> None:
    for override, said in (
        ("profile.choices=[leave]", "leaves nothing to choose"),
        ("profile.values=[4]", "profile.values are budgets of profile.choices"),
    ):
        with pytest.raises(SettingsError, match=said):
            settings_of(override)
    with pytest.raises(SettingsError, match="names 'int3'; allowed"):
        with_choices(settings_of("profile.choices=[int3,leave]"))
    first, further = with_choices(settings_of("profile.choices=[mxfp8,nvfp4,leave]"))
    assert (first.quant.name, [quant.name for quant in further]) == ("mxfp8", ["nvfp4"])
    assert dataclasses.replace(first, quant=settings_of().quant) == settings_of("profile.choices=[mxfp8,nvfp4,leave]")
