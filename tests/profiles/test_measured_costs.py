"""Costs timed on the machine at hand: what is timed is the product it claims to be, and plans are decided by it."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

from qvl_hydra.entry.compose import scheme_settings, with_choices
from qvl_hydra.errors import ProfileError
from qvl_hydra.profiles import kernels
from qvl_hydra.profiles.costs import COSTS, LEAVE
from qvl_hydra.profiles.prices import Terms
from qvl_hydra.profiles.select import Budget, cost_of, frontier, prices_of, select
from qvl_hydra.profiles.units import Unit
from qvl_hydra.quantization.scheme import scheme_from_settings
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.screen import Screen
from qvl_hydra.settings import Settings
from qvl_hydra.tasks import measure_costs
from qvl_hydra.tasks.measure_costs import reached_by, read_costs
from tests.profiles.test_choices import operator, settings_of

CPU = torch.device("cpu")


def product_of(name: str, inputs: int, outputs: int) -> kernels.Product:
    torch.manual_seed(0)
    return kernels.make_product(scheme_from_settings(scheme_settings(name)), inputs, outputs, CPU, torch.float32)


def test_products_are_those_of_their_weights() -> None:
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (192, 128), dtype=torch.int8).float()
    scales = torch.rand(1, 192)
    found = product_of("w8a8_int", 128, 192)(x)
    expected = x @ weight.T * scales
    assert (found - expected).norm() < 0.01 * expected.norm()  # inputs in 8 bits
    torch.manual_seed(0)
    weight = torch.randn(192, 128)
    found = product_of("fp8_dynamic", 128, 192)(x).float()
    assert (found - x @ weight.T).norm() < 0.06 * (x @ weight.T).norm()  # three bits of mantissa on both sides
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (192, 128), dtype=torch.int8).float()
    scale = torch.rand(192, dtype=torch.bfloat16).float()
    found = product_of("w8a16", 128, 192)(x).float()
    assert (found - x @ weight.T * scale).norm() < 0.01 * (x @ weight.T * scale).norm()
    torch.manual_seed(0)
    values = torch.randint(0, 16, (192, 128), dtype=torch.int32).float() - 8
    groups = torch.rand(4, 192, 2).to(torch.bfloat16).float()
    weight = values.view(192, 4, 32) * groups[..., 0].T[..., None] + groups[..., 1].T[..., None]
    found = product_of("w4a16_g32", 128, 192)(x).float()
    expected = x @ weight.flatten(1).T
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_what_the_machine_has_no_product_for_is_named(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"no product of {name}"):
        product_of(name, 64, 64)


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Path, str]:
    folder, text = tmp_path_factory.mktemp("timed"), io.StringIO()
    overrides = ["task=measure_costs", "operators.blocks=null", "profile.choices=[w4a16_g32,w8a8_int,nvfp4,leave]"]
    settings, further = with_choices(settings_of(*overrides))
    measure_costs.run(settings, RunFolder(folder), Screen(console=Console(file=text, width=200)), further)
    return settings, folder, text.getvalue()


def test_every_product_of_the_model_is_timed(timed: tuple[Settings, Path, str]) -> None:
    settings, folder, text = timed
    table = pd.read_parquet(folder / "costs.parquet")
    assert (table["seconds"] > 0).all()
    assert set(table["choice"]) == {"w4a16_g32", "w8a8_int", LEAVE}
    assert "no product in nvfp4: PyTorch has no product of nvfp4" in text
    asked = settings.profile
    assert set(table["tokens"]) == {1, asked.prompt_tokens + asked.image_tokens}
    assert not table.duplicated(["in_features", "out_features", "choice", "tokens"]).any()
    run = json.loads((folder / "run.json").read_text())
    assert (run["task"], run["costs"]["products"]) == ("measure_costs", len(table))
    assert "profile.cost=measured_seconds" in text


def test_plans_are_decided_by_what_was_timed(timed: tuple[Settings, Path, str]) -> None:
    settings, folder, _ = timed
    names = ("w4a16_g32", "w8a8_int")
    schemes = {name: scheme_from_settings(scheme_settings(name)) for name in names}
    terms = Terms(schemes, lengths=settings.profile, measured=read_costs(str(folder)))
    table = pd.read_parquet(folder / "costs.parquet")
    blocks = table[table["tokens"] > 1][["in_features", "out_features"]].drop_duplicates().itertuples(index=False)
    ops = [dataclasses.replace(operator(f"op{k}"), in_features=i, out_features=o) for k, (i, o) in enumerate(blocks)]
    assert len(ops) > 2
    units = [Unit(op.path, (op,), {"w4a16_g32": 3.0 + k, "w8a8_int": 1.0, LEAVE: 0.0}) for k, op in enumerate(ops)]
    cost = COSTS["measured_seconds"]
    prices = prices_of(units, cost, terms)
    for value in frontier(units, prices, 1.0, 4):
        profile = select(units, Budget(cost.name, value), terms)
        assert cost_of(profile, cost, terms) <= value * (1 + 1e-9)
    strange = dataclasses.replace(ops[0], in_features=77)
    with pytest.raises(ProfileError, match=r"no product of 77 to .* run task=measure_costs"):
        cost.load()(strange, None, terms)


def test_a_folder_without_costs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no costs.parquet there"):
        read_costs(str(tmp_path))


def test_what_a_machine_reaches_is_typical_and_not_the_most() -> None:
    shape = {"in_features": 64, "out_features": 64}
    rows = [
        {**shape, "choice": LEAVE, "tokens": 1, "rate": "bf16", "tera_ops": 0.1, "gb_s": 20.0},
        {**shape, "choice": LEAVE, "tokens": 512, "rate": "bf16", "tera_ops": 4.0, "gb_s": 1.0},
        {**shape, "choice": "w8a8_int", "tokens": 1, "rate": "int8", "tera_ops": 0.1, "gb_s": 30.0},
        {**shape, "choice": "w8a8_int", "tokens": 512, "rate": "int8", "tera_ops": 9.0, "gb_s": 1.0},
    ]
    found = reached_by(pd.DataFrame(rows))
    assert found.bandwidth_gb_s == 25.0
    assert found.tera_ops == {"bf16": 4.0, "int8": 9.0}
