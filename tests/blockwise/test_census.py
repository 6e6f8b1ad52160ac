"""The range census against the model's own forward, and an overflow that it must find."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks.jobs import SCHEMES, Silent, make_job
from qvl_hydra.backends import torch as native
from qvl_hydra.blockwise.census import OperatorCensus, warnings
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.estimators.bench import CENSUS
from qvl_hydra.models.forward import reference_output
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.runs.folder import RunFolder
from tests.conftest import load_tiny


def census_of(
    model: LoadedModel, samples: tuple[Sample, ...], path: Path, scheme: str
) -> tuple[dict[str, OperatorCensus], list[str]]:
    folder = RunFolder(path)
    job = make_job(model, samples, SCHEMES[scheme], "full", estimator="sketch", probes=1)
    report = native.run(job, folder, Silent())
    return {op: OperatorCensus(**own) for op, own in folder.recall(CENSUS).items()}, report.notes


@pytest.mark.parametrize("scheme", ["w8a8_static", "w4a16"])  # observed ranges, and none
def test_largest_values_are_the_models(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], tmp_path: Path, scheme: str
) -> None:
    samples = tiny_samples[:2]
    found, _ = census_of(tiny_model, samples, tmp_path, scheme)
    seen: dict[str, tuple[float, float]] = {}

    def look(name: str) -> object:
        def hook(_: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            old = seen.get(name, (0.0, 0.0))
            new = (float(inputs[0].abs().max()), float(output.abs().max()))
            seen[name] = (max(old[0], new[0]), max(old[1], new[1]))

        return tiny_model.module.get_submodule(name).register_forward_hook(hook)

    handles = [look(name) for name in found]
    for sample in samples:
        reference_output(tiny_model.module, sample, "full")
    for handle in handles:
        handle.remove()  # type: ignore[attr-defined]
    assert len(found) > 70
    for name, own in found.items():
        weight = tiny_model.module.get_submodule(name).weight
        assert own.input_max == pytest.approx(seen[name][0], rel=1e-4), name
        if name != "lm_head":  # whose output no range is taken of
            assert own.output_max == pytest.approx(seen[name][1], rel=1e-4, abs=1e-4), name
        assert own.weight_max == pytest.approx(float(weight.abs().max()))
        assert own.nonfinite == 0


def test_one_row_that_overflows_float16_is_found(tiny_samples: tuple[Sample, ...], tmp_path: Path) -> None:
    model = load_tiny()
    path, row = "model.visual.blocks.3.mlp.down_proj", 49
    down = model.module.get_submodule(path)
    up = model.module.get_submodule("model.visual.blocks.3.mlp.up_proj")
    with torch.no_grad():
        norms = down.weight.norm(dim=1)
        down.weight[row] *= 9 * norms.median() / norms[row]
        up.weight *= 1e5
        up.bias *= 1e5
    found, notes = census_of(model, tiny_samples[:1], tmp_path, "w8a16")
    own = found[path]
    assert (own.largest_row, round(own.row_ratio)) == (row, 9)
    assert own.output_max > 65504
    assert any(note.startswith("warning: float16 holds up to 65,504") for note in notes)


def test_warnings_name_the_furthest() -> None:
    fine, far = OperatorCensus(output_max=10), OperatorCensus(output_max=66861, largest_row=849, row_ratio=9.3)
    (said,) = warnings({"a": fine, "b": far})
    assert "1 operators exceed it, b the furthest (66,861; row 849 of its weight has 9.3 times" in said
    assert warnings({"a": fine}) == []
    assert "not finite, first c" in warnings({"c": dataclasses.replace(fine, nonfinite=3)})[0]
