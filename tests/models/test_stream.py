"""Streamed placement against the resident model, bit for bit, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qvl_hydra.blockwise.walker import Walker
from qvl_hydra.calibration.encode import encode, load_processor
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.calibration.scenes import scene_examples
from qvl_hydra.errors import ModelError
from qvl_hydra.families.table import FAMILIES
from qvl_hydra.models.load import LoadedModel, describe_model, load_model
from qvl_hydra.models.stream import Checkpoint, parameters_on_meta
from qvl_hydra.settings import ModelSettings
from tests.conftest import load_tiny


def samples_of(model: LoadedModel) -> list[Sample]:
    processor = load_processor(model.description.folder)
    found = [encode(processor, e.id, e.prompt, e.answer, [e.image]) for e in scene_examples("calibration", 2, 0)]
    return [*found, encode(processor, "text", "how many red ?", "two", [])]


@torch.no_grad()
def walk(model: LoadedModel, component: str, samples: list[Sample]) -> list[Tensor]:
    walker = Walker(model, component)
    samples = [sample for sample in samples if walker.usable(sample)]
    contexts = walker.contexts(samples)
    states = walker.starts(contexts)
    for segment in walker.segments:
        with walker.weights(segment):
            for index, context in enumerate(contexts):
                if not walker.skips(segment, context.sample):
                    states[index] = segment.run(states[index], context)
    return states


@pytest.mark.parametrize("component", ["lm", "vision", "full"])
@pytest.mark.parametrize("name", ["tiny_qwen2_5_vl", "tiny_qwen2_vl"])
def test_streamed_is_resident_bit_for_bit(name: str, component: str) -> None:
    resident, streamed = load_tiny(name), load_tiny(name, placement="streamed")
    samples = samples_of(resident)
    expected = walk(resident, component, samples)
    found = walk(streamed, component, samples)
    assert len(found) == len(expected) > 1
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(parameter.is_meta for parameter in streamed.module.parameters())


def test_streamed_is_resident_in_bfloat16() -> None:
    resident, streamed = (load_tiny(dtype="bfloat16", placement=placement) for placement in ("resident", "streamed"))
    samples = samples_of(resident)
    expected, found = walk(resident, "full", samples), walk(streamed, "full", samples)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_weights_are_there_within_and_gone_after_an_exception() -> None:
    model, path = load_tiny(placement="streamed"), "model.language_model.layers.2.mlp"
    part, neighbour = model.module.get_submodule(path), model.module.get_submodule("model.language_model.layers.1")
    expected = load_tiny().module.get_submodule(path).state_dict()
    with pytest.raises(KeyboardInterrupt), model.weights([path]):  # noqa: PT012
        found = part.state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert all(parameter.is_meta for parameter in neighbour.parameters())
        raise KeyboardInterrupt
    assert all(parameter.is_meta for parameter in model.module.parameters())


def test_tied_embeddings_serve_as_head(tmp_path: Path) -> None:
    """A checkpoint with tied embeddings has no weight for its head."""
    description = describe_model(ModelSettings("t", "bundled:tiny_qwen2_5_vl", "qwen2_5_vl", weights="random"))
    description.config.tie_word_embeddings = True
    tied = load_model(description, torch.device("cpu"), 0).module
    tied.tie_weights()
    tied.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path, FAMILIES["qwen2_5_vl"])
    assert "lm_head.weight" not in checkpoint.places
    for placement in ("resident", "streamed"):
        settings = ModelSettings("t", str(tmp_path), "qwen2_5_vl", placement=placement)  # type: ignore[arg-type]
        model = load_model(describe_model(settings), torch.device("cpu"), 0)
        with model.weights(["lm_head"]):
            assert torch.equal(model.module.get_submodule("lm_head").weight, tied.lm_head.weight)


def test_a_weight_that_is_not_there() -> None:
    checkpoint = Checkpoint(load_tiny().description.folder, FAMILIES["qwen2_5_vl"])
    with pytest.raises(ModelError, match=r"no weight model\.language_model\.layers\.99"):
        checkpoint.read("model.language_model.layers.99.mlp.up_proj.weight", (1, 1), torch.device("cpu"), torch.float32)


def test_one_file_goes_before_shards_that_lie_beside_it(tmp_path: Path) -> None:
    """As in transformers: streamed and resident would else be two models, and old shards that are gone a fault."""
    shard = "model-00001-of-00002.safetensors"
    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / shard)
    index = {"weight_map": {"lm_head.weight": shard, "model.norm.weight": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="lacks 1 of its 2 shards"):
        Checkpoint(tmp_path, FAMILIES["llama"])
    save_file({"lm_head.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    read = Checkpoint(tmp_path, FAMILIES["llama"]).read("lm_head.weight", (2, 2), torch.device("cpu"), torch.float32)
    assert torch.equal(read, torch.ones(2, 2))


def test_modules_are_made_as_ever_after_parameters_on_meta() -> None:
    with parameters_on_meta():
        assert nn.Linear(3, 3).weight.is_meta
        assert not nn.BatchNorm1d(3).running_mean.is_meta  # type: ignore[union-attr]
    with pytest.raises(ZeroDivisionError), parameters_on_meta():
        raise ZeroDivisionError
    assert not nn.Linear(3, 3).weight.is_meta
