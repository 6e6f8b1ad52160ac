"""The table of model families, by the `model_type` of their configs.

One addition is a module with the stages of its models, a row here and a YAML (docs/extending.md).
"""

from __future__ import annotations

from typing import Any

from qvl_hydra.families.record import FUSED, Family

# Checkpoints published before transformers 4.52 name the towers without `model.` and `language_model.`.
_OLD_NAMES = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
)
# Of vLLM's `hf_to_vllm_mapper`, the same for every vision-language family here.
_VLLM = ("language_model.model.", "visual.", "language_model.lm_head")
_QWEN2_NAMES = {"checkpoint": ("model.", "visual.", "lm_head"), "vllm": _VLLM}
_TEXT = "qvl_hydra.families.text:stages"
_QWEN2_VL = "qvl_hydra.families.qwen2_vl:stages"
_QWEN3_VL = "qvl_hydra.families.qwen3_vl:stages"
# Bare parameters of a checkpoint that become modules.
_EXPERTS = ((r"(\.mlp\.experts\.(?:gate_up_proj|down_proj))$", r"\1.weight"),)
_GATED_DELTA = {  # of a layer with linear attention
    "in_proj_qkv": "in_proj_qkvz",
    "in_proj_z": "in_proj_qkvz",
    "in_proj_b": "in_proj_ba",
    "in_proj_a": "in_proj_ba",
}

FAMILIES = {
    row.name: row
    for row in (
        Family(
            "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", _QWEN2_VL, position_class="Qwen2_5_VLModel",
            renames=_OLD_NAMES, names=_QWEN2_NAMES, towers=True, proxy_shape="tiny_qwen2_5_vl",
        ),
        Family(
            "qwen2_vl", "Qwen2VLForConditionalGeneration", _QWEN2_VL, position_class="Qwen2VLModel",
            renames=_OLD_NAMES, names=_QWEN2_NAMES, towers=True, proxy_shape="tiny_qwen2_vl",
        ),
        Family(
            "qwen3_vl", "Qwen3VLForConditionalGeneration", _QWEN3_VL, position_class="Qwen3VLModel",
            names={"vllm": _VLLM}, proxy_shape="tiny_qwen3_vl",
        ),
        Family(
            "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", _QWEN3_VL, position_class="Qwen3VLMoeModel",
            renames=_EXPERTS, names={"vllm": _VLLM}, adapt="qvl_hydra.families.experts:routed",
            proxy_shape="tiny_qwen3_vl",
        ),
        Family(
            "qwen3_5", "Qwen3_5ForConditionalGeneration", _QWEN3_VL, position_class="Qwen3_5Model",
            names={"vllm": _VLLM}, fused={**FUSED, **_GATED_DELTA}, proxy_shape="tiny_qwen3_vl",
        ),
        Family("qwen2", "Qwen2ForCausalLM", _TEXT, language="model", visual=None),
        Family("qwen3", "Qwen3ForCausalLM", _TEXT, language="model", visual=None),
        Family("llama", "LlamaForCausalLM", _TEXT, language="model", visual=None),
    )
}  # fmt: skip


def family_of(config: Any) -> Family:
    """The row of a model's config."""
    return FAMILIES[config.model_type]
