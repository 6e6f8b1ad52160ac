"""Every deployed scheme by sketch and exact; operators that a format cannot take; fused operators' tensor scale."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from benchmarks.jobs import Silent, make_job
from qvl_hydra.backends import torch as native
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.entry.compose import scheme_settings
from qvl_hydra.models.forward import reference_output
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.quantization.apply import make_quantizer, observe_ranges, quantized
from qvl_hydra.quantization.formats.table import not_offered
from qvl_hydra.quantization.qdq import largest_value
from qvl_hydra.quantization.scheme import Scheme, scheme_from_settings
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.scores.table import Scored, score_table

NAMES = ("fp8", "fp8_dynamic", "fp8_block", "nvfp4", "mxfp4", "mxfp8", "w8a8_int")


def scheme(name: str) -> Scheme:
    return scheme_from_settings(scheme_settings(name))


def means(frame: pd.DataFrame, estimator: str) -> dict[str, pd.Series]:
    """By scheme."""
    part = frame[(frame["metric"] == "squared_error") & (frame["estimator"] == estimator)]
    return {str(name): own.groupby("op")["value"].mean() for name, own in part.groupby("scheme")}


@pytest.fixture(scope="module")
def scored(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, pd.DataFrame]:
    """All schemes in one run, by each estimator."""
    found = {}
    for estimator in ("sketch", "exact"):
        job = make_job(tiny_model, tiny_samples[:4], scheme("fp8"), "full", estimator=estimator, probes=4)
        job = dataclasses.replace(job, schemes=tuple(map(scheme, NAMES)))
        folder = RunFolder(tmp_path_factory.mktemp(estimator))
        native.run(job, folder, Silent())
        found[estimator] = folder.frame()
    return found


# First-order effects of 4 bits are far from all there is.
@pytest.mark.parametrize(("name", "least"), [(name, 0.85 if "fp4" in name else 0.95) for name in NAMES])
def test_sketch_ranks_like_exact(scored: dict[str, pd.DataFrame], name: str, least: float) -> None:
    exact, sketch = means(scored["exact"], "exact")[name], means(scored["sketch"], "sketch")[name]
    assert set(exact.index) == set(sketch.index)
    assert spearmanr(exact, sketch[exact.index]).statistic > least


def test_what_a_format_cannot_take_is_skipped_with_its_reason(
    scored: dict[str, pd.DataFrame], tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...]
) -> None:
    job = make_job(tiny_model, tiny_samples[:1], scheme("fp8_block"), "full")
    table, _ = score_table(
        Scored(
            job.operators, scored["exact"], {}, "squared_error", "u", "fp8_block",
            not_offered=lambda members: not_offered(members, scheme("fp8_block")),
        )
    )  # fmt: skip
    table = table.set_index("op")
    narrow = [op.path for op in job.operators if op.in_features % 128 or op.kind != "Linear"]
    assert 0 < len(narrow) < len(job.operators)
    assert set(table.index[table["status"] == "skipped"]) == set(narrow)
    reasons = table.loc[narrow, "reason"]
    assert reasons.str.startswith("not offered: ").all()
    assert reasons.str.contains("192 inputs are no multiple of the 128 that share a scale").any()
    assert table.loc[table["status"] == "scored", "score"].notna().all()


def test_a_fused_operator_is_scored_with_one_tensor_scale(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], tmp_path: Path
) -> None:
    sample = tiny_samples[0]
    job = make_job(tiny_model, (sample,), scheme("nvfp4"), "lm", estimator="exact")
    members = [op for op in job.operators if op.group.endswith("layers.1.self_attn.qkv_proj")]
    assert len(members) == 3
    folder = RunFolder(tmp_path)
    native.run(dataclasses.replace(job, operators=tuple(members), fuse=True), folder, Silent())
    found = folder.frame().set_index("metric")["value"]["squared_error"]
    paths = [op.path for op in members]
    ranges = observe_ranges(tiny_model.module, paths, [sample], "lm", job.scheme)
    shared = largest_value(tiny_model.module.get_submodule(path).weight for path in paths)
    with torch.no_grad():
        before = reference_output(tiny_model.module, sample, "lm")
        changes = {}
        for name, largest in (("shared", shared), ("apart", None)):
            made = {p: make_quantizer(tiny_model.module, p, job.scheme, ranges, largest) for p in paths}
            with quantized(tiny_model.module, made):
                after = reference_output(tiny_model.module, sample, "lm")
            changes[name] = float((after - before).double().square().sum())
    assert found == pytest.approx(changes["shared"], rel=1e-3)
    assert found != pytest.approx(changes["apart"], rel=1e-3)
