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
from rich.console import Console
from scipy.optimize import linprog

from qvl_hydra.entry.compose import scheme_settings, with_choices
from qvl_hydra.errors import ProfileError, SettingsError
from qvl_hydra.families.table import FAMILIES
from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.costs import COSTS, LEAVE, MEASURED_SECONDS
from qvl_hydra.profiles.prices import Terms, lengths_of
from qvl_hydra.profiles.profile import Profile, weight_values
from qvl_hydra.profiles.select import (
    Budget,
    assign,
    cost_of,
    frontier,
    plan_profile,
    prices_of,
    select,
    several,
    size_of,
    undominated,
)
from qvl_hydra.profiles.units import Unit, units_from_scores, units_without
from qvl_hydra.quantization.scheme import Scheme, scheme_from_settings
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.screen import Screen
from qvl_hydra.settings import DeviceSettings, ProfileSettings, Settings, SpaceSettings
from qvl_hydra.tasks import profile, sweep
from tests.program import composed

NAMES = ("nvfp4", "fp8_dynamic")
SCHEMES: dict[str, Scheme] = {name: scheme_from_settings(scheme_settings(name)) for name in NAMES}


def operator(path: str, width: int = 64, group: str | None = None) -> Operator:
    role = path.rsplit(".", 1)[-1]
    return Operator(path, "lm", 0, role, group or path, "Linear", width, width, width * width, "qwen2_5_vl")


TERMS = Terms(SCHEMES)
BITS = COSTS["average_bits"]


def random_units(rng: np.random.Generator, count: int) -> list[Unit]:
    units = []
    for index in range(count):
        op = operator(f"op{index}", 16 * int(rng.integers(1, 5)))
        scores = {"nvfp4": 10 ** rng.uniform(-4, 0), "fp8_dynamic": 10 ** rng.uniform(-6, -1), LEAVE: 0.0}
        if rng.random() < 0.2:
            del scores["nvfp4"]
        units.append(Unit(op.path, (op,), scores))
    return units


@pytest.mark.parametrize("cost", [name for name in COSTS if name != MEASURED_SECONDS])
@pytest.mark.parametrize("seed", range(5))
def test_no_assignment_within_the_budget_loses_less(seed: int, cost: str) -> None:
    rng = np.random.default_rng(seed)
    units = random_units(rng, 7)
    terms = dataclasses.replace(TERMS, device=DEVICE)
    row = COSTS[cost]
    prices, size = prices_of(units, row, terms), size_of(units, row)
    value = float(rng.uniform(*frontier(units, prices, size, 2)))
    plan = assign(units, prices, Budget(cost, value), size)
    spent = sum(own[plan[unit.name]] for unit, own in zip(units, prices, strict=True))
    lost = sum(unit.scores[plan[unit.name]] for unit in units)
    best = min(
        sum(unit.scores[choice] for unit, choice in zip(units, chosen, strict=True))
        for chosen in itertools.product(*(list(unit.scores) for unit in units))
        if sum(own[choice] for own, choice in zip(prices, chosen, strict=True)) <= value * size * (1 + 1e-12)
    )
    assert spent <= value * size * (1 + 1e-9)
    assert lost == pytest.approx(best, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_few_plans_are_the_best_that_differ(seed: int) -> None:
    """Each loses least among all assignments that differ from those before in a tenth of the units."""
    rng = np.random.default_rng(seed)
    units = random_units(rng, 7)
    prices, size = prices_of(units, BITS, TERMS), size_of(units, BITS)
    value = float(rng.uniform(*frontier(units, prices, size, 2)))
    found = several(units, Budget(BITS.name, value), TERMS, 6)
    assert len({decided.key for decided in found}) == len(found)

    def plan_of(profile: Profile) -> list[str]:
        return [LEAVE if u.name in profile.high else profile.scheme_of(u.members[0]).name for u in units]

    options = [undominated(unit, own) for unit, own in zip(units, prices, strict=True)]
    fitting = [
        (sum(unit.scores[choice] for unit, choice in zip(units, chosen, strict=True)), list(chosen))
        for chosen in itertools.product(*options)
        if sum(own[choice] for own, choice in zip(prices, chosen, strict=True)) <= value * size * (1 + 1e-12)
    ]
    taken: list[list[str]] = []
    least = sum(min(unit.scores.values()) for unit in units)
    for decided in found:
        left = [(lost, plan) for lost, plan in fitting if plan not in taken]
        near = 0.01 if taken else 1e-6
        assert decided.predicted == pytest.approx(min(left)[0], rel=1e-6, abs=near * (min(left)[0] - least) + 1e-12)
        taken.append(plan_of(decided))
    assert len(found) == min(6, len(fitting))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("value", [5.5, 8.0])
def test_scores_that_are_nearly_equal_do_not_keep_anybody_waiting(value: float) -> None:
    """600 units and a large head, whose best plan takes hours to prove: seconds, and within 1 % of the bound."""
    rng = np.random.default_rng(1)
    units = []
    for index in range(600):
        op = operator(f"op{index}", 65536 if index == 300 else int(rng.choice([2048, 4096, 6144])))
        score = float(np.exp(0.01 * rng.standard_normal()))
        units.append(Unit(op.path, (op,), {"nvfp4": score, "fp8_dynamic": 0.1 * score, LEAVE: 0.0}))
    found = several(units, Budget(BITS.name, value), TERMS, 3)
    assert len(found) == 3
    assert all(cost_of(plan, BITS, TERMS) <= value * size_of(units, BITS) for plan in found)
    least = relaxed(units, value * size_of(units, BITS))
    assert least <= found[0].predicted < 1.01 * least  # type: ignore[operator]
    assert all(plan.predicted < 1.1 * least for plan in found)  # type: ignore[operator]


def relaxed(units: list[Unit], limit: float) -> float:
    """The lowest sum of scores where units may have parts of choices: no plan has a lower one."""
    prices = prices_of(units, BITS, TERMS)
    columns = [(at, own[name], unit.scores[name]) for at, (unit, own) in enumerate(zip(units, prices, strict=True))
               for name in own]  # fmt: skip
    rows, price, score = map(np.array, zip(*columns, strict=True))
    one_each = (rows == np.arange(len(units))[:, None]).astype(float)
    found = linprog(score, price[None], [limit], one_each, np.ones(len(units)))
    return float(found.fun)


def test_few_units_have_few_plans() -> None:
    op = operator("only")
    units = [Unit("only", (op,), {"nvfp4": 1.0, LEAVE: 0.0})]
    assert [len(p.high) for p in several(units, Budget("average_bits", 16.0), TERMS, 5)] == [1, 0]
    assert [len(p.high) for p in several(units, Budget("average_bits", 5.0), TERMS, 5)] == [0]


@pytest.mark.parametrize("seed", range(5))
def test_no_assignment_within_an_error_keeps_fewer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    units = random_units(rng, 7)
    allowed = float(rng.uniform(0, sum(max(unit.scores.values()) for unit in units)))
    profile = select(units, Budget("error", allowed), TERMS)
    fewest = min(
        sum(choice == LEAVE for choice in chosen)
        for chosen in itertools.product(*(list(unit.scores) for unit in units))
        if sum(unit.scores[choice] for unit, choice in zip(units, chosen, strict=True)) <= allowed
    )
    assert len(profile.high) == fewest
    assert profile.predicted is not None
    assert profile.predicted <= allowed * (1 + 1e-9)


def test_a_choice_that_costs_more_and_loses_more_is_dropped() -> None:
    unit = Unit("a", (operator("a"),), {"x": 1.0, "y": 2.0, LEAVE: 0.0})
    assert undominated(unit, {"x": 4.0, "y": 8.0, LEAVE: 16.0}) == ["x", LEAVE]


def test_the_cheapest_plan_is_the_least_budget() -> None:
    units = random_units(np.random.default_rng(0), 12)
    prices, size = prices_of(units, BITS, TERMS), size_of(units, BITS)
    least, most = frontier(units, prices, size, 2)
    assert set(assign(units, prices, Budget("average_bits", most), size).values()) == {LEAVE}
    with pytest.raises(ProfileError, match="the cheapest plan has") as refused:
        select(units, Budget("average_bits", least * 0.99), TERMS)
    told = float(str(refused.value).split("has ")[1].split(";")[0])
    assert least <= told < least * 1.001
    assert select(units, Budget("average_bits", told), TERMS)
    with pytest.raises(ProfileError, match="the cheapest plan has"):
        select(units, Budget("weight_bytes", 0.0), TERMS)


DEVICE = DeviceSettings("made up", bandwidth_gb_s=1000.0, tera_ops={"bf16": 100.0, "fp8": 200.0})


@pytest.mark.parametrize("scheme", [None, "nvfp4", "fp8_dynamic"])
@pytest.mark.parametrize(("path", "component"), [("a", "lm"), ("lm_head", "lm"), ("v", "vision")])
def test_a_roofline_is_the_longer_of_arithmetic_and_traffic(scheme: str | None, path: str, component: str) -> None:
    lengths = ProfileSettings(prompt_tokens=100, image_tokens=400, answer_tokens=50, requests=4)
    op = dataclasses.replace(operator(path, 1024), component=component)
    terms = Terms(SCHEMES, 16, DEVICE, lengths)
    own = None if scheme is None else SCHEMES[scheme]
    weight = 1024 * 1024 * {None: 16, "nvfp4": 4.5, "fp8_dynamic": 8 + 16 / 1024}[scheme] / 8
    peak = 200e12 if scheme == "fp8_dynamic" else 100e12  # no FP4 on this device: half precision

    def product(tokens: int) -> float:
        return max(2 * tokens * 1024 * 1024 / peak, (weight + 2 * tokens * 2048) / 1e12)

    once = {"a": 500, "lm_head": 1, "v": 1600}[path]
    expected = product(once) + (50 * product(4) / 4 if component == "lm" else 0.0)
    assert COSTS["seconds"].load()(op, own, terms) == pytest.approx(expected)
    moved = weight / 4 if component == "lm" else weight / 50
    assert COSTS["bytes_per_token"].load()(op, own, terms) == pytest.approx(moved)


@pytest.mark.parametrize("cost", ["seconds", "bytes_per_token"])
def test_a_request_without_an_image_costs_no_vision_tower(cost: str) -> None:
    """A model of text alone was priced with a prompt of 1024 image tokens, and zero was refused."""
    vision, language = dataclasses.replace(operator("v", 1024), component="vision"), operator("a", 1024)
    price, image, text = COSTS[cost].load(), ProfileSettings(), ProfileSettings(image_tokens=0)
    assert lengths_of(image, FAMILIES["qwen3_vl"]) == image
    assert lengths_of(image, FAMILIES["llama"]) == text
    with_image, without = (Terms(SCHEMES, 16, DEVICE, lengths) for lengths in (image, text))
    assert price(vision, None, without) == 0 < price(vision, None, with_image)
    less = price(language, None, with_image) - price(language, None, without)
    assert less > 0 if cost == "seconds" else less == 0


def scored(operators: list[Operator], score: float = 1.0) -> pd.DataFrame:
    rows = [(op.path, "scored", score, None) for op in operators]
    return pd.DataFrame(rows, columns=["op", "status", "score", "reason"])


def test_spaces_are_choices_of_some_operators_alone() -> None:
    operators = [operator("a.q_proj", group="a.qkv_proj"), operator("a.k_proj", group="a.qkv_proj"), operator("b")]
    tables = {name: scored(operators) for name in NAMES}
    everything = (*NAMES, LEAVE)

    def choices(*spaces: SpaceSettings) -> dict[str, set[str]]:
        found = units_from_scores(operators, tables, everything, spaces)
        return {unit.name: set(unit.scores) for unit in found}

    assert choices() == {"a.qkv_proj": set(everything), "b": set(everything)}
    assert choices(SpaceSettings("a.*", ["fp8_dynamic"])) == {"a.qkv_proj": {"fp8_dynamic"}, "b": set(everything)}
    both = SpaceSettings("*", ["nvfp4"]), SpaceSettings("b", [LEAVE])
    assert choices(*both) == {"a.qkv_proj": {"nvfp4"}, "b": {LEAVE}}
    with pytest.raises(ProfileError, match=r"'\*q_proj' cuts a\.qkv_proj in two.*leaves out a\.k_proj"):
        choices(SpaceSettings("*q_proj", ["nvfp4"]))
    with pytest.raises(ProfileError, match="'c' matches no operator; a path looks like a.k_proj"):
        choices(SpaceSettings("c", ["nvfp4"]))


def test_a_unit_that_one_operator_of_is_refused_a_choice_takes_another() -> None:
    operators = [operator("a.q_proj", group="a.qkv_proj"), operator("a.k_proj", group="a.qkv_proj"), operator("b")]
    units = units_from_scores(operators, {name: scored(operators) for name in NAMES}, NAMES)

    def refused(op: Operator, choice: str) -> str | None:
        return f"no {choice}" if (op.path == "a.k_proj" and choice == NAMES[0]) or op.path == "b" else None

    first, second = units_without(units, refused)
    assert first.scores == {name: value for name, value in units[0].scores.items() if name != NAMES[0]}
    assert first.reasons == {NAMES[0]: f"no {NAMES[0]}"}
    assert second.scores == {LEAVE: 0.0}
    assert units_without(units, lambda op, choice: None) == units


def test_a_unit_takes_what_it_can_have() -> None:
    operators = [operator("a.q_proj", group="a.qkv_proj"), operator("a.k_proj", group="a.qkv_proj"), operator("b")]

    def table(status: dict[str, str]) -> pd.DataFrame:
        rows = [(op.path, status.get(op.path, "scored"), 1.0, "not offered: odd") for op in operators]
        return pd.DataFrame(rows, columns=["op", "status", "score", "reason"])

    tables = {"nvfp4": table({"a.k_proj": "skipped"}), "fp8_dynamic": table({})}
    first, second = units_from_scores(operators, tables, NAMES)
    assert (first.name, dict(first.scores)) == ("a.qkv_proj", {"fp8_dynamic": 2.0})
    assert "not offered: odd" in first.reasons["nvfp4"]
    assert set(second.scores) == set(NAMES), "leave was not among the choices"
    none = {"nvfp4": table({"b": "failed"}), "fp8_dynamic": table({"b": "failed"})}
    assert dict(units_from_scores(operators, none, NAMES)[1].scores) == {LEAVE: 0.0}
    made = plan_profile([first, second], {"a.qkv_proj": "fp8_dynamic", "b": "nvfp4"}, SCHEMES, 16, "scores")
    assert [made.scheme_of(op).name for op in operators] == ["fp8_dynamic", "fp8_dynamic", "nvfp4"]
    assert made.average_bits == pytest.approx((2 * (8 + 16 / 64) + 4.5) / 3)


def test_a_thousand_units_with_six_choices_are_solved() -> None:
    rng, units, prices = np.random.default_rng(0), [], []
    for index in range(1000):
        op = operator(f"op{index}")
        prices.append({f"c{k}": float(k + 3) * weight_values(op) for k in range(6)})
        units.append(Unit(op.path, (op,), {f"c{k}": float(rng.exponential() * 4.0**-k) for k in range(6)}))
    limit = 5.0 * 1000 * 64 * 64
    plan = assign(units, prices, Budget("average_bits", limit), 1.0)
    assert sum(own[plan[unit.name]] for unit, own in zip(units, prices, strict=True)) <= limit * (1 + 1e-9)


SMALL = [
    "task=profile", "component=lm", "calibration.size=4", "strategy.estimator=sketch", "profile.evaluation_size=6",
    "tracking.enabled=false", "operators.blocks=0-2", "quant=w8a8_int",
    "profile.candidates=4",
]  # fmt: skip


def settings_of(*overrides: str) -> Settings:
    return composed(*SMALL, *overrides)


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
    assert any("best plans of each budget" in note for note in json.loads((folder / "run.json").read_text())["notes"])
    inner = table.iloc[3]
    assert inner["n_w4a16"] > 0
    assert inner["n_w8a8_int"] > 0
    record = json.loads((folder / "run.json").read_text())
    choices = json.loads((folder / "profile.json").read_text())["choices"]
    assert record["profile"]["n_w4a16"] == len(choices["w4a16"]) > 0
    assert "exported: the plan of" in text
    assert "Precision profile" in (folder / "report.html").read_text()


def test_the_report_holds_every_plan_and_its_command(planned: tuple[Path, str]) -> None:
    folder, _ = planned
    table = pd.read_parquet(folder / "profiles.parquet")
    plans = json.loads((folder / "plans.json").read_text())
    by_bits = {round(row["average_bits"], 9): row for row in table.to_dict("records")}
    assert len(plans["plans"]) == len({tuple(plan["of"]) for plan in plans["plans"]}) > 5
    for plan in plans["plans"]:
        row = by_bits[round(plan["average_bits"], 9)]
        counts = [plan["of"].count(place) for place, _ in enumerate(plans["choices"])]
        found = dict(zip(plans["choices"], counts, strict=True))
        assert found["leave"] == row["n_high"]
        assert (found["w4a16"], found["w8a8_int"]) == (row["n_w4a16"], row["n_w8a8_int"])
    exported = json.loads((folder / "profile.json").read_text())
    value = float(exported["budget"].partition("=")[2])
    (own,) = [plan for plan in plans["plans"] if plan["average_bits"] == exported["average_bits"]]
    assert own["budget"]["value"] == pytest.approx(value, rel=1e-5)
    low = [path for path, place in zip(plans["operators"], own["of"], strict=True) if place]
    assert low == exported["low"]
    page = (folder / "report.html").read_text()
    data = page.partition('<script type="application/json" id="plans">')[2].partition("</script>")[0]
    assert f"profile.values=[{own['budget']['value']!r}]" in data
    assert {plan["average_bits"] for plan in json.loads(data)["plans"]} == {p["average_bits"] for p in plans["plans"]}


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
        ("profile.cost=seconds", "is of profile.choices; without take profile.budget=seconds"),
        (
            "profile.budget=average_bits profile.value=6 profile.choices=[nvfp4]",
            r"take profile.cost=average_bits profile.values=\[6\]",
        ),
        ("profile.value=0.2 profile.choices=[nvfp4]", r"take profile.cost=share profile.values=\[0.2\]"),
        ("profile.spectrum=[0,1] profile.choices=[nvfp4]", "profile.spectrum is of one scheme"),
    ):
        with pytest.raises(SettingsError, match=said):
            settings_of(*override.split())
    with pytest.raises(SettingsError, match="names 'int3'; allowed"):
        with_choices(settings_of("profile.choices=[int3,leave]"))
    first, further = with_choices(settings_of("profile.choices=[mxfp8,nvfp4,leave]"))
    assert (first.quant.name, [quant.name for quant in further]) == ("mxfp8", ["nvfp4"])
    assert dataclasses.replace(first, quant=settings_of().quant) == settings_of("profile.choices=[mxfp8,nvfp4,leave]")
