"""The wavefront against the loop over operators one at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvl_hydra.blockwise.ranges import walk
from qvl_hydra.blockwise.walker import Walker
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.estimators import rows
from qvl_hydra.estimators.exact import Wavefront, score_samples
from qvl_hydra.estimators.rows import RowChunk, packed
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.operators.targets import make_targets
from qvl_hydra.quantization.apply import make_quantizer
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat
from tests.conftest import load_tiny
from tests.estimators.slow_loop import loop_scores

SCHEMES = {
    "w8a8_static": Scheme("w8a8_static", WeightFormat(8), ActivationFormat(8)),
    "inc_static": Scheme("inc_static", WeightFormat(8), ActivationFormat(8), ActivationFormat(8)),
    "w8a8_dynamic": Scheme("w8a8_dynamic", WeightFormat(8), ActivationFormat(8, symmetric=True, dynamic=True)),
    "w8a16": Scheme("w8a16", WeightFormat(8), None),
    "w4a16": Scheme("w4a16", WeightFormat(4, group_size=32), None),
}


def wavefront_scores(
    model: LoadedModel,
    samples: tuple[Sample, ...],
    component: str,
    scheme: Scheme,
    direction: str = "requantize",
    fuse: bool = False,
    chunk: int = 5,
) -> list[dict[str, dict[str, float]]]:
    operators = find_operators(model.module, component)
    walker = Walker(model, component)
    contexts = walker.contexts(samples)
    starts = walker.starts(contexts)
    ranges, _ = walk(walker, contexts, starts, operators, [scheme], lambda: None)
    wave = Wavefront(
        walker,
        make_targets(operators, fuse),
        operators if direction == "fallback" else [],
        lambda op: make_quantizer(model.module, op.path, scheme, ranges.params[scheme.name]),
        RowChunk(chunk),
    )
    return score_samples(wave, contexts, starts)


def assert_equal_scores(found: list[dict[str, dict[str, float]]], expected: list[dict[str, dict[str, float]]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for op, metrics in other.items():
            # `fallback` and the loss are differences of larger numbers: what float32 cannot tell apart is not counted.
            # It is more on processors whose products round otherwise for another number of rows.
            for name, value in metrics.items():
                largest = max(abs(scores[name]) for scores in other.values())
                rounding = {"loss_change": 3e-6, "kl": 3e-8}.get(name, 5e-6 * largest)
                assert one[op][name] == pytest.approx(value, rel=1e-4, abs=rounding), (op, name)


@pytest.mark.parametrize("direction", ["requantize", "fallback"])
@pytest.mark.parametrize("component", ["lm", "vision", "full"])
@pytest.mark.parametrize("scheme", ["w8a8_static", "inc_static"])
def test_wavefront_equals_the_loop(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], component: str, scheme: str, direction: str
) -> None:
    samples = tiny_samples[:2]
    targets = make_targets(find_operators(tiny_model.module, component), fuse=False)
    expected = loop_scores(tiny_model, targets, samples, component, SCHEMES[scheme], direction)
    found = wavefront_scores(tiny_model, samples, component, SCHEMES[scheme], direction)
    assert_equal_scores(found, expected)


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w8a16", "w4a16"])
def test_other_schemes_and_the_proxy(scheme: str) -> None:
    from qvl_hydra.calibration.encode import load_processor
    from qvl_hydra.calibration.sources import load_calibration
    from qvl_hydra.settings import CalibrationSettings

    model = load_tiny("tiny_qwen2_vl")
    samples = load_calibration(CalibrationSettings("bundled", size=1), load_processor(model.description.folder)).samples
    targets = make_targets(find_operators(model.module, "full"), fuse=False)
    expected = loop_scores(model, targets, samples, "full", SCHEMES[scheme])
    assert_equal_scores(wavefront_scores(model, samples, "full", SCHEMES[scheme]), expected)


def test_fused_groups_are_quantized_together(tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...]) -> None:
    samples, scheme = tiny_samples[:1], SCHEMES["w8a8_static"]
    targets = make_targets(find_operators(tiny_model.module, "lm"), fuse=True)
    assert {len(target.operators) for target in targets} == {1, 2, 3}
    expected = loop_scores(tiny_model, targets, samples, "lm", scheme)
    assert_equal_scores(wavefront_scores(tiny_model, samples, "lm", scheme, fuse=True), expected)


def test_outputs_of_a_chunk_are_bounded_together(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, scheme = (*tiny_samples[:2], text_alone(tiny_samples[0])), SCHEMES["w8a8_dynamic"]
    one_by_one = [scores for sample in samples for scores in wavefront_scores(tiny_model, (sample,), "full", scheme)]
    limit = 1 << 15
    monkeypatch.setattr(rows, "OUTPUT_BYTES", {"cpu": limit})
    seen: list[int] = []
    run = rows.run_rows

    def look(*args: Any) -> torch.Tensor:
        outputs = run(*args)
        seen.append(outputs.numel() * outputs.itemsize)
        return outputs

    monkeypatch.setattr(rows, "run_rows", look)
    assert_equal_scores(wavefront_scores(tiny_model, samples, "full", scheme), one_by_one)
    assert limit // 2 < max(seen) <= limit < sum(seen)


def text_alone(sample: Sample) -> Sample:
    """Its answer's tokens and what stands before them, without the image."""
    first = int((sample.labels >= 0).nonzero()[0]) - 4
    ids = sample.input_ids[first:]
    places = torch.arange(len(ids)).expand(len(sample.position_ids), -1)
    return Sample(f"{sample.id}, text alone", ids, places, sample.labels[first:], None, None)


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 12))
def test_tokens_of_several_samples_are_packed_in_order(counts: list[int], most: int) -> None:
    groups = list(packed(counts, most))
    tokens = [(index, token) for group in groups for index, own in group for token in range(own.start, own.stop)]
    assert tokens == [(index, token) for index, count in enumerate(counts) for token in range(count)]
    sizes = [sum(own.stop - own.start for _, own in group) for group in groups]
    assert all(size == most for size in sizes[:-1])
    assert all(0 < size <= most for size in sizes[-1:])


def test_chunk_halves_when_cuda_memory_runs_out(tiny_model: LoadedModel) -> None:
    seen: list[int] = []

    def run(rows: torch.Tensor, first: int) -> torch.Tensor:
        if rows.shape[0] > 3:
            raise torch.cuda.OutOfMemoryError("made up")
        seen.append(first)
        return rows * 2

    chunk = RowChunk(16)
    rows = torch.arange(10.0)[:, None, None]
    torch.testing.assert_close(chunk.advance(rows, run), rows * 2)
    assert chunk.size == 2
    assert seen == [0, 2, 4, 6, 8]


def test_memory_that_runs_out_for_one_row_is_an_error() -> None:
    def run(rows: torch.Tensor, first: int) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("made up")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        RowChunk(4).advance(torch.zeros(2, 1, 1), run)


def test_the_model_is_bit_for_bit_as_before(tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...]) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_model.module.state_dict().items()}
    wavefront_scores(tiny_model, tiny_samples[:1], "full", SCHEMES["inc_static"], "fallback")
    after = tiny_model.module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not [path for path, module in tiny_model.module.named_modules() if "forward" in vars(module)]
