"""docs/notebook.md, executed; and what `read` refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pandas as pd
import pytest

import qvl_hydra
from qvl_hydra.errors import QvlHydraError
from qvl_hydra.settings import TrackingSettings
from qvl_hydra.tracking.content import PROFILE_CURVES
from qvl_hydra.tracking.record import open_run, send_run
from tests.made_up_runs import write_run
from tests.program import with_store

PAGE = Path(__file__).parents[1] / "docs" / "notebook.md"


def test_the_page_runs(tmp_path: Path) -> None:
    matplotlib.use("agg")
    one, other = (write_run(tmp_path / name, seed=seed) for name, seed in (("one", 0), ("other", 1)))
    pd.DataFrame(
        {"chooser": ["scores", "random-0", "scores"], "average_bits": [16.0, 8.0, 5.0], "kl_answer": [1e-9, 0.5, 0.1]}
    ).to_parquet(one / "profiles.parquet")
    names: dict[str, object] = {"one": one, "other": other, "planned": one}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)  # the page's own examples
    run, change, front = names["run"], names["change"], names["front"]
    assert isinstance(run, qvl_hydra.Run)
    assert list(run.scores["op"]) == list(pd.read_parquet(one / "scores.parquet")["op"])
    assert run.profile == {}
    assert isinstance(change, pd.Series)
    assert change.abs().max() > 0
    assert isinstance(front, pd.DataFrame)
    assert list(front["average_bits"]) == [5.0, 16.0]


def test_schemes_stand_one_below_the_other(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", seed=0)
    table = pd.read_parquet(folder / "scores.parquet")
    table.assign(score=table["score"] * 2).to_parquet(folder / "scores_w4a16.parquet")
    found = qvl_hydra.read(folder).scores
    assert found is not None
    assert len(found) == 2 * len(table)
    by_scheme = dict(list(found.groupby("scheme")["score"].sum().items()))
    assert by_scheme.pop("w4a16") == pytest.approx(2 * next(iter(by_scheme.values())))


def test_a_tracked_run_is_read_as_its_folder_is(tmp_path: Path) -> None:
    settings = TrackingSettings(f"sqlite:///{with_store(tmp_path / 'store')}/mlflow.db")
    folder = write_run(tmp_path / "run", seed=0)
    measured = pd.DataFrame({"chooser": ["scores"], "n_high": [3]} | {curve: [0.1] for curve in PROFILE_CURVES})
    measured.to_parquet(folder / "profiles.parquet")
    plan = {"budget": "share=0.1", "scheme": "w4a16", "n_operators": 9, "n_high": 3, "average_bits": 8.0, "high": []}
    (folder / "profile.json").write_text(json.dumps(plan))
    open_run(settings, folder, name="run", tags={}, sweep=None)
    found, own = qvl_hydra.read(send_run(folder, settings), settings.uri), qvl_hydra.read(folder)
    assert (found.record, found.settings, found.profile) == (own.record, own.settings, own.profile)
    for name in ("scores", "sample_scores", "profiles"):
        pd.testing.assert_frame_equal(getattr(found, name), getattr(own, name))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QvlHydraError, match=r"no run\.json"):
        qvl_hydra.read(tmp_path)
    with pytest.raises(QvlHydraError, match="neither a folder nor a run"):
        qvl_hydra.read("0" * 32, uri=f"sqlite:///{tmp_path / 'x.db'}")
    folder = write_run(tmp_path / "run", seed=0)
    (folder / "scores.parquet").write_bytes(b"torn")
    with pytest.raises(QvlHydraError, match=r"scores\.parquet"):
        qvl_hydra.read(folder)


def test_the_package_alone_imports_nothing_heavy() -> None:
    said = "import sys, qvl_hydra; print(sorted({'torch', 'mlflow', 'pandas'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
