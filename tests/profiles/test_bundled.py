"""What profiles are for, on the bundled model: everything INT8 costs answers, and a few operators win them back."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.screen import Screen
from qvl_hydra.tasks import profile
from tests.program import composed


@pytest.mark.slow
def test_our_scores_win_back_what_int8_costs_and_no_baseline_does(tmp_path: Path) -> None:
    settings = composed("experiment=profile_spectrum", "profile.spectrum=[]", "tracking.enabled=false")
    profile.run(settings, RunFolder(tmp_path), Screen(console=Console(quiet=True)))
    found = json.loads((tmp_path / "run.json").read_text())["profile"]
    assert found["evaluation_samples"] == 256
    assert found["exact_match_float"] > 0.95
    assert found["exact_match_float"] - found["exact_match_quantized"] > 0.1
    assert found["share_high"] <= 0.2
    assert found["recovered"] >= 0.9
    assert found["best_baseline_recovered"] < 0.9
    table = pd.read_parquet(tmp_path / "profiles.parquet")
    same = table[table["value"] == settings.profile.value].set_index("chooser")
    assert same["exact_match"].drop("scores").max() < same.loc["scores", "exact_match"]
    assert same["kl"].drop("scores").min() > same.loc["scores", "kl"]
    assert same["n_high"].max() == same.loc["scores", "n_high"]
