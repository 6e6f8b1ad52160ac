"""What everybody else must know of a model family. Nothing here needs torch."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qvl_hydra.reference import load

# What runtimes such as vLLM and TensorRT-LLM run as one matrix product, and the name they give it.
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
HEAD = "lm_head"


@dataclass(frozen=True)
class Family:
    """One family of models, by the `model_type` of its config.

    Attributes:
        name: `model_type`.
        model_class: class of transformers that computes logits.
        stages: `module:function`; makes the stages of a model in the order in which data meets them.
        language: path of the language tower: `embed_tokens`, `layers` and `norm` lie below.
        visual: path of the vision tower: `patch_embed`, `blocks` and `merger` lie below; None for text alone.
        position_class: class of transformers whose `get_rope_index` gives positions on three axes; None: one axis.
        renames: pattern and replacement for keys of checkpoints whose names are not those of the modules.
        names: consumer to its prefixes for language tower, vision tower and head, where they are not the modules' own.
        fused: role to the name of the product that runtimes make of it and its neighbours.
        towers: they can be taken apart, for ONNX graphs and for backends that want modules of their own.
        adapt: `module:function`; makes operators of weights that transformers holds as bare parameters; None: all are
            modules.
        proxy_shape: bundled model whose tokenizer and image processor a shape without weights takes.
    """

    name: str
    model_class: str
    stages: str
    language: str = "model.language_model"
    visual: str | None = "model.visual"
    position_class: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    names: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=lambda: FUSED)
    towers: bool = False
    adapt: str | None = None
    proxy_shape: str | None = None

    @cached_property
    def block(self) -> re.Pattern[str]:
        """Matches an operator inside a block; group 1 is the block's index in its tower."""
        towers = [f"{self.language}.layers", *([f"{self.visual}.blocks"] if self.visual else [])]
        return re.compile(rf"^(?:{'|'.join(map(re.escape, towers))})\.(\d+)\.")

    @property
    def components(self) -> tuple[str, ...]:
        """Which of `component` it has."""
        return ("lm", "vision", "full") if self.visual else ("lm",)

    def component_of(self, path: str) -> str:
        """The tower that a module path lies in; the head belongs to the language tower."""
        return "vision" if self.visual and path.startswith(f"{self.visual}.") else "lm"

    def load_class(self, name: str | None = None) -> Any:
        """The class of transformers that computes logits, or another one by name; imported now."""
        return getattr(importlib.import_module("transformers"), name or self.model_class)

    def load_stages(self) -> Callable[[Any], Any]:
        """The function that makes a model's stages, imported now; see `families.stages`."""
        return load(self.stages)

    def adapted(self, model: Any) -> Any:
        """A model of transformers with everything that can be quantized as a module of its own."""
        return model if self.adapt is None else load(self.adapt)(model)

    def renamed(self, path: str, consumer: str) -> str:
        """A module path as a consumer names it."""
        if consumer not in self.names:
            return path
        language, vision, head = self.names[consumer]
        if path == HEAD:
            return head
        if self.visual and path.startswith(f"{self.visual}."):
            return vision + path.removeprefix(f"{self.visual}.")
        return language + path.removeprefix(f"{self.language}.")
