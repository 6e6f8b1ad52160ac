"""Every family against the plain loop over the whole Hugging Face model, streamed and resident, on random shapes."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path

import pytest
import torch

from qvl_hydra.blockwise.batches import make_batches, put_together
from qvl_hydra.blockwise.ranges import walk
from qvl_hydra.blockwise.walker import Walker
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.models.forward import reference_output
from qvl_hydra.models.load import LoadedModel, outline_model
from qvl_hydra.operators.discover import find_operators, uncovered
from qvl_hydra.operators.targets import make_targets
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat
from qvl_hydra.tasks.dry_run import sample_seconds
from tests.estimators.slow_loop import loop_scores
from tests.estimators.test_exact import assert_equal_scores, wavefront_scores
from tests.estimators.test_sketch import frame_and_products, sketch_and_autograd
from tests.families.shapes import SHAPES, load_made_up, made_up_checkpoint, samples_of

W8A8 = Scheme("w8a8_static", WeightFormat(8), ActivationFormat(8))
CASES = [
    (name, component)
    for name, (family, *_) in SHAPES.items()
    for component in (("lm",) if family in ("qwen2", "qwen3", "llama") else ("lm", "vision", "full"))
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: made_up_checkpoint(name, tmp_path_factory.mktemp(name)) for name in SHAPES}


def usable(model: LoadedModel, samples: tuple[Sample, ...], component: str) -> tuple[Sample, ...]:
    walker = Walker(model, component)
    return tuple(sample for sample in samples if walker.usable(sample))


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_are_those_of_the_hugging_face_model(name: str, checkpoints: dict[str, Path]) -> None:
    """Its own forward, given ids and pixels, positions from its own function."""
    model = load_made_up(checkpoints[name])
    for sample in samples_of(checkpoints[name]):
        given = {"input_ids": sample.input_ids[None], "use_cache": False}
        if sample.pixel_values is not None:
            given |= {"pixel_values": sample.pixel_values, "image_grid_thw": sample.image_grid_thw}
            given["mm_token_type_ids"] = (sample.input_ids == model.config.image_token_id).int()[None]
        with torch.no_grad():
            expected = model.module(**given).logits[0]
        component = "full" if model.family.visual else "lm"
        torch.testing.assert_close(
            reference_output(model.module, sample, component), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", SHAPES)
def test_a_forward_is_foretold_by_its_parts(
    name: str, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every segment once, with and without an image; also of those whose weights are drawn."""
    description = load_made_up(checkpoints[name]).description
    drawn = dataclasses.replace(description, settings=dataclasses.replace(description.settings, weights="random"))
    component = "full" if description.family.visual else "lm"
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    for item in (description, drawn):
        model = outline_model(item, torch.device("cpu"), 0)
        walker = Walker(model, component)
        for sample in samples_of(checkpoints[name]):
            passed = [segment for segment in walker.segments if not walker.skips(segment, sample)]
            assert sample_seconds(model, component, sample) == len(passed)


@pytest.mark.parametrize(("name", "component"), CASES)
def test_exact_equals_the_loop(name: str, component: str, checkpoints: dict[str, Path]) -> None:
    model = load_made_up(checkpoints[name])
    samples = usable(model, samples_of(checkpoints[name]), component)
    targets = make_targets(find_operators(model.module, component), fuse=False)
    expected = loop_scores(model, targets, samples, component, W8A8)
    assert_equal_scores(wavefront_scores(model, samples, component, W8A8), expected)


@pytest.mark.parametrize(("name", "component"), CASES)
def test_batches_walk_as_their_samples_do(name: str, component: str, checkpoints: dict[str, Path]) -> None:
    model = load_made_up(checkpoints[name])
    walker = Walker(model, component)
    contexts = walker.contexts([sample for sample in samples_of(checkpoints[name]) if walker.usable(sample)])
    starts = walker.starts(contexts)
    _, alone = walk(walker, contexts, starts, (), (), lambda: None, keep=slice(len(contexts)))
    for batch in make_batches(walker, contexts):
        states = put_together([starts[place] for place in batch.places], walker.packed(0))
        with torch.no_grad():
            for index, segment in enumerate(walker.segments):
                own = batch.take_apart(states, walker.packed(index)) if batch.has_images or not segment.vision else []
                for place, state in zip(batch.places, own, strict=False):
                    torch.testing.assert_close(state, alone[place][index], rtol=1e-4, atol=1e-5)
                if own:
                    states = segment.run(states, batch.context)


@pytest.mark.parametrize(("name", "component"), CASES)
def test_streamed_equals_resident(name: str, component: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Bit for bit, from shards."""
    shards = made_up_checkpoint(name, tmp_path, shards=True)
    samples = usable(load_made_up(shards), samples_of(shards), component)
    resident, streamed = (
        wavefront_scores(load_made_up(shards, placement=placement), samples, component, W8A8)
        for placement in ("resident", "streamed")
    )
    assert streamed == resident


@pytest.mark.parametrize(("name", "component"), CASES)
def test_sketch_is_what_autograd_gives(
    name: str, component: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = load_made_up(checkpoints[name])
    sample = samples_of(checkpoints[name])[0]
    found, expected = sketch_and_autograd(model, sample, component, tmp_path)
    assert found == pytest.approx(expected, rel=2e-3, abs=1e-6 * max(expected))


@pytest.mark.parametrize("name", ["taps", "experts", "text_bias"])
def test_where_errors_come_in_is_told_by_the_products_at_each_token(
    name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = load_made_up(checkpoints[name])
    sample = samples_of(checkpoints[name])[0]
    component = "full" if model.family.visual else "lm"
    frame, products = frame_and_products(model, sample, component, tmp_path)
    image = sample.input_ids == getattr(model.config, "image_token_id", -1)
    answer = sample.labels >= 0
    assert bool(answer.any())
    for path, own in products.items():
        if model.family.component_of(path) == "vision":
            expected = [float(own.sum(-1).square().sum()), 0.0, 0.0]
        else:
            tokens = own.sum(-1).view(len(image), -1).sum(-1).square()
            expected = [float(tokens[kind].sum()) for kind in (image, ~image & ~answer, answer)]
        found = frame.loc[path, ["from_image", "from_text", "from_answer"]].tolist()
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-6 * max(expected)), path


def test_operators_come_in_the_order_of_the_data(checkpoints: dict[str, Path]) -> None:
    """A merger that features leave the tower by comes right behind its block."""
    paths = [op.path for op in find_operators(load_made_up(checkpoints["taps"]).module, "vision")]
    place = paths.index("model.visual.deepstack_merger_list.1.linear_fc1")
    assert paths[place - 1] == "model.visual.blocks.1.mlp.linear_fc2"
    assert paths[place + 2] == "model.visual.blocks.2.attn.qkv"
    assert paths[-1] == "model.visual.merger.linear_fc2"


def test_what_runtimes_fuse_is_one_unit(checkpoints: dict[str, Path]) -> None:
    groups = {op.group for op in find_operators(load_made_up(checkpoints["gated_delta"]).module, "lm")}
    assert "model.language_model.layers.0.linear_attn.in_proj_qkvz" in groups
    assert "model.language_model.layers.0.linear_attn.in_proj_ba" in groups
    assert "model.language_model.layers.1.self_attn.qkv_proj" in groups
    vision = find_operators(load_made_up(checkpoints["taps"]).module, "vision")
    assert all(op.group == op.path for op in vision), "this tower has nothing to fuse"


def test_weights_that_hide_from_the_operators_are_named(checkpoints: dict[str, Path]) -> None:
    model = load_made_up(checkpoints["taps"]).module
    model.model.visual.hidden_table = torch.nn.Parameter(torch.zeros(200, 100))
    found = uncovered(model, "full")
    assert list(found) == ["model.visual.hidden_table", "model.language_model.embed_tokens.weight"]
    total = sum(parameter.numel() for parameter in model.parameters())
    assert found["model.visual.hidden_table"] == 20_000 / total
    assert list(uncovered(model, "lm")) == ["model.language_model.embed_tokens.weight"]
