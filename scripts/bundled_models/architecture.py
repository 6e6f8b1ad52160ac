"""Configurations and tokenizer of the bundled models: the real structure of each family, made small."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from qvl_hydra.calibration.scenes import COLORS, NUMBERS, SHAPES

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# The template of Qwen2-VL without its default system prompt (a small model has no use for it) and without video.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The real models' 0.02 at their width of thousands; at a width of 128 it would let signals die out for 2,000 steps.
INITIALIZER_RANGE = 0.06
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": INITIALIZER_RANGE,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
}
VISION_2_5 = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "window_size": 56,  # pixels: 4 merged tokens, so images of 112 x 168 have six windows and full blocks see more
    "fullatt_block_indexes": [1, 3],
    "out_hidden_size": 128,
    "tokens_per_second": 2,
    "initializer_range": INITIALIZER_RANGE,
}
VISION_2 = {
    "depth": 4,
    "embed_dim": 64,
    "mlp_ratio": 2,
    "num_heads": 4,
    "hidden_size": 128,
    "initializer_range": INITIALIZER_RANGE,
}
VISION_3 = {
    "depth": 4,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_heads": 4,
    "patch_size": 16,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,  # a table of 8 x 8, read between its points for every size of image
    "deepstack_visual_indexes": [0, 1, 2],
    "initializer_range": INITIALIZER_RANGE,
}
TEXT_3 = {
    "head_dim": 32,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
}
CLASSES = {
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, VISION_2_5, {}),
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, VISION_2, {}),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, VISION_3, TEXT_3),
}
FAMILIES = tuple(CLASSES)
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
IMAGE_MEAN = {"qwen2_5_vl": CLIP_MEAN, "qwen2_vl": CLIP_MEAN, "qwen3_vl": [0.5, 0.5, 0.5]}
IMAGE_STD = {"qwen2_5_vl": CLIP_STD, "qwen2_vl": CLIP_STD, "qwen3_vl": [0.5, 0.5, 0.5]}
MERGE = 2  # patches a side that one image token sees


def corpus() -> list[str]:
    """Every kind of sentence of the task, so that each of its words becomes one token, with and without a space."""
    nouns = [f"{color} {shape}" for color, shape in itertools.product(COLORS, SHAPES)]
    words = [*COLORS, *SHAPES]
    return [
        *(f"{first}, {second}" for first, second in itertools.product(nouns, nouns)),
        *(f"what comes after the {noun}?" for noun in nouns),
        *(f"what color is the {shape}? what shape is {color}?" for color, shape in itertools.product(COLORS, SHAPES)),
        *(f"how many {word} objects? how many objects?" for word in words for _ in range(8)),
        *(f"{word}\n {word}" for word in [*words, *NUMBERS, "nothing"] for _ in range(8)),
        *["describe the image.", "what is the first object?", "what is the last object?"] * 64,
        *["user\n", "assistant\n", "system\n"] * 64,
    ]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in the manner of Qwen's own: any text can be encoded, the task's words are one token each."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=TEXT["max_position_embeddings"],
    )


def patch_size(family: str) -> int:
    """Pixels a side of a patch."""
    return CLASSES[family][2].get("patch_size", 14)


def build_config(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The small configuration of a family, its token ids taken from the tokenizer."""
    token_id = tokenizer.convert_tokens_to_ids
    config_class, _, vision, changed = CLASSES[family]
    text = (
        TEXT
        | changed
        | {
            "vocab_size": len(tokenizer),
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
        }
    )
    ids = {
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
    }
    return config_class(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)


def build_model(family: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A freshly initialised model, the same for the same seed."""
    torch.manual_seed(seed)
    return CLASSES[family][1](build_config(family, tokenizer))


def save_processor(family: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer, chat template and image processor files beside the weights, in the hub's layout."""
    tokenizer.save_pretrained(folder)
    token = patch_size(family) * MERGE  # the grids of scenes.py, a cell a token
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen3VLProcessor" if family == "qwen3_vl" else "Qwen2_5_VLProcessor",
        "patch_size": patch_size(family),
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "min_pixels": (2 * token) ** 2,
        "max_pixels": 4 * 6 * token**2,
        "image_mean": IMAGE_MEAN[family],
        "image_std": IMAGE_STD[family],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
