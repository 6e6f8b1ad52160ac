"""Models in bfloat16: products of what differs, against a walk that is in float32 throughout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks.jobs import SCHEMES, Silent, bundled_samples, make_job
from qvl_hydra.backends import torch as native
from qvl_hydra.blockwise.differences import by_difference, by_expert
from qvl_hydra.estimators import exact_run
from qvl_hydra.estimators.job import SweepJob
from qvl_hydra.families.experts import ExpertProduct
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles import measure
from qvl_hydra.profiles.apply import Quantizers
from qvl_hydra.profiles.measure import Measurement, measure_profiles
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.runs.folder import RunFolder
from tests.conftest import load_tiny
from tests.families.shapes import SHAPES, load_made_up, made_up_checkpoint, samples_of


def scores(job: SweepJob, path: Path) -> pd.DataFrame:
    folder = RunFolder(path)
    native.run(job, folder, Silent())
    return folder.frame()


@pytest.mark.parametrize(
    ("name", "component", "scheme", "metric"),
    [
        ("tiny_qwen2_5_vl", "full", "w8a8_static", "kl"),
        ("tiny_qwen3_vl", "full", "w8a8_dynamic", "squared_error"),
        ("tiny_qwen2_vl", "vision", "inc_static", "squared_error"),
        ("tiny_qwen2_5_vl", "lm", "w4a16", "squared_error"),
    ],
)
def test_an_effect_loses_some_thousandths_of_itself(
    name: str, component: str, scheme: str, metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_tiny(name, dtype="bfloat16")
    job = make_job(model, bundled_samples(model, 2), SCHEMES[scheme], component, estimator="exact", metric=metric)
    job = dataclasses.replace(job, operators=job.operators[::3], fuse=component == "lm")
    found = scores(job, tmp_path / "differences").set_index(["op", "sample", "metric"])["value"]
    monkeypatch.setattr(exact_run, "by_difference", lambda *_: [])
    whole = scores(job, tmp_path / "float32").set_index(["op", "sample", "metric"])["value"]
    off = (found / whole).loc[:, :, metric].sub(1).abs()
    assert 0 < off.median() < 0.005
    assert off.max() < 0.05


@pytest.mark.parametrize("name", SHAPES)
def test_every_family_walks_so_and_what_is_kept_changes_no_score(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float32 throughout; and bit for bit: references kept, walked again, and of a model that is streamed."""
    folder = made_up_checkpoint(name, tmp_path / "model")

    def found(tag: str, placement: str = "resident") -> pd.Series:
        model = load_made_up(folder, dtype="bfloat16", placement=placement)
        component = "full" if model.family.visual else "lm"
        job = make_job(model, samples_of(folder), SCHEMES["w8a8_static"], component, estimator="exact", metric="kl")
        job = dataclasses.replace(job, schemes=(SCHEMES["w8a8_static"], SCHEMES["w4a16"]))  # several: states are kept
        return scores(job, tmp_path / tag).set_index(["op", "sample", "metric", "scheme"])["value"].sort_index()

    kept, streamed = found("kept"), found("streamed", "streamed")
    monkeypatch.setattr(exact_run, "fitting", lambda *_, **__: 0)
    walked = found("walked")
    monkeypatch.setattr(exact_run, "by_difference", lambda *_: [])
    whole = found("float32")
    pd.testing.assert_series_equal(kept, walked, check_exact=True)
    pd.testing.assert_series_equal(kept, streamed, check_exact=True)
    ratio = (kept / whole).loc[:, :, "kl"].dropna()  # a sample without an image loses nothing in the vision tower
    assert len(ratio) > len(kept) / 20
    assert 0 < ratio.sub(1).abs().median() < 0.01
    assert ratio.sub(1).abs().max() < 0.2


@pytest.mark.parametrize("name", SHAPES)
def test_profiles_of_every_family_walk_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of two schemes, bit for bit streamed, and against float32 throughout; of weights alone, as inputs flip."""
    folder = made_up_checkpoint(name, tmp_path / "model")
    schemes = [SCHEMES["w4a16"], SCHEMES["w8a16"]]

    def found(placement: str = "resident") -> list[Measurement]:
        model = load_made_up(folder, dtype="bfloat16", placement=placement)
        component = "full" if model.family.visual else "lm"
        operators, samples = tuple(find_operators(model.module, component)), samples_of(folder)
        high = [frozenset(op.path for op in operators[shift::3]) for shift in range(3)]
        others = {op.path: schemes[1] for op in operators[::2]}
        plans = [Profile(schemes[0], operators, kept, 16, "test", others=others) for kept in high]
        quantizers = Quantizers(model, operators, samples, component, schemes)
        return measure_profiles(model, plans, quantizers, samples, component)

    own = found()
    assert own == found("streamed")
    monkeypatch.setattr(measure, "by_difference", lambda *_: [])
    whole = found()
    assert own != whole
    for one, other in zip(own, whole, strict=True):
        assert vars(one) == pytest.approx(vars(other), rel=0.05)


def test_a_race_in_rounds_walks_kept_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_tiny(dtype="bfloat16")
    job = make_job(model, bundled_samples(model, 2), SCHEMES["w8a8_static"], estimator="auto", missed=0.01)
    kept = scores(job, tmp_path / "kept")
    monkeypatch.setattr(exact_run, "fitting", lambda *_, **__: 1)
    pd.testing.assert_frame_equal(kept, scores(job, tmp_path / "one_kept"), check_exact=True)


def test_a_slot_is_compared_with_what_the_reference_gave_the_same_expert() -> None:
    """In whatever order a token's experts come; with nothing where the reference's token goes elsewhere."""
    torch.manual_seed(0)
    module = ExpertProduct(torch.randn(4, 3, 5), active=2)
    reference = torch.stack([torch.randperm(4)[:2] for _ in range(6)])
    copies = torch.stack([torch.stack([torch.randperm(4)[:2] for _ in range(6)]) for _ in range(3)])
    given, gave = torch.randn(12, 5), torch.randn(12, 3)
    module.chosen = copies.flatten()
    seen = by_expert(module, reference.flatten(), given, gave)
    slots = [(expert, token) for copy in copies for token, experts in enumerate(copy.tolist()) for expert in experts]
    for at, (expert, token) in enumerate(slots):
        of_token = reference[token].tolist()
        for values, own in zip((given, gave), seen, strict=True):
            here = values[2 * token + of_token.index(expert)] if expert in of_token else torch.zeros(values.shape[1])
            assert torch.equal(own[at], here)
    module.chosen = reference.flatten().repeat(3)
    assert by_expert(module, reference.flatten(), given, gave)[0] is given, "nothing to gather"


def test_what_is_walked_in_float32() -> None:
    operators = find_operators(load_tiny().module, "full")
    assert len(by_difference(operators, torch.bfloat16)) == len(operators) - 1, "but for the convolution"
    assert not by_difference(operators, torch.float32)
    assert not by_difference(operators, torch.float16)
