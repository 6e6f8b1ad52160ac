"""Small random models of every family, with the oddities that published ones have, as checkpoints on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from qvl_hydra.calibration.encode import Processor, encode, load_processor
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.calibration.scenes import scene_examples
from qvl_hydra.families.table import FAMILIES
from qvl_hydra.models.load import LoadedModel, describe_model, load_model, model_folder
from qvl_hydra.settings import ModelSettings

TEXT = {
    "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 448, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
INTERLEAVED = {
    "head_dim": 12,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2], "mrope_interleaved": True,
    },
}  # fmt: skip
TOWER = {
    "hidden_size": 24, "intermediate_size": 36, "depth": 3, "num_heads": 2, "out_hidden_size": 32,
    "num_position_embeddings": 25, "initializer_range": 0.2,
}  # fmt: skip
DELTA = {
    "head_dim": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}  # fmt: skip
MIXTURE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
# name -> family, keys of the whole config, of the text config, of the vision config
SHAPES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "windows_tied": (
        "qwen2_5_vl", {"tie_word_embeddings": True}, TEXT | MROPE,
        {"hidden_size": 24, "intermediate_size": 37, "depth": 3, "num_heads": 2, "out_hidden_size": 32,
         "window_size": 56, "fullatt_block_indexes": [1], "initializer_range": 0.2},
    ),
    "full_attention": (
        "qwen2_vl", {}, TEXT | MROPE, {"embed_dim": 24, "hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    ),
    "taps": ("qwen3_vl", {}, TEXT | INTERLEAVED, TOWER | {"deepstack_visual_indexes": [0, 1]}),
    "taps_last_tied": (
        "qwen3_vl", {"tie_word_embeddings": True}, TEXT | INTERLEAVED | {"attention_bias": True},
        TOWER | {"deepstack_visual_indexes": [0, 1, 2], "hidden_size": 40, "num_heads": 2},
    ),
    "no_taps": ("qwen3_vl", {}, TEXT | INTERLEAVED, TOWER | {"deepstack_visual_indexes": []}),
    "experts": (
        "qwen3_vl_moe", {}, TEXT | INTERLEAVED | MIXTURE | {"mlp_only_layers": [1]},
        TOWER | {"deepstack_visual_indexes": [0, 1]},
    ),
    "square_experts": (  # as many values in as out, whose layout no shape tells
        "qwen3_vl_moe", {"tie_word_embeddings": True},
        TEXT | INTERLEAVED | MIXTURE
        | {"decoder_sparse_step": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 1},
        TOWER | {"deepstack_visual_indexes": [1]},
    ),
    "gated_delta": ("qwen3_5", {}, TEXT | DELTA, TOWER),
    "text_bias": ("qwen2", TEXT | {"tie_word_embeddings": True}, {}, {}),
    "text_norms": ("qwen3", TEXT | {"head_dim": 12}, {}, {}),
    "text_plain": ("llama", TEXT | {"tie_word_embeddings": True}, {}, {}),
    "text_windows": (
        "qwen3",
        TEXT | {"head_dim": 12, "attention_bias": True, "use_sliding_window": True, "sliding_window": 5,
                "max_window_layers": 1,
                "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                    "original_max_position_embeddings": 16}},
        {}, {},
    ),
    "text_scaled": (
        "llama",
        TEXT | {"attention_bias": True, "mlp_bias": True,
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
        {}, {},
    ),
}  # fmt: skip


def made_up_checkpoint(name: str, folder: Path, shards: bool = False) -> Path:
    """A random model of a shape, saved as transformers saves it, with a tokenizer and an image processor beside."""
    family, whole, text, vision = SHAPES[name]
    row = FAMILIES[family]
    bundled = model_folder(ModelSettings("", "bundled:tiny_qwen2_5_vl"))
    beside = json.loads((bundled / "config.json").read_text())
    ids = {key: beside[key] for key in ("image_token_id", "video_token_id", "vision_start_token_id",
                                        "vision_end_token_id")}  # fmt: skip
    config_class = row.load_class().config_class
    towers = {"text_config": text, "vision_config": vision, **ids} if row.visual else {}
    torch.manual_seed(7)
    model = row.load_class()(config_class(**whole, **towers))
    for parameter in model.parameters():  # norms and biases too, so that nothing hides behind a one or a zero
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size="60KB" if shards else "5GB")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(bundled / file, folder / file)
    if row.visual:
        processor = json.loads((bundled / "preprocessor_config.json").read_text())
        processor["patch_size"] = getattr(model.config.vision_config, "patch_size", 14)
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def load_made_up(folder: Path, **changes: Any) -> LoadedModel:
    """The model of a checkpoint folder."""
    return load_model(describe_model(ModelSettings("made_up", str(folder), **changes)), torch.device("cpu"), seed=0)


def samples_of(folder: Path) -> tuple[Sample, ...]:
    """Images of two sizes, two images in one sample, and one without any; for text alone, texts of two lengths."""
    processor = load_processor(folder)
    examples = scene_examples("calibration", 8, 0)
    if processor.image_processor is None:
        return tuple(encode(processor, e.id, e.prompt, e.answer, []) for e in examples[:2])
    first, second = (_small(example.image, processor, wide) for example, wide in zip(examples, (2, 3), strict=False))
    one, other, *_ = examples
    return (
        encode(processor, "one", one.prompt, one.answer, [first]),
        encode(processor, "two", other.prompt, other.answer, [second, first]),
        encode(processor, "none", one.prompt, one.answer, []),
    )


def _small(image: Image.Image, processor: Processor, wide: int) -> Image.Image:
    side = processor.token_side or 0
    return image.resize((wide * side, 2 * side))
