"""The bundled checkpoints: the real structure in small, a task truly learned, massive activations that cost INT8."""

from __future__ import annotations

import copy
import itertools
import json
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention

from qvl_hydra.calibration.encode import Processor, encode, load_processor
from qvl_hydra.calibration.sample import Sample, collate
from qvl_hydra.calibration.scenes import GRIDS, enlarged, scene_stream
from qvl_hydra.calibration.sources import load_calibration
from qvl_hydra.settings import CalibrationSettings

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from bundled_models.batches import GRID_SHARES, BatchMaker
from bundled_models.massive_activations import Stretch, reparametrise

ASSETS = Path(str(resources.files("qvl_hydra"))) / "assets"
FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    return ASSETS / f"tiny_{request.param}"


@pytest.fixture(scope="module")
def model(folder: Path) -> nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return load_processor(folder)


@pytest.fixture(scope="module")
def figures(folder: Path) -> dict:
    return json.loads((folder / "figures.json").read_text())


@pytest.fixture(scope="module")
def evaluation(processor: Processor) -> tuple[Sample, ...]:
    settings = CalibrationSettings(source="bundled", size=256, split="evaluation")
    return load_calibration(settings, processor).samples


def _batches(samples: tuple[Sample, ...], size: int = 32) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    for start in range(0, len(samples), size):
        batch = collate(samples[start : start + size])
        labels = batch.pop("labels")
        yield batch, labels


@torch.no_grad()
def _logits(model: nn.Module, samples: tuple[Sample, ...]) -> Tensor:
    """Logits at all answer tokens of all samples."""
    return torch.cat(
        [model(**batch, use_cache=False).logits[:, :-1][labels[:, 1:] != -100] for batch, labels in _batches(samples)]
    )


@torch.no_grad()
def _right(model: nn.Module, samples: tuple[Sample, ...]) -> list[bool]:
    """For each sample, whether the most likely token is the true one at every token of the answer."""
    right = []
    for batch, labels in _batches(samples):
        said, asked = model(**batch, use_cache=False).logits[:, :-1].argmax(-1), labels[:, 1:]
        right += ((said == asked) | (asked == -100)).all(1).tolist()
    return right


def _share(right: list[bool]) -> float:
    return sum(right) / len(right)


def test_files_and_size(folder: Path) -> None:
    assert (folder / "model.safetensors").stat().st_size <= 6_000_000
    for name in ("README.md", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (folder / name).is_file(), name
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert all(weights.get_tensor(key).dtype == torch.float32 for key in weights.keys())  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for token in ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"):
        assert len(tokenizer.encode(token)) == 1
    text = "red ring, blue cross\nEine Überraschung 犬 42"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_structure_is_the_real_one_in_small(folder: Path, model: nn.Module) -> None:
    config = AutoConfig.from_pretrained(folder)
    text = config.text_config
    assert text.num_hidden_layers >= 8
    assert text.num_attention_heads > text.num_key_value_heads > 1
    head_size = text.hidden_size // text.num_attention_heads
    assert sum(text.rope_parameters["mrope_section"]) == head_size // 2
    assert config.vision_config.depth >= 4
    assert not config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.model.language_model.embed_tokens.weight.data_ptr()
    attention = model.model.language_model.layers[0].self_attn
    assert (attention.q_proj.bias is None) == (config.model_type == "qwen3_vl")
    assert attention.o_proj.bias is None
    language = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and "visual" not in name]
    assert len(language) == 8 * 7 + 1


def test_windowed_and_full_attention_both_occur(
    folder: Path, model: nn.Module, evaluation: tuple[Sample, ...]
) -> None:
    """On the bundled images, window blocks of the 2.5 model attend within parts of an image, full blocks across it."""
    if folder.name != "tiny_qwen2_5_vl":
        pytest.skip("this tower has no windows")
    largest = max(evaluation, key=lambda sample: 0 if sample.pixel_values is None else len(sample.pixel_values))
    lengths = []

    def observe(_: nn.Module, args: tuple, kwargs: dict) -> None:
        lengths.append(kwargs["cu_seqlens"].diff().tolist())

    hooks = [
        part.register_forward_pre_hook(observe, with_kwargs=True)
        for part in model.modules()
        if isinstance(part, Qwen2_5_VLVisionAttention)
    ]
    _logits(model, (largest,))
    for hook in hooks:
        hook.remove()
    whole = len(largest.pixel_values)
    windows = [16] * (whole // 16)
    assert lengths == [windows, [whole], windows, [whole]]
    assert len(windows) == 6


def test_evaluation_is_answered(model: nn.Module, evaluation: tuple[Sample, ...], figures: dict) -> None:
    share = _share(_right(model, evaluation))
    assert share >= 0.95
    assert abs(share - figures["exact_match_float"]) <= 1 / 256


def test_greedy_generation_gives_the_answers(
    model: nn.Module, processor: Processor, evaluation: tuple[Sample, ...]
) -> None:
    """Plain `generate`, without the answer in sight, agrees sample by sample with what the logits promise."""
    some = evaluation[:24]
    generated = []
    for sample in some:
        prompt = sample.input_ids[sample.labels == -100][None]
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            pixel_values=sample.pixel_values,
            image_grid_thw=sample.image_grid_thw,
            mm_token_type_ids=(prompt == processor.config.image_token_id).int(),
            do_sample=False,
            max_new_tokens=20,
        )
        generated.append(output[0, prompt.shape[1] :].tolist() == sample.labels[sample.labels != -100].tolist())
    assert generated == _right(model, some)


def test_the_image_is_what_is_answered_from(model: nn.Module, evaluation: tuple[Sample, ...]) -> None:
    """With each image blacked out, what is left is guessing."""
    blind = tuple(
        Sample(s.id, s.input_ids, s.position_ids, s.labels, torch.full_like(s.pixel_values, -1.7), s.image_grid_thw)
        for s in evaluation[:96]
    )
    assert _share(_right(model, blind)) < 0.35


@pytest.mark.parametrize("number", [0, 1, 2])
def test_training_batches_are_encoded_as_the_package_encodes(processor: Processor, number: int) -> None:
    """Training makes a whole batch at once; here each of its samples goes the package's way."""
    batch = BatchMaker(processor.config.model_type, processor.tokenizer, seed=3).batch(number, 6)
    rng = np.random.default_rng([3, number])
    grid = GRIDS[int(rng.choice(len(GRIDS), p=GRID_SHARES))]
    scenes = itertools.islice(scene_stream("train", int(rng.integers(2**31)), grid=grid), 6)
    expected = collate(
        [
            encode(processor, "x", prompt, answer, [Image.fromarray(enlarged(pixels, processor.token_side))])
            for pixels, prompt, answer in scenes
        ]
    )
    valid = expected["attention_mask"].bool()
    assert batch["position_ids"][:, valid].equal(expected["position_ids"][:, valid])
    for name in ("input_ids", "labels", "image_grid_thw"):
        assert batch[name].equal(expected[name]), name
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-6)


STRETCHES = [
    Stretch("lm", 2, "attention_norm", 5, 16.0),
    Stretch("lm", 4, "mlp_norm", 77, 32.0),
    Stretch("lm", 3, "mlp_hidden", 11, 32.0),
    Stretch("lm", 5, "attention_value", 40, 8.0),
    Stretch("lm", None, "head_norm", 9, 4.0),
    Stretch("vision", 0, "attention_norm", 3, 16.0),
    Stretch("vision", 3, "mlp_norm", 21, 8.0),
]
READ_BY = [
    "model.language_model.layers.2.self_attn.k_proj",
    "model.language_model.layers.4.mlp.up_proj",
    "model.language_model.layers.3.mlp.down_proj",
    "model.language_model.layers.5.self_attn.o_proj",
    "lm_head",
    "model.visual.blocks.0.attn.qkv",
    None,  # gate_proj or fc1, by family
]


@pytest.mark.parametrize(
    ("stretch", "reader"), list(zip(STRETCHES, READ_BY, strict=True)), ids=lambda value: str(value)[:48]
)
def test_reparametrisation_leaves_the_function(
    model: nn.Module, evaluation: tuple[Sample, ...], stretch: Stretch, reader: str | None
) -> None:
    """Stretched once more at another channel, the logits stay and only the activation there grows."""
    reader = reader or next(
        name
        for name, _ in model.named_modules()
        if name.endswith(tuple(f"blocks.3.mlp.{first}" for first in ("fc1", "gate_proj", "linear_fc1")))
    )
    stretched = copy.deepcopy(model)
    reparametrise(stretched, [stretch])
    some = evaluation[:16]
    before, after = _ranges(model, reader, some), _ranges(stretched, reader, some)
    torch.testing.assert_close(_logits(stretched, some), _logits(model, some), rtol=1e-4, atol=1e-4)
    grown = (after / before).nan_to_num(1.0)
    # A value channel is read once by each of the query heads that share its key-value head.
    expected = [9] if stretch.site == "head_norm" else [stretch.channel]
    if stretch.site == "attention_value":
        head, offset = divmod(stretch.channel, 32)
        expected = [(2 * head) * 32 + offset, (2 * head + 1) * 32 + offset]
    assert torch.nonzero(grown > 1.5).flatten().tolist() == expected
    torch.testing.assert_close(grown[expected], torch.full((len(expected),), stretch.factor), rtol=1e-3, atol=0)


def _ranges(model: nn.Module, path: str, samples: tuple[Sample, ...]) -> Tensor:
    """Largest absolute value of each input channel of an operator."""
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].reshape(-1, inputs[0].shape[-1]).abs().amax(0))
    )
    _logits(model, samples)
    hook.remove()
    return torch.stack(seen).amax(0)


def test_int8_costs_and_few_operators_win_it_back(
    model: nn.Module, processor: Processor, evaluation: tuple[Sample, ...], figures: dict
) -> None:
    """W8A8 written out here once more, apart from the package's own: min-max uint8 inputs, symmetric int8 rows."""
    calibration = load_calibration(CalibrationSettings(source="bundled", size=128), processor).samples
    reference = _share(_right(model, evaluation))
    kept = set(figures["most_sensitive_first"][:11])
    with _int8(model, calibration, kept=()):
        everything = _share(_right(model, evaluation))
    with _int8(model, calibration, kept=kept):
        mixed = _share(_right(model, evaluation))
    assert abs(everything - figures["exact_match_w8a8_full"]) <= 2 / 256
    assert reference - everything >= 0.15
    assert mixed - everything >= 0.9 * (reference - everything)
    assert len(kept) / 57 <= 0.2


@contextmanager
def _int8(model: nn.Module, calibration: tuple[Sample, ...], kept: Collection[str]) -> Iterator[None]:
    parts = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear | nn.Conv3d) and name not in kept
    }
    ranges: dict[str, tuple[float, float]] = {}

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            low, high = ranges.get(name, (0.0, 0.0))
            ranges[name] = (min(low, float(inputs[0].min())), max(high, float(inputs[0].max())))

        return hook

    hooks = [part.register_forward_pre_hook(observe(name)) for name, part in parts.items()]
    for sample in calibration:  # one at a time: padding would be observed too
        _logits(model, (sample,))
    for hook in hooks:
        hook.remove()
    weights = {name: part.weight.data for name, part in parts.items()}
    hooks = []
    for name, part in parts.items():
        flat = part.weight.data.flatten(1)
        step = flat.abs().amax(1, keepdim=True) / 127.5
        part.weight.data = ((flat / step).round().clamp(-128, 127) * step).view_as(part.weight)
        low, high = ranges[name]
        scale = (high - low) / 255
        zero = round(-low / scale)
        hooks.append(
            part.register_forward_pre_hook(
                lambda _, inputs, scale=scale, zero=zero: (
                    ((inputs[0] / scale).round() + zero).clamp(0, 255).sub(zero) * scale,
                )
            )
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, part in parts.items():
            part.weight.data = weights[name]
