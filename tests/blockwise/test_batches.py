"""Samples that walk together against samples that walk alone: both families, every component, text among images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from qvl_hydra.blockwise import batches
from qvl_hydra.blockwise.batches import make_batches, put_together
from qvl_hydra.blockwise.walker import Walker
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.estimators import reverse, reverse_walk
from qvl_hydra.models.forward import reference_output
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.scores.shrink import ORIGINS
from tests.backends.test_torch import SCHEMES, make_job, scores
from tests.blockwise.test_walker import samples_of
from tests.conftest import load_tiny

APART = ["signed", *ORIGINS]  # effects of few tokens, whose sums round

KEYS = ["op", "sample", "probe"]


@pytest.mark.parametrize("component", ["lm", "vision", "full"])
@pytest.mark.parametrize("name", ["tiny_qwen2_5_vl", "tiny_qwen2_vl"])
def test_a_batch_walks_as_its_samples_do_alone(name: str, component: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(batches.BATCH_TOKENS, "cpu", 100_000)
    model = load_tiny(name)
    walker = Walker(model, component)
    samples = [sample for sample in samples_of(model) if walker.usable(sample)]
    contexts = walker.contexts(samples)
    made = make_batches(walker, contexts)
    assert len(made) == (1 if component == "vision" else 2), "those with images, and those without"
    states = list(walker.starts(contexts))
    with torch.no_grad():
        for index, segment in enumerate(walker.segments):
            for batch in made:
                if batch.has_images or not segment.vision:
                    together = put_together([states[place] for place in batch.places], segment.vision)
                    apart = batch.take_apart(segment.run(together, batch.context), walker.packed(index + 1))
                    for place, state in zip(batch.places, apart, strict=True):
                        states[place] = state
        for sample, state in zip(samples, states, strict=True):
            expected = reference_output(model.module, sample, component)
            torch.testing.assert_close(state[0], expected, rtol=1e-5, atol=1e-5)


def test_batches_hold_every_sample_once_and_keep_to_their_tokens(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = samples_of(tiny_model)
    walker = Walker(tiny_model, "lm")
    contexts = walker.contexts(samples)
    for limit in (1, 150, 100_000):
        monkeypatch.setitem(batches.BATCH_TOKENS, "cpu", limit)
        made = make_batches(walker, contexts)
        assert sorted(place for batch in made for place in batch.places) == list(range(len(samples)))
        assert all(len(batch.places) == 1 or batch.context.text[..., 0].numel() <= limit for batch in made)
    assert max(len(batch.places) for batch in made) > 1


@pytest.mark.parametrize(
    ("component", "strategy"),
    [
        ("lm", {}), ("vision", {}), ("full", {}), ("lm", {"metric": "kl", "positions": "answer"}),
        ("full", {"positions": "text"}), ("full", {"estimator": "gradient", "positions": "answer"}),
        ("full", {"name": "hawq_v2", "positions": "answer"}),
    ],
    ids=str,
)
def test_batched_samples_score_as_alone(
    tiny_model: LoadedModel, component: str, strategy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = tuple(samples_of(tiny_model))
    # Weights only: a rounded activation can fall to either side of a tie.
    job = make_job(tiny_model, samples, SCHEMES["w8a16"], component, **{"estimator": "sketch", "probes": 3} | strategy)
    found = {}
    for limit in (1, 100_000):
        monkeypatch.setitem(batches.BATCH_TOKENS, "cpu", limit)
        found[limit] = scores(job, tmp_path / str(limit))[0].sort_values(KEYS, ignore_index=True).drop(columns=APART)
    pd.testing.assert_frame_equal(found[1], found[100_000], rtol=2e-3)


def test_a_batch_goes_on_in_halves_when_memory_runs_out(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tiny_model, tiny_samples, SCHEMES["w8a8_static"], estimator="sketch")
    monkeypatch.setitem(batches.BATCH_TOKENS, "cpu", 100_000)
    together, _, _ = scores(job, tmp_path / "together")
    whole, sizes = reverse_walk.step_back, []

    def short_of_memory(work: Any, context: Any, *rest: Any) -> Any:
        sizes.append(len(context.samples))
        if len(context.samples) > 1:
            raise torch.cuda.OutOfMemoryError("not enough memory")
        return whole(work, context, *rest)

    monkeypatch.setattr(reverse_walk, "step_back", short_of_memory)
    halves, _, _ = scores(job, tmp_path / "halves")
    assert max(sizes[: len(tiny_samples) * 2]) == len(tiny_samples)
    assert max(sizes[len(tiny_samples) * 2 :]) == 1, "what was halved stays so"
    pd.testing.assert_frame_equal(
        *(found.sort_values(KEYS, ignore_index=True).drop(columns=APART) for found in (halves, together)), rtol=2e-3
    )


@pytest.mark.parametrize(
    "strategy",
    [
        {"estimator": "gradient", "positions": "answer"},
        {"estimator": "sketch", "metric": "kl", "positions": "text", "probes": 32},
        {"estimator": "sketch", "probes": 32},
        {"name": "hawq_v2", "positions": "text"},
    ],
    ids=str,
)
def test_the_head_is_given_long_samples_in_pieces(
    tiny_model: LoadedModel,
    tiny_samples: tuple[Sample, ...],
    strategy: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their scores are the same, but for probes, which are drawn a piece at a time; curvature needs all at once."""
    job = make_job(tiny_model, tiny_samples[:2], SCHEMES["w8a16"], "lm", **strategy)
    found, heads = [], []
    made = reverse.Part.__init__

    def counted(part: reverse.Part, state: torch.Tensor, gradients: Any) -> None:
        heads[-1].append(state.shape[1] if callable(gradients) else 0)
        made(part, state, gradients)

    monkeypatch.setattr(reverse.Part, "__init__", counted)
    for tokens in (100_000, 4):
        heads.append([])
        monkeypatch.setattr(reverse_walk, "PIECE_TOKENS", tokens)
        frame = scores(job, tmp_path / str(tokens))[0]
        found.append(frame.groupby(["op", "sample"])["value"].mean())
    whole, pieces = found
    if strategy.get("name") == "hawq_v2":
        assert heads[0] == heads[1]
        pd.testing.assert_series_equal(pieces, whole)
        return
    assert max(heads[1]) <= 4 < max(heads[0])
    assert sum(heads[0]) == sum(heads[1])
    if strategy["estimator"] == "gradient":
        pd.testing.assert_series_equal(pieces, whole, rtol=1e-3)
        return
    assert not pieces.equals(whole)
    assert (pieces / whole).median() == pytest.approx(1, abs=0.15)
