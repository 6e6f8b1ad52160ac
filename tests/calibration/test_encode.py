"""Encoding against Qwen-VL's own conventions and against the real model's position function."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration

from qvl_hydra.calibration.encode import EncodingError, Processor, encode, load_processor, with_pixel_limits
from qvl_hydra.calibration.sample import collate
from qvl_hydra.errors import CalibrationError

ASSETS = Path(str(resources.files("qvl_hydra"))) / "assets"
MODELS = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen2_vl": Qwen2VLForConditionalGeneration}


def _image(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_tokens_grid_and_labels(processor: Processor) -> None:
    sample = encode(processor, "x", "describe the image.", "red ring", [_image(84, 112)])
    assert sample.image_grid_thw is not None
    assert sample.image_grid_thw.tolist() == [[1, 6, 8]]
    assert sample.pixel_values is not None
    assert sample.pixel_values.shape == (48, 3 * 2 * 14 * 14)
    assert int((sample.input_ids == processor.config.image_token_id).sum()) == 48 // 2**2
    text = processor.tokenizer.decode(sample.input_ids)
    pads = "<|image_pad|>" * 12
    assert text == (
        f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>describe the image.<|im_end|>\n"
        "<|im_start|>assistant\nred ring<|im_end|>"
    )
    labelled = sample.labels != -100
    assert processor.tokenizer.decode(sample.labels[labelled]) == "red ring<|im_end|>"
    assert sample.labels[labelled].equal(sample.input_ids[labelled])
    assert labelled[-int(labelled.sum()) :].all()


def test_patches_are_the_normalised_pixels(processor: Processor) -> None:
    """First patch, first channel, first frame, computed by hand; the second frame repeats the first."""
    image = _image(56, 112)
    sample = encode(processor, "x", "q", "a", [image])
    assert sample.pixel_values is not None
    patch = sample.pixel_values[0].view(3, 2, 14, 14)
    red = torch.from_numpy(np.asarray(image)[:14, :14, 0].astype(np.float32)) / 255
    torch.testing.assert_close(patch[0, 0], (red - 0.48145466) / 0.26862954, rtol=1e-4, atol=1e-4)
    assert patch[:, 0].equal(patch[:, 1])


@pytest.mark.parametrize("sizes", [[(56, 112)], [(112, 168), (84, 112)], []])
def test_positions_equal_the_real_models(processor: Processor, sizes: list[tuple[int, int]]) -> None:
    family = processor.config.model_type
    model = MODELS[family].from_pretrained(ASSETS / f"tiny_{family}")
    sample = encode(processor, "x", "how many objects?", "two", [_image(*size) for size in sizes])
    kinds = (sample.input_ids == processor.config.image_token_id).int()[None]
    expected, _ = model.model.get_rope_index(sample.input_ids[None], kinds, image_grid_thw=sample.image_grid_thw)
    assert sample.position_ids.equal(expected[:, 0])


def test_positions_by_hand(processor: Processor) -> None:
    """Text counts on; the image's rows and columns start where the text before it ended."""
    sample = encode(processor, "x", "q", "a", [_image(56, 84)])
    before = 4  # <|im_start|> user \n <|vision_start|>
    image = sample.position_ids[:, before : before + 6]
    assert image.tolist() == [[4] * 6, [4, 4, 4, 5, 5, 5], [4, 5, 6, 4, 5, 6]]
    after = sample.position_ids[:, before + 6 :]
    assert after.equal((torch.arange(after.shape[1]) + before + 3).expand_as(after))


def test_text_only(processor: Processor) -> None:
    sample = encode(processor, "x", "how many objects?", "two", [])
    assert sample.pixel_values is None
    assert sample.image_grid_thw is None
    assert sample.position_ids.equal(torch.arange(len(sample.input_ids)).expand(3, -1))


def test_a_batch_gives_each_samples_own_logits(processor: Processor) -> None:
    family = processor.config.model_type
    model = MODELS[family].from_pretrained(ASSETS / f"tiny_{family}").eval()
    samples = [
        encode(processor, "a", "describe the image.", "red ring, blue cross", [_image(84, 112)]),
        encode(processor, "b", "how many objects?", "two", []),
        encode(processor, "c", "q", "a", [_image(56, 112), _image(112, 112)]),
    ]
    with torch.no_grad():
        together = model(**collate(samples)).logits
        for row, sample in enumerate(samples):
            alone = model(**collate([sample])).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=1e-4)


def test_image_token_in_the_text_is_refused(one_processor: Processor) -> None:
    with pytest.raises(EncodingError, match="image token of its own"):
        encode(one_processor, "x", "what is <|image_pad|>?", "a", [_image(56, 56)])
    with pytest.raises(EncodingError, match="image token of its own"):
        encode(one_processor, "x", "q", "<|image_pad|>", [])


def test_sliver_of_an_image_is_refused(one_processor: Processor) -> None:
    with pytest.raises(EncodingError, match="aspect ratio"):
        encode(one_processor, "x", "q", "a", [_image(2, 500)])


def test_pixel_limits(one_processor: Processor) -> None:
    limited = with_pixel_limits(one_processor, None, 60 * 60)
    sample = encode(limited, "x", "q", "a", [_image(300, 300)])
    assert sample.image_grid_thw is not None
    assert sample.image_grid_thw.tolist() == [[1, 4, 4]]
    enlarged = encode(with_pixel_limits(one_processor, 112 * 112, None), "x", "q", "a", [_image(56, 56)])
    assert enlarged.image_grid_thw is not None
    assert enlarged.image_grid_thw.tolist() == [[1, 8, 8]]
    unchanged = encode(one_processor, "x", "q", "a", [_image(56, 56)])
    assert unchanged.image_grid_thw is not None
    assert unchanged.image_grid_thw.tolist() == [[1, 4, 4]]
    with pytest.raises(CalibrationError, match=r"min_pixels=9000 is above calibration\.max_pixels=3136"):
        with_pixel_limits(one_processor, 9000, 3136)


def test_real_checkpoints_layout(tmp_path: Path) -> None:
    """Template in `chat_template.json`, with the default system prompt, as the published checkpoints have it."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(ASSETS / "tiny_qwen2_5_vl", folder, ignore=shutil.ignore_patterns("*.safetensors", "*.jinja"))
    template = (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
        "{% else %}{% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    processor = load_processor(folder)
    sample = encode(processor, "x", "q", "two", [_image(56, 56)])
    assert processor.tokenizer.decode(sample.input_ids).startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    )
    assert processor.tokenizer.decode(sample.labels[sample.labels != -100]) == "two<|im_end|>"


def test_missing_parts_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(ASSETS / "tiny_qwen2_5_vl", folder, ignore=shutil.ignore_patterns("*.safetensors", "*.jinja"))
    with pytest.raises(CalibrationError, match="no chat template"):
        load_processor(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CalibrationError, match=r"preprocessor_config\.json"):
        load_processor(folder)


def test_another_family_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(ASSETS / "tiny_qwen2_5_vl", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(CalibrationError, match=r"'gpt2'; allowed: qwen2_5_vl, qwen2_vl"):
        load_processor(folder)
