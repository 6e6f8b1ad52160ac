"""The walker against the model's own forward: both families, every component, several rows, text only."""

from __future__ import annotations

import pytest
import torch

from qvl_hydra.blockwise.walker import Walker
from qvl_hydra.calibration.encode import encode, load_processor
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.calibration.scenes import scene_examples
from qvl_hydra.models.forward import reference_output
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import find_operators
from tests.conftest import load_tiny


def samples_of(model: LoadedModel, sizes: int = 3) -> list[Sample]:
    """Samples with images of different sizes, one with two images, one without any."""
    processor = load_processor(model.description.folder)
    by_size = {example.image.size: example for example in scene_examples("calibration", 40, 0)}
    examples = list(by_size.values())[:sizes]
    assert len(examples) > 1, "the bundled scenes come in several sizes"
    found = [encode(processor, e.id, e.prompt, e.answer, [e.image]) for e in examples]
    two = [examples[0].image, examples[1].image]
    found.append(encode(processor, "two images", examples[0].prompt, examples[0].answer, two))
    found.append(encode(processor, "text", examples[0].prompt, examples[0].answer, []))
    return found


@pytest.mark.parametrize("component", ["lm", "vision", "full"])
@pytest.mark.parametrize("name", ["tiny_qwen2_5_vl", "tiny_qwen2_vl"])
def test_walk_equals_the_models_own_forward(name: str, component: str) -> None:
    model = load_tiny(name)
    walker = Walker(model, component)
    samples = [sample for sample in samples_of(model) if walker.usable(sample)]
    contexts = walker.contexts(samples)
    for sample, context, state in zip(samples, contexts, walker.starts(contexts), strict=True):
        rows = state.repeat(3, 1, 1)
        with torch.no_grad():
            for segment in walker.segments:
                if not walker.skips(segment, sample):
                    rows = segment.run(rows, context)
            expected = reference_output(model.module, sample, component)
        for row in rows:
            torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


def test_recording_leaves_no_trace(tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...]) -> None:
    Walker(tiny_model, "full").contexts(tiny_samples)
    changed = [path for path, module in tiny_model.module.named_modules() if "forward" in vars(module)]
    assert changed == []


def test_every_operator_lies_in_one_segment(tiny_model: LoadedModel) -> None:
    walker = Walker(tiny_model, "full")
    for op in find_operators(tiny_model.module, "full"):
        assert sum(segment.holds(op.path) for segment in walker.segments) == 1
