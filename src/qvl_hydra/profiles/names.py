"""How each consumer names an operator; a profile holds Hugging Face module paths (transformers 5).

Every mapping goes by prefix, tower first: a vision MLP and a language MLP share their last parts (`mlp.gate_proj`), so
that no name may ever be made from last parts alone.

Source: `Qwen2_5_VLForConditionalGeneration` in transformers (modules, and the names its `save_pretrained` writes, which
are those of the checkpoints on the hub), and `hf_to_vllm_mapper` and `packed_modules_mapping` of vLLM's model of the
same name.
"""

from __future__ import annotations

import re

from qvl_hydra.operators.discover import HEAD, LANGUAGE_PREFIX, VISION_PREFIX

# consumer -> what replaces the three prefixes `model.language_model.`, `model.visual.`, `lm_head`
CONVENTIONS = {
    "hugging_face": (LANGUAGE_PREFIX, VISION_PREFIX, HEAD),
    "checkpoint": ("model.", "visual.", HEAD),
    "vllm": ("language_model.model.", "visual.", "language_model.lm_head"),
}


def rename(path: str, convention: str) -> str:
    """An operator's name in a consumer's convention.

    Args:
        path: Hugging Face module path.
        convention: key of `CONVENTIONS`.
    """
    language, vision, head = CONVENTIONS[convention]
    if path.startswith(LANGUAGE_PREFIX):
        return language + path.removeprefix(LANGUAGE_PREFIX)
    if path.startswith(VISION_PREFIX):
        return vision + path.removeprefix(VISION_PREFIX)
    assert path == HEAD, f"{path} belongs to neither tower"
    return head


def neural_compressor_pattern(path: str) -> str:
    """A regular expression that Neural Compressor matches in full against its operator names.

    Its names depend on where tracing began (`language_model.layers...` or `model.language_model.layers...`) and end in
    `.module` where a sub-module was traced alone; the tower is always part of them.
    """
    return rf"(.*\.)?{re.escape(path.removeprefix('model.'))}(\.module)?"
