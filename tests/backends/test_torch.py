"""The native engine as a whole: estimators, several schemes, resumption, failures, streamed placement, devices."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from benchmarks.jobs import SCHEMES, Silent, make_job, with_strategy
from qvl_hydra.backends import torch as native
from qvl_hydra.blockwise.plain_forward import plain_forward
from qvl_hydra.blockwise.ranges import walk
from qvl_hydra.blockwise.walker import Walker
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import EngineError
from qvl_hydra.estimators import auto, bench, exact_run, groups, sketch_run
from qvl_hydra.estimators.first_order import OperatorChange
from qvl_hydra.estimators.job import EngineReport, SweepJob
from qvl_hydra.models.load import LoadedModel, describe_model, load_model
from qvl_hydra.operators.discover import Operator
from qvl_hydra.quantization.qdq import OperatorQuantizer
from qvl_hydra.runs.folder import RunFolder, SampleScore
from qvl_hydra.scores.shrink import ORIGINS
from tests.conftest import DEVICES, load_tiny

APART = ["signed", *ORIGINS]  # effects of few tokens, whose sums round


def scores(job: SweepJob, path: Path) -> tuple[pd.DataFrame, EngineReport, RunFolder]:
    folder = RunFolder(path)
    report = native.run(job, folder, Silent())
    return folder.frame(), report, folder


@pytest.fixture
def job(tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...]) -> SweepJob:
    return make_job(tiny_model, tiny_samples[:3], SCHEMES["w8a8_static"], estimator="auto", probes=2)


def text_alone() -> Sample:
    """A sample without an image."""
    ids = torch.tensor([5, 6, 7, 8])
    return Sample("text", ids, torch.arange(4).expand(3, -1), ids, None, None)


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


class FragileFolder(RunFolder):
    """A folder whose process dies after so many writes."""

    def __init__(self, path: Path, writes: int) -> None:
        super().__init__(path)
        self.left = writes

    def write(self, unit: str, scores: Sequence[SampleScore]) -> None:  # type: ignore[override]
        if self.left == 0:
            raise Killed
        self.left -= 1
        super().write(unit, scores)


@pytest.mark.parametrize("writes", [1, 4, 9, 11])
def test_a_killed_run_goes_on_and_ends_the_same_bit_for_bit(job: SweepJob, tmp_path: Path, writes: int) -> None:
    undisturbed, _, _ = scores(job, tmp_path / "whole")
    with pytest.raises(Killed):
        native.run(job, FragileFolder(tmp_path / "killed", writes), Silent())
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed/parts").glob("*.parquet")}
    assert len(before) == writes
    resumed, _, folder = scores(job, tmp_path / "killed")
    after = {path.name: path.stat().st_mtime_ns for path in folder.parts.glob("*.parquet")}
    assert {name: after[name] for name in before} == before, "finished units are not computed again"
    pd.testing.assert_frame_equal(resumed, undisturbed, check_exact=True)
    assert not list(folder.parts.glob("*.safetensors")), "states of a finished run are taken away"


def test_a_race_killed_in_any_round_goes_on_as_it_would_have(job: SweepJob, tmp_path: Path) -> None:
    strict = with_strategy(job, missed=0.001)
    undisturbed, _, whole = scores(strict, tmp_path / "whole")
    rounds = {path.name.split("-")[0] for path in whole.parts.glob("exact*.parquet")}
    assert len(rounds) >= 2, "a race of several rounds"
    parts = len(list(whole.parts.glob("*.parquet")))
    for writes in range(parts - 3 * len(rounds) + 1, parts):
        path = tmp_path / str(writes)
        with pytest.raises(Killed):
            native.run(strict, FragileFolder(path, writes), Silent())
        resumed, _, _ = scores(strict, path)
        pd.testing.assert_frame_equal(resumed, undisturbed, check_exact=True)


def test_auto_measures_what_decides_exactly(job: SweepJob, tmp_path: Path) -> None:
    frame, report, folder = scores(job, tmp_path)
    squared = frame[frame["metric"] == "squared_error"]
    means = squared.groupby(["estimator", "op"])["value"].mean()
    sketch, exact = means["sketch"], means["exact"]
    assert set(sketch.index) == {op.path for op in job.operators}
    assert set(sketch.sort_values(ascending=False).head(auto.FIRST).index) <= set(exact.index)
    controls = folder.recall(auto.CONTROLS)["w8a8_static"]
    assert set(controls) <= set(exact.index)
    assert report.details["exact_operators"] == len(exact) < len(sketch) / 2
    assert report.details["agreement"] == pytest.approx(spearmanr(exact[controls], sketch[controls]).statistic)
    assert report.details["expected_wrong_in_top_k"] <= job.strategy.missed
    everything, _, _ = scores(
        dataclasses.replace(job, strategy=dataclasses.replace(job.strategy, estimator="exact")), tmp_path / "all"
    )
    truth = everything[everything["metric"] == "squared_error"].groupby("op")["value"].mean()
    k = report.details["top_k"]
    factor = (exact[controls] / sketch[controls]).median()
    found = (sketch * factor).where(~sketch.index.isin(exact.index), exact.reindex(sketch.index))
    assert len(set(found.nlargest(k).index) & set(truth.nlargest(k).index)) >= k - 1
    for op, value in exact.items():
        assert value == pytest.approx(truth[op], rel=1e-4)


def test_the_race_goes_on_where_the_sketch_is_wrong() -> None:
    sketched = {f"op{index:02d}": 2.0**-index for index in range(20)}
    sure = {name: value * 3 for name, value in list(sketched.items())[::3]}
    assert sum(auto.wrong_side(sketched, sure, 6).values()) < 0.01
    noise = {name: value * 3 * (4.0 if index % 2 else 0.25) for index, (name, value) in enumerate(sure.items())}
    unsure = auto.wrong_side(sketched, {name: value / sure[name] * sure[name] for name, value in noise.items()}, 6)
    assert sum(unsure.values()) > 1
    assert max(unsure, key=unsure.__getitem__) in {"op04", "op05", "op07", "op08"}, "beside the border"
    assert auto.wrong_side(sketched, dict.fromkeys(sketched, 1.0), 6) == {}


def test_low_agreement_is_told(job: SweepJob, tmp_path: Path) -> None:
    _, report, _ = scores(job, tmp_path)
    (note,) = auto.doubts(report.details, warn=1.1)
    assert note.startswith("warning: sketch and exact")
    assert f"{report.details['agreement']:.2f} on the {report.details['control_operators']} operators" in note
    assert auto.doubts(report.details, warn=-1.0) == []
    assert auto.doubts({}, warn=1.0) == []


def test_each_scheme_has_its_own_race(job: SweepJob, tmp_path: Path) -> None:
    """The operators that decide in one scheme are not those that decide in another."""
    both = dataclasses.replace(job, schemes=(SCHEMES["w8a8_static"], SCHEMES["w4a16"]))
    frame, _, _ = scores(both, tmp_path / "both")
    for scheme in both.schemes:
        alone, _, _ = scores(dataclasses.replace(job, schemes=(scheme,)), tmp_path / scheme.name)
        chosen = [
            set(found.loc[(found["estimator"] == "exact") & (found["scheme"] == scheme.name), "op"])
            for found in (frame, alone)
        ]
        assert chosen[0] == chosen[1]


class Stages:
    """A progress bar that keeps what each stage had to do and did."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.left: list[float] = []

    def total(self, steps: float, label: str) -> None:
        self.labels.append(label)
        self.left.append(steps)

    def step(self, steps: float = 1) -> None:
        self.left[-1] -= steps


@pytest.mark.parametrize("estimator", ["auto", "sketch", "exact", "gradient"])
def test_the_bar_names_each_stage_and_is_full_at_its_end(job: SweepJob, tmp_path: Path, estimator: str) -> None:
    strategy = dataclasses.replace(job.strategy, estimator=estimator, metric="kl")
    job = dataclasses.replace(job, strategy=strategy, schemes=(SCHEMES["w8a8_static"], SCHEMES["w4a16"]))
    for _ in range(2):  # the second finds all on disk; its ranges need no walk
        bar = Stages()
        native.run(job, RunFolder(tmp_path), bar)
        assert bar.left == pytest.approx([0.0] * len(bar.left), abs=1e-9)
        assert len(bar.left) > 1
    exact = [label for label in bar.labels if label.startswith("exact scores of")]
    assert all(any(label.endswith(f" in {scheme.name}") for label in exact) == bool(exact) for scheme in job.schemes)
    assert bool(exact) == (estimator in ("auto", "exact"))


def test_several_schemes_share_a_run(job: SweepJob, tmp_path: Path) -> None:
    sketch = dataclasses.replace(job, strategy=dataclasses.replace(job.strategy, estimator="sketch"))
    schemes = (SCHEMES["w8a8_static"], SCHEMES["w4a16"])
    together, _, _ = scores(dataclasses.replace(sketch, schemes=schemes), tmp_path / "both")
    for scheme in schemes:
        alone, _, _ = scores(dataclasses.replace(sketch, schemes=(scheme,)), tmp_path / scheme.name)
        part = together[together["scheme"] == scheme.name].sort_values(["op", "sample", "probe"], ignore_index=True)
        expected = alone.sort_values(["op", "sample", "probe"], ignore_index=True)
        pd.testing.assert_frame_equal(part, expected, check_exact=True)


def test_fused_groups_get_one_score(job: SweepJob, tmp_path: Path) -> None:
    fused = dataclasses.replace(job, fuse=True)
    frame, _, _ = scores(fused, tmp_path)
    means = frame[frame["metric"] == "squared_error"].groupby(["estimator", "op"])["value"].mean()
    assert set(means["sketch"].index) == {op.group for op in job.operators}
    shared = means["exact"].index
    assert spearmanr(means["exact"], means["sketch"][shared]).statistic > 0.85


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_a_value_that_is_not_finite_fails_its_operator_only(
    job: SweepJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    broken = job.operators[10].path
    quantizer, change = bench.make_quantizer, sketch_run._change

    def spoiled_quantizer(module: Any, path: str, *rest: Any) -> OperatorQuantizer:
        made = quantizer(module, path, *rest)
        assert made.weight is not None
        return dataclasses.replace(made, weight=made.weight * torch.nan) if path == broken else made

    def spoiled_change(made_for: Any, op: Operator, scheme: Any) -> OperatorChange:
        made = change(made_for, op, scheme)
        assert made.weight is not None
        return dataclasses.replace(made, weight=made.weight * torch.nan) if op.path == broken else made

    monkeypatch.setattr(bench, "make_quantizer", spoiled_quantizer)
    monkeypatch.setattr(sketch_run, "_change", spoiled_change)
    made = dataclasses.replace(job, strategy=dataclasses.replace(job.strategy, estimator=estimator))
    frame, _, folder = scores(made, tmp_path)
    assert set(folder.endings()) == {broken}
    assert "nan" in folder.endings()[broken][1]
    assert set(frame["op"]) == {op.path for op in job.operators} - {broken}
    assert frame["value"].map(pd.notna).all()


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
@pytest.mark.parametrize("component", ["lm", "full"])
def test_streamed_equals_resident(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], tmp_path: Path, component: str, estimator: str
) -> None:
    streamed = load_tiny(placement="streamed")
    assert all(parameter.is_meta for parameter in streamed.module.parameters())
    found = []
    for model in (tiny_model, streamed):
        job = make_job(model, tiny_samples[:2], SCHEMES["w8a8_static"], component, estimator=estimator, probes=2)
        found.append(scores(job, tmp_path / model.description.settings.placement)[0])
    pd.testing.assert_frame_equal(found[0], found[1], check_exact=True)
    assert all(parameter.is_meta for parameter in streamed.module.parameters())


@pytest.mark.parametrize(("size", "ends"), [(1, [[0, 1], [1, 2], [2, 3]]), (2, [[0, 2], [2, 3]])])
def test_samples_in_several_groups_score_alike(
    job: SweepJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, ends: list[list[int]]
) -> None:
    sketch = dataclasses.replace(job, strategy=dataclasses.replace(job.strategy, estimator="sketch"))
    together, _, _ = scores(sketch, tmp_path / "one")
    monkeypatch.setattr(groups, "fitting", lambda _, sizes, **__: min(size, len(sizes)))
    apart, _, folder = scores(sketch, tmp_path / "many")
    assert folder.recall(groups.GROUPS) == ends
    keys = ["op", "sample", "probe"]
    apart, together = (f.sort_values(keys, ignore_index=True).drop(columns=APART) for f in (apart, together))
    pd.testing.assert_frame_equal(apart, together, rtol=1e-4)


@pytest.mark.parametrize("component", ["lm", "full"])
def test_a_kept_reference_changes_no_score(
    job: SweepJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, component: str
) -> None:
    """But by what float32 rounds, where a processor's products depend on how many rows there are.

    The samples have images, but for the last.
    """
    text = text_alone()
    job = make_job(job.model, (*job.scored[:2], text), job.scheme, component, estimator="auto", probes=1)
    found = [scores(job, tmp_path / "known")[0]]
    monkeypatch.setattr(auto, "reference_states", lambda _: None)
    found.append(scores(job, tmp_path / "kept")[0])
    monkeypatch.setattr(exact_run, "fitting", lambda *_, **__: 0)
    walked: list[str] = []
    weights = Walker.weights
    monkeypatch.setattr(Walker, "weights", lambda walker, segment: walked.append("") or weights(walker, segment))
    found.append(scores(job, tmp_path / "walked")[0])
    for frame in found[1:]:
        pd.testing.assert_frame_equal(found[0], frame, rtol=2e-3, atol=3e-7)
    again = len(walked)
    walked.clear()
    monkeypatch.undo()
    monkeypatch.setattr(Walker, "weights", lambda walker, segment: walked.append("") or weights(walker, segment))
    scores(job, tmp_path / "counted")
    assert len(walked) < again


@pytest.mark.parametrize("direction", ["requantize", "fallback"])
def test_samples_that_pass_over_every_operator_lose_nothing(job: SweepJob, tmp_path: Path, direction: str) -> None:
    text = text_alone()
    job = make_job(job.model, (job.scored[0], text), job.scheme, "full", estimator="exact", direction=direction)
    job = dataclasses.replace(job, operators=tuple(op for op in job.operators if op.component == "vision")[:3])
    frame, _, _ = scores(job, tmp_path)
    by_sample = {str(name): part["value"] for name, part in frame.groupby("sample")}
    assert (by_sample["text"] == 0).all()
    assert (by_sample[job.scored[0].id] != 0).any()


def test_groups_hold_what_fits_of_samples_of_any_size(
    job: SweepJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "free_memory_bytes", lambda: 40)
    folder = RunFolder(tmp_path)
    assert groups.groups(job, folder, [7, 1, 1, 1, 9, 12, 5], 3) == [(3, 7), (7, 8), (8, 9), (9, 10)]
    monkeypatch.setattr(groups, "free_memory_bytes", lambda: 400)
    assert groups.groups(job, folder, [1] * 9, 3)[3:] == [(9, 10), (10, 12)], "what was begun stays"


@pytest.mark.parametrize("component", ["lm", "full"])
def test_a_plain_forward_tells_what_a_walk_keeps(job: SweepJob, component: str) -> None:
    walker = Walker(job.model, component)
    contexts = walker.contexts([*job.scored, text_alone()])
    starts = walker.starts(contexts)
    found = plain_forward(walker, contexts, starts)
    _, states = walk(walker, contexts, starts, (), (), lambda: None, keep=slice(len(contexts)))
    assert found.state_bytes == [sum(state.nbytes for state in kept) for kept in states]
    assert len(found.shares) == len(walker.segments)
    assert sum(found.shares) == pytest.approx(1)


@pytest.mark.parametrize("component", ["lm", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_bar_comes_to_its_end(
    tiny_samples: tuple[Sample, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, component: str, dtype: str
) -> None:
    """In several groups, and once more where a killed run had come to some place."""
    monkeypatch.setattr(groups, "fitting", lambda _, sizes, **__: 2)
    job = make_job(load_tiny(dtype=dtype), tiny_samples[:3], SCHEMES["w8a8_static"], component, estimator="auto")
    with pytest.raises(Killed):
        native.run(job, FragileFolder(tmp_path, 9), Silent())
    for _ in range(2):
        bar = Stages()
        native.run(job, RunFolder(tmp_path), bar)
        assert bar.labels[:2] == ["preparing", f"sketch of {len(job.operators)} operators"]
        assert bar.left == pytest.approx([0.0] * len(bar.left), abs=1e-9)


def test_the_timed_forward_keeps_no_logits(job: SweepJob) -> None:
    walker = Walker(job.model, "lm")
    contexts = walker.contexts(job.scored)
    logits: list[weakref.ref[torch.Tensor]] = []
    kept: list[int] = []

    def look(_: object, __: object, output: torch.Tensor) -> None:
        kept.append(sum(found() is not None for found in logits))
        logits.append(weakref.ref(output))

    with job.model.module.get_submodule("lm_head").register_forward_hook(look):
        plain_forward(walker, contexts, walker.starts(contexts))
    assert len(kept) > len(job.scored)
    assert max(kept) <= 1


def test_text_alone_does_not_reach_the_vision_tower(tiny_model: LoadedModel, tmp_path: Path) -> None:
    text = text_alone()
    with pytest.raises(EngineError, match="image"):
        scores(make_job(tiny_model, (text,), SCHEMES["w8a8_static"], "vision"), tmp_path / "vision")
    _, _, folder = scores(make_job(tiny_model, (text,), SCHEMES["w8a8_static"], "full"), tmp_path / "full")
    endings = folder.endings()
    assert endings
    assert all(status == "skipped" and op.startswith("model.visual.") for op, (status, _) in endings.items())


@pytest.mark.parametrize(
    "strategy",
    [
        {"estimator": "exact"}, {"estimator": "sketch"}, {"estimator": "auto"}, {"direction": "fallback"},
        {"estimator": "gradient"}, {"name": "hawq_v2"}, {"name": "hawq_v2", "curvature": "hessian", "probes": 8},
    ],
    ids=str,
)  # fmt: skip
def test_where_nothing_is_finite_every_operator_fails_and_the_run_ends(
    tiny_samples: tuple[Sample, ...], tmp_path: Path, strategy: dict[str, Any]
) -> None:
    model = load_tiny()
    model.module.get_submodule("model.language_model.embed_tokens").weight.fill_(torch.nan)
    job = make_job(model, tiny_samples[:2], SCHEMES["w8a8_static"])
    job = dataclasses.replace(job, strategy=dataclasses.replace(job.strategy, **strategy))
    frame, report, folder = scores(job, tmp_path)
    assert frame.empty
    assert {status for status, _ in folder.endings().values()} == {"failed"}
    assert len(folder.endings()) == len(job.operators)
    assert all("not finite" in note for note in report.notes)


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
@pytest.mark.parametrize("device", DEVICES)
def test_runs_on_each_device_and_ranks_alike(
    job: SweepJob, tiny_samples: tuple[Sample, ...], tmp_path: Path, device: str, estimator: str
) -> None:
    settings = job.model.description.settings
    other = load_model(describe_model(settings), torch.device(device), 0)
    found = []
    for model in (job.model, other):
        made = make_job(model, tiny_samples[:3], SCHEMES["w8a8_static"], "full", estimator=estimator)
        frame, _, _ = scores(made, tmp_path / f"{model.device}-{id(model)}")
        found.append(frame[frame["metric"] == "squared_error"].groupby("op")["value"].mean())
    assert spearmanr(found[0], found[1][found[0].index]).statistic > 0.99


def test_bfloat16_ranks_much_like_float32(job: SweepJob, tiny_samples: tuple[Sample, ...], tmp_path: Path) -> None:
    half = load_tiny(dtype="bfloat16")
    found = []
    for name, model in (("float32", job.model), ("bfloat16", half)):
        made = make_job(model, tiny_samples[:3], SCHEMES["w8a8_static"], "lm", estimator="sketch", probes=8)
        frame, _, _ = scores(made, tmp_path / name)
        found.append(frame.groupby("op")["value"].mean())
    assert spearmanr(found[0], found[1][found[0].index]).statistic > 0.9
